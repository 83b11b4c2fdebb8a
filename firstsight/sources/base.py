"""What every source of images offers: a length, pixels by index, and an identity by index."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
"""An upright image, (H, W, 3), RGB."""


class UnreadableImage(Exception):
    """One image of a source cannot be decoded; the loader replaces it and counts it."""


class Source(ABC):
    """Indexable images with, where known, a label for each.

    A source is picklable and opens its files lazily, once in each process, so that it can be handed
    to loader workers however they are started.
    """

    spec: str
    """What the user typed to get this source."""
    labels: NDArray[np.int64] | None = None
    """(N,) class of each image, or None where there are no labels."""
    classes: tuple[str, ...] = ()
    """Name of each class, in the order of the labels; empty where there are no labels."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are."""

    @abstractmethod
    def identity(self, index: int) -> str:
        """A name of image `index` that stays the same between runs (its relative path)."""

    @abstractmethod
    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""

    def fingerprint(self) -> str:
        """A short hash of all identities and labels: tells whether it is the same source."""
        import hashlib

        digest = hashlib.sha256(f"{len(self)}".encode())
        for index in range(len(self)):
            digest.update(self.identity(index).encode("utf-8", "surrogateescape") + b"\0")
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]
