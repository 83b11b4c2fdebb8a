"""Test images that were learnt from: how many there are, where a reading could be flattered."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from firstsight.features import Features
from firstsight.log import say
from firstsight.sources import Source, UnreadableImage


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
    if count:
        share = 100 * count / len(queries.values)
        say(f"{count} test images ({share:.1f} %) are training images too: the figures flatter")
    return count
