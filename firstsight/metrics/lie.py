"""How features lie on the sphere of directions: apart, together, in how many dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distractors = Literal["published", "full"]

_TILE = 2048
"""Rows and columns of a block of pairs: 16 MB in float32."""
_BLOCK = 2**25
"""Pairs of a block of whole rows: 128 MB in float32."""


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the unit vectors of two views, rows of `x` and `y` (N, D); 0 to 4.

    Low is good: two views of an image lie together (Wang and Isola 2020, section 4.1,
    https://arxiv.org/abs/2005.10242). Collapsed features reach 0 too: read it with `uniformity`.
    """
    return float(2 - 2 * (_units(x) * _units(y)).sum(dim=1).double().mean())


def class_alignment(x: Tensor, labels: Tensor) -> float:
    """Mean squared distance of unit vectors of one class, `x` (N, D) and `labels` (N,); 0 to 4.

    Low is good. The mean over all unordered pairs of a class, then over classes (Shi et al. 2022,
    https://arxiv.org/abs/2107.14762); a class of one image has no pair and does not count. Not a
    number where no class has two.
    """
    units = _units(x).double()
    _, kind = torch.unique(labels, return_inverse=True)
    count = kind.bincount().double()  # (K,)
    total = units.new_zeros(len(count), x.shape[1]).index_add_(0, kind, units)  # (K, D)
    # over ordered pairs, sum |a - b|^2 = 2 n sum |a|^2 - 2 |sum a|^2
    squares = units.new_zeros(len(count)).index_add_(0, kind, units.square().sum(dim=1))
    means = 2 * (count * squares - total.square().sum(dim=1)) / (count * (count - 1))
    return float(means[count > 1].mean())


def uniformity(x: Tensor, temperature: float = 2.0) -> float:
    """Log of the mean of exp(-temperature |a - b|^2) over all pairs of unit vectors of `x` (N, D).

    Low is good: images lie far apart. 0 where all lie on one point; evenly spread over many
    dimensions it nears -4 at temperature 2 (Wang and Isola 2020, section 4.1). Exact over all
    N (N - 1) / 2 pairs, a block at a time; sums are float64.
    """
    units = _units(x)
    if len(units) < 2:
        return math.nan
    tiles = torch.split(units, _TILE)
    level, total = units.new_tensor(-2 * temperature), 0.0
    for row, a in enumerate(tiles):
        for column, b in enumerate(tiles[row:], start=row):
            # -t |a - b|^2 = 2 t (a . b) - 2 t
            near = torch.addmm(level, a, b.T, alpha=2 * temperature).exp_()
            total += float((near.triu_(1) if row == column else near).sum(dtype=torch.float64))
    return math.log(total / (len(units) * (len(units) - 1) / 2))


