"""Boxes of all images by one or several networks, decoded once for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import distributed
from firstsight.errors import UserError
from firstsight.geometry import cells_box, object_cells
from firstsight.localize import controls, published
from firstsight.localize.eyes import Eye
from firstsight.localize.images import squares
from firstsight.log import Meter
from firstsight.sources.base import Source

STEPS = tuple(step / 20 for step in range(20))
"""Thresholds of MaxBoxAcc, on maps scaled to 0 to 1."""

Boxes = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Boxer:
    """Map -> box, by the rule that was asked for."""

    size: int
    """Side of the square image, pixels."""
    threshold: str | float
    connectivity: int
    published_cam: bool = False
    """Boxes of class activation maps as Tobias' code has them."""

    def box(self, values: NDArray[np.float64]) -> tuple[Boxes, bool]:
        """(4,) and whether nothing was found, so that it is the whole image."""
        whole = controls.full_image(self.size)
        if self.published_cam:
            cam = published.cam_box(values)
            return whole if cam is None else np.array(cam), cam is None
        cells = object_cells(values, self.connectivity, self.threshold)
        return whole if cells is None else np.array(cells_box(cells, self.size)), cells is None

    def sweep(self, values: NDArray[np.float64]) -> Boxes:
        """(T, 4) at each of `STEPS` of the range of the map; the whole image where it has none."""
        low, high = float(values.min()), float(values.max())
        rows = np.tile(controls.full_image(self.size), (len(STEPS), 1))
        for row, step in zip(rows, STEPS, strict=True):
            cells = object_cells(values, self.connectivity, low + step * (high - low))
            if cells is None:
                break
            row[:] = cells_box(cells, self.size)
        return rows


@dataclass(frozen=True)
class Found:
    """The boxes that one network found, in squares of `size` pixels; a row for each image."""

    size: int
    shapes: NDArray[np.int64]
    """(N, 3) position in the source (rising), width and height of each image."""
    flags: NDArray[np.bool_]
    """(N, 3): nothing found; because the map holds NaN or infinity; nothing in the divided map."""
    boxes: Boxes
    """(N, 2 + T, 4): of the map, of the map divided by that of noise, at each of T thresholds."""
    noise: Boxes
    """(1 + T, 4): of the map of noise."""
    noise_fallback: bool
    cells: tuple[int, int]
    """Height and width of the maps."""


def find(
    eyes: Sequence[Eye],
    source: Source,
    index: NDArray[np.int64],
    boxer: Boxer,
    divide: bool,
    known: NDArray[np.int64] | None,
) -> list[Found]:
    """What each network finds in the images at `index` that can be read.

    `divide`: maps are also divided by the map of noise. `known` (len(source),) are the classes that
    class activation maps are read for.
    """
    rows: list[list[list[float]]] = [[] for _ in eyes]
    shapes: list[list[int]] = []
    with Meter(f"objects of {source.spec}", 0, len(index)) as meter:
        for pixels, told in seen(eyes[0], source, index):
            classes = None if known is None else torch.from_numpy(known)[told[:, 0]]
            for eye, found in zip(eyes, rows, strict=True):
                for values in eye.see(pixels, classes):
                    found.append(_row(values, eye.noise if divide else None, boxer))
            shapes += told.tolist()
            meter.show(min(len(shapes) * distributed.world(), len(index)))
    if not distributed.anyone(bool(shapes)):
        raise UserError(f"none of {len(index)} images of {source.spec} can be read; check --data")
    return [_found(eye, boxer, shapes, found) for eye, found in zip(eyes, rows, strict=True)]


def seen(eye: Eye, source: Source, index: NDArray[np.int64]) -> Iterator[tuple[Tensor, Tensor]]:
    """The images at `index` as a network is shown them, in batches, and (B', 3) which they are."""
    how = eye.reader
    return squares(source, index, how.size, how.batch_size, how.workers, how.interpolation)


def _row(values: Tensor, noise: Tensor | None, boxer: Boxer) -> list[float]:
    own, nothing = boxer.box(values.numpy())
    over, over_nothing = own, nothing
    if noise is not None:
        over, over_nothing = boxer.box(controls.divided(values, noise).numpy())
    infinite = not bool(values.isfinite().all())
    return [nothing, infinite, over_nothing, *own, *over, *boxer.sweep(values.numpy()).ravel()]


def _found(eye: Eye, boxer: Boxer, shapes: list[list[int]], rows: list[list[float]]) -> Found:
    """From the rows of this rank to those of all."""
    assert eye.noise is not None
    parts = distributed.collect((np.array(shapes, np.int64), np.array(rows, np.float64)))
    told = np.concatenate([part[0].reshape(-1, 3) for part in parts])
    table = np.concatenate([part[1].reshape(len(part[0]), -1) for part in parts if len(part[0])])
    order = told[:, 0].argsort()
    told, table = told[order], table[order]
    noise, noise_fallback = boxer.box(eye.noise.numpy())
    height, width = eye.noise.shape
    return Found(
        size=boxer.size,
        shapes=told,
        flags=table[:, :3].astype(bool),
        boxes=table[:, 3:].reshape(len(table), -1, 4),
        noise=np.concatenate([noise[None], boxer.sweep(eye.noise.numpy())]),
        noise_fallback=noise_fallback,
        cells=(height, width),
    )
