"""What every source of images offers: a length, pixels by index, and an identity by index."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.errors import UserError

Pixels = NDArray[np.uint8]
"""An upright image, (H, W, 3), RGB."""

_Read = TypeVar("_Read")

_ATTEMPTS = 50
_NAMES = 1 << 16
"""Names that are hashed at a time."""
_LOOKED_AT = 256
"""Files whose length tells whether they are the same."""


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

    def reduced(self, index: int, shrink: Callable[[int, int], int]) -> tuple[Pixels, int]:
        """Image `index` and how many times smaller it comes: 1, 2, 4 or 8.

        At most what `shrink` says of its width and height; 1 where smaller would not be cheaper.
        """
        return self.pixels(index), 1

    def full_size(self, index: int, pixels: Pixels) -> tuple[int, int]:
        """Width and height of the original of `pixels`, where crops are drawn."""
        return pixels.shape[1], pixels.shape[0]

    def fingerprint(self) -> str:
        """A short hash of all identities and labels: tells whether it is the same source."""
        digest = hashlib.sha256(f"{len(self)}".encode())
        for start in range(0, len(self), _NAMES):  # one by one they take three times as long
            names = map(self.identity, range(start, min(start + _NAMES, len(self))))
            digest.update(("\0".join(names) + "\0").encode("utf-8", "surrogateescape"))
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def contents(self) -> str:
        """A short hash that differs where other pictures have the names; empty: nobody knows."""
        return ""


class Encoded(Source):
    """A source whose images are encoded files (JPEG, PNG, ...), wherever these lie."""

    def contents(self) -> str:
        """Of the lengths of some files, evenly spread: to read all of them would take too long."""
        lengths = []
        for index in np.linspace(0, len(self) - 1, min(len(self), _LOOKED_AT)).astype(int).tolist():
            try:
                lengths.append(self.size(index))
            except UnreadableImage:
                lengths.append(-1)
        return hashlib.sha256(repr(lengths).encode()).hexdigest()[:16]

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of image `index` as it is stored; raises `UnreadableImage`."""

    def size(self, index: int) -> int:
        """Bytes of the file of image `index`; raises `UnreadableImage`."""
        return len(self.encoded(index))

    def file_of(self, index: int) -> str | None:
        """Where the file of image `index` lies on disk; None inside an archive."""
        return None

    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""
        from firstsight.sources.decode import decode

        return decode(self.encoded(index))

    def reduced(self, index: int, shrink: Callable[[int, int], int]) -> tuple[Pixels, int]:
        """A JPEG so many times smaller as `shrink` says; raises `UnreadableImage`."""
        from firstsight.sources.decode import reduced

        return reduced(self.encoded(index), shrink)


def readable(source: Source, index: int, seed: int, bad: list[str]) -> tuple[int, Pixels]:
    """Image `index`, or a replacement that is always the same one, behind its position.

    Names of images that cannot be decoded are added to `bad`.
    """
    return readable_by(source.pixels, source, index, seed, bad)


def readable_by(
    read: Callable[[int], _Read], source: Source, index: int, seed: int, bad: list[str]
) -> tuple[int, _Read]:
    """The same of what `read` makes of an image."""
    chosen = index
    for attempt in range(_ATTEMPTS):
        try:
            return chosen, read(chosen)
        except UnreadableImage:
            bad.append(source.identity(chosen))
            chosen = int(keyed.hashed(seed, index, attempt) % np.uint64(len(source)))
    raise UserError(f"{source.spec}: {_ATTEMPTS} images in turn cannot be decoded, {bad[0]} first")


def common_labels(
    bank: Source, test: Source, bank_flag: str, test_flag: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The labels of both sources in the numbers of the first, matched by the names of classes.

    Two folders number their classes each for itself, so numbers alone would compare a cat with a
    dog where one of them lacks a class. Raises `UserError` where labels are missing, or where the
    second has a class that the first has not.
    """
    for flag, source in ((bank_flag, bank), (test_flag, test)):
        if source.labels is None:
            raise UserError(f"{flag} {source.spec} has no labels, and this reading needs them")
    assert bank.labels is not None and test.labels is not None
    if bank.classes == test.classes:
        return bank.labels, test.labels
    number = {name: label for label, name in enumerate(bank.classes)}
    lacking = [name for name in test.classes if name not in number]
    if lacking:
        raise UserError(
            f"{test_flag} {test.spec} has a class {lacking[0]!r} that {bank_flag} {bank.spec} lacks"
        )
    renumbered = np.array([number[name] for name in test.classes], np.int64)
    return bank.labels, renumbered[test.labels]


def class_count(source: Source) -> int:
    """K, the classes of a labelled source; images of one class alone are refused."""
    assert source.labels is not None
    if len(np.unique(source.labels)) < 2:
        raise UserError(
            f"{source.spec} has images of one class only; a classifier needs two or more"
        )
    return max(len(source.classes), int(source.labels.max()) + 1)
