"""Each operation against its named reference. Distances are in grey levels of 0 to 255."""

import colorsys

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from firstsight.views import Views
from firstsight.views.apply import (
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    apply,
    crop_resize,
    eval_policy,
    eval_view,
    gaussian_blur,
    resize,
    solarize,
    to_gray,
)
from firstsight.views.draw import Drawn, draw
from tests.views.pictures import generated, photographs

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
# Bicubic overshoots at sharp edges and is cut to 0..255 between its two passes. torch goes along
# the rows first; Pillow picks the order by the work it saves. A few values in 10,000 feel that.
LARGEST = {"bilinear": 1, "bicubic": 6}
SIZES = [(32, 32), (128, 128), (224, 224), (75, 50)]


@pytest.fixture(params=["generated", pytest.param("photographs", marks=pytest.mark.photos)])
def pictures(request):
    if request.param == "generated":
        return [generated(seed, *size) for seed, size in enumerate(SIZES)]
    return [resize(photo, *size) for photo, size in zip(photographs(4), SIZES, strict=True)]


def assert_near(ours, reference, *, mean, largest):
    distance = np.abs(np.asarray(ours, dtype=float) - np.asarray(reference, dtype=float))
    assert ours.dtype == np.uint8
    assert ours.shape == np.shape(reference)
    assert distance.mean() <= mean
    assert distance.max() <= largest


# Crop and resize


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "box", "size"),
    [
        ((32, 32), (4, 5, 29, 28), 32),  # larger both ways
        ((32, 32), (0, 0, 32, 32), 32),  # the same
        ((32, 32), (10, 10, 11, 11), 32),  # one pixel
        ((128, 128), (10, 20, 90, 110), 64),
        ((128, 128), (10, 20, 60, 110), 64),  # larger one way, smaller the other
        ((500, 375), (50, 60, 420, 330), 224),
        ((500, 375), (50, 60, 200, 180), 224),
        ((500, 375), (0, 0, 500, 375), 32),  # far smaller: aliases badly without a wide filter
    ],
)
def test_crop_and_resize_are_those_of_pillow(source, box, size, interpolation):
    pixels = generated(0, *source)
    reference = Image.fromarray(pixels).crop(box).resize((size, size), PILLOW[interpolation])
    ours = crop_resize(pixels, box, size, interpolation)
    assert_near(ours, reference, mean=0.3, largest=LARGEST[interpolation])


@pytest.mark.photos
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crops_of_photographs_are_those_of_pillow(interpolation):
    photos = photographs(10)
    sizes = [(photo.shape[1], photo.shape[0]) for photo in photos]
    crops = draw(Views(min_scale=(0.08,)), sizes, seed=0, epoch=0, index=range(10)).crops
    for b, pixels in enumerate(photos):
        for size, box in zip((224, 64), crops[b].tolist(), strict=True):
            reference = (
                Image.fromarray(pixels).crop(box).resize((size, size), PILLOW[interpolation])
            )
            ours = crop_resize(pixels, box, size, interpolation)
            assert_near(ours, reference, mean=0.3, largest=LARGEST[interpolation])


def test_fine_stripes_become_flat_grey_and_no_moire():
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = crop_resize(stripes, (0, 0, 255, 256), 60)
    assert np.ptp(small[:, 2:-2].astype(int)) <= 12
    aliased = cv2.resize(stripes[:, :255], (60, 60), interpolation=cv2.INTER_LINEAR)
    assert np.ptp(aliased.astype(int)) > 100  # the trap is real


@pytest.fixture
def every_warning():
    """torch warns once a process; here it must each time, or an earlier test hides the warning."""
    torch.set_warn_always(True)
    yield
    torch.set_warn_always(False)


def test_memory_that_must_not_be_written_is_read_without_a_warning(every_warning, recwarn):
    pixels = generated(0, 128, 128)
    expected = crop_resize(pixels, (3, 4, 120, 100), 64)
    pixels.flags.writeable = False
    assert np.array_equal(crop_resize(pixels, (3, 4, 120, 100), 64), expected)
    assert not recwarn.list


