"""How good detections are: COCO's figures for boxes and masks, Pascal VOC's for boxes.

COCO (https://cocodataset.org/#detection-eval): average precision at 101 recalls, mean over
overlaps .50 to .95 and over the classes with objects, of the 100 surest detections an image. It is
computed by faster-coco-eval, or by COCO's own pycocotools. VOC
(http://host.robots.ox.ac.uk/pascal/VOC): at one overlap, at 11 recalls (2007) or over all (2010).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.detect.annotations import AnnotatedImages, Detections
from firstsight.detect.masks import compressed, counts_of
from firstsight.errors import UserError

Found = Sequence[Detections]

OVERLAPS = tuple((50 + 5 * i) / 100 for i in range(10))
"""IoU .50 to .95 that COCO's figures are means over."""
_AREAS = ("", "s", "m", "l")  # all; below 32 x 32 pixels; below 96 x 96; above
_MOST = (1, 10, 100)  # detections an image
_AT_50, _AT_75, _ALL, _HUNDRED = 0, 5, 0, 2


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What an evaluator counts; -1 where a class has no object (of that area)."""

    precision: NDArray[np.float64]
    """(10 overlaps, 101 recalls, K classes, 4 areas, 3 numbers of detections), 0 to 1."""
    recall: NDArray[np.float64]
    """(10, K, 4, 3)."""


def figures(truth: AnnotatedImages, found: Found, *, official: bool = False) -> dict[str, Any]:
    """COCO's figures in percent; higher is better, None where nothing is there to be found.

    `found` is what was found in each image of `truth`, in its order. `bbox` (and `segm`, where both
    sides have masks) holds AP, AP50, AP75, by area APs, APm, APl, and the recalls AR1, AR10, AR100,
    ARs, ARm, ARl; `per_class` a row for each category; `curves` the precision at recalls 0, 1, ...
    100 percent. VOC's difficult objects are left aside as crowds are. `official` has pycocotools
    count instead of faster-coco-eval: the same figures, ten times slower.

    Raises `UserError` where the package is not installed.
    """
    _agree(truth, found)
    masked = truth.has_masks and any(one.masks is not None for one in found)
    tables = {kind: tabled(truth, found, kind, official) for kind in _kinds(masked)}
    result: dict[str, Any] = {kind: _summary(one) for kind, one in tables.items()}
    result["per_class"] = _per_class(truth, tables)
    result["curves"] = {kind: _curves(truth, one) for kind, one in tables.items()}
    return result


def _kinds(masked: bool) -> tuple[str, ...]:
    return ("bbox", "segm") if masked else ("bbox",)


def tabled(truth: AnnotatedImages, found: Found, kind: str, official: bool = False) -> Tables:
    """Precision and recall of boxes (`bbox`) or masks (`segm`), counted by the evaluator."""
    coco, evaluator, masks = _evaluator(official)
    said = io.StringIO()
    # pycocotools prints its progress
    with contextlib.redirect_stdout(said), _no_search_for_cycles():
        sides = []
        for rows in (_truths(truth, kind), _detections(found, kind, masks)):
            side = coco()
            side.dataset = {
                "images": [
                    {"id": i, "width": p.width, "height": p.height}
                    for i, p in enumerate(truth.pictures)
                ],
                "categories": [{"id": k, "name": n} for k, n in enumerate(truth.categories)],
                "annotations": rows,
            }
            side.createIndex()
            sides.append(side)
        judge = evaluator(*sides, iouType=kind)
        judge.evaluate()
        judge.accumulate()
    shape = (10, 101, len(truth.categories), 4, 3)
    return Tables(
        precision=np.asarray(judge.eval["precision"], np.float64).reshape(shape),
        recall=np.asarray(judge.eval["recall"], np.float64).reshape(shape[:1] + shape[2:]),
    )


@contextlib.contextmanager
def _no_search_for_cycles() -> Iterator[None]:
    """Rows by the hundred thousand set it off again and again: a fifth of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _evaluator(official: bool) -> tuple[Any, Any, Any]:
    """The classes that hold annotations and count them, and the module for masks."""
    try:
        if official:
            counting = importlib.import_module("pycocotools.cocoeval").COCOeval
            masks = importlib.import_module("pycocotools.mask")
            return importlib.import_module("pycocotools.coco").COCO, counting, masks
        package = importlib.import_module("faster_coco_eval")
        masks = importlib.import_module("faster_coco_eval.core.mask")
        return package.COCO, package.COCOeval_faster, masks
    except ImportError:
        name = "pycocotools" if official else "faster-coco-eval"
        raise UserError(
            f"COCO's figures need the package {name}; pip install 'firstsight[detect]'"
        ) from None


def _agree(truth: AnnotatedImages, found: Found) -> None:
    if len(found) != len(truth):
        raise ValueError(f"{len(found)} detections for {len(truth)} images")
    for picture, one in zip(truth.pictures, found, strict=True):
        count = len(one.scores)
        fits = one.boxes.shape == (count, 4) and one.labels.shape == (count,)
        if not fits or (one.masks is not None and len(one.masks) != count):
            raise ValueError(f"{picture.name}: boxes, scores, labels or masks differ in number")
        if count and not 0 <= one.labels.min() <= one.labels.max() < len(truth.categories):
            raise ValueError(f"{picture.name}: labels beyond {len(truth.categories)} categories")
        if not (np.isfinite(one.boxes).all() and np.isfinite(one.scores).all()):
            raise ValueError(f"{picture.name}: boxes or scores that are not finite")


