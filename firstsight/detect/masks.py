"""Masks as annotation files have them -> bitmaps, and bitmaps -> COCO's run lengths.

Everything agrees bit for bit with COCO's own code, which the figures are computed with, and needs
none of it. Run lengths count pixels column by column, zeros first (https://cocodataset.org).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bitmap = NDArray[np.bool_]
"""(H, W)."""

Polygons = tuple[NDArray[np.float64], ...]
"""Outlines (k, 2) of x, y in pixels; their union is the mask."""

Segmentation = Polygons | Mapping[str, Any]
"""Polygons, or run lengths: `{"size": [H, W], "counts": ...}`."""

_FINER = 5  # outlines are drawn on a grid this much finer, then thinned to crossings of pixels


class BadMask(ValueError):
    """A mask that cannot be what its file says."""


def bitmap(mask: Segmentation, height: int, width: int) -> Bitmap:
    """(H, W) the pixels of a mask; raises `BadMask` where it is of another size or damaged."""
    if isinstance(mask, Mapping):
        return decode(mask, height, width)
    drawn = np.zeros((height, width), bool)
    for outline in mask:
        drawn |= _filled(outline, height, width)
    return drawn


def checked(
    mask: Any, height: int, width: int, scale: tuple[float, float] = (1, 1)
) -> Segmentation:
    """A mask as a file has it, lists of x, y, x, y, ... or run lengths, in the form kept here.

    Polygons are multiplied by `scale` (in x, in y). Raises `BadMask` where the mask is damaged, or
    of another size than (H, W).
    """
    if isinstance(mask, Mapping):
        counts_of(mask, height, width)
        return {"size": [height, width], "counts": mask["counts"]}
    try:
        outlines = tuple(np.array(one, np.float64).reshape(-1, 2) * scale for one in mask)
    except (TypeError, ValueError):
        raise BadMask("no lists of x, y, x, y, ...") from None
    if not outlines or not all(len(one) > 2 and np.abs(one).max() < 1e6 for one in outlines):
        raise BadMask("a polygon without three corners")
    return outlines


def encode(pixels: NDArray[Any]) -> dict[str, Any]:
    """The compressed run lengths of a bitmap (H, W): `{"size": [H, W], "counts": str}`."""
    height, width = pixels.shape
    return {"size": [height, width], "counts": compressed(runs(pixels))}


def decode(mask: Mapping[str, Any], height: int, width: int) -> Bitmap:
    """(H, W) the pixels of run lengths, compressed (text, bytes) or plain (numbers)."""
    return _laid_out(counts_of(mask, height, width), height, width)


def _laid_out(counts: NDArray[np.int64], height: int, width: int) -> Bitmap:
    line = np.zeros(height * width, bool)
    start, end = counts[0], height * width - counts[-1] * (len(counts) % 2)
    ones = np.arange(len(counts)) % 2 == 1
    inner = slice(1, len(counts) - len(counts) % 2)
    line[start:end] = np.repeat(ones[inner], counts[inner])
    return np.asarray(line.reshape(width, height).T)


def counts_of(mask: Mapping[str, Any], height: int, width: int) -> NDArray[np.int64]:
    """The numbers of pixels, zeros first; raises `BadMask` where they do not fill (H, W)."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width]:
        raise BadMask(f"of size {size} for an image of {[height, width]} (height, width)")
    if isinstance(counts, bytes):
        counts = counts.decode("ascii", "replace")
    try:
        found = (
            uncompressed(counts)
            if isinstance(counts, str)
            else np.asarray(counts, np.int64).reshape(-1)
        )
    except (TypeError, ValueError, OverflowError, IndexError):
        raise BadMask("run lengths that cannot be read") from None
    if (found < 0).any() or found.sum() != height * width:
        raise BadMask(f"run lengths of {found.sum()} pixels for {height * width}")
    return found


def runs(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """The lengths of runs of equal pixels (H, W), column by column; the first is of zeros."""
    line = np.asarray(pixels, bool).T.reshape(-1)
    if not line.size:
        return np.zeros(1, np.int64)
    ends = np.flatnonzero(line[1:] != line[:-1]) + 1
    starts = [0] if not line[0] else [0, 0]  # an empty run of zeros comes before ones
    bounds = np.concatenate([starts, ends, [line.size]]).astype(np.int64)
    return bounds[1:] - bounds[:-1]


# A length is written as its difference to the one before the last (from the fourth on), five bits a
# letter from chr(48) on, the lowest first; 32 says that more follow, 16 in the last is the sign.


def compressed(counts: NDArray[np.int64]) -> str:
    """Run lengths as COCO's text."""
    letters = []
    values = counts.tolist()
    for i, value in enumerate(values):
        left = value - values[i - 2] if i > 2 else value
        while True:
            bits, left = left & 31, left >> 5
            done = left == (-1 if bits & 16 else 0)
            letters.append(chr(48 + bits + (0 if done else 32)))
            if done:
                break
    return "".join(letters)


def uncompressed(text: str) -> NDArray[np.int64]:
    """COCO's text as run lengths; raises `ValueError` where it is none."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{letter!r} in run lengths")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("run lengths that break off")
    return np.array(counts, np.int64)


def _filled(outline: NDArray[np.float64], height: int, width: int) -> Bitmap:
    """The pixels inside one polygon, as COCO's masks have them.

    The outline is drawn as steps on a grid five times finer; where it crosses the middle of a
    column of pixels, all pixels of the image from there on (column by column) change sides.
    """
    fine = (_FINER * outline + 0.5).astype(np.int64)  # towards zero, as a cast in C
    x, y = _walk(fine, np.roll(fine, -1, axis=0))
    across = np.flatnonzero(x[1:] != x[:-1]) + 1
    before, after = x[across - 1], x[across]
    column = (np.where(after < before, after, after - 1) + 0.5) / _FINER - 0.5
    row = (np.minimum(y[across], y[across - 1]) + 0.5) / _FINER - 0.5
    kept = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    row = np.ceil(row[kept].clip(0, height)).astype(np.int64)
    turns = np.sort(column[kept].astype(np.int64) * height + row)
    return _laid_out(np.diff(np.concatenate([[0], turns, [height * width]])), height, width)


def _walk(
    starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All grid points of the lines from starts (k, 2) to ends (k, 2), ends included, in order."""
    reach = np.abs(ends - starts)  # (k, 2)
    flat = reach[:, 0] >= reach[:, 1]  # the axis walked is x
    length = np.where(flat, reach[:, 0], reach[:, 1])
    line = np.repeat(np.arange(len(starts)), length + 1)
    at = np.arange(len(line)) - np.repeat(np.cumsum(length + 1) - length - 1, length + 1)
    # lines are always drawn in the rising direction of their axis, so that both ways are the same
    along = np.where(flat, 0, 1)
    every = np.arange(len(starts))
    back = starts[every, along] > ends[every, along]
    low = np.where(back[:, None], ends, starts)
    high = np.where(back[:, None], starts, ends)
    rise = (high - low)[every, 1 - along] / np.maximum(length, 1)
    step = np.where(back[line], length[line] - at, at)
    walked = low[every, along][line] + step
    other = (low[every, 1 - along][line] + rise[line] * step + 0.5).astype(np.int64)
    return np.where(flat[line], walked, other), np.where(flat[line], other, walked)
