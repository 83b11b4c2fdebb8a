"""Boxes that have seen no image: what a figure has to be above before it means anything.

Objects are large and central in most photographs, and zero padding makes the map of any image
brighter in the middle. So each score stands beside those of boxes that know only this much.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import keyed

NOISES = 16
"""Images of noise whose maps are averaged."""

BLIND = ("full_image", "centre_box", "noise", "constant_mask")
"""Controls that know nothing of an image but, for one of them, the size of the box found in it."""


def full_image(size: int) -> NDArray[np.float64]:
    """(4,) all of it."""
    return np.array([0, 0, size, size], np.float64)


def centre_box(box: NDArray[np.float64], size: int) -> NDArray[np.float64]:
    """(4,) the square in the centre with the area of `box`, which is (4,), in a square image."""
    side = np.sqrt((box[2] - box[0]) * (box[3] - box[1]))
    return np.array([size - side, size - side, size + side, size + side], np.float64) / 2


def constant_mask(size: int) -> NDArray[np.float64]:
    """(4,) the lower right 3 x 3 cells of 4 x 4: what the published mask file nearly is."""
    return np.array([0.25, 0.25, 1, 1], np.float64) * size


def noise(size: int, seed: int) -> Tensor:
    """(NOISES, 3, size, size) Gaussian noise, as normalised images have it: mean 0, deviation 1."""
    generator = torch.Generator().manual_seed(keyed.seed(seed, NOISES))
    return torch.randn(NOISES, 3, size, size, generator=generator)


def divided(maps: Tensor, by: Tensor) -> Tensor:
    """(B, h, w) maps over the map of noise (h, w); NaN where that is not above 0."""
    return maps / by.where(by > 0, torch.nan)
