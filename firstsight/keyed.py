"""Random numbers that are a pure function of a key, never of history.

A drawn view must depend on (seed, epoch, image, view) alone: not on the worker that makes it, the
rank, the batch it falls in, or what was drawn before. So there is no generator state here. Each
number is a hash of its key (the finaliser of SplitMix64, Steele et al. 2014), which numpy computes
for a whole batch at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed


def hashed(*key: ArrayLike) -> NDArray[np.uint64]:
    """64 well-mixed bits for each key; the parts of the key (integers >= 0) are broadcast."""
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is the point
        state = np.asarray(_GOLDEN)
        for part in key:
            state = _mix((state + np.asarray(part).astype(np.uint64)) * _GOLDEN + _GOLDEN)
    return state


def uniform(*key: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) for each key; the parts of the key (integers >= 0) are broadcast."""
    top: NDArray[np.float64] = (hashed(*key) >> np.uint64(11)).astype(np.float64)
    return np.asarray(top * 2.0**-53)


def seed(*key: int) -> int:
    """One integer in [0, 2**63) to seed a generator with, from a key of integers."""
    return int(hashed(*key) >> np.uint64(1))
