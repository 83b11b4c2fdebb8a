"""What the pixels of images show, and from that what the cells of a feature map show.

Marks are index masks (a PNG of each image's name and size, in a folder), boxes in any file that
`firstsight localize --boxes` reads, or the masks that generated scenes have of themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from firstsight.errors import UserError
from firstsight.localize.boxes import Marked
from firstsight.localize.truth import match, truth_of
from firstsight.sources.base import Source
from firstsight.sources.scenes import Scenes

ASIDE = 255
"""Pixels and cells of this number are of no class, as Pascal VOC has it."""

BACKGROUND = "background"

Numbers = NDArray[np.uint8]


class Marks(ABC):
    """Which class each pixel of the images of a source is of."""

    kind: str
    """What they were read from, in a word."""
    names: tuple[str, ...]
    """Classes 0, 1, ...; empty where masks hold numbers only."""

    @abstractmethod
    def known(self) -> NDArray[np.int64]:
        """Positions of the images that are marked, rising."""

    @abstractmethod
    def numbers(self, index: int, width: int, height: int) -> Numbers:
        """(height, width) classes of the pixels of image `index`, 255 for none."""


class SceneMarks(Marks):
    """The shapes that generated scenes are made of."""

    kind = "scenes"

    def __init__(self, source: Scenes) -> None:
        self.source = source
        self.names = (BACKGROUND, *source.classes)

    def known(self) -> NDArray[np.int64]:
        """All of them."""
        return np.arange(len(self.source))

    def numbers(self, index: int, width: int, height: int) -> Numbers:
        """The class of its shape, from 1, where the shape is; 0 elsewhere."""
        number = np.uint8(1 + self.source.labels[index])
        found: Numbers = np.where(self.source.mask(index), number, np.uint8(0))
        return found


class BoxMarks(Marks):
    """All that lies in a box is of its class; where boxes overlap, the smaller one is in front."""

    def __init__(self, source: Source, path: str) -> None:
        truth = truth_of(source, path)
        assert truth is not None
        self.kind = f"boxes, {truth.kind}"
        own = truth.classes(source)
        self.marked: dict[int, Marked] = {}
        for i, one in truth.marked.items():
            # a box without a class is of the image's, where that has one
            labels = [name or own.get(i, "object") for name in one.names]
            self.marked[i] = Marked(one.boxes, labels)
        every = {name for one in self.marked.values() for name in one.names}
        if len(every) >= ASIDE:
            raise UserError(f"{path} has {len(every)} classes; up to {ASIDE - 1} can be told apart")
        self.names = (BACKGROUND, *sorted(every))

    def known(self) -> NDArray[np.int64]:
        """Those that the file names, some perhaps without a box."""
        return np.array(sorted(self.marked), np.int64)

    def numbers(self, index: int, width: int, height: int) -> Numbers:
        """Pixels whose centre is in a box have its class; all others are background."""
        found = np.zeros((height, width), np.uint8)
        one = self.marked[index]
        pairs = list(zip(one.boxes, one.names, strict=True))
        pairs.sort(key=lambda pair: (pair[0][0] - pair[0][2]) * (pair[0][3] - pair[0][1]))
        for box, name in pairs:
            x1, y1, x2, y2 = np.ceil(np.array(box) - 0.5).clip(0).astype(int).tolist()
            found[y1:y2, x1:x2] = self.names.index(name)
        return found


class MaskMarks(Marks):
    """Pictures whose pixels are numbers of classes, grey or by a palette."""

    kind = "index masks"
    names = ()

    def __init__(self, source: Source, folder: str) -> None:
        paths = sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.png"))
        images = [source.identity(i) for i in range(len(source))]
        found = match(images, paths, source.spec)
        if not found:
            raise UserError(
                f"no image of {source.spec} has a mask of its name in {folder}: images begin with "
                f"{images[0]}, masks with {paths[0]}; point at the folder that fits"
            )
        self.files = {i: Path(folder) / path for i, path in found.items()}

    def known(self) -> NDArray[np.int64]:
        """Those that have a mask."""
        return np.array(sorted(self.files), np.int64)

    def numbers(self, index: int, width: int, height: int) -> Numbers:
        """As the file has them; raises `UserError` where it is no mask of this image."""
        path = self.files[index]
        try:
            with Image.open(path) as file:
                mode, found = file.mode, np.array(file, np.uint8)
        except (OSError, ValueError, SyntaxError) as error:
            raise UserError(f"cannot read the mask {path} ({error}); mend it") from None
        if mode not in ("L", "P", "1"):
            raise UserError(f"{path} holds colours ({mode}), not indices; save it with one channel")
        if found.shape != (height, width):
            raise UserError(
                f"{path} has {found.shape[1]} x {found.shape[0]} pixels, and its image {width} x "
                f"{height}; a mask is as large as its (upright) image"
            )
        return found


def marks_of(source: Source, path: str, flag: str) -> Marks:
    """The marks at `path`, a folder of index masks or a file of boxes; without it a source's own.

    Raises `UserError` where there are none, and `flag` is what would name them.
    """
    if not path:
        if isinstance(source, Scenes):
            return SceneMarks(source)
        raise UserError(
            f"nothing says what the pixels of {source.spec} show; {flag} takes a folder of index "
            "masks (PNG) or a file of boxes"
        )
    if Path(path).is_dir() and next(Path(path).rglob("*.png"), None) is not None:
        return MaskMarks(source, path)
    return BoxMarks(source, path)


def cell_counts(numbers: Numbers, height: int, width: int) -> NDArray[np.int64]:
    """(height, width, 256) pixels of each number in each cell of a map over all of the image.

    A pixel is of the cell that its centre lies in.
    """
    rows = ((np.arange(numbers.shape[0]) + 0.5) * height / numbers.shape[0]).astype(np.int64)
    columns = ((np.arange(numbers.shape[1]) + 0.5) * width / numbers.shape[1]).astype(np.int64)
    cell = rows[:, None] * width + columns  # (H, W)
    counts = np.bincount((cell * 256 + numbers).ravel(), minlength=height * width * 256)
    return counts.reshape(height, width, 256)


def cell_labels(counts: NDArray[np.int64], mixed: bool) -> tuple[Numbers, NDArray[np.bool_]]:
    """The class of most pixels of each cell (h, w), of equals the lowest; and which are mixed.

    Mixed: pixels of more than one class, 255 among them. A cell is left aside (255) where most of
    its pixels are, and, without `mixed`, where it is mixed.
    """
    found = counts.argmax(axis=-1).astype(np.uint8)
    several = np.asarray((counts > 0).sum(axis=-1) > 1)
    if not mixed:
        found[several] = ASIDE
    return found, several


def same_classes(train: Marks, test: Marks) -> tuple[tuple[str, ...], NDArray[np.uint8] | None]:
    """The names of the classes of `train`, and what each number of `test` is among them.

    Masks have numbers only: None, they mean the same in both. Raises `UserError` where one side has
    names and the other has not, or `test` a class that `train` lacks.
    """
    if bool(train.names) != bool(test.names):
        raise UserError(
            f"--train-marks are {train.kind} and --test-marks {test.kind}: classes cannot be "
            "matched; use one kind for both"
        )
    if not train.names:
        return (), None
    lacking = [name for name in test.names if name not in train.names]
    if lacking:
        raise UserError(f"--test-marks have a class {lacking[0]!r} that --train-marks lack")
    numbers = np.full(256, ASIDE, np.uint8)
    numbers[: len(test.names)] = [train.names.index(name) for name in test.names]
    return train.names, numbers


def said(names: Iterable[str], highest: int) -> tuple[str, ...]:
    """Names of the classes 0 to `highest`: numbers where there are none."""
    return tuple(names) or tuple(str(number) for number in range(highest + 1))
