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
