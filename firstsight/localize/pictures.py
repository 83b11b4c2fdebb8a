"""Overlay sheets: an image, its heat map, the box that was found and those that are marked."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from firstsight import checkpoint
from firstsight.localize import published
from firstsight.localize.commands import Localize
from firstsight.localize.eyes import Eye
from firstsight.localize.reading import Found, seen
from firstsight.localize.truth import Truth, placed
from firstsight.pictures import spread, write_png
from firstsight.sources.base import Pixels, Source

COUNT = 12
"""Images on a sheet."""

_SIDE, _GAP, _PAIRS = 160, 8, 3
_FOUND, _MARKED = (0, 200, 80), (230, 40, 40)


def heat_map(pixels: Pixels, values: ArrayLike) -> Pixels:
    """The image with its map over it in colours from blue to red, as Tobias' figures have it.

    Colours are those of `published.heat`; cells keep their edges; 0.3 of the map, 0.7 of the image.
    """
    height, width = pixels.shape[:2]
    grey = cv2.resize(published.heat(values), (width, height), interpolation=cv2.INTER_NEAREST)
    colours = cv2.cvtColor(cv2.applyColorMap(grey, cv2.COLORMAP_JET), cv2.COLOR_BGR2RGB)
    blended = cv2.addWeighted(colours, 0.3, pixels, 0.7, 0)
    return np.asarray(blended, np.uint8)


def boxed(pixels: Pixels, box: ArrayLike, colour: tuple[int, int, int]) -> Pixels:
    """The image with a frame of two pixels just inside a box (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = (round(float(v)) for v in np.asarray(box))
    picture: Pixels = pixels.copy()
    cv2.rectangle(picture, (x1, y1), (max(x2 - 1, x1), max(y2 - 1, y1)), colour, 2)
    return picture


def sheet(
    eye: Eye,
    source: Source,
    truth: Truth | None,
    found: Found,
    known: NDArray[np.int64] | None,
    ask: Localize,
) -> tuple[Pixels, str]:
    """A sheet of some images (of different classes, fixed by seed), and what it shows.

    `known` (len(source),) are the classes that class activation maps are read for.
    """
    among = dict(zip(found.shapes[:, 0].tolist(), range(len(found.shapes)), strict=True))
    chosen = [i for i in spread(source, len(source), ask.seed).tolist() if i in among][:COUNT]
    tiles = []
    for pixels, told in seen(eye, source, np.sort(np.array(chosen, np.int64))):
        classes = None if known is None else torch.from_numpy(known)[told[:, 0]]
        maps = eye.see(pixels, classes)
        for image, values, (i, width, height) in zip(pixels, maps, told.tolist(), strict=True):
            plain = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
            boxes = _marked(truth, i, width, height, found.size)
            own = found.boxes[among[i], 0]
            tiles.append(_tile(plain, values.numpy(), own, boxes, found.size))
    wide = 2 * _SIDE + 2 * _GAP
    rows = -(-len(tiles) // _PAIRS)
    canvas = np.full((rows * (_SIDE + _GAP), _PAIRS * (wide + _GAP), 3), 255, np.uint8)
    for at, tile in enumerate(tiles):
        top, left = at // _PAIRS * (_SIDE + _GAP), at % _PAIRS * (wide + _GAP)
        canvas[top : top + _SIDE, left : left + tile.shape[1]] = tile
    caption = f"Images of {source.spec} with the box found (green)"
    caption += ", the boxes marked (red)" if truth is not None else ""
    return (
        canvas,
        f"{caption} and the map, {ask.reading} of {eye.backbone.name}, red where highest.",
    )


def _marked(truth: Truth | None, i: int, width: int, height: int, size: int) -> ArrayLike:
    if truth is None or i not in truth.marked:
        return np.empty((0, 4))
    return placed(truth.marked[i], width, height, size, truth.kind).boxes


def _tile(
    pixels: Pixels, values: ArrayLike, found: ArrayLike, marked: ArrayLike, size: int
) -> Pixels:
    """(SIDE, 2 SIDE + GAP, 3): the image with boxes, then its heat map with the box found."""
    scale = _SIDE / size
    small = cv2.resize(pixels, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    left, right = np.asarray(small, np.uint8), heat_map(np.asarray(small, np.uint8), values)
    for box in np.asarray(marked):
        left = boxed(left, box * scale, _MARKED)
    left = boxed(left, np.asarray(found) * scale, _FOUND)
    right = boxed(right, np.asarray(found) * scale, _FOUND)
    return np.concatenate([left, np.full((_SIDE, _GAP, 3), 255, np.uint8), right], axis=1)


def save(folder: Path, pixels: Pixels, caption: str, name: str = "objects") -> None:
    """Write a picture (objects.png) and its caption, beside those of other pictures."""
    write_png(folder / f"{name}.png", pixels)
    file = folder / "captions.json"
    try:
        captions = json.loads(file.read_text())
    except (OSError, ValueError):
        captions = {}
    checkpoint.write_json(file, {**captions, name: caption})
