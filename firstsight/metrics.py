"""Figures from features: pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstsight.errors import UserError

Metric = Literal["cosine", "euclidean"]
Weighting = Literal["softmax", "distance", "uniform"]

_CHUNK_BYTES = 2**28
"""Bound on one block of the test x train matrix."""


def spread(x: Tensor) -> Tensor:
    """How far the directions of the rows of `x` (N, D) differ: about 1 evenly spread, 0 all alike.

    The standard deviation of their unit vectors, mean over dimensions, times the root of D. Where a
    method without negatives collapses, it goes to 0 (Chen and He 2021, section 4.1,
    https://arxiv.org/abs/2011.10566).
    """
    deviation = F.normalize(x, dim=1).std(dim=0)  # (D,)
    return deviation.mean() * math.sqrt(x.shape[1])


def nearest(
    train: Tensor, test: Tensor, k: int, metric: Metric = "cosine"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k nearest rows of `train` (N, D) for each row of `test` (M, D), exact, nearest first.

    Yields blocks of (closeness, index), (m, k) each, so that memory stays bounded. Closeness is the
    cosine, or minus the Euclidean distance.
    """
    if metric == "cosine":
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train))
    for block in torch.split(test, max(1, _CHUNK_BYTES // (4 * len(train)))):
        if metric == "cosine":
            closeness = block @ train.T
        else:
            closeness = -torch.cdist(block, train, compute_mode="donot_use_mm_for_euclid_dist")
        yield closeness.topk(k, dim=1)


def votes(
    closeness: Tensor,
    labels: Tensor,
    classes: int,
    weighting: Weighting = "softmax",
    temperature: float = 0.07,
    metric: Metric = "cosine",
) -> Tensor:
    """(m, classes) summed votes of each row's neighbours, given closeness and labels, (m, k) each.

    Weights: `softmax` exp(closeness / temperature) (Wu et al. 2018, https://arxiv.org/abs/1805.01978,
    section 3.4), `distance` one over the distance (neighbours at distance 0 then decide alone),
    `uniform` one each. The distance is 1 - cosine, or the Euclidean one.
    """
    if weighting == "softmax":  # less the nearest: the same ranking, no overflow
        weights = ((closeness - closeness[:, :1]).double() / temperature).exp()
    elif weighting == "distance":
        distance = (1 - closeness if metric == "cosine" else -closeness).double().clamp_min(0)
        exact = (distance == 0).any(dim=1, keepdim=True)
        weights = torch.where(exact, (distance == 0).double(), 1 / distance)
    else:
        weights = torch.ones_like(closeness, dtype=torch.float64)
    return weights.new_zeros(len(labels), classes).scatter_add_(1, labels, weights)


def ranked(summed: Tensor) -> Tensor:
    """(m, classes) classes from most to fewest votes; of equal ones the lowest first."""
    return summed.argsort(dim=1, descending=True, stable=True)


def places(scores: Tensor, labels: Tensor) -> Tensor:
    """(...) how many classes come before the true one, by `scores` (..., K) and `labels` (...).

    Of equal scores the lowest class comes first; a score that is not a number comes last.
    """
    true = scores.gather(-1, labels[..., None])  # (..., 1)
    later = torch.arange(scores.shape[-1], device=scores.device) >= labels[..., None]
    behind = (scores < true) | ((scores == true) & later)  # the true class is behind itself
    return (~behind).sum(dim=-1)


def knn_predict(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    k: int,
    weighting: Weighting = "softmax",
    temperature: float = 0.07,
    metric: Metric = "cosine",
) -> Tensor:
    """(M,) labels voted by the k nearest of `train` (N, D) for each row of `test` (M, D).

    Exact over all pairs; of equally voted labels the lowest wins.
    """
    classes = int(labels.max()) + 1
    blocks = [
        ranked(votes(closeness, labels[index], classes, weighting, temperature, metric))[:, 0]
        for closeness, index in nearest(train, test, k, metric)
    ]
    return torch.cat(blocks)


def knn_accuracy(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    ks: Sequence[int],
    weighting: Weighting = "softmax",
    temperature: float = 0.07,
    metric: Metric = "cosine",
) -> dict[int, dict[str, float]]:
    """Percent of test rows whose label is voted first (`top1`) or in the first five (`top5`).

    One pass serves all `ks`: the neighbours of a smaller k are the first ones of a larger.
    """
    if len(train) == 0 or len(test) == 0:
        raise UserError("k-NN needs at least one readable image in each of --train and --test")
    classes = int(max(labels.max(), test_labels.max())) + 1
    hits = {k: [0, 0] for k in ks}
    done = 0
    for closeness, index in nearest(train, test, max(ks), metric):
        truth = test_labels[done : done + len(index), None]
        done += len(index)
        for k in ks:
            near = labels[index[:, :k]]
            summed = votes(closeness[:, :k], near, classes, weighting, temperature, metric)
            correct = ranked(summed)[:, :5] == truth
            hits[k][0] += int(correct[:, 0].sum())
            hits[k][1] += int(correct.any(dim=1).sum())
    return {
        k: {"top1": 100 * first / len(test), "top5": 100 * five / len(test)}
        for k, (first, five) in hits.items()
    }
