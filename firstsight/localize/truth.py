"""Which boxes belong to which image of a source, and what was left out on the way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.localize.boxes import Manifest, Marked, read_boxes, scaled, scaled_as_published
from firstsight.sources.base import Source
from firstsight.sources.paths import has_extension
from firstsight.sources.scenes import Scenes


@dataclass(frozen=True)
class Truth:
    """What is marked in the images of a source."""

    marked: dict[int, Marked]
    """By position in the source; images that the file does not name are missing."""
    kind: str
    """Kind of file; scenes for generated images."""
    counts: dict[str, int]
    """What was left out: degenerate boxes, crowds, annotations of other images."""

    def classes(self, source: Source) -> dict[int, str]:
        """The class of each marked image, where its source knows it."""
        if source.labels is None:
            return {}
        return {i: source.classes[int(source.labels[i])] for i in self.marked}


def truth_of(source: Source, path: str) -> Truth | None:
    """The boxes in the file at `path`; without one those that the source has, if it has any.

    Where the file names classes and the source has them too (ImageNet), only boxes of an image's
    own class count, as published. Raises `UserError` where the file names no image of the source.
    """
    if not path:
        if not isinstance(source, Scenes):
            return None
        found = {i: Marked([_four(box)], [""]) for i, box in enumerate(source.boxes)}
        return Truth(found, "scenes", {})
    manifest = read_boxes(path)
    names = [source.identity(i) for i in range(len(source))]
    keys = match(names, list(manifest.images), source.spec)
    if not keys:
        raise UserError(
            f"{path} marks no image of {source.spec}: it begins with {next(iter(manifest.images))},"
            f" the images with {names[0]}; check --boxes and --data"
        )
    marked = {i: manifest.images[key] for i, key in keys.items()}
    counts = {
        "degenerate_boxes": manifest.degenerate,
        "crowds": manifest.crowds,
        "annotated_elsewhere": len(manifest.images) - len(set(keys.values())),
    }
    return Truth(_of_own_class(marked, source, manifest), manifest.kind, counts)


def _four(box: NDArray[np.float32]) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box.tolist()
    return x1, y1, x2, y2


def _of_own_class(
    marked: dict[int, Marked], source: Source, manifest: Manifest
) -> dict[int, Marked]:
    named = {name for one in manifest.images.values() for name in one.names if name}
    if source.labels is None or not named & set(source.classes):
        return marked
    kept = {}
    for i, one in marked.items():
        own = source.classes[int(source.labels[i])]
        pairs = [pair for pair in zip(one.boxes, one.names, strict=True) if pair[1] == own]
        kept[i] = Marked([box for box, _ in pairs], [name for _, name in pairs])
    return kept


def match(names: Sequence[str], keys: Sequence[str], root: str) -> dict[int, str]:
    """The key of each name, where it has one: the key that shares most of the end of its path.

    The endings of file names (`.jpg`) are not compared; `root` is the folder that `names` lie in
    and helps to tell keys apart. Raises `UserError` where two keys fit equally well.
    """
    by_stem: dict[str, list[tuple[list[str], str]]] = defaultdict(list)
    for key in keys:
        parts = _parts(key)
        by_stem[parts[0]].append((parts, key))
    found = {}
    for i, name in enumerate(names):
        parts = _parts(f"{root}/{name}")
        scores = [(_shared(parts, other), key) for other, key in by_stem.get(parts[0], ())]
        best = [key for score, key in scores if score == max(s for s, _ in scores)]
        if len(best) > 1:
            raise UserError(
                f"{name} may be {best[0]} or {best[1]}; point --data at the folder that the paths "
                "of --boxes begin in"
            )
        if best:
            found[i] = best[0]
    return found


def _parts(path: str) -> list[str]:
    """The parts of a path from its end, the file's own without its ending."""
    pure = PurePosixPath(path.replace("\\", "/"))
    last = pure.stem if has_extension(pure.name) else pure.name
    return [last, *reversed(pure.parts[:-1])]


def _shared(parts: list[str], others: list[str]) -> int:
    count = 0
    for one, other in zip(parts, others, strict=False):
        if one != other:
            break
        count += 1
    return count


@dataclass(frozen=True)
class Placed:
    """The boxes of one image in its square resize."""

    boxes: NDArray[np.float64]
    """(n, 4), n may be 0."""
    names: list[str]
    outside: int
    """Boxes that reached beyond the image, and were cut at its edge."""
    degenerate: int
    """Boxes of which nothing is inside the image; not among `boxes`."""


def placed(
    marked: Marked, width: int, height: int, size: int, kind: str, compat: bool = False
) -> Placed:
    """Boxes of an image as they lie in its resize to (size, size), cut at the edges."""
    boxes = np.array(marked.boxes, np.float64).reshape(-1, 4)
    if compat:
        boxes = scaled_as_published(boxes, width, height, size, kind)
        return Placed(boxes, marked.names, 0, 0)
    cut = boxes.clip(0, np.array([width, height, width, height], np.float64))
    there = np.asarray((cut[:, 2:] > cut[:, :2]).all(axis=1))
    outside = int((cut != boxes).any(axis=1).sum())
    names = [name for name, kept in zip(marked.names, there.tolist(), strict=True) if kept]
    return Placed(scaled(cut[there], width, height, size), names, outside, int((~there).sum()))
