"""Projectors and predictors that methods share: trained with a backbone, thrown away after."""

from __future__ import annotations

import itertools

from torch import nn


def mlp(*widths: int, hidden_bias: bool = True) -> nn.Sequential:
    """Linear layers between `widths`, with batch-norm and ReLU after all but the last.

    The last layer has no bias. Nor need the others, since batch-norm takes it out again: they have
    one where the paper's have one.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths[:-1]):
        layers.append(nn.Linear(before, after, bias=hidden_bias))
        layers += [nn.BatchNorm1d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))


def two_layers(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Linear, ReLU, linear, with biases and without batch-norm."""
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim))


def contrastive(kind: str, width: int, dim: int) -> nn.Module:
    """Projectors without batch-norm: of MoCo `mlp` and `linear`, and of ssl-small (Shi et al. 2021,
    https://arxiv.org/abs/2107.14762), where those are `simple` and `none`.

    `deep` has two hidden layers, `dropout` leaves out half of the one, `wide` doubles it.
    """
    if kind in ("linear", "none"):
        return nn.Linear(width, dim)
    hidden = 2 * width if kind == "wide" else width
    last = nn.Linear(hidden, dim)
    layers: list[nn.Module] = [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
    if kind == "deep":
        layers += [nn.Linear(width, width), nn.ReLU(inplace=True)]
    if kind == "dropout":
        layers.append(nn.Dropout(0.5))
    return nn.Sequential(*layers, last)
