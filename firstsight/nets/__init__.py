"""The plumbing that methods share: full precision, momentum encoder, queue."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight.parallel import local


def cast_to(precision: str, device: torch.device) -> AbstractContextManager[None]:
    """A context with the arithmetic that `fp32`, `bf16` or `fp16` name, on that device."""
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, low, enabled=low is not None)


def uncast(tensor: Tensor) -> AbstractContextManager[None]:
    """A context without autocast on the device of `tensor`: losses are computed in full."""
    return torch.autocast(tensor.device.type, enabled=False)


def full(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 where it is so already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class MomentumEncoder(nn.Module):
    """A copy of some modules, applied in turn, that follows them as a moving average.

    Parameters follow; batch-norm statistics do not: the copy keeps its own, from its own passes.
    It never receives a gradient and never records one.
    """

    def __init__(self, *followed: nn.Module) -> None:
        super().__init__()
        self.copy = nn.Sequential(*copy.deepcopy(followed))
        self.copy.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """What the copied modules, one after the other, make of the images."""
        return cast(Tensor, self.copy(images))

    @torch.no_grad()
    def redraw(self) -> None:
        """Other weights of the same kind: the values of each parameter, in random order."""
        for parameter in self.copy.parameters():
            order = torch.randperm(parameter.numel(), device=parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))

    @torch.no_grad()
    def follow(self, *followed: nn.Module, momentum: float) -> None:
        """Move each parameter: momentum * own + (1 - momentum) * followed."""
        own = [local(p) for p in self.copy.parameters()]
        other = [local(p.detach()) for module in followed for p in module.parameters()]
        torch._foreach_lerp_(own, other, 1 - momentum)


class Queue(nn.Module):
    """The last K keys, unit vectors (K, D), first in first out; at the start random directions.

    Reading and pushing are two calls, so that no key can become its own negative by accident. The
    queue wraps around: its length need not be a multiple of the batch.
    """

    keys: Tensor
    position: Tensor

    def __init__(self, length: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(length, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))
        self._waiting: list[Tensor] | None = None

    def read(self) -> Tensor:
        """(K, D), a snapshot: a later push does not disturb the backward pass."""
        return self.keys.clone()

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Replace the oldest keys by these (B, D); of more than K, the last K stay."""
        if self._waiting is not None:
            self._waiting.append(keys)
            return
        length = len(self.keys)
        offset = torch.arange(max(len(keys) - length, 0), len(keys), device=keys.device)
        self.keys[(self.position + offset) % length] = keys[offset].to(self.keys.dtype)
        self.position.copy_((self.position + len(keys)) % length)

    @staticmethod
    @contextmanager
    def still(module: nn.Module) -> Iterator[None]:
        """Inside, every queue in `module` reads as it does now; what is pushed goes in at the end.

        The chunks of one batch so meet the same negatives, and none of each other's keys.
        """
        queues = [m for m in module.modules() if isinstance(m, Queue)]
        for queue in queues:
            queue._waiting = []
        yield
        for queue in queues:
            waiting, queue._waiting = queue._waiting or [], None
            for keys in waiting:
                queue.push(keys)
