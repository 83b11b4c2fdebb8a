"""Statistics of our views, one by one and batched, against the same draws by torchvision.

Mean and deviation of the channels, the power spectrum (what blur takes away, and where), the turn
of the hue, and sharpness: bounds are those stated in docs/data.md.
"""

import dataclasses

import numpy as np
import pytest
import torch

from firstsight.loader import colours_of
from firstsight.views import PRESETS
from firstsight.views.apply import apply
from firstsight.views.batched import coloured, crop_resize
from firstsight.views.draw import draw
from tests.views.pictures import generated
from tests.views.test_pipeline import by_torchvision, fineness

SIDE = 64
PICTURES = [generated(seed, 160, 120) for seed in range(16)]
VIEWS = dataclasses.replace(PRESETS["mocov2"], blur=(0.7,))


def by_ours(drawn, made):
    if made == "worker":
        return np.array(
            [[apply(p, drawn, b, v, SIDE) for v in range(2)] for b, p in enumerate(PICTURES)], float
        )
    images = torch.from_numpy(np.stack(PICTURES)).permute(0, 3, 1, 2)
    views = []
    for v, colours in enumerate(colours_of([drawn])):
        cut = crop_resize(images, torch.from_numpy(drawn.crops[:, v]), SIDE)
        views.append(coloured(cut, torch.from_numpy(drawn.flips[:, v].copy()), colours))
    return torch.stack(views, 1).permute(0, 1, 3, 4, 2).double().numpy()


@pytest.fixture(params=["worker", "device"])
def pair(request):
    drawn = draw(VIEWS, [(160, 120)] * 16, seed=3, epoch=0, index=np.arange(16))
    theirs = np.array(
        [
            [by_torchvision(p, drawn, b, v, SIDE, "bilinear") for v in range(2)]
            for b, p in enumerate(PICTURES)
        ],
        float,
    )
    return by_ours(drawn, request.param), theirs, drawn


def test_mean_deviation_and_sharpness(pair):
    ours, theirs, _ = pair
    assert np.abs(ours.mean((0, 1, 2, 3)) - theirs.mean((0, 1, 2, 3))).max() < 0.5
    assert np.abs(ours.std((0, 1, 2, 3)) / theirs.std((0, 1, 2, 3)) - 1).max() < 0.01
    assert abs(fineness(ours) / fineness(theirs) - 1) < 0.02


def bands(views, side=SIDE):
    """Power of grey views in eight rings of frequencies, the finest last."""
    power = np.abs(np.fft.fft2(views.mean(-1))) ** 2
    y, x = np.meshgrid(*[np.abs(np.fft.fftfreq(side))] * 2)
    ring = np.minimum((np.hypot(x, y) * 16).astype(int), 7)
    return np.array([power[..., ring == r].mean(-1) for r in range(8)])  # (8, B, V)


def test_spectrum_of_blurred_and_of_sharp_views(pair):
    ours, theirs, drawn = pair
    for chosen in (drawn.sigmas > 1, drawn.sigmas == 0):
        assert chosen.sum() >= 5
        a, b = bands(ours)[:, chosen].mean(-1), bands(theirs)[:, chosen].mean(-1)
        # beyond a thousandth of the second ring there is only the noise of rounding
        strong = b > 1e-3 * b[1]
        assert strong.sum() >= 3
        assert np.abs(a / b - 1)[strong].max() < 0.05


@pytest.mark.parametrize("made", ["worker", "device"])
def test_hues_turn_as_far_as_drawn(made):
    plain = dataclasses.replace(VIEWS, jitter=0.0, gray=0.0, blur=(0.0,))
    turned = dataclasses.replace(
        plain, jitter=1.0, brightness=0.0, contrast=0.0, saturation=0.0, hue=0.2
    )
    options = {"seed": 5, "epoch": 0, "index": np.arange(16)}
    before, after = (draw(views, [(160, 120)] * 16, **options) for views in (plain, turned))
    a, b = by_ours(before, made), by_ours(after, made)

    def hue(views):
        red, green, blue = np.moveaxis(views, -1, 0)
        return np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)

    colourful = np.ptp(a, axis=-1) > 60
    error = []
    for place in np.ndindex(16, 2):
        if colourful[place].sum() > 50:
            turn = (hue(b[place]) - hue(a[place]) - after.factors[place][3] + 0.5) % 1 - 0.5
            error.append(np.median(turn[colourful[place]]))
    # the hexagon of HSV is not the circle of the arc tangent: they differ by up to 1.2 degrees
    assert len(error) > 15
    assert np.abs(error).max() < 0.012 and abs(np.mean(error)) < 0.003
