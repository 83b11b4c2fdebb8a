"""Drawing views: everything random about them, as arrays, for a whole batch at once.

Each number is a pure function of (seed, salt, epoch, image index, view, quantity), so a view does
not depend on the batch that it falls in, the worker that makes it, or what was drawn before. Each
quantity has its own place in the key: changing the probability of blur moves no crop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firstsight import keyed
from firstsight.views import Views

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
"""The operations of the jitter, as `Drawn.order` numbers them and `Drawn.factors` lists them."""

_ATTEMPTS = 10

# The last part of the key. A quantity never changes its place: old runs must replay.
_AREA, _RATIO = 0, _ATTEMPTS
_LEFT, _TOP, _FLIP, _JITTER, _ORDER = range(20, 25)
_FACTORS = 25
_GRAY, _BLUR, _SIGMA, _SOLARIZE = range(29, 33)
_SLOTS = np.arange(33)
_HIDE, _GRID = 33, 34
_CELLS = 35  # and all after it: one for each cell of the finest grid

SHRINKS = np.array([1.1, 1.2, 1.5])
"""How many times smaller SCRL's code makes a view to blur it: one of these at random."""

HIDDEN = 16
"""Cells a side of the finest grid of Hide-and-Seek; coarser ones are 8 and 4."""

_ORDERS = np.array(list(permutations(range(4))), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What was drawn for B images in V views each; the operations apply in the order listed."""

    crops: NDArray[np.int64]
    """(B, V, 4) x1, y1, x2, y2 in pixels of the original, half-open."""
    flips: NDArray[np.bool_]
    """(B, V) mirrored left to right."""
    jitter: NDArray[np.bool_]
    """(B, V) the colours are jittered."""
    order: NDArray[np.int64]
    """(B, V, 4) order of the jitter: a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE."""
    factors: NDArray[np.float64]
    """(B, V, 4) brightness, contrast and saturation factors (1: no change); hue shift in turns."""
    gray: NDArray[np.bool_]
    """(B, V) turned grey."""
    sigmas: NDArray[np.float64]
    """(B, V) standard deviation of the blur, pixels of the view; 0 is no blur."""
    shrinks: NDArray[np.float64]
    """(B, V) how many times smaller and large again instead, as a blur; 0: not at all."""
    solarize: NDArray[np.bool_]
    """(B, V) values from 128 up are inverted."""
    hidden: NDArray[np.bool_]
    """(B, V, 16, 16) cells that show the mean colour."""


def draw(
    views: Views,
    image_sizes: ArrayLike,
    *,
    seed: int,
    epoch: int,
    index: ArrayLike,
    salt: int = 0,
) -> Drawn:
    """The V views of B images, drawn.

    A pure function of (seed, salt, epoch, image index, view): an image drawn alone or in any batch
    gets the same views. `image_sizes` is (B, 2), width and height in pixels; `index` is (B,), the
    position of each image in the source; `salt` gives other views of the same epoch, for a run
    that rolled back.

    Crops follow RandomResizedCrop of torchvision (Szegedy et al. 2014): up to ten attempts at an
    area uniform in the scale range and a log-uniform ratio, then the central crop.
    """
    index = np.asarray(index)
    sizes = np.asarray(image_sizes, dtype=np.int64).reshape(-1, 2)
    u = keyed.uniform(
        seed, salt, epoch, index[:, None, None], np.arange(views.total)[:, None], _SLOTS
    )  # (B, V, slots)

    strengths = np.array(views.strengths)
    middle = np.array([1.0, 1.0, 1.0, 0.0])
    lowest = np.array([0.0, 0.0, 0.0, -0.5])  # a factor is never negative
    low, high = np.maximum(middle - strengths, lowest), middle + strengths
    sigmas = views.min_sigma + u[..., _SIGMA] * (views.max_sigma - views.min_sigma)
    shrinks = SHRINKS[(u[..., _SIGMA] * len(SHRINKS)).astype(np.int64)]
    blurred = u[..., _BLUR] < np.array(views.blurs)
    gaussian = views.blur_by == "gaussian"
    return Drawn(
        crops=_crops(views, sizes, u),
        flips=u[..., _FLIP] < views.flip,
        jitter=u[..., _JITTER] < views.jitter,
        order=_ORDERS[(u[..., _ORDER] * len(_ORDERS)).astype(np.int64)],
        factors=low + u[..., _FACTORS : _FACTORS + 4] * (high - low),
        gray=u[..., _GRAY] < views.gray,
        sigmas=np.where(blurred & gaussian, sigmas, 0.0),
        shrinks=np.where(blurred & (not gaussian), shrinks, 0.0),
        solarize=u[..., _SOLARIZE] < np.array(views.solarizes),
        hidden=_hidden(views, (seed, salt, epoch, index[:, None, None])),
    )


def _hidden(views: Views, key: tuple[ArrayLike, ...]) -> NDArray[np.bool_]:
    """(B, V, 16, 16): Hide-and-Seek (Kumar Singh and Lee 2017, https://arxiv.org/abs/1704.04232).

    As ssl-small draws it: for each view a grid, for each of its cells a coin.
    """
    count = len(np.asarray(key[-1]))
    if views.hide == 0:
        return np.zeros((count, views.total, HIDDEN, HIDDEN), bool)
    slots = np.arange(_HIDE, _CELLS + HIDDEN**2)
    u = keyed.uniform(*key, np.arange(views.total)[:, None], slots)  # (B, V, slots)
    coins = (u[..., _CELLS - _HIDE :] < 0.5).reshape(count, views.total, HIDDEN, HIDDEN)
    width = 2 ** (u[..., _GRID - _HIDE] * 3).astype(np.int64)  # (B, V): 1, 2 or 4 cells become one
    cell = np.arange(HIDDEN) // width[..., None]  # (B, V, 16)
    first = np.take_along_axis(coins, cell[..., :, None], axis=2)
    hidden = np.take_along_axis(first, cell[..., None, :], axis=3)
    return hidden & (u[..., 0, None, None] < views.hide)


def _crops(views: Views, sizes: NDArray[np.int64], u: NDArray[np.float64]) -> NDArray[np.int64]:
    width, height = sizes[:, 0, None], sizes[:, 1, None]  # (B, 1)
    scales = np.array(views.scales)  # (V, 2)
    low, high = scales[:, 0, None], scales[:, 1, None]  # (V, 1)
    log_ratio = math.log(views.min_ratio)

    area = (width * height)[..., None] * (low + u[..., _AREA : _AREA + _ATTEMPTS] * (high - low))
    ratio = np.exp(log_ratio * (1.0 - 2.0 * u[..., _RATIO : _RATIO + _ATTEMPTS]))
    w = np.rint(np.sqrt(area * ratio))  # (B, V, attempts); rint halves to even, as Python rounds
    h = np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width[..., None]) & (h > 0) & (h <= height[..., None])
    first = fits.argmax(axis=-1)[..., None]
    fallback_w, fallback_h = _central(width, height, views.min_ratio)
    found = fits.any(axis=-1)
    w = np.where(found, np.take_along_axis(w, first, -1)[..., 0], fallback_w)  # (B, V)
    h = np.where(found, np.take_along_axis(h, first, -1)[..., 0], fallback_h)

    x1 = np.where(found, np.floor(u[..., _LEFT] * (width - w + 1)), (width - w) // 2)
    y1 = np.where(found, np.floor(u[..., _TOP] * (height - h + 1)), (height - h) // 2)
    return np.stack([x1, y1, x1 + w, y1 + h], axis=-1).astype(np.int64)


def _central(
    width: NDArray[np.int64], height: NDArray[np.int64], min_ratio: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sides of the largest crop whose ratio is allowed."""
    # Ratios as torchvision clamps them; a strip one pixel wide still gives a crop of one pixel.
    w = np.clip(np.rint(np.minimum(width, height / min_ratio)), 1, width)
    h = np.clip(np.rint(np.minimum(height, width / min_ratio)), 1, height)
    return w, h
