"""Applying views on the CPU: a deterministic step from pixels and a drawn row to one view.

Every operation works alone, on (H, W, 3) uint8 RGB, and has one named reference that its test
holds it to. `out` takes the result and may be the input itself; without it, a new array comes out.
Where Pillow cuts fractions off, so do these (to within one grey level): rounding instead would
make views brighter by half a level in each operation.
"""

from __future__ import annotations

import functools
from typing import Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from firstsight.views import IMAGENET_MEAN, Interpolation
from firstsight.views.batched import CUT, LUMA, weights
from firstsight.views.draw import BRIGHTNESS, CONTRAST, SATURATION, Drawn

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""

Crop = Literal["centre", "whole"]

TINY = 48
"""Up to so many pixels a side of image and result, products of matrices resize fastest."""

_HUES = np.arange(256) * (255 / 256)


def apply(
    pixels: Pixels,
    drawn: Drawn,
    b: int,
    v: int,
    size: int,
    interpolation: Interpolation = "bilinear",
    out: Pixels | None = None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
) -> Pixels:
    """View `v` of image `b` of the batch, (size, size, 3) uint8, into `out` where that is given.

    Order: crop and resize, flip, jitter in the drawn order, grey, blur, solarize, hide. What is
    hidden has the colour `mean`, values in 0 to 1.
    """
    view = crop_resize(pixels, drawn.crops[b, v].tolist(), size, interpolation, out)
    if drawn.flips[b, v]:
        cv2.flip(view, 1, dst=view)
    if drawn.jitter[b, v]:
        factors = drawn.factors[b, v].tolist()
        for operation in drawn.order[b, v].tolist():
            if operation == BRIGHTNESS:
                adjust_brightness(view, factors[operation], view)
            elif operation == CONTRAST:
                adjust_contrast(view, factors[operation], view)
            elif operation == SATURATION:
                adjust_saturation(view, factors[operation], view)
            else:
                adjust_hue(view, factors[operation], view)
    if drawn.gray[b, v]:
        to_gray(view, view)
    if drawn.sigmas[b, v] > 0:
        gaussian_blur(view, float(drawn.sigmas[b, v]), view)
    if drawn.shrinks[b, v] > 0:
        resize_blur(view, float(drawn.shrinks[b, v]), view)
    if drawn.solarize[b, v]:
        solarize(view, view)
    if np.count_nonzero(drawn.hidden[b, v]):  # ten times as fast as any()
        hide(view, drawn.hidden[b, v], mean)
    return view


def crop_resize(
    pixels: Pixels,
    box: tuple[int, int, int, int] | list[int],
    size: int,
    interpolation: Interpolation = "bilinear",
    out: Pixels | None = None,
) -> Pixels:
    """The pixels inside `box` (x1, y1, x2, y2, half-open) as (size, size, 3), antialiased.

    Reference: Pillow's `crop(box)` then `resize`, as RandomResizedCrop of torchvision does it.
    Pillow's `resize(box=...)` is another thing: it also reads pixels around the box.
    """
    x1, y1, x2, y2 = box
    return resize(pixels[y1:y2, x1:x2], size, size, interpolation, out)


def resize(
    pixels: Pixels,
    width: int,
    height: int,
    interpolation: Interpolation = "bilinear",
    out: Pixels | None = None,
) -> Pixels:
    """The image as (height, width, 3), antialiased. Reference: Pillow's `resize`."""
    out = np.empty((height, width, 3), dtype=np.uint8) if out is None else out
    if pixels.shape == out.shape:
        out[...] = pixels
    elif interpolation == "bilinear" and pixels.shape[0] <= height and pixels.shape[1] <= width:
        # Enlarging needs no antialiasing, and OpenCV is five times as fast on small images. Its
        # bicubic is out: another kernel (a = -0.75) than that of Pillow and torch (-0.5).
        cv2.resize(pixels, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    elif max(*pixels.shape[:2], height, width) <= TINY:
        _by_products(pixels, width, height, interpolation, out)
    else:
        # torch warns of memory that it must not write, such as that of a packed file.
        source = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy())
        # [None] before the permutation: after it, torch no longer sees channels-last memory, and
        # both its result and the copy of it take more than twice as long.
        resized = source[None].permute(0, 3, 1, 2)
        if height < pixels.shape[0] and interpolation == "bilinear":
            # Of the two passes, the one along the columns costs half as much; fewer rows are left
            # for the other. torch alone goes along the rows first: 1.5 times as slow. Bicubic feels
            # the order, as it overshoots.
            resized = _antialiased(resized, height, pixels.shape[1], interpolation)
        out[...] = _antialiased(resized, height, width, interpolation)[0].permute(1, 2, 0).numpy()
    return out


