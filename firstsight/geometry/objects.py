"""Boxes of objects from activation maps, and how much two boxes share."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from firstsight.errors import UserError

Box = tuple[float, float, float, float]
"""x1, y1, x2, y2, half-open."""


def object_box(
    activation: Tensor | ArrayLike,
    image_size: int | tuple[int, int],
    connectivity: int = 8,
    threshold: str | float = "mean",
) -> Box:
    """The box (x1, y1, x2, y2, half-open) of the object that a map (h, w) of activations shows.

    Of the cells above the threshold (their mean) the largest connected component is kept and scaled
    to the image by nearest neighbour; the box is tight around it (SCDA, Wei et al. 2017, as Tobias,
    https://arxiv.org/abs/2106.09259, applies it). `image_size` is the side of a square image, or
    (width, height). Where no cell is above the threshold, as on a flat map or one with NaN, it is
    the whole image; `object_cells` tells these apart. Raises `UserError` as `object_cells` does.
    """
    cells = object_cells(activation, connectivity, threshold)
    return cells_box(np.ones((1, 1), bool) if cells is None else cells, image_size)


def object_cells(
    activation: Tensor | ArrayLike, connectivity: int = 8, threshold: str | float = "mean"
) -> NDArray[np.bool_] | None:
    """(h, w) the largest connected component of cells above the threshold; None: there is none.

    Above is strictly above; `threshold` is "mean", "percentile:P" or a number. Cells connect over
    edges, with `connectivity` 8 over corners too. Of components of one size the first counts, in
    the order of rows. Sums are taken in float64. There is none in a map that is flat, or holds NaN
    or infinity. Raises `UserError` for other thresholds and connectivities.
    """
    if connectivity not in (4, 8):
        raise UserError(f"--connectivity is 4 or 8, not {connectivity}")
    if isinstance(activation, Tensor):
        activation = activation.detach().cpu().numpy()
    values = np.asarray(activation, np.float64)
    if not np.isfinite(values).all() or values.min() == values.max():
        return None
    above = values > _level(values, threshold)
    if not above.any():
        return None
    _, labels, stats, _ = cv2.connectedComponentsWithStats(
        above.astype(np.uint8), connectivity=connectivity
    )
    areas = stats[1:, cv2.CC_STAT_AREA]
    largest = np.flatnonzero(areas == areas.max()) + 1
    first = labels.flat[np.flatnonzero(np.isin(labels, largest))[0]]  # OpenCV counts by blocks
    kept: NDArray[np.bool_] = labels == first
    return kept


def _level(values: NDArray[np.float64], threshold: str | float) -> float:
    if not isinstance(threshold, str):
        return threshold
    if threshold == "mean":
        return float(values.mean())
    return float(np.percentile(values, percentile(threshold)))


def percentile(threshold: str) -> float:
    """P of "percentile:P"; raises `UserError` where it is no such text, or P not in 0 to 100."""
    name, _, text = threshold.partition(":")
    try:
        if name == "percentile" and 0 <= (p := float(text)) <= 100:
            return p
    except ValueError:
        pass
    raise UserError(f"--threshold is mean or percentile:P with P from 0 to 100, not {threshold!r}")


def cells_box(cells: NDArray[np.bool_], image_size: int | tuple[int, int]) -> Box:
    """The tight box of some cells (h, w), at least one, in an image of (width, height) pixels.

    As if the cells were scaled up by nearest neighbour, where pixel x belongs to cell
    floor(x * w / width): so cell c begins at pixel ceil(c * width / w).
    """
    width, height = (image_size, image_size) if isinstance(image_size, int) else image_size
    rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
    h, w = cells.shape
    x1, x2 = (-(-int(c) * width // w) for c in (columns[0], columns[-1] + 1))
    y1, y2 = (-(-int(c) * height // h) for c in (rows[0], rows[-1] + 1))
    return float(x1), float(y1), float(x2), float(y2)


def iou(boxes: ArrayLike, others: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of boxes (..., 4) and (..., 4), broadcast; 0 where both are empty."""
    a, b = np.asarray(boxes, np.float64), np.asarray(others, np.float64)
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    shared = (high - low).clip(0).prod(axis=-1)
    sums = sum((c[..., 2:] - c[..., :2]).clip(0).prod(axis=-1) for c in (a, b))
    union = np.asarray(sums - shared)
    return np.asarray(np.divide(shared, union, out=np.zeros_like(union), where=union > 0))
