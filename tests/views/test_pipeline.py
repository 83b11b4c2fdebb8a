"""Whole views against the pipeline that everybody uses: torchvision v1 on Pillow images."""

import numpy as np
import pytest
import torch
import torchvision.transforms as tv
import torchvision.transforms.functional as tvf
from PIL import Image, ImageFilter, ImageOps

from firstsight.views import PRESETS
from firstsight.views.apply import apply
from firstsight.views.draw import draw
from tests.views.pictures import generated, photographs

MODES = {
    "bilinear": tv.InterpolationMode.BILINEAR,
    "bicubic": tv.InterpolationMode.BICUBIC,
}


def by_torchvision(pixels, drawn, b, v, size, interpolation):
    """What was drawn, applied by torchvision and Pillow."""
    x1, y1, x2, y2 = drawn.crops[b, v].tolist()
    image = Image.fromarray(pixels)
    image = tvf.resized_crop(image, y1, x1, y2 - y1, x2 - x1, [size, size], MODES[interpolation])
    if drawn.flips[b, v]:
        image = tvf.hflip(image)
    if drawn.jitter[b, v]:
        operations = (
            tvf.adjust_brightness,
            tvf.adjust_contrast,
            tvf.adjust_saturation,
            tvf.adjust_hue,
        )
        for number in drawn.order[b, v].tolist():
            image = operations[number](image, float(drawn.factors[b, v, number]))
    if drawn.gray[b, v]:
        image = tvf.rgb_to_grayscale(image, 3)
    if drawn.sigmas[b, v] > 0:
        image = tvf.gaussian_blur(image, 23, float(drawn.sigmas[b, v]))
    if drawn.solarize[b, v]:
        image = ImageOps.solarize(image, 128)
    return np.asarray(image)


def fineness(views):
    """Mean squared difference of neighbouring pixels: the energy of what is small."""
    views = np.asarray(views, dtype=float)
    return (np.diff(views, axis=-2) ** 2).mean() + (np.diff(views, axis=-3) ** 2).mean()


@pytest.fixture(params=["generated", pytest.param("photographs", marks=pytest.mark.photos)])
def pictures(request):
    if request.param == "generated":
        return [generated(seed, 320, 240) for seed in range(12)]
    return photographs(12)


@pytest.mark.parametrize(("preset", "size"), [("mocov2", 64), ("byol", 128), ("simclr", 32)])
def test_the_same_draw_gives_the_same_view_as_torchvision(pictures, preset, size):
    views = PRESETS[preset]
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    drawn = draw(views, sizes, seed=0, epoch=0, index=np.arange(len(pictures)))
    ours, theirs, distances = [], [], []
    for b, pixels in enumerate(pictures):
        for v in range(2):
            ours.append(apply(pixels, drawn, b, v, size, views.interpolation))
            theirs.append(by_torchvision(pixels, drawn, b, v, size, views.interpolation))
            if not drawn.solarize[b, v]:  # one level across 128 becomes 255 - 2 * 128 levels there
                distances.append(np.abs(ours[-1].astype(float) - theirs[-1]).mean())
    ours, theirs = np.array(ours, dtype=float), np.array(theirs, dtype=float)
    assert np.median(distances) < 0.8
    assert max(distances) < 3.0
    assert np.abs(ours.mean((0, 1, 2)) - theirs.mean((0, 1, 2))).max() < 0.5
    assert np.abs(ours.std((0, 1, 2)) / theirs.std((0, 1, 2)) - 1).max() < 0.01
    assert abs(fineness(ours) / fineness(theirs) - 1) < 0.02


@pytest.mark.slow
def test_views_have_the_statistics_of_the_usual_pipeline(pictures):
    """Two independent samples, so the bounds are those of 1,200 views of 12 pictures."""
    views, size, rounds = PRESETS["mocov2"], 64, 100

    def moco_blur(image):
        sigma = float(torch.empty(1).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(sigma))

    usual = tv.Compose(
        [
            tv.RandomResizedCrop(size, scale=(0.2, 1.0)),
            tv.RandomApply([tv.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            tv.RandomGrayscale(p=0.2),
            tv.RandomApply([moco_blur], p=0.5),
            tv.RandomHorizontalFlip(),
        ]
    )
    torch.manual_seed(0)
    images = [Image.fromarray(picture) for picture in pictures]
    theirs = np.array([np.asarray(usual(i)) for i in images for _ in range(rounds)], dtype=float)

    sizes = [image.size for image in images]
    ours = []
    for epoch in range(rounds // 2):
        drawn = draw(views, sizes, seed=0, epoch=epoch, index=np.arange(len(images)))
        ours += [
            apply(pixels, drawn, b, v, size) for b, pixels in enumerate(pictures) for v in range(2)
        ]
    ours = np.array(ours, dtype=float)
    assert ours.shape == theirs.shape
    assert np.abs(ours.mean((0, 1, 2)) - theirs.mean((0, 1, 2))).max() < 4.0
    assert np.abs(ours.std((0, 1, 2)) / theirs.std((0, 1, 2)) - 1).max() < 0.05
    assert abs(fineness(ours) / fineness(theirs) - 1) < 0.15
