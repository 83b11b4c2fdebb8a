"""Views made for a whole batch, against the same draw made one by one. Distances in grey levels."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from firstsight import loader
from firstsight.loader import Steps, colours_of, on_device
from firstsight.order import Epochs
from firstsight.sources.base import Source
from firstsight.views import PRESETS, apply, batched
from firstsight.views.draw import draw
from tests.views.pictures import generated

SIDE = 48
PICTURES = [generated(seed, SIDE, SIDE) for seed in range(6)]


def stacked(pictures):
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def unstacked(tensor):
    return tensor.permute(0, 2, 3, 1).numpy().astype(float)


def assert_near(ours, reference, *, mean, largest):
    distance = np.abs(ours - np.asarray(reference, dtype=float))
    assert ours.shape == np.shape(reference)
    assert np.array_equal(ours, np.rint(ours))  # whole levels
    assert distance.mean() <= mean and distance.max() <= largest


def colours(count, **changes):
    neutral = {
        "jitter": torch.zeros(count, dtype=torch.bool),
        "order": torch.arange(4).repeat(count, 1),
        "factors": torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64).repeat(count, 1),
        "gray": torch.zeros(count, dtype=torch.bool),
        "sigmas": torch.zeros(count, dtype=torch.float64),
        "shrinks": torch.zeros(count, dtype=torch.float64),
        "solarize": torch.zeros(count, dtype=torch.bool),
    }
    return batched.Colours(**(neutral | changes))


def done(flips=None, **changes):
    flips = torch.zeros(6, dtype=torch.bool) if flips is None else flips
    return unstacked(batched.coloured(stacked(PICTURES), flips, colours(6, **changes)))


def test_nothing_drawn_changes_nothing():
    assert_near(done(), PICTURES, mean=0, largest=0)


@pytest.mark.parametrize(
    ("number", "operation", "factors", "mean", "largest"),
    [
        (0, apply.adjust_brightness, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 0.02, 1),
        (1, apply.adjust_contrast, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 0.1, 1),
        (2, apply.adjust_saturation, (0.0, 0.2, 0.7, 1.0, 1.3, 1.8), 0.25, 1),
        (3, apply.adjust_hue, (-0.5, -0.1, 0.0, 0.05, 0.2, 0.4), 0.4, 7),
    ],
)
def test_each_part_of_the_jitter_is_that_of_one_view(number, operation, factors, mean, largest):
    drawn = torch.tensor([[1.0, 1.0, 1.0, 0.0]], dtype=torch.float64).repeat(6, 1)
    drawn[:, number] = torch.tensor(factors)
    expected = [operation(p, factor) for p, factor in zip(PICTURES, factors, strict=True)]
    got = done(jitter=torch.ones(6, dtype=torch.bool), factors=drawn)
    assert_near(got, expected, mean=mean, largest=largest)


def test_hue_is_that_of_torchvision_on_floats():
    floats = stacked(PICTURES).float()
    for shift in (-0.4, -0.1, 0.05, 0.3, 0.5):
        exact = tvf.adjust_hue(floats.double() / 255, shift) * 255
        got = batched.adjust_hue(floats, torch.full((6,), shift))
        assert (got - exact).abs().max() <= 0.51


def test_flip_gray_and_solarize_are_those_of_one_view():
    some = torch.tensor([True, False, True, True, False, False])
    flipped = [p[:, ::-1] if on else p for p, on in zip(PICTURES, some, strict=True)]
    assert_near(done(flips=some), flipped, mean=0, largest=0)
    gray = [apply.to_gray(p) if on else p for p, on in zip(PICTURES, some, strict=True)]
    assert_near(done(gray=some), gray, mean=0.01, largest=1)
    solarized = [apply.solarize(p) if on else p for p, on in zip(PICTURES, some, strict=True)]
    assert_near(done(solarize=some), solarized, mean=0, largest=0)


@pytest.mark.parametrize(
    ("drawn", "one", "values", "mean", "largest"),
    [
        ("sigmas", apply.gaussian_blur, (0.0, 0.1, 0.5, 0.0, 1.3, 2.0), 0.03, 1),
        ("shrinks", apply.resize_blur, (0.0, 1.1, 1.5, 0.0, 1.2, 1.5), 0.2, 2),
    ],
)
def test_blur_is_that_of_one_view_and_touches_no_other(drawn, one, values, mean, largest):
    expected = [one(p, v) if v else p for p, v in zip(PICTURES, values, strict=True)]
    got = done(**{drawn: torch.tensor(values, dtype=torch.float64)})
    assert_near(got, expected, mean=mean, largest=largest)
    assert np.array_equal(got[[0, 3]], np.stack(PICTURES)[[0, 3]])


@pytest.mark.parametrize("length", [1, 2, 5])
def test_blur_mirrors_more_than_once_where_images_are_tiny(length):
    pixels = generated(0, length, length)
    got = batched.blur(stacked([pixels]).float(), torch.tensor([2.0], dtype=torch.float64))
    assert_near(unstacked(got)[0], apply.gaussian_blur(pixels, 2.0), mean=0.1, largest=1)


@pytest.mark.parametrize("size", [8, 32, 64])
@pytest.mark.parametrize(("interpolation", "largest"), [("bilinear", 1), ("bicubic", 6)])
def test_crop_and_resize_are_those_of_pillow(size, interpolation, largest):
    boxes = [[0, 0, 48, 48], [3, 5, 40, 33], [10, 10, 11, 11], [0, 20, 48, 25], [7, 0, 9, 48]]
    got = unstacked(
        batched.crop_resize(stacked(PICTURES[:5]), torch.tensor(boxes), size, interpolation)
    )
    method = getattr(Image.Resampling, interpolation.upper())
    for b, box in enumerate(boxes):
        reference = Image.fromarray(PICTURES[b]).crop(box).resize((size, size), method)
        assert_near(got[b], reference, mean=0.3, largest=largest)


class OnCpu(TorchDispatchMode):
    """Notes the sizes of tensors that are made on the CPU."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.sizes.append(out.numel())
        return out


