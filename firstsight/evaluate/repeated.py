"""Test images that were learnt from: how many there are, where a reading could be flattered."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
from torch import Tensor

from firstsight import distributed
from firstsight.features import Features
from firstsight.log import say
from firstsight.sources import Source, UnreadableImage
from firstsight.sources.base import Encoded


def repeated(
    source: Source, asked: Source, bank: Features, queries: Features, nearest_rows: Tensor
) -> int:
    """Test images that are their own nearest training image, pixel for pixel; said if there are.

    `nearest_rows` (M,) is the row of `bank` nearest to each of `queries`.
    """
    near = bank.values[nearest_rows]
    alike = (near - queries.values).norm(dim=1) <= 1e-3 * queries.values.norm(dim=1)
    count = 0
    for row in alike.nonzero()[:, 0].tolist():
        here, there = int(queries.index[row]), int(bank.index[nearest_rows[row]])
        try:
            count += np.array_equal(asked.pixels(here), source.pixels(there))
        except UnreadableImage:  # it could be read a moment ago
            continue
    _warn(count, len(queries.values))
    return count


def repeated_files(source: Source, learnt: Iterable[int], asked: Source) -> int:
    """Test images that are among those of `source` at `learnt`; said if there are.

    For readings that make no features to find them by: files are the same byte by byte, and images
    that are no files on either side pixel by pixel.
    """
    as_files = isinstance(source, Encoded) and isinstance(asked, Encoded)
    known = set(_digests(source, learnt, as_files))
    count = sum(one in known for one in _digests(asked, range(len(asked)), as_files))
    _warn(count, len(asked))
    return count


def _digests(source: Source, index: Iterable[int], as_files: bool) -> list[bytes]:
    """Of the images that can be read; each rank reads its share of them."""
    found = []
    for i in list(index)[distributed.rank() :: distributed.world()]:
        try:
            if as_files and isinstance(source, Encoded):
                found.append(blake2b(source.encoded(int(i)), digest_size=16).digest())
            else:
                pixels = np.ascontiguousarray(source.pixels(int(i)))
                shape = str(pixels.shape).encode()
                found.append(blake2b(pixels.tobytes() + shape, digest_size=16).digest())
        except UnreadableImage:
            continue
    return [one for part in distributed.collect(found) for one in part]


def _warn(count: int, images: int) -> None:
    if count:
        share = 100 * count / images
        say(f"{count} test images ({share:.1f} %) are training images too: the figures flatter")
