"""What a source holds, looked at image by image, and settings that suit it."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from firstsight.data.each import each
from firstsight.log import printable
from firstsight.sources import Source, UnreadableImage, open_source
from firstsight.sources.base import Encoded, Pixels
from firstsight.sources.decode import decode

NEAR = 3
"""Bits, of 64, that the hashes of near duplicates may differ in."""

_BANDS = NEAR + 1  # two hashes that differ in NEAR bits agree in one of so many parts
_CHUNK = 1024  # images of one part of the same bits that are compared at a time


class _Seen(NamedTuple):
    """One image."""

    width: int
    height: int
    mode: str
    stored: int
    """Bytes of its file."""
    digest: bytes
    near: int | None
    """The perceptual hash; None where the picture is all of one brightness."""


def info(source: str, *, workers: int = 0) -> dict[str, Any]:
    """Counts, sizes, modes, labels, unreadable files, duplicates, decode rate, settings that suit.

    Exact duplicates are files (or pixels, where there are no files) of the same SHA-256. Near ones
    look alike when small: difference hashes (9 x 8 grey pixels, neighbours compared) of at most
    `NEAR` different bits; plain areas of one brightness are left out. Every image is decoded.
    """
    found = open_source(source)
    began = time.perf_counter()
    seen = list(each(lambda index: _look(found, index), len(found), "looking", workers))
    seconds = time.perf_counter() - began
    fine = [(index, one) for index, one in enumerate(seen) if isinstance(one, _Seen)]
    bad = [(index, str(one)) for index, one in enumerate(seen) if not isinstance(one, _Seen)]
    digests: dict[bytes, list[int]] = {}
    for index, one in fine:
        digests.setdefault(one.digest, []).append(index)
    exact = [group for group in digests.values() if len(group) > 1]
    once = {group[0] for group in digests.values()}
    hashes = [(index, one.near) for index, one in fine if index in once and one.near is not None]

    def named(groups: Iterable[list[int]]) -> list[list[str]]:
        return [[printable(found.identity(index)) for index in group] for group in groups]

    figures: dict[str, Any] = {
        "source": source,
        "images": len(found),
        "unreadable": [{"image": printable(found.identity(i)), "reason": why} for i, why in bad],
        "width": _spread([one.width for _, one in fine]),
        "height": _spread([one.height for _, one in fine]),
        "bytes": sum(one.stored for _, one in fine),
        "modes": dict(Counter(one.mode for _, one in fine).most_common()),
        "labels": _labels(found),
        "exact_duplicates": named(exact),
        "near_duplicates": named(alike(hashes)),
        "decoded_per_second": round(len(found) / max(seconds, 1e-9), 1),
    }
    return figures | {"recommended": recommended(figures, isinstance(found, Encoded))}


def _look(source: Source, index: int) -> _Seen | UnreadableImage:
    try:
        if isinstance(source, Encoded):
            data = source.encoded(index)
            pixels = decode(data)
            with Image.open(io.BytesIO(data)) as image:
                mode = image.mode
        else:
            pixels, mode = source.pixels(index), "RGB"
            data = pixels.tobytes()
    except UnreadableImage as error:
        return error
    height, width = pixels.shape[:2]
    digest = hashlib.sha256(data).digest()
    return _Seen(width, height, mode, len(data), digest, difference_hash(pixels))


def difference_hash(pixels: Pixels) -> int | None:
    """64 bits: whether each of 8 x 8 places is brighter than its left neighbour; None if flat."""
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (9, 8), interpolation=cv2.INTER_AREA).astype(np.int16)
    if small.max() - small.min() < 8:
        return None
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    return int.from_bytes(bits.tobytes(), "big")


def alike(hashes: list[tuple[int, int]]) -> list[list[int]]:
    """Groups of indices whose hashes differ in at most `NEAR` bits from another of the group."""
    group = {index: index for index, _ in hashes}

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    width = 64 // _BANDS
    for band in range(_BANDS):
        buckets: dict[int, list[tuple[int, int]]] = {}
        for index, value in hashes:
            part = value >> (band * width) & ((1 << width) - 1)
            buckets.setdefault(part, []).append((index, value))
        for bucket in buckets.values():
            for one, other in _close(bucket):
                group[max(root(one), root(other))] = min(root(one), root(other))
    members: dict[int, list[int]] = {}
    for index, _ in hashes:
        members.setdefault(root(index), []).append(index)
    return [sorted(found) for found in members.values() if len(found) > 1]


def _close(bucket: list[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Pairs of a bucket that differ in few bits."""
    if len(bucket) < 8:
        for (one, a), (other, b) in combinations(bucket, 2):
            if (a ^ b).bit_count() <= NEAR:
                yield one, other
        return
    values = np.array([value for _, value in bucket], np.uint64)
    for start in range(0, len(bucket), _CHUNK):
        differing = _bits(values[start : start + _CHUNK, None] ^ values[None, :])  # (C, N)
        for row, column in np.argwhere(differing <= NEAR):
            if start + row < column:
                yield bucket[start + row][0], bucket[column][0]


def _bits(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """How many bits are set in each number."""
    table = np.array([number.bit_count() for number in range(256)], np.uint8)
    eight = values.view(np.uint8).reshape(*values.shape, 8)
    return np.asarray(table[eight].sum(-1), np.int64)


def _spread(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    low, middle, high = np.percentile(values, [0, 50, 100])
    return {"min": int(low), "median": round(float(middle)), "max": int(high)}


def _labels(source: Source) -> dict[str, int]:
    if source.labels is None:
        return {}
    counts = np.bincount(source.labels, minlength=len(source.classes))
    names = [printable(name) for name in source.classes]
    return dict(zip(names, counts.tolist(), strict=True))


def recommended(figures: dict[str, Any], files: bool) -> dict[str, str]:
    """Flags of `firstsight pretrain` that suit such a source, each with its value."""
    fine = figures["images"] - len(figures["unreadable"])
    if fine < 2:
        return {}
    side = min(figures["width"]["median"], figures["height"]["median"])
    size = next((s for s in (224, 160, 128, 96, 64) if side >= s), 32)
    flags = {"--size": f"{size}", "--batch-size": f"{min(256, 1 << int(math.log2(fine)))}"}
    if size <= 64:
        flags |= {"--stem": "small", "--backbone": "resnet18"}
    if files and figures["bytes"] < 2**30:
        flags["--cache"] = "shared"
    if share := len(figures["unreadable"]) / figures["images"]:
        flags["--max-bad"] = f"{math.ceil(share * 1000) / 1000:g}"
    return flags
