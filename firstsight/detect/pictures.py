"""Pictures for a report: what was found and what is marked, in some images."""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.detect.annotations import AnnotatedImages, Detections
from firstsight.detect.masks import decode
from firstsight.detect.segmentation_data import ASIDE, SegmentedImages
from firstsight.geometry import iou
from firstsight.localize import pictures
from firstsight.sources.base import Pixels, UnreadableImage

COUNT = 12
"""Images on a sheet."""
SURE = 0.5
"""Detections with lower scores are not drawn."""

_SIDE, _GAP, _COLUMNS = 280, 8, 4
# told apart by people who see no red or no green, too
_RIGHT, _WRONG, _MARKED = (0, 190, 130), (233, 120, 0), (255, 255, 255)


def save(
    folder: Path, truth: AnnotatedImages, found: Sequence[Detections], *, seed: int = 0
) -> None:
    """Write `detections.png` and its caption into a run's folder of pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    caption = (
        f"Images of {truth.root.name} with what was found at a score of {SURE:g} or more: green "
        "where an object of that class is marked (IoU .5 or more), orange where none is. Thin and "
        "white: what is marked."
    )
    pictures.save(folder, sheet(truth, found, seed=seed), caption, "detections")


def sheet(truth: AnnotatedImages, found: Sequence[Detections], *, seed: int = 0) -> Pixels:
    """Some images with objects, chosen by seed, side by side with their boxes and masks."""
    tiles: list[Pixels] = []
    for i in _drawn_order(len(truth), seed):
        if len(tiles) == COUNT:
            break
        if not len(truth.pictures[i].objects):
            continue
        try:
            tiles.append(_fitted(drawn(truth, i, found[i])))
        except UnreadableImage:
            continue
    return _laid_out(tiles)


def _drawn_order(count: int, seed: int) -> list[int]:
    order: list[int] = np.random.default_rng(keyed.seed(seed, count)).permutation(count).tolist()
    return order


def _laid_out(tiles: Sequence[Pixels]) -> Pixels:
    rows = max(1, -(-len(tiles) // _COLUMNS))
    step = _SIDE + _GAP
    canvas = np.full((rows * step, _COLUMNS * step, 3), 255, np.uint8)
    for at, tile in enumerate(tiles):
        top, left = at // _COLUMNS * step, at % _COLUMNS * step
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas


def drawn(truth: AnnotatedImages, index: int, found: Detections) -> Pixels:
    """Image `index` with what is marked and what was found surely; raises `UnreadableImage`."""
    pixels, objects = truth.pixels(index), truth.pictures[index].objects
    unit = max(1.0, max(pixels.shape[:2]) / _SIDE)  # pixels of the image to one of the sheet
    for box in objects.boxes:
        pixels = _frame(pixels, box, _MARKED, unit)
    for n in np.flatnonzero(found.scores >= SURE)[::-1].tolist():
        same = objects.boxes[objects.labels == found.labels[n]]
        right = bool((iou(found.boxes[n], same) >= 0.5).any())
        colour = _RIGHT if right else _WRONG
        if found.masks is not None:
            inside = decode(found.masks[n], *pixels.shape[:2])
            tinted = 0.6 * pixels[inside] + 0.4 * np.array(colour)
            pixels = pixels.copy()
            pixels[inside] = tinted.astype(np.uint8)
        pixels = _frame(pixels, found.boxes[n], colour, 2 * unit)
        said = f"{truth.categories[int(found.labels[n])]} {100 * found.scores[n]:.0f}"
        x, y = int(found.boxes[n, 0]), int(max(found.boxes[n, 1], 11 * unit))
        for shade, width in (((0, 0, 0), 3 * unit), (colour, unit)):
            place, font = (x, y - int(2 * unit)), cv2.FONT_HERSHEY_SIMPLEX
            cv2.putText(pixels, said, place, font, 0.36 * unit, shade, round(width), cv2.LINE_AA)
    return pixels


def _frame(
    pixels: Pixels, box: NDArray[np.float32], colour: tuple[int, int, int], width: float
) -> Pixels:
    picture: Pixels = np.ascontiguousarray(pixels).copy()
    x1, y1, x2, y2 = (round(float(value)) for value in box)
    cv2.rectangle(picture, (x1, y1), (max(x2 - 1, x1), max(y2 - 1, y1)), colour, round(width))
    return picture


def _fitted(pixels: Pixels) -> Pixels:
    """The image as it fits into a tile."""
    scale = _SIDE / max(pixels.shape[:2])
    size = max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def some(count: int, seed: int) -> list[int]:
    """Positions of the images that a sheet of segmentation shows: pairs of what is marked and
    found, half as many."""
    return _drawn_order(count, seed)[: COUNT // 2]


def save_marks(folder: Path, truth: SegmentedImages, found: Mapping[int, Pixels]) -> None:
    """Write `segmentation.png` and its caption: what is marked and what was found, side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    tiles = []
    for i in sorted(found):
        pixels = truth.pixels(i)
        both = (truth.indices(i), np.where(truth.indices(i) == ASIDE, ASIDE, found[i]))
        tiles += [_fitted(coloured(pixels, one, truth.categories)) for one in both]
    caption = (
        f"Images of {truth.root.name}: left what is marked, right what was found, each class in a "
        "colour of its own. Uncoloured: pixels that do not count."
    )
    pictures.save(folder, _laid_out(tiles), caption, "segmentation")


def coloured(pixels: Pixels, indices: NDArray[np.integer[Any]], names: Sequence[str]) -> Pixels:
    """An image tinted by the class of each pixel, and the names of those that are there."""
    shown, unit = pixels.astype(np.float64), max(pixels.shape[:2]) / _SIDE
    there = [int(k) for k in np.unique(indices) if k != ASIDE]
    for k in there:
        shown[indices == k] = 0.5 * shown[indices == k] + 0.5 * np.array(_colour(k))
    made = np.ascontiguousarray(shown.astype(np.uint8))
    for k in there:
        rows, columns = np.nonzero(indices == k)
        middle = len(rows) // 2  # in raster order: a pixel of the class, half-way down
        font = cv2.FONT_HERSHEY_SIMPLEX
        (long, _), _ = cv2.getTextSize(names[k], font, 0.4 * unit, 1)
        place = max(0, min(int(columns[middle]), pixels.shape[1] - long)), int(rows[middle])
        for shade, width in (((0, 0, 0), 3 * unit), ((255, 255, 255), unit)):
            thick = max(1, round(width))
            cv2.putText(made, names[k], place, font, 0.4 * unit, shade, thick, cv2.LINE_AA)
    return made


def _colour(number: int) -> tuple[float, float, float]:
    """Neighbouring numbers get hues far apart (steps of the golden ratio)."""
    r, g, b = colorsys.hsv_to_rgb(0.1 + number * 0.618034 % 1.0, 0.85, 0.95)
    return 255 * r, 255 * g, 255 * b
