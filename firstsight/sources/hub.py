"""`hf:NAME:SPLIT`: a map-style image set of the Hugging Face hub, by its own package.

NAME may also be a folder here: of images or Parquet files as the package reads them, or one that
its `save_to_disk` wrote.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from firstsight.errors import UserError
from firstsight.sources.base import Encoded, UnreadableImage

PREFIX = "hf:"


class Hub(Encoded):
    """The images of one split: the first column of images, labels of the first of class labels.

    Files stay encoded, as the set holds them. Raises `UserError` where the package, the set or a
    column of images is missing. Nothing is downloaded here (`download`).
    """

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self._rows = _loaded(spec, local=True)
        features = self._rows.features
        kinds = {name: type(kind).__name__ for name, kind in features.items()}
        images = [name for name, kind in kinds.items() if kind == "Image"]
        labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
        if not images:
            raise UserError(
                f"{spec} has no column of images, only {', '.join(kinds)}; use another set"
            )
        self._column = images[0]
        if labels:
            self.classes = tuple(features[labels[0]].names)
            self.labels = np.asarray(self._rows[labels[0]][:], np.int64)
            if self.labels.min(initial=0) < 0:  # -1 stands for: not labelled
                self.classes, self.labels = (), None
        # Alone, so that no other column of images is decoded on the way.
        self._rows = self._rows.select_columns([self._column])
        self._rows = self._rows.cast_column(self._column, _image_kind())

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self, index: int) -> str:
        """Set, split and number."""
        return f"{self.spec.removeprefix(PREFIX)}/{range(len(self))[index]:08}"

    def encoded(self, index: int) -> bytes:
        """The file of image `index`; raises `UnreadableImage`."""
        row = self._rows[index][self._column]
        try:
            if row["bytes"] is not None:
                return bytes(row["bytes"])
            with open(row["path"], "rb") as file:
                return file.read()
        except (OSError, TypeError) as error:
            raise UnreadableImage(str(error)) from error


def download(spec: str) -> None:
    """Fetch the set that `spec` names, where it names one of these."""
    if spec.startswith(PREFIX):
        _loaded(spec, local=False)


def _package(spec: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{spec} needs a package; pip install 'firstsight[datasets]', or save its images as "
            "files"
        ) from None
    return datasets


def _image_kind() -> Any:
    return _package(PREFIX).Image(decode=False)


def _loaded(spec: str, local: bool) -> Any:
    datasets = _package(spec)
    name, _, split = spec.removeprefix(PREFIX).rpartition(":")
    if not name or not split:
        raise UserError(f"{spec!r} names no split; a set is hf:NAME:SPLIT, as hf:cifar10:train")
    try:
        if os.path.exists(os.path.join(name, "state.json")):  # as save_to_disk writes one split
            rows = datasets.load_from_disk(name)
            if str(rows.split or split) == split:
                return rows
            raise ValueError(f"it is the split {rows.split}")
        with _offline(datasets) if local else contextlib.nullcontext():
            return datasets.load_dataset(name, split=split)
    except Exception as error:  # of the package, of its file systems, of the network
        reason = (str(error) or type(error).__name__).splitlines()[0]
        advice = "add --download, or look at its name and split" if local else "try again"
        raise UserError(f"{spec} cannot be loaded ({reason}); {advice}") from error


@contextlib.contextmanager
def _offline(datasets: Any) -> Iterator[None]:
    """Nothing is asked of the network: told to use local files only, the package asks anyway.

    Its variable HF_HUB_OFFLINE is read when it is imported, so the switches are turned themselves.
    """
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
