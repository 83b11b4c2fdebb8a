"""Applying views to many small images of one size at once, on the CPU.

For a view of 32 pixels a side, calling an operation takes as long as the operation. So what can be
done to all images of a batch is done in one call: crops as products of matrices, hues and grey on
all views laid one below the other. The pictures are those of `apply`, level by level.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import cast

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight.views import Interpolation
from firstsight.views import apply as apply_one
from firstsight.views.apply import TINY, Pixels
from firstsight.views.batched import CUT, LUMA
from firstsight.views.draw import BRIGHTNESS, CONTRAST, HUE, SATURATION, Drawn

Planes = NDArray[np.float32]
"""(3, B, H, W): red, green and blue of B images of one size."""


def suits(images: Sequence[Pixels], size: int) -> bool:
    """Whether `apply` here is faster than one by one: images of one size, all of it small."""
    shape = images[0].shape
    return max(*shape[:2], size) <= TINY and all(image.shape == shape for image in images)


def apply(
    images: Sequence[Pixels],
    drawn: Drawn,
    interpolation: Interpolation,
    outs: Sequence[Pixels],
    mean: tuple[float, float, float],
) -> None:
    """All views of B images of one size into `outs`, V of (B, side, side, 3): as `apply.apply`."""
    planes = _planes(images) if interpolation == "bicubic" else None
    for v, out in enumerate(outs):
        if planes is not None:
            _crop_resize(planes, drawn.crops[:, v], drawn.flips[:, v], out)
        else:  # OpenCV enlarges one view faster than this, and most of them are enlarged
            for b, image in enumerate(images):
                apply_one.crop_resize(image, drawn.crops[b, v].tolist(), len(out[b]), out=out[b])
                if drawn.flips[b, v]:
                    cv2.flip(out[b], 1, dst=out[b])
        _colour(out, drawn, v, mean)


def _planes(images: Sequence[Pixels]) -> Planes:
    below = np.concatenate(images)  # (B H, W, 3)
    count, (high, wide, _) = len(images), images[0].shape
    return np.stack(cv2.split(below)).reshape(3, count, high, wide).astype(np.float32)


def _colour(out: Pixels, drawn: Drawn, v: int, mean: tuple[float, float, float]) -> None:
    """All that follows crop and flip, in place."""
    pictures = list(out)
    jitter = np.flatnonzero(drawn.jitter[:, v])
    order, factors = drawn.order[jitter, v], drawn.factors[jitter, v]
    for place in range(4):
        for operation, adjust in _ADJUST.items():
            where = order[:, place] == operation
            adjust([pictures[b] for b in jitter[where].tolist()], factors[where, operation])
        where = order[:, place] == HUE
        if where.any():
            out[jitter[where]] = adjust_hues(out[jitter[where]], factors[where, HUE])
    if len(gray := np.flatnonzero(drawn.gray[:, v])):
        out[gray] = to_grays(out[gray])
    for b in np.flatnonzero(drawn.sigmas[:, v] > 0).tolist():
        apply_one.gaussian_blur(pictures[b], float(drawn.sigmas[b, v]), pictures[b])
    for b in np.flatnonzero(drawn.shrinks[:, v] > 0).tolist():
        apply_one.resize_blur(pictures[b], float(drawn.shrinks[b, v]), pictures[b])
    for b in np.flatnonzero(drawn.solarize[:, v]).tolist():
        apply_one.solarize(pictures[b], pictures[b])
    for b in np.flatnonzero(drawn.hidden[:, v].any((1, 2))).tolist():
        apply_one.hide(pictures[b], drawn.hidden[b, v], mean)


def _crop_resize(
    images: Planes, boxes: NDArray[np.int64], flips: NDArray[np.bool_], out: Pixels
) -> None:
    """What `boxes` (B, 4) show, resized (bicubic) and mirrored where `flips` (B,) say so."""
    high, wide = images.shape[2:]
    count, size = out.shape[:2]
    corners = boxes.tolist()
    across = np.stack(
        [
            _across(x1, x2, wide, size, flip)
            for (x1, _, x2, _), flip in zip(corners, flips.tolist(), strict=True)
        ]
    )  # (B, W, size)
    down = np.stack([_down(y1, y2, high, size) for _, y1, _, y2 in corners])
    made = np.empty((3, count * size, size), np.uint8)
    for plane, picture in zip(images, made, strict=True):
        # along the rows, then along the columns, whole levels between, as Pillow goes
        rows = plane @ across  # (B, H, size)
        np.clip(np.rint(rows, out=rows), 0, 255, out=rows)
        values = (down @ rows).reshape(picture.shape)  # (B size, size)
        cv2.addWeighted(values, 1, values, 0, 0, dst=picture, dtype=cv2.CV_8U)
    cv2.merge(list(made), dst=out.reshape(count * size, size, 3))


@functools.lru_cache(maxsize=1 << 12)
def _down(first: int, last: int, length: int, size: int) -> NDArray[np.float32]:
    """(size, length): `line_weights` of the part from `first` to `last`, zero around it."""
    weights = np.zeros((size, length), np.float32)
    weights[:, first:last] = apply_one.line_weights(last - first, size, "bicubic")
    return weights


@functools.lru_cache(maxsize=1 << 12)
def _across(first: int, last: int, length: int, size: int, flip: bool) -> NDArray[np.float32]:
    """(length, size): the same for lines that lie the other way, mirrored if so."""
    weights = _down(first, last, length, size)
    return np.ascontiguousarray((weights[::-1] if flip else weights).T)


def _brightness(views: list[Pixels], factors: NDArray[np.float64]) -> None:
    for view, factor in zip(views, factors.tolist(), strict=True):
        apply_one.adjust_brightness(view, factor, view)


def _contrast(views: list[Pixels], factors: NDArray[np.float64]) -> None:
    """`adjust_contrast` of each view by its factor, in place."""
    red, green, blue, _ = np.array([cv2.mean(view) for view in views]).reshape(-1, 4).T
    grey = np.floor(LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 0.5)
    shift = (1.0 - factors) * grey + CUT
    _transform(views, np.zeros((len(views), 3)), factors, shift)


def _saturation(views: list[Pixels], factors: NDArray[np.float64]) -> None:
    """`adjust_saturation` of each view by its factor, in place."""
    parts = np.rint((1.0 - factors)[:, None] * np.array(LUMA) * 1024) / 1024  # (B, 3)
    own = 1.0 - parts[:, 0] - parts[:, 1] - parts[:, 2]
    _transform(views, parts, own, np.full(len(views), CUT))


def _transform(
    views: list[Pixels],
    parts: NDArray[np.float64],
    own: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> None:
    """own (B,) of each channel and `parts` (B, 3) of red, green and blue, plus `shift` (B,)."""
    matrices = np.empty((len(views), 3, 4))
    matrices[:, :, :3] = parts[:, None]
    matrices[:, :, 3] = shift[:, None]
    diagonal = np.arange(3)
    matrices[:, diagonal, diagonal] += own[:, None]
    for view, matrix in zip(views, matrices, strict=True):
        cv2.transform(view, matrix, dst=view)


_ADJUST = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation}


def adjust_hues(views: Pixels, shifts: NDArray[np.float64]) -> Pixels:
    """`adjust_hue` of views (B, h, w, 3) by `shifts` (B,)."""
    below = views.reshape(-1, views.shape[2], 3)  # (B h, w, 3): one picture
    hsv = cv2.cvtColor(below, cv2.COLOR_RGB2HSV_FULL)
    hues = cv2.extractChannel(hsv, 0).reshape(views.shape[:3])
    for hue, table in zip(hues, apply_one.hue_table(shifts[:, None]), strict=True):
        cv2.LUT(hue, table, dst=hue)
    cv2.insertChannel(hues.reshape(below.shape[:2]), hsv, 0)
    turned = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL).reshape(views.shape)
    if not shifts.all():  # the way through HSV and back is not quite the identity
        turned[shifts == 0] = views[shifts == 0]
    return cast(Pixels, turned)


def to_grays(views: Pixels) -> Pixels:
    """`to_gray` of views (B, h, w, 3)."""
    below = views.reshape(-1, views.shape[2], 3)
    gray = cv2.cvtColor(below, cv2.COLOR_RGB2GRAY)
    return cast(Pixels, cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB).reshape(views.shape))
