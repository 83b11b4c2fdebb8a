"""Applying views for a whole batch at once, on whatever device it is: the same drawn rows as
`apply`, the same operations in the same order, as torch operations on (B, 3, H, W).

Values are floats that hold whole grey levels between operations: fractions are cut off where
`apply` cuts them off, so that both make the same pictures. They differ where `apply` goes through
8 bits in the middle of an operation: hue (at most 6 levels, 0.4 on average) and resizing (1 level).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from firstsight.batch import Colours
from firstsight.views import Interpolation
from firstsight.views.draw import CONTRAST, HUE, SATURATION, SHRINKS

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow and OpenCV weigh the channels

# Added before rounding, so that fractions are cut off; short of a half, for whole numbers.
CUT = -0.499


def coloured(views: Tensor, flips: Tensor, colours: Colours, compiled: bool = False) -> Tensor:
    """(B, 3, H, W) floats of whole levels, 0 to 255, from uint8 crops: all that follows the crop.

    `colours` lie on the CPU, so that which images draw what is known without waiting for the
    device; the images that did not draw a costly operation are not touched by it. `compiled`, the
    flip, the jitter and the grey are one pass over all images instead, made by torch.compile for
    each shape: it does more arithmetic and reads each pixel few times. The pictures are the same
    but for a level where the compiler rounds a sum otherwise. Raises what the compiler raises.
    """
    if compiled:
        points = [_moved(n, views) for n in (flips, *_parameters(colours), colours.gray)]
        out = _compiled()(views, *points)
    else:
        out = views.float()
        out = torch.where(_moved(flips, out).view(-1, 1, 1, 1), out.flip(-1), out)
        out = jittered(out, colours)
        if colours.gray.any():
            out = _grayed(out, _moved(colours.gray, out))
    if (blurred := colours.sigmas > 0).any():
        where = _moved(blurred.nonzero().squeeze(1), out)
        out = out.index_copy(0, where, blur(out[where], colours.sigmas[blurred]))
    for times in SHRINKS.tolist():
        if (colours.shrinks == times).any():
            where = _moved((colours.shrinks == times).nonzero().squeeze(1), out)
            out = out.index_copy(0, where, resize_blur(out[where], times))
    if colours.solarize.any():
        inverted = _moved(colours.solarize, out).view(-1, 1, 1, 1) & (out >= 128)
        out = torch.where(inverted, 255 - out, out)
    return out


def jittered(images: Tensor, colours: Colours) -> Tensor:
    """The four parts of the jitter, each image in its own order.

    Brightness, contrast and saturation mix an image with black, its mean and its grey: one
    expression with its own numbers for each image. Hue goes over those images whose turn it is.
    """
    own, to_mean, to_gray, shifts = _parameters(colours)
    for place in range(4):
        if (own[place] != 1).any():
            numbers = (own[place], to_mean[place], to_gray[place])
            images = _mixed(images, *(_moved(n, images) for n in numbers))
        if (turned := shifts[place] != 0).any():
            where = _moved(turned.nonzero().squeeze(1), images)
            hues = adjust_hue(images[where], _moved(shifts[place][turned], images))
            images = images.index_copy(0, where, hues)
    return images


def _parameters(colours: Colours) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each place in the order of the jitter and each image, (4, B): what `_mixed` takes, and
    the turn of the hue (0: not its turn)."""
    operation = torch.where(colours.jitter[:, None], colours.order, -1).T
    factor = colours.factors.gather(1, colours.order).float().T
    own = torch.where((operation == HUE) | (operation < 0), 1.0, factor)
    to_mean = torch.where(operation == CONTRAST, 1 - own, 0.0)
    to_gray = torch.where(operation == SATURATION, 1 - own, 0.0)
    return own, to_mean, to_gray, torch.where(operation == HUE, factor, 0.0)


def each_point(
    views: Tensor,
    flips: Tensor,
    own: Tensor,
    to_mean: Tensor,
    to_gray: Tensor,
    shifts: Tensor,
    gray: Tensor,
) -> Tensor:
    """Flip, jitter and grey of all images alike, by numbers alone: what a compiler can fuse."""
    out = views.float()
    out = torch.where(flips.view(-1, 1, 1, 1), out.flip(-1), out)
    for place in range(4):
        out = _mixed(out, own[place], to_mean[place], to_gray[place])
        turn = shifts[place]
        out = torch.where((turn != 0).view(-1, 1, 1, 1), adjust_hue(out, turn), out)
    return _grayed(out, gray)


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(each_point, dynamic=False)


def _grayed(images: Tensor, gray: Tensor) -> Tensor:
    return torch.where(gray.view(-1, 1, 1, 1), luma(images).round().expand_as(images), images)


def _mixed(images: Tensor, own: Tensor, to_mean: Tensor, to_gray: Tensor) -> Tensor:
    """own * image + to_mean * (mean grey, rounded) + to_gray * grey; each (B,)."""
    gray = luma(images)
    mean = (gray.mean((1, 2, 3), keepdim=True) + 0.5).floor()
    mixed = own.view(-1, 1, 1, 1) * images + to_gray.view(-1, 1, 1, 1) * gray
    return (mixed + to_mean.view(-1, 1, 1, 1) * mean + CUT).round().clamp(0, 255)


def luma(images: Tensor) -> Tensor:
    """(B, 1, H, W) grey of each pixel, not rounded."""
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue).unsqueeze(1)


