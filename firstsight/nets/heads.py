"""Linear heads on features that stay as they are: several side by side, each trained as if alone.

Good learning rates for a linear classifier differ by factors of a thousand between backbones, so
readings try several. Side by side they cost little more than one: features are read once, and one
matrix product serves all.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight.errors import UserError
from firstsight.metrics import places
from firstsight.optim.lars import VARIANTS, Lars

_LOGITS = 2**25
"""Bound on the logits held at a time while accuracy is counted: 128 MB."""


class Heads(nn.Module):
    """S linear classifiers of K classes on the same features (B, C); they start equal."""

    def __init__(
        self,
        count: int,
        width: int,
        classes: int,
        *,
        seed: int,
        std: float = 0.01,
        prepare: nn.Module | None = None,
    ) -> None:
        """Weights N(0, std) drawn by `seed`, biases 0; with `std` 0 both as torch draws a layer.

        `prepare` is what features go through first; it is not trained.
        """
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            first = nn.Linear(width, classes)
            if std:
                nn.init.normal_(first.weight, std=std)
                nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList(copy.deepcopy(first) for _ in range(count))
        self.prepare = prepare if prepare is not None else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(B, S, K) logits of features (B, C)."""
        weight = torch.cat([head.get_parameter("weight") for head in self.heads])  # (S * K, C)
        bias = torch.cat([head.get_parameter("bias") for head in self.heads])  # (S * K,)
        logits = F.linear(self.prepare(features), weight, bias)
        return logits.view(len(logits), len(self.heads), -1)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Scalar sum over heads of the mean cross-entropy, so that none changes another's gradient.

        Features are cut off from what made them: no gradient leaves the heads.
        """
        logits = self(features.detach())  # (B, S, K)
        every = labels[:, None].expand(logits.shape[:2])
        return F.cross_entropy(logits.flatten(0, 1), every.flatten()) * len(self.heads)

    @torch.no_grad()
    def judged(self, features: Tensor, labels: Tensor) -> list[dict[str, float]]:
        """For each head: `top1` and `top5`, percent of the rows, and `loss`, mean cross-entropy.

        `mean_per_class` is the top-1 of each class, mean over the classes that have rows. Of equal
        logits the lowest class counts as the first.
        """
        if len(features) == 0:
            raise UserError("a linear reading needs at least one readable test image")
        device = next(self.parameters()).device
        classes = self.heads[0].get_parameter("bias").numel()
        sums = torch.zeros(3, len(self.heads), dtype=torch.float64, device=device)
        right = torch.zeros(classes, len(self.heads), dtype=torch.float64, device=device)
        rows = max(1, _LOGITS // (classes * len(self.heads)))
        for part, truth in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
            logits = self(part.to(device))  # (b, S, K)
            every = truth.to(device)[:, None].expand(logits.shape[:2])
            place = places(logits, every)
            loss = F.cross_entropy(logits.flatten(0, 1), every.flatten(), reduction="none")
            sums += torch.stack([(place < 1), (place < 5), loss.view_as(place)]).double().sum(1)
            right.index_add_(0, every[:, 0], (place < 1).double())
        first, five, loss = (sums / len(features)).tolist()
        count = labels.to(device).bincount(minlength=classes)
        by_class = (right[count > 0] / count[count > 0, None]).mean(dim=0).tolist()
        return [
            {"top1": 100 * a, "top5": 100 * b, "mean_per_class": 100 * m, "loss": c}
            for a, b, m, c in zip(first, five, by_class, loss, strict=True)
        ]

    @torch.no_grad()
    def predicted(self, features: Tensor) -> Tensor:
        """(N, S) the class that each head gives each row; of equal logits the lowest."""
        device = next(self.parameters()).device
        classes = self.heads[0].get_parameter("bias").numel()
        parts = torch.split(features, max(1, _LOGITS // (classes * len(self.heads))))
        return torch.cat([self(part.to(device)).argmax(dim=-1).cpu() for part in parts])


class Descent:
    """SGD (or LARS) on heads, each with a learning rate and a weight decay of its own."""

    def __init__(
        self,
        heads: Heads,
        settings: Sequence[tuple[float, float]],
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        lars: str = "",
    ) -> None:
        """`settings` are the (peak learning rate, weight decay) of each head; `lars` is a variant
        of it around SGD, where there is to be one."""
        self.heads, self.peaks = heads, [lr for lr, _ in settings]
        groups = [
            {"params": list(head.parameters()), "weight_decay": decay}
            for head, (_, decay) in zip(heads.heads, settings, strict=True)
        ]
        self.optimizer: torch.optim.Optimizer
        if lars:
            self.optimizer = Lars(
                groups, VARIANTS[lars], weight_decay=0.0, momentum=momentum, nesterov=nesterov
            )
        else:
            self.optimizer = torch.optim.SGD(
                groups, lr=0.0, momentum=momentum, nesterov=nesterov, fused=True
            )

    def step(self, features: Tensor, labels: Tensor, factor: float) -> None:
        """One step on features (B, C) and labels (B,), at `factor` of the peak learning rates."""
        device = next(self.heads.parameters()).device
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        torch.autograd.backward(self.heads.loss(features.to(device), labels.to(device)))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All that later steps depend on."""
        return {"heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def prepared(
    features: Tensor, representation: Literal["original", "norm", "standard"]
) -> nn.Module:
    """What features go through before the classifier; `standard` takes its statistics from these.

    It can be taken over the held-out rows too: no label is in it.
    """
    if representation == "norm":
        return _Unit()
    return _Standard(features) if representation == "standard" else nn.Identity()


class _Unit(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1)


class _Standard(nn.Module):
    mean: Tensor
    scale: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        std, mean = torch.std_mean(features, dim=0, correction=0)
        # a feature that is constant but for rounding says nothing, and must not be blown up
        varies = std > 1e-6 * mean.abs()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", torch.where(varies, 1 / std, 0.0))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.scale
