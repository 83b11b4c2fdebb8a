"""LARS: SGD with momentum in which each tensor moves by a set share of its own length.

You et al. 2017, https://arxiv.org/abs/1708.03888, equations 4 to 6. Large batches ask for large
learning rates, and those break layers whose gradients are long beside their weights. Here the
length of the gradient does not count: a tensor moves by `trust` times its own length (times the
rate).

Papers that say LARS mean different things. What differs is data: a `Variant` for each.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from firstsight.settings import Kind, Pretrain


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One meaning of LARS. Below, p is a tensor, g its gradient, d the weight decay."""

    trust: float = 0.001
    """Share of |p| that a rate of 1 moves."""
    joint_norm: bool = True
    """The ratio divides by |g + d p|; else by |g| + d |p|."""
    epsilon: float = 0.0
    """Added to what the ratio divides by."""
    excluded: tuple[Kind, ...] = ("norm", "bias", "vector")
    """Tensors that are neither adapted nor decayed: plain SGD."""
    excluded_names: str = ""
    """Exclude by a pattern of names in place of kinds; all others then decay, norms too."""
    rate_in_buffer: bool = False
    """The learning rate multiplies what enters the buffer; else what leaves it."""
    decays_without_gradient: bool = True
    """Weight decay also where g is zero."""
    clipped: bool = False
    """No tensor moves faster than by plain SGD: the ratio is cut at the learning rate."""
    excluded_rate: float = 1.0
    """Learning rate of excluded tensors, as a share of that of the others."""
    excluded_rate_squared: bool = False
    """Excluded gradients are multiplied by the learning rate twice."""

    def part(self, kind: str, name: str, otherwise: str) -> str:
        """Of a parameter of this kind and name: `excluded`, `decayed`, or as it is `otherwise`."""
        if not self.excluded_names:
            return "excluded" if kind in self.excluded else otherwise
        return "excluded" if re.search(self.excluded_names, name) else "decayed"


VARIANTS = {
    # apex LARC with clip=False: SwAV, and SimSiam's linear protocol
    "larc": Variant(joint_norm=False, epsilon=1e-8, excluded=(), decays_without_gradient=False),
    # Barlow Twins, VICReg, DINO and MoCo v3
    "barlow": Variant(),
    "byol": Variant(excluded=("norm", "bias")),
    # the classic momentum of its TensorFlow code
    "simclr": Variant(excluded=("norm", "bias"), rate_in_buffer=True),
    "pixpro": Variant(epsilon=1e-8),
    "scrl": Variant(joint_norm=False, epsilon=1e-8, excluded=("norm", "bias")),
    # solo-learn's small recipes
    "solo": Variant(
        trust=0.02, joint_norm=False, epsilon=1e-8, clipped=True, decays_without_gradient=False
    ),
    # as published: rate squared where excluded, and exclusion by what its backbone calls `bn` and
    # `bias`, which misses the norms of stem, shortcuts and heads (a ResNet under torchvision names)
    "scrl-published": Variant(
        joint_norm=False,
        epsilon=1e-8,
        excluded_names=r"layer\d\..*\.bn|bias",
        excluded_rate_squared=True,
    ),
}
"""All variants by the name that --lars takes."""


def of(config: Pretrain) -> Variant:
    """The variant of a run."""
    return replace(VARIANTS[config.lars], excluded_rate=config.excluded_lr)


class Lars(torch.optim.Optimizer):
    """LARS; a parameter group with `excluded` true takes plain steps of SGD with momentum."""

    def __init__(
        self,
        parameters: Any,
        variant: Variant,
        *,
        weight_decay: float,
        momentum: float = 0.9,
        nesterov: bool = False,
    ) -> None:
        """`nesterov`: what moves is the adapted gradient and the buffer after it, as in SGD."""
        if nesterov and variant.rate_in_buffer:
            raise ValueError("Nesterov's momentum needs the learning rate outside the buffer")
        own = {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum, "excluded": False}
        super().__init__(parameters, own)
        self.variant, self.nesterov = variant, nesterov

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move all parameters that have a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not moved:
                continue
            for p in moved:
                if not self.state[p]:
                    self.state[p]["velocity"] = torch.zeros_like(p)
            velocities = [self.state[p]["velocity"] for p in moved]
            entering, leaving = 1.0, group["lr"]
            leaving *= self.variant.excluded_rate if group["excluded"] else 1
            if self.variant.rate_in_buffer:
                entering, leaving = leaving, entering
            torch._foreach_mul_(velocities, group["momentum"])
            pulls = self._pulls(moved, group)
            torch._foreach_add_(velocities, pulls, alpha=entering)
            if self.nesterov:
                torch._foreach_add_(moved, pulls, alpha=-leaving)
                leaving *= group["momentum"]
            torch._foreach_add_(moved, velocities, alpha=-leaving)

    def _pulls(self, moved: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """What enters each buffer: the gradient, decayed and adapted if it is not excluded."""
        variant, decay = self.variant, group["weight_decay"]
        gradients: list[Tensor] = [p.grad for p in moved if p.grad is not None]
        if group["excluded"]:
            twice = variant.excluded_rate_squared
            return list(torch._foreach_mul(gradients, group["lr"])) if twice else gradients
        pulls = list(torch._foreach_add(gradients, moved, alpha=decay))
        lengths = torch.stack(torch._foreach_norm(moved))
        steepness = torch.stack(torch._foreach_norm(pulls if variant.joint_norm else gradients))
        below = steepness if variant.joint_norm else steepness + decay * lengths
        ratios = variant.trust * lengths / (below + variant.epsilon)
        if variant.clipped:
            ratios = (ratios / group["lr"]).clamp(max=1)
        ratios = ratios.where((lengths > 0) & (steepness > 0), torch.ones_like(ratios))
        if not variant.decays_without_gradient:
            ratios = ratios.where(steepness > 0, torch.zeros_like(ratios))
        torch._foreach_mul_(pulls, list(ratios.unbind()))
        return pulls
