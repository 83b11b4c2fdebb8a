"""JPEGs decoded at a half, quarter or eighth where the crops allow it: sharpness and places."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from firstsight.errors import UserError
from firstsight.loader import Steps
from firstsight.order import Epochs
from firstsight.sources import decode, open_source
from firstsight.views import Views
from tests.sources.pictures import encoded
from tests.views.pictures import generated, photographs
from tests.views.test_pipeline import fineness
from tests.views.test_statistics import bands

PLAIN = Views(flip=0.0, jitter=0.0, gray=0.0, blur=(0.0,))
SIDE = 24


def saved(folder, pictures, **options):
    folder.mkdir()
    for number, picture in enumerate(pictures):
        data = encoded(Image.fromarray(picture), "JPEG", **options)
        (folder / f"{number:02}.jpg").write_bytes(data)
    return open_source(str(folder))


def batch(source, views, size=SIDE):
    order = Epochs(len(source), len(source), 0)
    steps = Steps(source=source, views=views, size=size, order=order, seed=1, rank=0, world=1)
    return steps.batch(0)


@pytest.fixture
def asked(monkeypatch):
    """How many times smaller each image came, in the order of the batch."""
    real, noted = decode.reduced, []

    def reduced(data, shrink):
        pixels, by = real(data, shrink)
        noted.append(by)
        return pixels, by

    monkeypatch.setattr(decode, "reduced", reduced)
    return noted


def smooth(seed, width, height):
    """Like a photograph: less power the finer it is."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3))
    for knots in (4, 8, 16, 32, 64, 128, 256):
        part = rng.normal(0, 90 / knots**0.75, (knots, knots, 3))
        total += cv2.resize(part, (width, height), interpolation=cv2.INTER_CUBIC)
    return (128 + total).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("what", ["generated", pytest.param("real", marks=pytest.mark.photos)])
def test_sharpness_stays_within_what_is_stated(tmp_path, asked, what, interpolation):
    real = what == "real"
    pictures = photographs(16) if real else [smooth(seed, 640, 480) for seed in range(10)]
    source = saved(tmp_path / "p", pictures, quality=95)
    views = dataclasses.replace(PLAIN, interpolation=interpolation)
    small = batch(source, views)
    smaller = np.array(asked) > 1
    assert {2, 4} <= set(asked)
    whole = batch(source, dataclasses.replace(views, margin=0.0))
    a, b = (
        np.stack([v.permute(0, 2, 3, 1).double().numpy() for v in one.views], 1)
        for one in (small, whole)
    )  # (B, V, H, W, 3)
    a, b = a[smaller], b[smaller]
    # mostly since edges move, by a sixth of a view's pixel at most
    assert np.abs(a - b).mean() < 2 and abs(a.mean() - b.mean()) < 0.1
    assert abs(fineness(a) / fineness(b) - 1) < 0.02
    assert np.abs(bands(a, SIDE).mean((1, 2)) / bands(b, SIDE).mean((1, 2)) - 1).max() < 0.05


def test_every_crop_keeps_the_margin_and_is_the_one_that_was_drawn(tmp_path, asked):
    sizes = [(333, 501), (501, 333), (1003, 777), (90, 400), (640, 480), (770, 770)]
    source = saved(tmp_path / "p", [generated(seed, *size) for seed, size in enumerate(sizes)])
    small = batch(source, PLAIN)
    came = list(asked)
    whole = batch(source, dataclasses.replace(PLAIN, margin=0.0))
    assert asked == came + [1] * len(sizes) and len(set(came)) == 3
    for one, other in zip(small.crops, whole.crops, strict=True):
        assert (one == other).all()
    assert torch.equal(small.sizes, whole.sizes)  # of the originals
    crops = np.stack([crop.numpy() for crop in small.crops], 1)
    shorter = (crops[..., 2:] - crops[..., :2]).min((1, 2))
    largest = [max(by for by in (1, 2, 4, 8) if by == 1 or s >= 3 * SIDE * by) for s in shorter]
    assert came == largest


@pytest.mark.parametrize("side", [2, 4, 8])
def test_views_show_the_same_places_from_sizes_that_nothing_divides(tmp_path, asked, side):
    """The red of a picture tells how far right a place lies, its green how far down."""
    width, height = 501, 333
    y, x = np.mgrid[0:height, 0:width]
    ramp = np.stack([x / 2, y / 2, 0 * x], -1).astype(np.uint8)
    source = saved(tmp_path / "p", [ramp] * 8, quality=100, subsampling=0)
    small, came = batch(source, PLAIN, side), torch.tensor(asked)
    whole = batch(source, dataclasses.replace(PLAIN, margin=0.0), side)
    assert came.max() == 8
    for one, other in zip(small.views, whole.views, strict=True):
        moved = 2 * (one[:, :2].double() - other[:, :2]).abs().amax((1, 2, 3))  # pixels
        # an edge moves by half of the smaller picture's pixels at most; a level is two pixels
        assert (moved <= came / 2 + 2).all()
        assert (moved > 0).any()


def test_a_margin_that_would_enlarge_is_refused():
    with pytest.raises(UserError, match=r"--views\.margin 0\.5 would enlarge"):
        Views(margin=0.5)