def _by_products(
    pixels: Pixels, width: int, height: int, interpolation: Interpolation, out: Pixels
) -> None:
    """Along the rows, then along the columns, as Pillow goes, each as one product of matrices."""
    high, wide = pixels.shape[:2]
    columns = cv2.transpose(pixels).reshape(wide, high * 3).astype(np.float32)
    across = _levels(line_weights(wide, width, interpolation) @ columns)
    rows = cv2.transpose(across.reshape(width, high, 3)).reshape(high, width * 3)
    down = line_weights(high, height, interpolation) @ rows.astype(np.float32)
    out[...] = _levels(down).reshape(height, width, 3)


@functools.lru_cache(maxsize=4 * TINY**2)
def line_weights(length: int, size: int, interpolation: Interpolation) -> NDArray[np.float32]:
    """(size, length): row i weighs the pixels of a line that make pixel i of the result.

    In whole 1/32768, so that float32 holds every sum of weighted levels exactly: in whatever order
    a library adds them, and whatever zeros are among them, the same picture comes out.
    """
    ends = torch.tensor([[0.0], [length]], dtype=torch.double)
    exact = weights(ends[0], ends[1], length, size, interpolation)[0]
    return np.asarray(((exact * 2**15).round() / 2**15).numpy())


def _levels(values: NDArray[np.float32]) -> Pixels:
    """The nearest levels, 0 to 255, in one go."""
    return _array(cv2.addWeighted(values, 1, values, 0, 0, dtype=cv2.CV_8U))


def _antialiased(
    images: torch.Tensor, height: int, width: int, interpolation: Interpolation
) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        images, (height, width), mode=interpolation, antialias=True
    )


def adjust_brightness(pixels: Pixels, factor: float, out: Pixels | None = None) -> Pixels:
    """Values times `factor` (0: black, 1: unchanged). Reference: Pillow's ImageEnhance."""
    return _array(cv2.convertScaleAbs(pixels, dst=out, alpha=factor, beta=CUT))


def adjust_contrast(pixels: Pixels, factor: float, out: Pixels | None = None) -> Pixels:
    """Distances to the mean grey level times `factor` (0: flat, 1: unchanged).

    Reference: Pillow's ImageEnhance, whose mean is that of the greyscale image, rounded.
    """
    red, green, blue, _ = cv2.mean(pixels)  # plain numbers: small arrays cost more than small views
    mean = int(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0.5)
    shift = (1.0 - factor) * mean + CUT
    return _array(
        cv2.transform(
            pixels,
            np.array([[factor, 0, 0, shift], [0, factor, 0, shift], [0, 0, factor, shift]]),
            dst=out,
        )
    )


def adjust_saturation(pixels: Pixels, factor: float, out: Pixels | None = None) -> Pixels:
    """Distances to the grey of each pixel times `factor` (0: grey, 1: unchanged).

    Reference: Pillow's ImageEnhance.
    """
    # OpenCV rounds the matrix to 1/1024. Rows must still sum to 1, or grey pixels take on colour.
    red, green, blue = (round((1.0 - factor) * part * 1024) / 1024 for part in LUMA)
    own = 1.0 - red - green - blue
    return _array(
        cv2.transform(
            pixels,
            np.array(
                [
                    [own + red, green, blue, CUT],
                    [red, own + green, blue, CUT],
                    [red, green, own + blue, CUT],
                ]
            ),
            dst=out,
        )
    )


def adjust_hue(pixels: Pixels, shift: float, out: Pixels | None = None) -> Pixels:
    """Hues turned by `shift`, in turns of the colour circle (-0.5 to 0.5).

    Reference: the exact colour circle (`colorsys`), through 8-bit HSV. `adjust_hue` of torchvision
    on a Pillow image goes through 8-bit HSV too, but cuts the shift off to whole steps and wraps a
    circle of 255 steps at 256: up to one grey level away on average, and further from exact.
    """
    if shift == 0:  # the way through HSV and back is not quite the identity
        out = np.empty_like(pixels) if out is None else out
        out[...] = pixels
        return out
    hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), hue_table(shift)), hsv, 0)
    return _array(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=out))