def sampled_uniformity(
    x: Tensor, temperature: float = 2.0, *, subsets: int = 3, size: int = 128, seed: int = 0
) -> float:
    """`uniformity` as ssl-small published it: the mean over three random parts of 128 images.

    Between draws it scatters by hundredths; `uniformity` does not. The same seed takes the same
    rows of any `x` of so many. Theirs is unseeded. Fewer images than that make fewer parts.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).to(x.device)
    parts = [part for part in torch.split(order[: subsets * size], size) if len(part) > 1]
    return sum(uniformity(x[part], temperature) for part in parts) / len(parts)


def instance_ranks(
    queries: Tensor, positives: Tensor, distractors: Distractors = "published"
) -> Tensor:
    """(N,) how many others are nearer to a query than its own positive, by cosine; 0 is best.

    `queries` and `positives` are (N, D). Others are all other queries (`published`: ssl-small,
    eval.instdisc), or all other queries and all other positives (`full`). What is just as near does
    not count as nearer, so features that are all the same have rank 0.
    """
    queries, positives = _units(queries), _units(positives)
    own = (queries * positives).sum(dim=1, keepdim=True)  # (N, 1)
    others = [queries] if distractors == "published" else [queries, positives]
    # the same image computed as part of a block may differ in the last bit
    bar = own + 4 * torch.finfo(own.dtype).eps
    ranks = torch.zeros(len(queries), dtype=torch.long, device=queries.device)
    rows = max(1, _BLOCK // max(1, len(queries)))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        mine = torch.arange(start, min(start + rows, len(queries)), device=queries.device)
        for other in others:
            nearer = queries[part] @ other.T > bar[part]  # (n, N)
            nearer[mine - start, mine] = False
            ranks[part] += nearer.sum(dim=1)
    return ranks


def instance_accuracy(
    queries: Tensor,
    positives: Tensor,
    topk: Sequence[int] = (1, 5),
    distractors: Distractors = "published",
) -> dict[int, float]:
    """Percent of queries whose positive is among the `k` nearest, for each k of `topk`.

    High is good: an image is told from all others. Row i of `positives` (N, D) belongs to row i of
    `queries` (N, D); `instance_ranks` says what it competes with.

    differs from the paper: its code takes the mean over blocks of a class, in which a short last
    block weighs as much as a full one; here each image weighs the same.
    """
    ranks = instance_ranks(queries, positives, distractors)
    return {k: float((ranks < k).double().mean() * 100) for k in topk}


def spectrum(x: Tensor) -> Tensor:
    """(min(N, D),) singular values of `x` (N, D) as it is, from the largest, float64.

    Of many rows a part at a time, each reduced to its triangle: memory stays within some D x D.
    """
    step = 4 * x.shape[1]
    triangle = x.new_zeros((0, x.shape[1]), dtype=torch.float64)
    for part in torch.split(x, step):
        triangle = torch.linalg.qr(torch.cat([triangle, part.double()]), mode="r").R
    values: Tensor = torch.linalg.svdvals(triangle)
    return values


def effective_rank(x: Tensor) -> float:
    """RankMe: in how many dimensions the rows of `x` (N, D) lie; from 1 to min(N, D).

    High is good. The exponential of the entropy of the singular values, as shares of their sum, of
    `x` as it is: neither centred nor normalised (Garrido et al. 2023, equation 1,
    https://arxiv.org/abs/2210.02885). 0 where all of `x` is 0.

    differs from the paper: it adds 1e-7 to each share; here a share of 0 has entropy 0.
    """
    return _perplexity(spectrum(x))


def lidar(views: Tensor, delta: float = 1e-4) -> float:
    """In how many dimensions images differ more than their views do, of `views` (N, V, D).

    High is good. The effective rank of the spread between images, measured in units of the spread
    between views of one image (Thilak et al. 2024, section 3, https://arxiv.org/abs/2312.04000);
    `delta` is added to the latter's diagonal. Needs two views or more of each image.
    """
    centres = views.double().mean(dim=1)  # (N, D)
    between = centres - centres.mean(dim=0)
    within = torch.zeros_like(between[0].outer(between[0]))
    pairs = zip(torch.split(views, _TILE), torch.split(centres, _TILE), strict=True)
    for part, centre in pairs:
        away = (part.double() - centre[:, None]).flatten(0, 1)
        within += away.T @ away
    within = within / (views.shape[0] * views.shape[1])
    value, vector = torch.linalg.eigh(within)
    whitened = (between @ vector) / (value.clamp_min(0) + delta).sqrt()
    # the eigenvalues of its covariance are the squares of its singular values, but for a factor
    return _perplexity(spectrum(whitened).square())


def _perplexity(amounts: Tensor) -> float:
    if not amounts.sum() > 0:
        return 0.0
    shares = amounts / amounts.sum()
    return float(torch.special.entr(shares).sum().exp())


def _units(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)


def feature_std(x: Tensor) -> float:
    """Standard deviation of the unit vectors of `x` (N, D), mean over dimensions.

    About 1 / sqrt(D) evenly spread, 0 where all are alike: `spread` without its root of D.
    """
    return float(spread(x)) / math.sqrt(x.shape[1])


def spread(x: Tensor) -> Tensor:
    """How far the directions of the rows of `x` (N, D) differ: about 1 evenly spread, 0 all alike.

    The standard deviation of their unit vectors, mean over dimensions, times the root of D. Where a
    method without negatives collapses, it goes to 0 (Chen and He 2021, section 4.1,
    https://arxiv.org/abs/2011.10566).
    """
    deviation = F.normalize(x, dim=1).std(dim=0)  # (D,)
    return deviation.mean() * math.sqrt(x.shape[1])
