"""Which paths are images, which classes their folders spell, and where a cache lies."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

EXTENSIONS = ("jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif")
"""What the name of an image ends in, in upper or lower case."""


def cache_folder() -> Path:
    """FIRSTSIGHT_CACHE, else `firstsight` in XDG_CACHE_HOME, else in `~/.cache`."""
    named = os.environ.get("FIRSTSIGHT_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "firstsight"


def is_image(path: str) -> bool:
    """Whether the `/`-separated `path` ends like an image and no part of it is hidden."""
    parts = path.split("/")
    # ".." is hidden too: inside an archive it is only a name, and a strange one.
    hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
    return not hidden and has_extension(path)


def has_extension(path: str) -> bool:
    """Whether `path` ends in one of `EXTENSIONS`."""
    name = path.rpartition("/")[2]
    return "." in name and name.rpartition(".")[2].lower() in EXTENSIONS


def by_folder(path: str) -> str:
    """A key to sort by folders: like the list of the parts of a path, in less memory."""
    return path.replace("/", "\0")


def sort_by_folder(paths: list[str]) -> None:
    """Sort in place; what is in order already, a million paths perhaps, needs no keys."""
    if any(by_folder(one) > by_folder(next_) for one, next_ in pairwise(paths)):
        paths.sort(key=by_folder)


def class_folders(paths: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64] | None]:
    """Class names and (N,) labels that the folders of `paths` spell, or `((), None)`.

    The rule: every image lies in (or below) a first-level folder, and there are at least two of
    these. They are the classes then, sorted by name. One image beside them, or a single folder,
    and there are no labels.
    """
    if not all("/" in path for path in paths):
        return (), None
    names = sorted({path.partition("/")[0] for path in paths})
    if len(names) < 2:
        return (), None
    number = {name: label for label, name in enumerate(names)}
    labels = np.fromiter((number[path.partition("/")[0]] for path in paths), np.int64, len(paths))
    return tuple(names), labels