# Colours


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 0.937, 1.0, 1.083, 1.4, 1.8])
def test_brightness_is_that_of_pillow(pictures, factor):
    for pixels in pictures:
        reference = tvf.adjust_brightness(Image.fromarray(pixels), factor)
        assert_near(adjust_brightness(pixels, factor), reference, mean=0.25, largest=1)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 0.937, 1.0, 1.083, 1.4, 1.8])
def test_contrast_is_that_of_pillow(pictures, factor):
    for pixels in pictures:
        reference = tvf.adjust_contrast(Image.fromarray(pixels), factor)
        assert_near(adjust_contrast(pixels, factor), reference, mean=0.25, largest=1)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 0.937, 1.0, 1.083, 1.4, 1.8])
def test_saturation_is_that_of_pillow(pictures, factor):
    for pixels in pictures:
        reference = tvf.adjust_saturation(Image.fromarray(pixels), factor)
        # Pillow rounds the grey before it mixes; at factor 0 nothing but the grey is left
        mean = 0.6 if factor == 0 else 0.25
        assert_near(adjust_saturation(pixels, factor), reference, mean=mean, largest=1)


@pytest.mark.parametrize("factor", [0.0, 0.2, 0.6, 0.937, 1.083, 1.4, 1.8])
def test_saturation_gives_grey_pixels_no_colour(factor):
    gray = to_gray(generated(0, 128, 128))
    assert np.array_equal(adjust_saturation(gray, factor), gray)


@pytest.mark.parametrize("shift", [-0.5, -0.4, -0.1, -0.03, 0.05, 0.1, 0.25, 0.4, 0.5])
def test_hue_turns_the_exact_colour_circle(pictures, shift):
    for pixels in pictures:
        ours = adjust_hue(pixels, shift)
        exact, theirs = np.empty(pixels.shape), tvf.adjust_hue(Image.fromarray(pixels), shift)
        for place in np.ndindex(pixels.shape[:2]):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixels[place] / 255))
            exact[place] = colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)
        exact = np.rint(exact * 255)
        # One step of the circle moves a saturated colour by 6 levels; the hue is rounded to half a
        # step twice. Torchvision cuts both off to whole steps, and wraps one step too late.
        assert_near(ours, exact, mean=0.4, largest=6)
        assert_near(ours, theirs, mean=1.5, largest=18)
        assert np.abs(ours - exact).mean() < np.abs(np.asarray(theirs) - exact).mean() + 0.05


def test_no_turn_of_the_hue_changes_nothing(pictures):
    for pixels in pictures:
        assert np.array_equal(adjust_hue(pixels, 0.0), pixels)


def test_hue_turns_primary_colours_into_one_another():
    red, green, blue = (np.full((4, 4, 3), row, np.uint8) for row in 255 * np.eye(3))
    for start, shift, end in ((red, 1 / 3, green), (red, -1 / 3, blue), (green, 1 / 3, blue)):
        assert_near(adjust_hue(start, shift), end, mean=0, largest=0)


def test_gray_is_that_of_pillow(pictures):
    for pixels in pictures:
        reference = Image.fromarray(pixels).convert("L").convert("RGB")
        assert_near(to_gray(pixels), reference, mean=0.01, largest=1)


def test_solarize_is_exactly_that_of_pillow(pictures):
    for pixels in pictures:
        assert np.array_equal(solarize(pixels), ImageOps.solarize(Image.fromarray(pixels), 128))


def test_changes_of_colour_do_not_drift():
    """Cutting fractions off is part of Pillow's operations: rounding would brighten by a half."""
    pixels = generated(1, 224, 224)
    ours, reference = pixels, Image.fromarray(pixels)
    for factor in (0.9, 1.08, 0.93, 1.12):
        ours = adjust_saturation(adjust_contrast(adjust_brightness(ours, factor), factor), factor)
        reference = tvf.adjust_contrast(tvf.adjust_brightness(reference, factor), factor)
        reference = tvf.adjust_saturation(reference, factor)
    assert abs(ours.mean() - np.asarray(reference).mean()) < 0.6


