"""What an annotation file says, before anything of it is believed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from firstsight.errors import UserError

EXAMPLES = 5
"""Places that are named of each kind of fault."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How often one thing was wrong, and where at first."""

    count: int
    examples: tuple[str, ...] = ()


class Faults:
    """Counts what is wrong, by kind, and remembers where it was at first."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = defaultdict(int)
        self.examples: dict[str, list[str]] = defaultdict(list)

    def note(self, kind: str, where: str, count: int = 1) -> None:
        """One more of a kind."""
        self.counts[kind] += count
        if len(self.examples[kind]) < EXAMPLES:
            self.examples[kind].append(where)

    def total(self, kinds: Iterable[str]) -> int:
        """How many there are of these kinds together."""
        return sum(self.counts.get(kind, 0) for kind in kinds)

    def reasons(self, kinds: Iterable[str]) -> str:
        """How many there are of each of these kinds, and where the first was."""
        return "; ".join(
            f"{self.counts[kind]} {kind}, first {self.examples[kind][0]}"
            for kind in kinds
            if kind in self.counts
        )

    def kept(self) -> dict[str, Fault]:
        """All of them by kind, as a set keeps them."""
        return {
            kind: Fault(count=count, examples=tuple(self.examples[kind]))
            for kind, count in self.counts.items()
        }


def told(faults: Mapping[str, Fault]) -> list[str]:
    """A line for each kind of fault: how many, and where at first."""
    return [f"{one.count} {kind} ({', '.join(one.examples)})" for kind, one in faults.items()]


@dataclass(slots=True, kw_only=True)
class Written:
    """One object as a file has it, translated to corners."""

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2, half-open; shares of the image where the set is `relative`."""
    label: int
    """Position in the set's categories."""
    what: str
    """What a fault of it is called by."""
    crowd: bool = False
    difficult: bool = False
    area: float | None = None
    mask: Any = None
    """Lists of numbers x, y, x, y, ...; run lengths; or None."""


@dataclass(slots=True, kw_only=True)
class WrittenImage:
    """One image as a file has it."""

    name: str
    """Its path or name."""
    image_id: int | str
    other_name: str = ""
    """Tried where there is no image of that name."""
    size: tuple[int, int] | None = None
    """Width and height, where the file says them."""
    objects: list[Written] = field(default_factory=list)


@dataclass(kw_only=True)
class WrittenSet:
    """All that a file says."""

    categories: tuple[str, ...]
    category_ids: tuple[int, ...]
    images: list[WrittenImage]
    faults: Faults
    relative: bool = False
    """Whether coordinates are shares of the image's width and height."""


# Kinds of faults: what is left out with them, or mended.
MISSING = "images missing"
UNREADABLE = "images unreadable"
OTHER_SIZE = "images of another size than stated"
TWICE = "images listed twice"
UNLISTED = "annotations of images that are not listed"
NO_CATEGORY = "objects of an unknown category"
NO_NUMBERS = "boxes that are no four numbers"
NO_AREA = "boxes without area"
OUTSIDE = "boxes outside the image"
CUT = "boxes cut at the edge of the image"
NO_MASK = "objects without a mask among others with one"
BAD_MASK = "masks that do not fit the image or cannot be read"
EMPTY_CLASS = "categories without an object"

IMAGES = (MISSING, UNREADABLE, OTHER_SIZE, TWICE)
"""Faults that cost an image."""
OBJECTS = (UNLISTED, NO_CATEGORY, NO_NUMBERS, NO_AREA, OUTSIDE, NO_MASK, BAD_MASK)
"""Faults that cost an object."""


def four(values: Any) -> tuple[float, float, float, float]:
    """Four finite numbers; raises `ValueError` where these are none."""
    if isinstance(values, str) or len(values) != 4:
        raise ValueError(f"{values!r}")
    a, b, c, d = (float(value) for value in values)
    if not all(abs(value) < 1e9 for value in (a, b, c, d)):  # NaN is not below either
        raise ValueError(f"{values!r}")
    return a, b, c, d


def damaged(path: object, error: Exception) -> UserError:
    """What is said of an annotation file that cannot be read at all."""
    if isinstance(error, KeyError):
        reason = f"{error.args[0]!r} is missing"
    elif isinstance(error, OSError):
        reason = error.strerror or str(error)
    else:
        reason = str(error) or type(error).__name__
    return UserError(f"cannot read annotations from {path} ({reason}); mend --annotations")


def numbered(names: Mapping[int, str], path: object) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids of categories, ids rising; raises `UserError` where there are none."""
    if not names:
        raise UserError(f"{path} names no category; give --annotations that do")
    ids = tuple(sorted(names))
    return tuple(names[one] for one in ids), ids