def _corners_to_sides(boxes: NDArray[np.float32]) -> list[list[float]]:
    """x, y, width, height, in the double precision that evaluators count in."""
    wide = boxes.astype(np.float64)
    sides: list[list[float]] = np.concatenate([wide[:, :2], wide[:, 2:] - wide[:, :2]], 1).tolist()
    return sides


def _truths(truth: AnnotatedImages, kind: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, picture in enumerate(truth.pictures):
        objects = picture.objects
        aside = (objects.crowd | objects.difficult).tolist()
        sides, labels = _corners_to_sides(objects.boxes), objects.labels.tolist()
        for n, area in enumerate(objects.area.tolist()):
            row = {"id": len(rows) + 1, "image_id": i, "category_id": labels[n]}  # 0 means no match
            row |= {"bbox": sides[n], "area": area, "iscrowd": int(aside[n])}
            if kind == "segm":
                row["segmentation"] = _as_coco(objects.masks[n], picture.height, picture.width)
            rows.append(row)
    return rows


def _as_coco(mask: Any, height: int, width: int) -> Any:
    if isinstance(mask, Mapping):
        counts = mask["counts"]
        if not isinstance(counts, str | bytes):
            counts = compressed(counts_of(mask, height, width))
        return {"size": [height, width], "counts": counts}
    return [outline.ravel().tolist() for outline in mask]


def _detections(found: Found, kind: str, masks: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i, one in enumerate(found):
        sides, scores, labels = _corners_to_sides(one.boxes), one.scores.tolist(), one.labels
        if kind == "segm" and len(scores):
            if one.masks is None:
                raise ValueError(f"detections of image {i} have no masks, others have")
            areas = masks.area([dict(mask) for mask in one.masks]).tolist()
        else:
            areas = [side[2] * side[3] for side in sides]
        for n, label in enumerate(labels.tolist()):
            row = {"id": len(rows) + 1, "image_id": i, "category_id": label, "iscrowd": 0}
            row |= {"bbox": sides[n], "area": areas[n], "score": scores[n]}
            if kind == "segm":
                assert one.masks is not None
                row["segmentation"] = dict(one.masks[n])
            rows.append(row)
    return rows


def _percent(values: NDArray[np.float64]) -> float | None:
    """The mean in percent of what there is; None where there is nothing."""
    there = values[values > -1]
    return 100 * float(there.mean()) if there.size else None


def _summary(tables: Tables) -> dict[str, float | None]:
    precision, recall = tables.precision, tables.recall
    shown = {
        "AP": _percent(precision[..., _ALL, _HUNDRED]),
        "AP50": _percent(precision[_AT_50, ..., _ALL, _HUNDRED]),
        "AP75": _percent(precision[_AT_75, ..., _ALL, _HUNDRED]),
    }
    for i, area in enumerate(_AREAS[1:], start=1):
        shown[f"AP{area}"] = _percent(precision[..., i, _HUNDRED])
    for i, most in enumerate(_MOST):
        shown[f"AR{most}"] = _percent(recall[..., _ALL, i])
    for i, area in enumerate(_AREAS[1:], start=1):
        shown[f"AR{area}"] = _percent(recall[..., i, _HUNDRED])
    return shown


def _per_class(truth: AnnotatedImages, tables: Mapping[str, Tables]) -> list[dict[str, Any]]:
    counts = np.zeros(len(truth.categories), np.int64)
    for picture in truth.pictures:
        objects = picture.objects
        counted = objects.labels[~(objects.crowd | objects.difficult)]
        counts += np.bincount(counted, minlength=len(counts))
    rows = []
    for k, name in enumerate(truth.categories):
        row: dict[str, Any] = {"name": name, "objects": int(counts[k])}
        for kind, one in tables.items():
            precision = one.precision[:, :, k, _ALL, _HUNDRED]
            row[kind] = {
                "AP": _percent(precision),
                "AP50": _percent(precision[_AT_50]),
                "AP75": _percent(precision[_AT_75]),
                "AR100": _percent(one.recall[:, k, _ALL, _HUNDRED]),
            }
        rows.append(row)
    return rows


def _curves(truth: AnnotatedImages, tables: Tables) -> dict[str, Any]:
    """Precision (101,) in percent, rounded: means over classes, and each class at overlap .5."""
    precision = tables.precision[..., _ALL, _HUNDRED]  # (10, 101, K)
    there = precision[_AT_50, 0] > -1  # classes with objects
    means = {
        f"{OVERLAPS[i]:.2f}": _rounded(precision[i][:, there].mean(axis=1))
        for i in (_AT_50, _AT_75)
        if there.any()
    }
    classes = {
        name: _rounded(precision[_AT_50, :, k])
        for k, name in enumerate(truth.categories)
        if there[k]
    }
    return {"means": means, "classes": classes}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(100 * value, 1) for value in values.tolist()]