# Blur


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0])
def test_blur_is_a_gaussian(pictures, sigma):
    for pixels in pictures:
        taps = 2 * max(1, int(np.ceil(5 * sigma))) + 1
        planes = torch.from_numpy(pixels).permute(2, 0, 1).double()
        reference = tvf.gaussian_blur(planes, taps, sigma).permute(1, 2, 0).round().numpy()
        assert_near(gaussian_blur(pixels, sigma), reference, mean=0.25, largest=3)


@pytest.mark.photos
def test_blur_lies_as_far_from_that_of_pillow_as_stated():
    distances = [
        np.abs(
            gaussian_blur(photo, sigma).astype(float)
            - np.asarray(Image.fromarray(photo).filter(ImageFilter.GaussianBlur(sigma)))
        ).mean()
        for photo in photographs(10)
        for sigma in (0.3, 0.6, 1.0, 1.5, 2.0)
    ]
    assert 0.3 < np.mean(distances) < 1.2


# All of them


@pytest.mark.parametrize(
    "operation",
    [
        lambda pixels, out: crop_resize(pixels, (0, 0, 64, 48), 64, out=out),
        lambda pixels, out: adjust_brightness(pixels, 1.3, out),
        lambda pixels, out: adjust_contrast(pixels, 1.3, out),
        lambda pixels, out: adjust_saturation(pixels, 0.3, out),
        lambda pixels, out: adjust_hue(pixels, 0.3, out),
        lambda pixels, out: adjust_hue(pixels, 0.0, out),
        lambda pixels, out: gaussian_blur(pixels, 1.7, out),
        to_gray,
        solarize,
    ],
)
def test_out_takes_the_result_and_the_input_stays(operation):
    pixels = generated(2, 64, 64)
    before = pixels.copy()
    fresh = operation(pixels, None)
    assert np.array_equal(pixels, before)
    batch = np.zeros((3, 64, 64, 3), dtype=np.uint8)
    result = operation(pixels, batch[1])
    assert np.shares_memory(result, batch)
    assert np.array_equal(batch[1], fresh)
    assert not batch[[0, 2]].any()


@pytest.mark.parametrize("side", [7, 32, 224])
@pytest.mark.parametrize(
    "operation",
    [
        lambda pixels, out: adjust_brightness(pixels, 1.3, out),
        lambda pixels, out: adjust_contrast(pixels, 1.3, out),
        lambda pixels, out: adjust_saturation(pixels, 0.3, out),
        lambda pixels, out: adjust_hue(pixels, 0.3, out),
        lambda pixels, out: gaussian_blur(pixels, 1.7, out),
        to_gray,
        solarize,
    ],
)
def test_operations_work_in_place(operation, side):
    pixels = generated(2, side, side)
    fresh = operation(pixels, None)
    operation(pixels, pixels)
    assert np.array_equal(pixels, fresh)


def drawn_by_hand(box, flip=False, **changes):
    neutral = {
        "crops": np.array([[box]]),
        "flips": np.array([[flip]]),
        "jitter": np.array([[False]]),
        "order": np.array([[[0, 1, 2, 3]]]),
        "factors": np.array([[[1.0, 1.0, 1.0, 0.0]]]),
        "gray": np.array([[False]]),
        "sigmas": np.array([[0.0]]),
        "shrinks": np.array([[0.0]]),
        "solarize": np.array([[False]]),
        "hidden": np.zeros((1, 1, 16, 16), bool),
    }
    return Drawn(**(neutral | changes))


