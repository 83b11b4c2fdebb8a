"""Views: an image becomes several transformed copies.

What is *drawn* (`draw.py`: crop boxes, flips, colour factors, ...) is data and a pure function of
(seed, epoch, image, view); how it is *applied* (`apply.py`) is a separate, deterministic step. This
page holds what both need: the settings, and the presets of the papers. It imports neither OpenCV nor
torch, so that `--help` stays instant.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Views:
    """How views are drawn. Tuples hold one value per resolution or view; the last one repeats."""

    counts: tuple[int, ...] = (2,)
    """Views at each resolution: 2 is two global crops, 2 6 adds six local ones."""
    sizes: tuple[int, ...] = ()
    """Side of the views at each resolution, pixels; empty: --size for all of them."""
    min_scale: tuple[float, ...] = (0.2,)
    """Smallest crop at each resolution, share of the image area."""
    max_scale: tuple[float, ...] = (1.0,)
    """Largest crop at each resolution, share of the image area."""
    min_ratio: float = 0.75
    """Narrowest crop, width over height; the widest is its inverse."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Filter of the antialiased resize."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    jitter: float = 0.8
    """Probability of colour jitter; its four parts are applied in random order."""
    brightness: float = 0.4
    """Jitter: brightness factor drawn from 1 - b to 1 + b."""
    contrast: float = 0.4
    """Jitter: contrast factor drawn from 1 - c to 1 + c."""
    saturation: float = 0.4
    """Jitter: saturation factor drawn from 1 - s to 1 + s."""
    hue: float = 0.1
    """Jitter: hue shift drawn from -h to h, in turns of the colour circle (at most 0.5)."""
    gray: float = 0.2
    """Probability of turning grey."""
    blur: tuple[float, ...] = (0.5,)
    """Probability of Gaussian blur for each view."""
    min_sigma: float = 0.1
    """Blur: smallest standard deviation, pixels of the view."""
    max_sigma: float = 2.0
    """Blur: largest standard deviation, pixels of the view."""
    solarize: tuple[float, ...] = (0.0,)
    """Probability, for each view, of inverting all values from 128 up."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, values in 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel after the mean, values in 0 to 1."""