def hue_table(shift: float | NDArray[np.float64]) -> Pixels:
    """(..., 256): what each hue of OpenCV becomes when turned by `shift` (..., 1)."""
    # The trap: into HSV, OpenCV makes 256 steps of a turn; out of it, it reads 255.
    table = _HUES + shift % 1 * 255
    np.subtract(table, 255, out=table, where=table >= 255)
    return np.asarray(np.rint(table), np.uint8)


def to_gray(pixels: Pixels, out: Pixels | None = None) -> Pixels:
    """Three equal channels of luma. Reference: Pillow's `convert("L")`."""
    gray = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    return _array(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB, dst=out))


def gaussian_blur(pixels: Pixels, sigma: float, out: Pixels | None = None) -> Pixels:
    """A true Gaussian of standard deviation `sigma` pixels, cut at three sigma, mirrored edges.

    Reference: `gaussian_blur` of torchvision with a wide kernel. Pillow's GaussianBlur, which MoCo
    uses, is three box filters instead: on photographs 0.4 to 1 grey level away on average.
    """
    taps = round(6 * sigma + 1) | 1
    kernel = cv2.getGaussianKernel(taps, sigma, cv2.CV_32F)
    # Not cv2.GaussianBlur: its fixed-point way for 8 bits is further off, and up to 3 times slower.
    return _array(cv2.sepFilter2D(pixels, -1, kernel, kernel, dst=out))


def resize_blur(pixels: Pixels, times: float, out: Pixels | None = None) -> Pixels:
    """Made so many times smaller (sides rounded down), and as large as before again.

    Reference: two bicubic resizes of Pillow, as SCRL's code blurs.
    """
    height, width = pixels.shape[:2]
    small = resize(pixels, max(1, int(width / times)), max(1, int(height / times)), "bicubic")
    return resize(small, width, height, "bicubic", out)


def solarize(pixels: Pixels, out: Pixels | None = None) -> Pixels:
    """Values from 128 up inverted. Reference: Pillow's `ImageOps.solarize`, exactly."""
    return _array(cv2.min(pixels, cv2.bitwise_not(pixels), dst=out))


def hide(pixels: Pixels, cells: NDArray[np.bool_], mean: tuple[float, float, float]) -> None:
    """Give all pixels of `cells` (n, n), laid over the whole view, the colour `mean`, in place.

    Reference: zeros after normalisation, in a mask resized by nearest neighbour (ssl-small); here
    the mean is rounded to whole values, 0.01 standard deviations away at most.
    """
    height, width = pixels.shape[:2]
    rows, columns = np.arange(height) * len(cells) // height, np.arange(width) * len(cells) // width
    pixels[cells[rows][:, columns]] = np.rint(np.array(mean) * 255).astype(np.uint8)


def eval_view(
    pixels: Pixels,
    size: int,
    interpolation: Interpolation = "bilinear",
    crop: Crop = "centre",
) -> Pixels:
    """The view for evaluation, (size, size, 3): resize the short side, cut out the centre.

    From 96 pixels up the short side becomes size / 0.875 (256 for 224), the habit on ImageNet;
    below, where margins cost too much, it becomes `size`. `eval_policy` says it in words.
    References: Resize and CenterCrop of torchvision on a Pillow image. With `crop` whole all of the
    image is resized; one of that size stays as it is.
    """
    if crop == "whole":
        same = pixels.shape[:2] == (size, size)
        return pixels if same else resize(pixels, size, size, interpolation)
    pixels = _middle(pixels)
    height, width = pixels.shape[:2]
    side = _short_side(size)
    if width <= height:
        width, height = side, side * height // width
    else:
        width, height = side * width // height, side
    resized = resize(pixels, width, height, interpolation)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.ascontiguousarray(resized[top : top + size, left : left + size])


def _middle(pixels: Pixels) -> Pixels:
    """A long strip without its far ends, which would be resized for nothing."""
    height, width = pixels.shape[:2]
    most = 8 * min(height, width)  # far beyond what the centre crop and the filter reach
    top, left = max(0, (height - most) // 2), max(0, (width - most) // 2)
    return pixels[top : top + most, left : left + most]


def eval_policy(size: int, interpolation: Interpolation = "bilinear", crop: Crop = "centre") -> str:
    """What `eval_view` does at this size, in words for a protocol."""
    if crop == "whole":
        return f"resize {size} x {size} (antialiased {interpolation})"
    return f"resize {_short_side(size)} (antialiased {interpolation}), centre crop {size}"


def _short_side(size: int) -> int:
    return round(size / 0.875) if size >= 96 else size


def _array(result: object) -> Pixels:
    """What OpenCV returns, with the type that it has."""
    return cast(Pixels, result)