@pytest.mark.parametrize(("side", "small"), [(224, (203, 186, 149)), (40, (36, 33, 26))])
def test_blur_by_resizing_is_two_bicubic_resizes_of_pillow(side, small):
    pixels = generated(1, side, side)
    for times, less in zip((1.1, 1.2, 1.5), small, strict=True):
        drawn = drawn_by_hand([0, 0, side, side], shrinks=np.array([[times]]))
        smaller = Image.fromarray(pixels).resize((less, less), Image.Resampling.BICUBIC)
        expected = np.asarray(smaller.resize((side, side), Image.Resampling.BICUBIC), float)
        distance = np.abs(apply(pixels, drawn, 0, 0, side) - expected)
        assert distance.mean() < 0.2 and distance.max() <= 3


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_view_shows_the_places_that_its_crop_and_flip_say(flip, size, interpolation):
    """Red is x and green is y: every pixel of the view must tell the place that it shows."""
    y, x = np.mgrid[0:200, 0:250]
    ramp = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(20):
        x1, y1 = int(rng.integers(0, 180)), int(rng.integers(0, 130))
        x2, y2 = int(rng.integers(x1 + 40, 251)), int(rng.integers(y1 + 40, 201))
        view = apply(ramp, drawn_by_hand([x1, y1, x2, y2], flip), 0, 0, size, interpolation)
        place = np.arange(size) + 0.5  # centres of the pixels of the view
        columns = x2 - place * (x2 - x1) / size if flip else x1 + place * (x2 - x1) / size
        rows = y1 + place * (y2 - y1) / size
        inside = slice(4, -4)  # the filter meets the edge of the crop outside this
        assert np.abs(view[inside, inside, 0] - (columns[inside] - 0.5)).max() <= 1
        assert np.abs(view[inside, inside, 1] - (rows[inside, None] - 0.5)).max() <= 1


def test_operations_apply_in_the_drawn_order():
    pixels = generated(3, 64, 64)
    factors = np.array([[[1.4, 0.6, 1.4, 0.1]]])
    operations = [adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2]):
        drawn = drawn_by_hand(
            [0, 0, 64, 64],
            flip=True,
            jitter=np.array([[True]]),
            order=np.array([[order]]),
            factors=factors,
            gray=np.array([[True]]),
            sigmas=np.array([[1.2]]),
            solarize=np.array([[True]]),
        )
        expected = np.ascontiguousarray(pixels[:, ::-1])
        for operation in order:
            expected = operations[operation](expected, factors[0, 0, operation])
        expected = solarize(gaussian_blur(to_gray(expected), 1.2))
        assert np.array_equal(apply(pixels, drawn, 0, 0, 64), expected)


def test_nothing_drawn_changes_nothing():
    pixels = generated(3, 64, 64)
    assert np.array_equal(apply(pixels, drawn_by_hand([0, 0, 64, 64]), 0, 0, 64), pixels)


# Evaluation


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("source", "size", "side"),
    [
        ((500, 375), 224, 256),
        ((375, 500), 224, 256),
        ((333, 500), 96, 110),
        ((500, 333), 64, 64),
        ((32, 32), 32, 32),
        ((40, 300), 32, 32),
    ],
)
def test_the_evaluation_view_is_that_of_torchvision(source, size, side, interpolation):
    pixels = generated(4, *source)
    mode = InterpolationMode(interpolation)
    reference = CenterCrop(size)(Resize(side, mode)(Image.fromarray(pixels)))
    assert_near(
        eval_view(pixels, size, interpolation), reference, mean=0.3, largest=LARGEST[interpolation]
    )


def test_the_evaluation_policy_says_what_is_done():
    assert eval_policy(224) == "resize 256 (antialiased bilinear), centre crop 224"
    assert eval_policy(32, "bicubic") == "resize 32 (antialiased bicubic), centre crop 32"


def test_hidden_cells_are_the_mean_and_others_what_they_were():
    """As ssl-small: a mask of cells by nearest neighbour, zeros after normalisation."""
    pixels = generated(3, 64, 64)
    cells = np.random.default_rng(0).random((16, 16)) < 0.5
    for side in (64, 60):
        box = (0, 0, 64, 64)
        plain = apply(pixels, drawn_by_hand(box), 0, 0, side)
        drawn = drawn_by_hand(box, hidden=cells[None, None])
        view = apply(pixels, drawn, 0, 0, side, mean=(0.1, 0.5, 0.9))
        for y in range(side):
            for x in range(side):
                hidden = cells[y * 16 // side, x * 16 // side]
                want = [26, 128, 230] if hidden else plain[y, x].tolist()  # halves go to even
                assert view[y, x].tolist() == want
