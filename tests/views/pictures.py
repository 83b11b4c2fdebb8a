"""Pictures to test with: generated ones always, real photographs where they lie beside the repo."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

PHOTOS = Path(__file__).parents[2].parent / "shared/data/photos"


def generated(seed: int, width: int, height: int) -> NDArray[np.uint8]:
    """Smooth shading, waves, sharp saturated boxes and grain: what photographs are made of."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    picture = np.empty((height, width, 3))
    for channel in range(3):
        a, b, phase = rng.uniform(-1, 1, 3)
        waves = np.sin(2 * np.pi * (rng.uniform(1, 6) * x + rng.uniform(1, 6) * y + phase))
        picture[..., channel] = 120 + 90 * (a * x + b * y) + 25 * waves
    for _ in range(8):
        x1, y1 = rng.integers(0, width), rng.integers(0, height)
        w, h = rng.integers(1, max(2, width // 3)), rng.integers(1, max(2, height // 3))
        picture[y1 : y1 + h, x1 : x1 + w] = rng.integers(0, 256, 3)
    picture += rng.normal(0, 6, (height, width, 1))
    return np.clip(picture, 0, 255).astype(np.uint8)


def photographs(count: int) -> list[NDArray[np.uint8]]:
    """Real photographs, upright RGB; skips the test where there are none."""
    paths = sorted(PHOTOS.glob("*.jpg"))[:: max(1, 80 // count)][:count]
    if not paths:
        pytest.skip("no photographs in ../shared/data/photos beside the repository")
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]
