"""Neighbours of features, and what they vote for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstsight.errors import UserError

Metric = Literal["cosine", "euclidean"]
Weighting = Literal["softmax", "distance", "uniform"]
Representation = Literal["original", "norm", "shift-norm"]

_CHUNK_BYTES = 2**27
"""Bound on one block of the test x train matrix, unless that is less than `_ROWS`. A product of
some hundred rows takes an eighth less time than one of half as many, and twice as many gain no
more; what is searched must still be in the last cache."""
_ROWS = 128
"""Fewer rows than that would make the matrix product wait for memory."""
_GROUP = 4
"""Columns of which the largest stands for all in the search for the largest of a row."""


def nearest(
    train: Tensor,
    test: Tensor,
    k: int,
    metric: Metric = "cosine",
    own: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The k nearest rows of `train` (N, D) for each row of `test` (M, D), exact, nearest first.

    Yields blocks of (closeness, index), (m, k) each, so that memory stays bounded. Closeness is the
    cosine, or minus the Euclidean distance; of equally close rows the first comes first. `own` (M,)
    names a row of `train` that each row of `test` must not find: itself.
    """
    if metric == "cosine":
        train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    k = min(k, len(train) - (own is not None))
    rows = min(max(_ROWS, _CHUNK_BYTES // (4 * len(train))), max(1, len(test)))
    room = train.new_empty(rows, len(train)) if metric == "cosine" else None
    for start, block in zip(range(0, len(test), rows), torch.split(test, rows), strict=True):
        if room is not None:  # asking for fresh memory costs more than the search in it
            closeness = torch.mm(block, train.T, out=room[: len(block)])
        else:
            closeness = -torch.cdist(block, train, compute_mode="donot_use_mm_for_euclid_dist")
        if own is not None:
            closeness.scatter_(1, own[start : start + rows, None], -math.inf)
        yield _first(closeness, k)


def _first(closeness: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row (m, N), and where they are; of equal ones the first first."""
    values, index = _largest(closeness, min(k + 1, closeness.shape[1]))
    # which of equals is taken is left open: where the cut falls between equals, sort it all
    cut = values[:, k - 1 : -1].eq(values[:, k:]).any(dim=1)
    values, index = values[:, :k], index[:, :k]
    if cut.any():
        again, place = closeness[cut].sort(dim=1, descending=True, stable=True)
        values[cut], index[cut] = again[:, :k], place[:, :k]
    equal = values[:, 1:].eq(values[:, :-1]).any(dim=1)
    if equal.any():
        by_place, order = index[equal].sort(dim=1)
        again, order = values[equal].gather(1, order).sort(dim=1, descending=True, stable=True)
        values[equal], index[equal] = again, by_place.gather(1, order)
    return values, index


def _largest(rows: Tensor, k: int, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """`topk` of each row (m, N); a third of its time where rows are long.

    The k largest lie in the k groups of columns whose own largest are the largest; of equal ones
    they may be others than `topk` takes.
    """
    groups = rows.shape[1] // _GROUP
    if groups < 2 * k:
        return rows.topk(k, dim=1, sorted=ordered)
    grouped = rows[:, : groups * _GROUP].view(len(rows), _GROUP, groups)
    _, best = _largest(grouped.amax(dim=1), k, ordered=False)  # (m, k)
    members = torch.arange(_GROUP, device=rows.device)[:, None] * groups  # (G, 1)
    rest = torch.arange(groups * _GROUP, rows.shape[1], device=rows.device).expand(len(rows), -1)
    columns = torch.cat([(best[:, None] + members).flatten(1), rest], dim=1)  # (m, G k + rest)
    values, place = rows.gather(1, columns).topk(k, dim=1, sorted=ordered)
    return values, columns.gather(1, place)


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


def represented(
    train: Tensor,
    test: Tensor,
    representation: Representation,
    batch_size: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) and (M, D) as they are compared: as they are, of unit length, or shifted.

    `shift-norm` subtracts the mean of all training rows from both, then makes unit vectors. With a
    `batch_size` each random batch of so many rows loses its own mean, as ssl-small published it:
    that figure depends on the batch size and on `seed`.
    """
    if representation == "original":
        return train, test
    if representation == "shift-norm" and batch_size:
        train, test = (_less_own_means(x, batch_size, seed) for x in (train, test))
    elif representation == "shift-norm":
        mean = train.double().mean(dim=0).to(train.dtype)
        train, test = train - mean, test - mean
    return F.normalize(train, dim=1), F.normalize(test, dim=1)


def _less_own_means(x: Tensor, batch_size: int, seed: int) -> Tensor:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    shifted = torch.empty_like(x)
    for rows in torch.split(order, batch_size):
        shifted[rows] = x[rows] - x[rows].mean(dim=0)
    return shifted


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
    found = nearest(train, test, max(ks), metric)
    classes = int(max(labels.max(), test_labels.max())) + 1
    first = first_five(found, labels, classes, ks, weighting, temperature, metric)
    return {k: accuracies(first[k], test_labels) for k in ks}


def first_five(
    found: Iterable[tuple[Tensor, Tensor]],
    labels: Tensor,
    classes: int,
    ks: Sequence[int],
    weighting: Weighting = "softmax",
    temperature: float = 0.07,
    metric: Metric = "cosine",
) -> dict[int, Tensor]:
    """For each k the five classes (M, 5) with the most votes, from what `nearest` found."""
    first: dict[int, list[Tensor]] = {k: [] for k in ks}
    for closeness, index in found:
        for k in ks:
            near = labels[index[:, :k]]
            summed = votes(closeness[:, :k], near, classes, weighting, temperature, metric)
            first[k].append(ranked(summed)[:, :5])
    return {k: torch.cat(parts) for k, parts in first.items()}


def accuracies(first: Tensor, truth: Tensor) -> dict[str, float]:
    """Percent of rows whose class is the first (`top1`) or one (`top5`) of `first` (M, 5)."""
    correct = first == truth[:, None]
    return {
        "top1": 100 * float(correct[:, 0].double().mean()),
        "top5": 100 * float(correct.any(dim=1).double().mean()),
    }
