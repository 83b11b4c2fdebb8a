"""Background merging: the foreground of an image stays, and another one's background comes behind.

Tobias, Cao and Wu 2021, https://arxiv.org/abs/2106.09259. An image is cut into n x n cells; the
strongest of its mask are foreground. The others give way to the background cells of a partner, in
random order. It happens on the whole image, before anything is cropped, so the crop cuts image and
foreground alike, and boxes of crops keep their meaning.

What is drawn is a function of (seed, salt, epoch, image index, view), as for all views. The partner
is any image of the source, not of the batch: so it is the same however a batch is shared out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firstsight import keyed
from firstsight.views import Views
from firstsight.views.apply import Pixels, resize

_MERGED, _PARTNER = 300, 301  # places in the key, beyond those of `draw`
_CELLS = 302  # and all after it: three for each cell
_ORDER, _OWN, _OTHER = range(3)

Cells = NDArray[np.bool_]
"""(n, n) whether a cell is foreground, rows from the top."""


@dataclass(frozen=True, kw_only=True)
class Merges:
    """What was drawn for B images in V views each."""

    partners: NDArray[np.int64]
    """(B, V) position of the image that the background comes from; -1: the view is not merged."""
    numbers: NDArray[np.float64]
    """(B, V, 3, n * n) in 0 to 1: the order of the partner's cells, and of the two images the grids
    whose strongest cells are foreground where that is random."""


def draw_merges(
    views: Views, cells: int, images: int, *, seed: int, epoch: int, index: ArrayLike, salt: int = 0
) -> Merges:
    """Who is merged with whom: B images at `index` in a source of `images`, cut into `cells` cells.

    An image may be its own partner, as published.
    """
    index = np.asarray(index)
    slots = np.arange(_MERGED, _CELLS + 3 * cells)
    u = keyed.uniform(
        seed, salt, epoch, index[:, None, None], np.arange(views.total)[:, None], slots
    )  # (B, V, slots)
    may = np.arange(views.total) < {"query": 1, "both": 2}[views.merge.views]
    taken = (u[..., 0] < views.merge.probability) & may
    numbers = u[..., _CELLS - _MERGED :].reshape(*taken.shape, cells, 3)
    return Merges(
        partners=np.where(taken, (u[..., _PARTNER - _MERGED] * images).astype(np.int64), -1),
        numbers=np.moveaxis(numbers, -1, -2),
    )


def exchanged(own: Cells, other: Cells, order: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n * n,) for each cell the partner's that takes its place, as row * n + column; -1: none.

    The background of `own` is filled, in the order of its rows, with that of `other`, as `order`
    (n * n,) permutes it. Both have equally many foreground cells.
    """
    free, given = np.flatnonzero(~own), np.flatnonzero(~other)
    cells = np.full(own.size, -1)
    cells[free] = given[np.argsort(order[: len(given)], kind="stable")]
    return cells


def merged(image: Pixels, partner: Pixels, cells: NDArray[np.int64], side: int) -> Pixels:
    """The image (H, W, 3) with those of its `cells` (n * n,) that are not -1 from `partner`.

    Both are squeezed into squares of `side` pixels, cut to a multiple of n, and the result is
    resized to H x W, as published. differs from the paper: the filter is an antialiased bicubic one
    in any case; the published code's depends on the version of Pillow.
    """
    n = math.isqrt(len(cells))
    patch = max(1, side // n)
    own, other = (_patches(picture, n, patch) for picture in (image, partner))
    mixed = np.where((cells < 0)[:, None, None, None], own, other[cells])
    square = mixed.reshape(n, n, patch, patch, 3).swapaxes(1, 2).reshape(n * patch, n * patch, 3)
    return resize(square, image.shape[1], image.shape[0], "bicubic")


def _patches(pixels: Pixels, n: int, patch: int) -> Pixels:
    """(n * n, patch, patch, 3): the cells of an image squeezed into a square, row by row."""
    square = resize(pixels, n * patch, n * patch, "bicubic")
    cells: Pixels = square.reshape(n, patch, n, patch, 3).swapaxes(1, 2)
    return cells.reshape(n * n, patch, patch, 3)