def adjust_hue(images: Tensor, shifts: Tensor) -> Tensor:
    """Hues turned by `shifts` (B,), in turns of the colour circle; value and saturation stay.

    On the circle each channel is a function of the hue alone: the largest value less the chroma
    times min(1, max(0, |distance of the hue to that channel's opposite|)), in sixths of a turn.
    """
    red, green, blue = images.unbind(1)
    top, chroma = images.amax(1), images.amax(1) - images.amin(1)
    safe = chroma.clamp(min=1e-9)
    of_red = (green - blue) / safe
    of_green, of_blue = 2 + (blue - red) / safe, 4 + (red - green) / safe
    hue = torch.where(top == red, of_red, torch.where(top == green, of_green, of_blue))
    hue = hue + 6 * shifts.view(-1, 1, 1)
    channels = []
    for offset in (5.0, 3.0, 1.0):  # Smith 1978, in the form without branches
        k = torch.remainder(hue + offset, 6)
        channels.append(top - chroma * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, 1).round()


def blur(images: Tensor, sigmas: Tensor) -> Tensor:
    """Gaussians of standard deviations `sigmas` (B,) pixels, cut at three sigma, mirrored edges."""
    height, width = images.shape[-2:]
    across = _gaussians(sigmas, width, images)
    down = across if height == width else _gaussians(sigmas, height, images)
    return _columns(_rows(images, across), down).round()


def resize_blur(images: Tensor, times: float) -> Tensor:
    """Images (B, 3, H, H) made so many times smaller (bicubic) and as large as before again."""
    side = images.shape[-1]
    small = max(1, int(side / times))
    for before, after in ((side, small), (small, side)):
        whole = torch.tensor([[0, 0, before, before]] * len(images))
        images = crop_resize(images, whole, after, "bicubic").float()
    return images


def _gaussians(sigmas: Tensor, length: int, images: Tensor) -> Tensor:
    """(B, length, length): row i weighs the pixels that make pixel i of a blurred line.

    Made on the device of the images: a processor would fill these matrices for longer than a GPU
    trains on the batch.
    """
    taps = torch.round(6 * sigmas + 1).long() | 1
    reach = int(taps.max()) // 2
    places = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(places**2) / (2 * sigmas.double().view(-1, 1) ** 2))
    weights = weights * (places.abs() <= taps.view(-1, 1) // 2)
    weights = (weights / weights.sum(1, keepdim=True)).float()  # (B, 2 reach + 1)
    weights = _moved(weights, images)
    lines = torch.zeros(len(sigmas), length, length, device=images.device)
    line = torch.arange(length, device=images.device)
    for tap, place in enumerate(places.tolist()):
        lines[:, line, _mirrored(line + place, length)] += weights[:, tap, None]
    return lines


def _mirrored(places: Tensor, length: int) -> Tensor:
    """Places outside a line of pixels, mirrored at its outermost pixels."""
    if length == 1:
        return torch.zeros_like(places)
    period = 2 * (length - 1)
    places = places.remainder(period)
    return torch.minimum(places, period - places)


def crop_resize(
    images: Tensor, boxes: Tensor, size: int, interpolation: Interpolation = "bilinear"
) -> Tensor:
    """(B, 3, size, size) uint8: what `boxes` show, antialiased, from (B, 3, H, W) uint8.

    boxes (B, 4) x1, y1, x2, y2, half-open, may be fractions of pixels. As Pillow's `crop` then
    `resize`: a pixel of the result never reads beyond its box. Values outside H and W are not read.
    """
    height, width = images.shape[-2:]
    boxes = _moved(boxes.double(), images)
    across = weights(boxes[:, 0], boxes[:, 2], width, size, interpolation)
    down = weights(boxes[:, 1], boxes[:, 3], height, size, interpolation)
    rows = _level(_rows(images.float(), across))  # whole, as Pillow has them
    return _level(_columns(rows, down)).to(torch.uint8)


def weights(
    first: Tensor, last: Tensor, length: int, size: int, interpolation: Interpolation
) -> Tensor:
    """(B, size, length): row i weighs the pixels of a line that make pixel i of the result.

    Made where `first` and `last` (B,) lie.
    """
    first, last = first.view(-1, 1, 1), last.view(-1, 1, 1)
    scale = (last - first) / size
    centres = first + (torch.arange(size, device=first.device).view(-1, 1) + 0.5) * scale
    pixels = torch.arange(length, device=first.device) + 0.5
    distance = (pixels - centres).abs() / scale.clamp(min=1)  # shrinking widens the filter
    kernel = (1 - distance).clamp(min=0) if interpolation == "bilinear" else _cubic(distance)
    kernel = kernel * ((pixels > first) & (pixels < last))
    return (kernel / kernel.sum(-1, keepdim=True)).float()


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic, a = -0.5, as Pillow and torch have it."""
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _rows(images: Tensor, weights: Tensor) -> Tensor:
    """(B, 3, H, w) from (B, 3, H, W) by weights (B, w, W)."""
    return images @ weights.transpose(1, 2).unsqueeze(1)


def _columns(images: Tensor, weights: Tensor) -> Tensor:
    """(B, 3, h, W) from (B, 3, H, W) by weights (B, h, H)."""
    return weights.unsqueeze(1) @ images


def _level(images: Tensor) -> Tensor:
    """The nearest level, 0 to 255; halves go up, as Pillow rounds."""
    return (images + 0.5).floor().clamp(0, 255)


def _moved(small: Tensor, images: Tensor) -> Tensor:
    """Numbers about images, on their device, without waiting for it."""
    return small.to(images.device, non_blocking=True)
