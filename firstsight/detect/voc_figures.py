"""Average precision as Pascal VOC counts it.

Each detection claims the object of its class that it overlaps most, the surest detection first; an
object claimed again makes the later detection wrong, and so does an overlap below the limit.
Difficult objects are neither to be found nor wrong to find.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.detect.annotations import AnnotatedImages, Detections
from firstsight.detect.figures import OVERLAPS
from firstsight.geometry import iou as overlap_of


@dataclass(frozen=True, kw_only=True)
class _Claims:
    """The detections of one class, surest first."""

    overlap: NDArray[np.float64]
    """(n,) with the object that each claims; 0 where there is none in its image."""
    claimed: NDArray[np.int64]
    """(n,) which object."""
    aside: NDArray[np.bool_]
    """(n,) whether that is a difficult one, or a crowd."""
    objects: int
    """Those to be found."""


def voc_average_precision(
    truth: AnnotatedImages,
    found: Sequence[Detections],
    *,
    iou: float = 0.5,
    points: int | None = 11,
) -> dict[str, Any]:
    """Percent, the mean over classes with objects; None where there are none; higher is better.

    `AP07` (points = 11): the mean of the best precisions at recalls of at least 0, .1, ... 1.
    `AP10` (points = None): the area below precision over recall, made to fall only. A detection
    is right from an overlap of `iou` on, as in the development kit (many a Python copy asks for
    more than `iou`). Recalls are compared exactly, and nothing is rounded before: detectron2
    rounds scores to 3 decimals and boxes to 0.1 pixels.
    """
    return _read(_claims(truth, found), truth.categories, iou, points)


def voc_figures(truth: AnnotatedImages, found: Sequence[Detections]) -> dict[str, Any]:
    """AP07 and AP10, each with AP50, AP75 and AP, the mean over overlaps of .50 to .95.

    Detectron2's figures on VOC are those of AP07.
    """
    claims = _claims(truth, found)
    result: dict[str, Any] = {}
    for points in (11, None):
        name = _name(points)
        each = [_read(claims, truth.categories, iou, points)[name] for iou in OVERLAPS]
        mean = None if None in each else float(np.mean(each))
        result[name] = {"AP": mean, "AP50": each[0], "AP75": each[5]}
    return result


def _name(points: int | None) -> str:
    return "AP10" if points is None else "AP07"


def _read(
    claims: Sequence[_Claims], categories: Sequence[str], iou: float, points: int | None
) -> dict[str, Any]:
    each = [_average_precision(one, iou, points) for one in claims]
    there = [value for value in each if value is not None]
    return {
        _name(points): float(np.mean(there)) if there else None,
        "per_class": dict(zip(categories, each, strict=True)),
    }


def _claims(truth: AnnotatedImages, found: Sequence[Detections]) -> list[_Claims]:
    classes = len(truth.categories)
    rows: list[list[tuple[float, float, int, bool]]] = [[] for _ in range(classes)]
    objects, first = np.zeros(classes, np.int64), 0
    for picture, one in zip(truth.pictures, found, strict=True):
        own = picture.objects
        aside = own.crowd | own.difficult
        objects += np.bincount(own.labels[~aside], minlength=classes)
        overlaps = overlap_of(
            one.boxes[:, None].astype(np.float64), own.boxes[None].astype(np.float64)
        )
        overlaps = np.where(one.labels[:, None] == own.labels[None], overlaps, 0.0)
        for n, label in enumerate(one.labels.tolist()):
            best = int(overlaps[n].argmax()) if len(own) else -1
            value = float(overlaps[n, best]) if len(own) else 0.0
            known = bool(aside[best]) if len(own) else False
            rows[label].append((float(one.scores[n]), value, first + best, known))
        first += len(own)
    return [_sorted(each, int(count)) for each, count in zip(rows, objects, strict=True)]


def _sorted(rows: list[tuple[float, float, int, bool]], objects: int) -> _Claims:
    order = np.argsort([-row[0] for row in rows], kind="stable")
    table = [rows[i] for i in order]
    return _Claims(
        overlap=np.array([row[1] for row in table], np.float64),
        claimed=np.array([row[2] for row in table], np.int64),
        aside=np.array([row[3] for row in table], bool),
        objects=objects,
    )


def _average_precision(claims: _Claims, iou: float, points: int | None) -> float | None:
    if not claims.objects:
        return None
    hits = claims.overlap >= iou
    counted = ~(hits & claims.aside)
    right = np.zeros(len(hits), bool)
    candidates = np.flatnonzero(hits & ~claims.aside)
    _, firsts = np.unique(claims.claimed[candidates], return_index=True)
    right[candidates[firsts]] = True
    good = np.cumsum(right[counted])
    precision = good / np.arange(1, len(good) + 1)
    # the best precision at this recall or a higher one
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if points is None:
        steps = np.diff(good, prepend=0) / claims.objects
        return 100 * float((steps * best).sum())
    reached = [good * (points - 1) >= i * claims.objects for i in range(points)]
    return 100 * float(np.mean([best[at].max(initial=0) for at in reached]))
