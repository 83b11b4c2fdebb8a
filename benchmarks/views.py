"""Microseconds of one core for one view, ours against torchvision on Pillow images, same run.

    python benchmarks/views.py [--rounds 5] [--views 200]

Decoding is not part of it: both start from pixels in memory. The pictures are generated. Rounds
alternate between the two pipelines and the best round of each counts, so that a neighbour on the
machine harms both alike.
"""

import argparse
import time
from collections.abc import Callable

import cv2
import numpy as np
import torch
import torchvision.transforms as tv
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from firstsight.views import PRESETS, Views
from firstsight.views.apply import apply
from firstsight.views.draw import draw

CASES = [
    # preset, width, height of the source, side of the view
    ("mocov2-small", 32, 32, 32),
    ("mocov2", 32, 32, 32),
    ("mocov2", 128, 128, 64),
    ("mocov2", 500, 375, 224),
    ("byol", 500, 375, 224),
]


def picture(width: int, height: int) -> NDArray[np.uint8]:
    """Shading, boxes and grain."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([60 + 150 * x, 200 - 120 * y, 90 + 100 * x * y], axis=-1)
    for _ in range(8):
        x1, y1 = rng.integers(0, width), rng.integers(0, height)
        pixels[y1 : y1 + height // 4, x1 : x1 + width // 4] = rng.integers(0, 256, 3)
    pixels += rng.normal(0, 6, (height, width, 1))
    return np.clip(pixels, 0, 255).astype(np.uint8)


def by_torchvision(views: Views, view: int, size: int) -> Callable[[Image.Image], Image.Image]:
    """The usual pipeline: torchvision v1 and Pillow's blur, with the same settings."""

    def blur(image: Image.Image) -> Image.Image:
        sigma = np.random.uniform(views.min_sigma, views.max_sigma)
        return image.filter(ImageFilter.GaussianBlur(sigma))

    jitter = tv.ColorJitter(views.brightness, views.contrast, views.saturation, views.hue)
    return tv.Compose(
        [
            tv.RandomResizedCrop(
                size, views.scales[view], interpolation=tv.InterpolationMode(views.interpolation)
            ),
            tv.RandomHorizontalFlip(views.flip),
            tv.RandomApply([jitter], views.jitter),
            tv.RandomGrayscale(views.gray),
            tv.RandomApply([blur], views.blurs[view]),
            tv.RandomApply([lambda image: ImageOps.solarize(image, 128)], views.solarizes[view]),
        ]
    )


def main() -> None:
    """Measures all cases and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--views", type=int, default=200, help="images of two views in a round")
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)

    images = args.views
    print(f"one core, {images} images of 2 views, best of {args.rounds} rounds, us per view")
    print(
        f"{'preset':14}{'source':>9}{'view':>6}{'draw':>8}{'ours':>9}{'torchvision':>13}{'ratio':>8}"
    )
    for preset, width, height, size in CASES:
        views, pixels = PRESETS[preset], picture(width, height)
        image = Image.fromarray(pixels)
        usual = [by_torchvision(views, view, size) for view in range(2)]
        out = np.empty((images, 2, size, size, 3), dtype=np.uint8)
        sizes = np.tile([[width, height]], (images, 1))
        drawing, ours, theirs = [], [], []
        for epoch in range(args.rounds):
            start = time.perf_counter()
            drawn = draw(views, sizes, seed=0, epoch=epoch, index=np.arange(images))
            drawn_at = time.perf_counter()
            for b in range(images):
                for v in range(2):
                    apply(pixels, drawn, b, v, size, views.interpolation, out[b, v])
            applied_at = time.perf_counter()
            for b in range(images):
                for v in range(2):
                    out[b, v] = np.asarray(usual[v](image))
            done_at = time.perf_counter()
            drawing.append(drawn_at - start)
            ours.append(applied_at - start)
            theirs.append(done_at - applied_at)
        a, b, c = (min(seconds) / images / 2 * 1e6 for seconds in (drawing, ours, theirs))
        source = f"{width}x{height}"
        print(f"{preset:14}{source:>9}{size:>6}{a:>8.1f}{b:>9.1f}{c:>13.1f}{c / b:>8.1f}")


if __name__ == "__main__":
    main()