def test_what_grows_with_pixels_is_made_on_the_device():
    """No matrix of weights is filled by the processor; the device here has no memory at all."""
    images = torch.zeros((6, 3, 60, 80), dtype=torch.uint8, device="meta")
    drawn = draw(PRESETS["byol"], [(80, 60)] * 6, seed=0, epoch=0, index=np.arange(6))
    with OnCpu() as made:
        views = batched.crop_resize(images, torch.from_numpy(drawn.crops[:, 0]), 48, "bicubic")
        flips = torch.from_numpy(drawn.flips[:, 0])
        assert batched.coloured(views, flips, colours_of([drawn])[0]).device.type == "meta"
    assert 0 < max(made.sizes) < 6 * 48


class Few(Source):
    spec = "few"

    def __len__(self):
        return 12

    def identity(self, index):
        return f"{index}"

    def pixels(self, index):
        return generated(index, 70 + index, 60)


@pytest.mark.parametrize("preset", ["mocov2", "byol", "simclr"])
def test_the_device_makes_the_views_that_workers_make(preset):
    views = dataclasses.replace(PRESETS[preset], hue=0.1)
    steps = Steps(
        source=Few(), views=views, size=SIDE, order=Epochs(12, 12, 0), seed=0, rank=0, world=1
    )
    on_worker = steps.batch(0)
    cut = dataclasses.replace(steps, views_on="device").batch(0)
    assert on_worker.colours == () and len(cut.colours) == 2
    assert all(map(torch.equal, cut.crops + cut.flips, on_worker.crops + on_worker.flips))
    whole = on_device(cut, views, torch.device("cpu"), torch.contiguous_format)
    parts = [
        on_device(part, views, torch.device("cpu"), torch.contiguous_format)
        for part in cut.chunks(5)
    ]
    expected = on_device(on_worker, views, torch.device("cpu"), torch.contiguous_format)
    level = 1 / 255 / torch.tensor(views.std).view(3, 1, 1)
    for v in range(2):
        distance = ((whole.views[v] - expected.views[v]) / level).abs()
        solarized = cut.colours[v].solarize  # one level across 128 becomes 255 - 2 * 128 there
        assert distance[~solarized].mean() < 0.5 and distance[~solarized].max() <= 16
        assert distance[solarized].median() < 1 if solarized.any() else True
        assert torch.equal(torch.cat([part.views[v] for part in parts]), whole.views[v])


