"""The networks whose activations are read: untrained ones as Tobias ablates them, or any other."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firstsight import backbones, checkpoint
from firstsight.backbones import Backbone, Timm
from firstsight.errors import UserError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}
INITS = ("kaiming-normal", "kaiming-uniform", "xavier-normal", "xavier-uniform")


class Atan(nn.Module):
    """The arc tangent of each value."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x.atan()


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is done to a network before it is read (Tobias' ablations; see the flags' help)."""

    activation: str = "own"
    init: str = "own"
    last_stride: int = 0
    bn: str = "eval"
    padding: str = "zeros"


def networks(spec: str, seed: int, count: int) -> list[tuple[str, int]]:
    """(CHECKPOINT, seed) of `count` networks; only untrained ones come in several."""
    if count > 1 and not spec.startswith("random:"):
        raise UserError(f"{spec} is one network; --seeds {count} needs random:NAME")
    return [(spec, seed + number) for number in range(count)]


def load(spec: str, seed: int, size: int, changes: Changes) -> tuple[Backbone, dict[str, Any]]:
    """The network of a CHECKPOINT, changed, in evaluation mode, and what is known about it.

    `random:NAME` is drawn by `seed`. A last stride of 0 is 1 for an untrained torchvision ResNet,
    as Tobias has it, and what it is for any other network.
    """
    if not spec.startswith("random:"):
        if changes.init != "own":
            raise UserError(f"--init {changes.init} would undo {spec}; use it with random:NAME")
        backbone, about = checkpoint.load_backbone(spec)
    else:
        name = spec.partition(":")[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            backbone = backbones.build(name, size=size)
            redraw(backbone, changes.init, changes.activation)
        about = {"backbone": name, "untrained": True, "size": size}
    set_last_stride(backbone, last_stride(spec, changes.last_stride))
    set_activation(backbone, changes.activation)
    set_padding(backbone, changes.padding)
    if changes.bn == "batch":
        use_own_statistics(backbone)
    return backbone.eval(), about


def last_stride(spec: str, asked: int) -> int:
    """The step of a ResNet's last stage: what is asked for; of 0, 1 for untrained torchvision ones
    as Tobias has them, and else 0, the network's own."""
    return asked or int(spec.startswith("random:resnet"))


def redraw(backbone: Backbone, init: str, activation: str = "own") -> None:
    """New weights for every convolution and linear layer; biases 0, norm layers as they begin.

    `init` is "own" (nothing is done), one of `INITS`, "normal:S" (deviation S) or "uniform:A"
    (from -A to A). Kaiming's are of fan-out; the gain is that of ReLU, and 5/3 with tanh and with
    atan, as Tobias has it.
    """
    if init == "own":
        return
    kind, _, text = init.partition(":")
    gain: Literal["tanh", "relu"] = "tanh" if activation in ("atan", "tanh") else "relu"
    for layer in backbone.modules():
        if not isinstance(layer, nn.Conv2d | nn.Linear):
            continue
        if init == "kaiming-normal":
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity=gain)
        elif init == "kaiming-uniform":
            nn.init.kaiming_uniform_(layer.weight, mode="fan_out", nonlinearity=gain)
        elif init == "xavier-normal":
            nn.init.xavier_normal_(layer.weight)
        elif init == "xavier-uniform":
            nn.init.xavier_uniform_(layer.weight)
        elif kind == "normal":
            nn.init.normal_(layer.weight, 0, _width(init, text))
        elif kind == "uniform":
            nn.init.uniform_(layer.weight, -_width(init, text), _width(init, text))
        else:
            raise _no_init(init)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _width(init: str, text: str) -> float:
    try:
        if (width := float(text)) > 0 and math.isfinite(width):
            return width
    except ValueError:
        pass
    raise _no_init(init)


def _no_init(init: str) -> UserError:
    return UserError(
        f"--init is own, {', '.join(INITS)}, normal:S or uniform:A with S and A above 0, "
        f"not {init!r}"
    )


def set_last_stride(backbone: Backbone, stride: int) -> None:
    """Let the last stage of a ResNet step by 1 or 2 cells (0: as it does); no dilation."""
    if stride == 0:
        return
    inner = backbone.network if isinstance(backbone, Timm) else backbone
    stage = getattr(inner, "layer4", None)
    if not isinstance(stage, nn.Sequential):
        raise UserError(f"--last-stride is for ResNets, which {backbone.name} is not; leave it out")
    block = stage[0]
    stepping = [m for m in block.modules() if getattr(m, "stride", 1) in (2, (2, 2))]
    if stride == 1:
        for layer in stepping:
            layer.stride = (1, 1)  # type: ignore[assignment]
    elif not stepping:
        raise UserError(f"the last stage of {backbone.name} steps by 1; use --last-stride 1")


def set_activation(backbone: Backbone, name: str) -> None:
    """Put another activation in the place of each ReLU, GELU or SiLU; gates keep theirs."""
    if name == "own":
        return
    replaced = 0
    for parent in list(backbone.modules()):
        for child, module in list(parent.named_children()):
            if isinstance(module, nn.ReLU | nn.ReLU6 | nn.GELU | nn.SiLU | nn.Hardswish):
                setattr(parent, child, Atan() if name == "atan" else ACTIVATIONS[name]())
                replaced += 1
    if not replaced:
        raise UserError(f"{backbone.name} has no activation to replace; leave out --activation")


def set_padding(backbone: Backbone, mode: str) -> None:
    """What convolutions see beyond the edge: zeros, the image mirrored, or its edge repeated."""
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode = mode  # type: ignore[assignment]


def use_own_statistics(backbone: Backbone) -> None:
    """Let batch-norm take mean and variance of each image alone.

    It is what batch-norm in training mode computes of a batch of one image, as Tobias' heat maps
    have it; so a map does not depend on what else is in its batch. Nothing of it is learnt.
    """
    for parent in list(backbone.modules()):
        for child, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                alone = nn.InstanceNorm2d(norm.num_features, norm.eps, affine=norm.affine)
                alone.weight, alone.bias = norm.weight, norm.bias
                rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m]
                setattr(parent, child, nn.Sequential(alone, *rest) if rest else alone)


def weights_hash(backbone: Backbone) -> str:
    """SHA-256 of all weights and buffers with their names: which network it was."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode() + b"\0" + str(tensor.dtype).encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
