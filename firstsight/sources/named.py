"""Sets that torchvision knows by name, and ImageNet as a folder; nothing is downloaded unasked."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError, unknown
from firstsight.sources.base import Pixels, Source
from firstsight.sources.folder import Folder
from firstsight.sources.paths import cache_folder

SPLITS = {
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test", "unlabeled"),
    "imagenet": ("train", "val"),
}
"""The splits of each set."""


def parts(spec: str) -> tuple[str, str, Path] | None:
    """Name, split and root of `NAME:SPLIT` or `NAME:SPLIT@ROOT`; None where no such set is named.

    Without a root it is the folder in FIRSTSIGHT_DATA, else `data` in the cache.
    """
    whole, _, root = spec.partition("@")
    name, _, split = whole.partition(":")
    if name not in SPLITS:
        return None
    if split not in SPLITS[name]:
        raise unknown("source", whole, [f"{name}:{one}" for one in SPLITS[name]])
    if root:
        return name, split, Path(root)
    base = Path(os.environ.get("FIRSTSIGHT_DATA") or cache_folder() / "data")
    return name, split, base / "imagenet" if name == "imagenet" else base


def open_named(name: str, split: str, root: Path) -> Source:
    """The source of that name; raises `UserError` where its files are not there."""
    if name != "imagenet":
        return Named(name, split, root)
    if not (root / split).is_dir():
        raise UserError(
            f"there is no folder {root / split}; ImageNet lies in ROOT/{split}/CLASS/ "
            f"(firstsight data sort-imagenet-val sorts val so); use imagenet:{split}@ROOT"
        )
    return Folder(root / split)


class Named(Source):
    """One of torchvision's small sets, in memory; their files are checked as torchvision does."""

    def __init__(self, name: str, split: str, root: Path) -> None:
        self.spec = f"{name}:{split}"
        self._where = (name, split, root)
        loaded = _load(name, split, root, download=False)
        self._images: NDArray[np.uint8] | None = loaded.data
        self._count = len(loaded.data)
        if split != "unlabeled":
            self.classes = tuple(loaded.classes)
            labels = loaded.labels if name == "stl10" else loaded.targets
            self.labels = np.asarray(labels, np.int64)

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_images": None}  # workers read the files themselves

    def identity(self, index: int) -> str:
        """Set, split and number."""
        name, split, _ = self._where
        return f"{name}/{split}/{range(self._count)[index]:06}"

    def pixels(self, index: int) -> Pixels:
        """Image `index`, RGB, (H, W, 3) uint8, a copy."""
        if self._images is None:
            self._images = _load(*self._where, download=False).data
        image = self._images[index]
        if self._where[0] == "stl10":  # channels first, there
            image = image.transpose(1, 2, 0)
        return np.array(image, order="C")


def download(spec: str) -> None:
    """Fetch the files of the set that `spec` names, unless they are there; or nothing."""
    found = None if os.path.exists(spec) else parts(spec)
    if found is None:
        return
    name, split, root = found
    if name == "imagenet":
        if not (root / split).is_dir():
            raise UserError(
                "ImageNet cannot be downloaded for you: get it from image-net.org, and use "
                f"imagenet:{split}@ROOT without --download"
            )
        return
    _load(name, split, root, download=True)


def _load(name: str, split: str, root: Path, download: bool) -> Any:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
    options = {"split": split} if name == "stl10" else {"train": split == "train"}
    try:
        return kind[name](root, **options, download=download)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        if download:
            raise UserError(
                f"{name} cannot be downloaded to {root} ({reason}); put its files there yourself"
            ) from error
        raise UserError(
            f"the files of {name}:{split} are not in {root}, or not whole; add --download, or "
            f"use {name}:{split}@ROOT with the folder that holds them"
        ) from error