def test_orders_of_the_jitter_are_each_images_own():
    drawn = draw(
        dataclasses.replace(PRESETS["simclr"], jitter=1.0, hue=0.0, gray=0.0, blur=(0.0,)),
        [(SIDE, SIDE)] * 6,
        seed=1,
        epoch=0,
        index=np.arange(6),
    )
    colours = colours_of([drawn])[0]
    got = unstacked(batched.jittered(stacked(PICTURES).float(), colours))
    operations = (apply.adjust_brightness, apply.adjust_contrast, apply.adjust_saturation)
    for b, pixels in enumerate(PICTURES):
        expected = pixels
        for number in drawn.order[b, 0]:
            if number < 3:
                expected = operations[number](expected, drawn.factors[b, 0, number])
        assert_near(got[b], expected, mean=0.6, largest=4)
    assert len({tuple(order) for order in drawn.order[:, 0]}) > 2


def drawn_for_all(preset, count):
    """Crops, flips and colours of `count` images, every kind of operation among them."""
    views = dataclasses.replace(PRESETS[preset], hue=0.2, gray=0.4, jitter=0.7)
    drawn = draw(views, [(SIDE, SIDE)] * count, seed=3, epoch=0, index=np.arange(count))
    pixels = stacked([PICTURES[k % 6] for k in range(count)])
    for v, colours in enumerate(colours_of([drawn])):
        yield pixels, torch.from_numpy(drawn.flips[:, v]), colours


@pytest.mark.parametrize("preset", ["byol", "simclr"])
def test_the_one_pass_that_is_compiled_makes_the_same_pictures(preset, monkeypatch):
    used = []
    one_pass = batched.each_point
    monkeypatch.setattr(batched, "_compiled", lambda: lambda *a: used.append(1) or one_pass(*a))
    for one in drawn_for_all(preset, 40):
        assert torch.equal(batched.coloured(*one, compiled=True), batched.coloured(*one))
    assert used == [1, 1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_what_the_compiler_makes_of_it_differs_by_a_rounding_here_and_there():
    for one in drawn_for_all("simclr", 12):
        distance = (batched.coloured(*one, compiled=True) - batched.coloured(*one)).abs()
        assert (distance > 0).float().mean() < 0.01 and distance.max() <= 8


def test_where_nothing_compiles_it_is_said_once_and_the_pictures_are_the_same(monkeypatch, capsys):
    tried = []

    def missing():
        tried.append(1)
        raise RuntimeError("Cannot find a working triton installation.\nMore about it")

    monkeypatch.setattr(batched, "_compiled", missing)
    monkeypatch.setattr(loader, "_compiles", True)
    steps = Steps(source=Few(), views=PRESETS["simclr"], size=8, order=Epochs(12, 2, 0), seed=0,
                  rank=0, world=1, views_on="device")  # fmt: skip
    device = (steps.views, torch.device("cpu"), torch.contiguous_format)
    plain, compiled = (on_device(steps.batch(0), *device, c) for c in (False, True))
    assert all(map(torch.equal, plain.views, compiled.views)) and tried == [1]
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0 and "(Cannot find a working triton installation.)" in said
