"""How well boxes agree with what is marked: pure functions from overlaps to figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.geometry import iou

LEVELS = (0.3, 0.5, 0.7)
"""Overlaps above which a box counts as right."""
RESAMPLES = 1000
"""Draws of the bootstrap."""

Overlaps = NDArray[np.float64]


def best_overlaps(boxes: NDArray[np.float64], truths: NDArray[np.float64]) -> Overlaps:
    """(K,) for each of K boxes (K, 4) its best IoU with the marked ones (n, 4); 0 where n is 0."""
    if len(truths) == 0:
        return np.zeros(len(boxes))
    return np.asarray(iou(boxes[:, None], truths[None]).max(axis=1))


def corloc(overlaps: Overlaps, level: float) -> float:
    """Percent of overlaps strictly above `level`; higher is better (Deselaers et al. 2010)."""
    return 100 * float((overlaps > level).mean()) if overlaps.size else float("nan")


def corloc_over_classes(overlaps: Overlaps, classes: NDArray[np.int64], level: float) -> float:
    """The mean over classes of each class's CorLoc, percent: rare classes count as common ones."""
    found = [corloc(overlaps[classes == one], level) for one in np.unique(classes)]
    return float(np.mean(found)) if found else float("nan")


def max_box_accuracy(overlaps: Overlaps, level: float = 0.5) -> tuple[float, int]:
    """(percent, column) the best CorLoc of any threshold; overlaps are (N, thresholds).

    MaxBoxAcc of Choe et al. 2020 (https://arxiv.org/abs/2001.07437), with an overlap strictly above
    `level`. The threshold is chosen on the very images that it is read on, so it flatters.
    """
    each = [corloc(column, level) for column in overlaps.T]
    best = int(np.argmax(each))
    return each[best], best


def interval(values: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The middle 95 % of the mean of (N,) values over `RESAMPLES` bootstraps of the images."""
    generator = np.random.default_rng(keyed.seed(seed, len(values)))
    count = len(values)
    means = [values[generator.integers(0, count, count)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def figures(overlaps: Overlaps, of_classes: Overlaps, classes: NDArray[np.int64]) -> dict[str, Any]:
    """CorLoc over images and over classes at every level, and the mean IoU, of one network.

    `overlaps` are (N,) one for each image; `of_classes` (M,) one for each class in each image.
    """
    return {
        "corloc": {str(level): corloc(overlaps, level) for level in LEVELS},
        "corloc_over_classes": {
            str(level): corloc_over_classes(of_classes, classes, level) for level in LEVELS
        }
        if len(classes)
        else None,
        "mean_iou": float(overlaps.mean()),
    }


def mean_of(results: Sequence[Any]) -> Any:
    """The mean of equal trees of numbers, place by place; None where one of them is None."""
    first = results[0]
    if isinstance(first, dict):
        return {key: mean_of([one[key] for one in results]) for key in first}
    return None if any(one is None for one in results) else float(np.mean(results))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Lowest, highest and standard deviation (n - 1) of some figures."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"lowest": min(values), "highest": max(values), "deviation": deviation}


def explained(
    own: NDArray[np.float64], controls: dict[str, NDArray[np.float64]], seed: int
) -> dict[str, Any]:
    """How much of a score the best control reaches, image by image.

    `own` and each control are (N,) values of which the mean is the score. `share` is that of the
    best control over `own` (at most 1; None where own is 0), `interval` the middle 95 % of the
    difference over bootstraps of the images: a network that sees objects leaves 0 below it.
    """
    name = max(controls, key=lambda one: float(controls[one].mean()))
    score, control = float(own.mean()), float(controls[name].mean())
    return {
        "score": score,
        "best_control": name,
        "control": control,
        "share": min(control / score, 1.0) if score > 0 else None,
        "difference": score - control,
        "interval": interval(own - controls[name], seed),
    }
