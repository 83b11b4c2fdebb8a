"""A picture of views: each original with its crops marked, and beside it what was made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight.views import Views
from firstsight.views.apply import Pixels, apply, resize
from firstsight.views.draw import draw

# One colour for each view of a draw, the same on its crop and on the border of its picture.
_COLOURS = ((230, 60, 50), (40, 110, 230), (40, 170, 80), (240, 160, 20), (150, 70, 190))
_BORDER = 3
_GAP = 6


def sheet(
    pixels: Sequence[Pixels],
    views: Views,
    size: int,
    *,
    draws: int = 3,
    seed: int = 0,
    index: Sequence[int] | None = None,
    behind: Callable[[int, int, int], Pixels] | None = None,
) -> NDArray[np.uint8]:
    """One picture (H, W, 3) uint8 on white: a row for each draw of each image.

    Left the original, its crops as rectangles; then its V views in the colours of their
    rectangles, a triangle in the corner of those that are mirrored. Draw number e is what a run
    with this seed shows in epoch e of the images at `index` in its source (0, 1, ... if not given).
    Where backgrounds are merged, `behind(e, b, v)` is what view v of image b is cut out of.
    """
    sizes = [(image.shape[1], image.shape[0]) for image in pixels]
    where = np.arange(len(pixels)) if index is None else np.asarray(index)
    sides = views.sides(size)
    drawings = [draw(views, sizes, seed=seed, epoch=e, index=where) for e in range(draws)]
    rows = []
    for b, image in enumerate(pixels):
        for e, drawn in enumerate(drawings):
            cells = [_original(image, drawn.crops[b], max(sides))]
            for v, side in enumerate(sides):
                whole = behind(e, b, v) if behind else image
                view = apply(whole, drawn, b, v, side, views.interpolation, mean=views.mean)
                cells.append(_framed(view, bool(drawn.flips[b, v]), _colour(v)))
            rows.append(_beside(cells))
    return _below(rows)


def _colour(view: int) -> tuple[int, int, int]:
    return _COLOURS[view % len(_COLOURS)]


def _original(image: Pixels, crops: NDArray[np.int64], side: int) -> Pixels:
    """The image on a square of the height of the views, with the rectangles of its crops."""
    height, width = image.shape[:2]
    scale = side / max(height, width)
    small = resize(image, max(1, round(width * scale)), max(1, round(height * scale)))
    for v, crop in enumerate(crops.tolist()):
        x1, y1, x2, y2 = (round(value * scale) for value in crop)
        cv2.rectangle(small, (x1, y1), (x2 - 1, y2 - 1), _colour(v), max(1, side // 100))
    square = np.full((side + 2 * _BORDER, side + 2 * _BORDER, 3), 255, dtype=np.uint8)
    top = (square.shape[0] - small.shape[0]) // 2
    left = (square.shape[1] - small.shape[1]) // 2
    square[top : top + small.shape[0], left : left + small.shape[1]] = small
    return square


def _framed(view: Pixels, mirrored: bool, colour: tuple[int, int, int]) -> Pixels:
    framed = np.empty((view.shape[0] + 2 * _BORDER, view.shape[1] + 2 * _BORDER, 3), dtype=np.uint8)
    framed[...] = colour
    framed[_BORDER:-_BORDER, _BORDER:-_BORDER] = view
    if mirrored:
        corner = max(8, len(view) // 10)
        cv2.fillPoly(framed, [np.array([[0, 0], [corner, 0], [0, corner]], np.int32)], colour)
    return framed


def _beside(cells: Sequence[Pixels]) -> Pixels:
    height = max(len(cell) for cell in cells)
    width = sum(cell.shape[1] for cell in cells) + _GAP * (len(cells) - 1)
    row = np.full((height, width, 3), 255, dtype=np.uint8)
    left = 0
    for cell in cells:
        row[: len(cell), left : left + cell.shape[1]] = cell
        left += cell.shape[1] + _GAP
    return row


def _below(rows: Sequence[Pixels]) -> Pixels:
    height = sum(len(row) for row in rows) + _GAP * (len(rows) - 1)
    picture = np.full((height, max(row.shape[1] for row in rows), 3), 255, dtype=np.uint8)
    top = 0
    for row in rows:
        picture[top : top + len(row), : row.shape[1]] = row
        top += len(row) + _GAP
    return picture
