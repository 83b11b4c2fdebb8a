"""Optimisers: which parameters decay, how long a gradient may be."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstsight import parallel
from firstsight.optim import lars
from firstsight.settings import Pretrain


def groups(
    module: nn.Module, undecayed: Sequence[str], variant: lars.Variant | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters of `module` in groups: decayed, undecayed, LARS's excluded; steady ones.

    What goes undecayed is decided by the type of the module that owns the parameter: `norm` layers,
    `bias` vectors of all others, and every other `vector` (of one dimension or none).
    """
    more: dict[str, dict[str, Any]] = {"decayed": {}, "free": {"weight_decay": 0.0}}
    more["excluded"] = {"weight_decay": 0.0, "excluded": True}
    parts = {(part, still): list[nn.Parameter]() for still in (False, True) for part in more}
    for path, owner in module.named_modules():
        norm = isinstance(owner, _BatchNorm | nn.LayerNorm | nn.GroupNorm)
        still = path.partition(".")[0] in getattr(module, "steady", ())
        for name, parameter in owner.named_parameters(path, recurse=False):
            if parameter.requires_grad:
                kind = "norm" if norm else "bias" if name.endswith("bias") else "weight"
                if kind == "weight" and parameter.ndim < 2:
                    kind = "vector"
                part = "free" if kind in undecayed else "decayed"
                part = variant.part(kind, name, part) if variant else part
                parts[part, still].append(parameter)
    return [{"params": p, "steady": s, **more[part]} for (part, s), p in parts.items() if p]


def build(
    kind: Literal["sgd", "lars", "adamw"],
    parameters: list[dict[str, Any]],
    weight_decay: float,
    variant: lars.Variant | None = None,
) -> torch.optim.Optimizer:
    """The optimiser; its learning rate is set anew at every step.

    Fused: each parameter is read and written once (AdamW, 11 million: 9 ms in place of 46).
    """
    if kind == "lars":
        return lars.Lars(parameters, variant or lars.Variant(), weight_decay=weight_decay)
    own: dict[str, Any] = {"lr": 0.0, "weight_decay": weight_decay, "fused": True}
    if kind == "sgd":
        sgd = torch.optim.SGD(parameters, momentum=0.9, **own)
        # torch 2.15 leaves these without values when float16 skips the first fused step
        for parameter in (p for group in sgd.param_groups for p in group["params"]):
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return torch.optim.AdamW(parameters, **own)


def of(method: nn.Module, config: Pretrain) -> torch.optim.Optimizer:
    """The optimiser of a run."""
    variant = lars.of(config) if config.optimizer == "lars" else None
    parameters = groups(method, config.undecayed, variant)
    return build(config.optimizer, parameters, config.weight_decay, variant)


def clip(parameters: Iterable[nn.Parameter], norm: float, each: float) -> None:
    """Shorten gradients: each longer than `each` to that, then all together to `norm`; 0: not."""
    moved = [p for p in parameters if p.grad is not None]
    gradients: list[Tensor] = [p.grad for p in moved if p.grad is not None]
    if each > 0:
        lengths = parallel.lengths(moved, gradients)
        shares = [(each / (length + 1e-6)).clamp(max=1) for length in lengths]
        torch._foreach_mul_(gradients, shares)
    if norm > 0:
        total = torch.stack(parallel.lengths(moved, gradients)).norm()
        torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1))


def cosine(progress: float, start: float, end: float) -> float:
    """Half a cosine: `start` at progress 0, `end` at progress 1, flat at both.

    For learning rates, weight decay, and the momentum of moving averages (Grill et al. 2020,
    section 3.3: 1 - (1 - base) * (cos(pi k / K) + 1) / 2 is `cosine(k / K, base, 1)`).
    """
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


def set_rate(optimizer: torch.optim.Optimizer, lr: float, peak: float | None = None) -> None:
    """Give all groups the learning rate `lr`, the steady ones `peak` where there is one."""
    for group in optimizer.param_groups:
        group["lr"] = peak if group.get("steady") and peak is not None else lr
