"""Boxes found and boxes marked -> figures, beside those of every control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.localize import controls, scores
from firstsight.localize.reading import STEPS, Boxes, Found
from firstsight.localize.truth import Placed, Truth, placed
from firstsight.sources.base import Source

_OWN, _DIVIDED, _CENTRE, _NOISE, _FULL, _CONSTANT = range(6)
_CONTROLS = {
    "full_image": _FULL,
    "centre_box": _CENTRE,
    "constant_mask": _CONSTANT,
    "noise": _NOISE,
    "noise_divided": _DIVIDED,
}
_FIRST = len(_CONTROLS) + 1  # columns from here on: T of the map, T of the map of noise


@dataclass(frozen=True)
class Marks:
    """The marked boxes of the images that are scored."""

    rows: list[int]
    """Which rows of `Found` these are."""
    boxes: list[Boxes]
    """(n, 4) for each, in the square."""
    cases: list[tuple[int, int, Boxes]]
    """(place in `rows`, class, boxes of that class in that image)."""
    counts: dict[str, int]
    """What was left out, or cut."""


def marks(truth: Truth, source: Source, found: Found, compat: bool) -> Marks:
    """What is scored: images with at least one box; published code also counts those without."""
    counts = dict.fromkeys(("without_boxes", "outside_boxes"), 0) | truth.counts
    counts.setdefault("degenerate_boxes", 0)
    rows: list[int] = []
    boxes: list[Boxes] = []
    cases: list[tuple[int, int, Boxes]] = []
    numbers: dict[str, int] = {}
    own = truth.classes(source)
    for row, (i, width, height) in enumerate(found.shapes.tolist()):
        if i not in truth.marked:
            counts["without_boxes"] += 1
            continue
        here = placed(truth.marked[i], width, height, found.size, truth.kind, compat)
        counts["outside_boxes"] += here.outside
        counts["degenerate_boxes"] += here.degenerate
        counts["without_boxes"] += not len(here.boxes)
        if len(here.boxes) or compat:
            for name, group in _groups(here, own.get(i)).items():
                cases.append((len(rows), numbers.setdefault(name, len(numbers)), group))
            rows.append(row)
            boxes.append(here.boxes)
    if not rows:
        raise UserError(f"no image of {source.spec} has a box inside it; check --boxes")
    return Marks(rows, boxes, cases, counts)


def _groups(here: Placed, own: str | None) -> dict[str, Boxes]:
    """Boxes of an image by class: all of the image's own class, else each of its named one."""
    if own is not None:
        return {own: here.boxes}
    names = np.array(here.names)
    return {str(name): here.boxes[names == name] for name in dict.fromkeys(here.names) if name}


def judge(found: Sequence[Found], marked: Marks, divide: bool, seed: int) -> dict[str, Any]:
    """The scores of the maps and of all controls; means over the networks, with their spread."""
    rows = [_candidates(one, row) for one in found for row in marked.rows]
    count, classes = len(marked.rows), np.array([c for _, c, _ in marked.cases], np.int64)
    overlaps = np.array(
        [scores.best_overlaps(c, marked.boxes[at % count]) for at, c in enumerate(rows)]
    ).reshape(len(found), count, -1)
    of_classes = np.array(
        [
            [scores.best_overlaps(rows[n * count + at][:_FIRST], b) for at, _, b in marked.cases]
            for n in range(len(found))
        ]
    ).reshape(len(found), len(classes), _FIRST)

    def figures(column: int) -> dict[str, Any]:
        each = [
            scores.figures(overlaps[n, :, column], of_classes[n, :, column], classes)
            for n in range(len(found))
        ]
        mean: dict[str, Any] = scores.mean_of(each)
        return mean

    own, blind = overlaps[:, :, _OWN], {k: v for k, v in _CONTROLS.items() if k != "noise_divided"}
    right = (overlaps > 0.5).mean(axis=0, dtype=np.float64) * 100  # (N, columns)
    result = figures(_OWN)
    result["max_box_acc"] = _best_threshold(overlaps[:, :, _FIRST : _FIRST + len(STEPS)])
    result["intervals"] = {
        "corloc": {
            str(at): scores.interval(100 * (own > at).mean(axis=0), seed) for at in scores.LEVELS
        },
        "mean_iou": scores.interval(own.mean(axis=0), seed),
    }
    result["over_seeds"] = {
        "corloc": {
            str(at): scores.spread([scores.corloc(one, at) for one in own]) for at in scores.LEVELS
        },
        "mean_iou": scores.spread([float(one.mean()) for one in own]),
    }
    shown = _CONTROLS if divide else blind
    result["controls"] = {name: figures(column) for name, column in shown.items()}
    noise = overlaps[:, :, _FIRST + len(STEPS) :]
    result["controls"]["noise"]["max_box_acc"] = _best_threshold(noise)
    result["explained"] = {
        "corloc_0.5": scores.explained(
            right[:, _OWN], {name: right[:, at] for name, at in blind.items()}, seed
        ),
        "mean_iou": scores.explained(
            own.mean(axis=0),
            {name: overlaps[:, :, at].mean(axis=0) for name, at in blind.items()},
            seed,
        ),
    }
    return result


def _candidates(found: Found, row: int) -> Boxes:
    """(6 + 2 T, 4) every box that stands for one image, in the order of the columns."""
    size, boxes = found.size, found.boxes[row]
    six = np.array(
        [
            boxes[0],
            boxes[1],
            controls.centre_box(boxes[0], size),
            found.noise[0],
            controls.full_image(size),
            controls.constant_mask(size),
        ]
    )
    return np.concatenate([six, boxes[2:], found.noise[1:]])


def _best_threshold(overlaps: NDArray[np.float64]) -> dict[str, float]:
    """MaxBoxAcc at an overlap of .5, mean over networks, and the mean of the best thresholds."""
    each = [scores.max_box_accuracy(one) for one in overlaps]
    thresholds = [STEPS[best] for _, best in each]
    return {"0.5": float(np.mean([p for p, _ in each])), "threshold": float(np.mean(thresholds))}
