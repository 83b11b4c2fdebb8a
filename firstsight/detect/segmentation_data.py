"""Semantic segmentation: images with index masks beside them, and the mean IoU over classes.

A mask is a PNG of the image's name and size whose pixels are numbers of classes, grey or by a
palette (whose colours mean nothing); 255 is left aside, as Pascal VOC has it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from firstsight.detect.voc import VOC_CLASSES
from firstsight.detect.written import Fault, Faults, told
from firstsight.errors import UserError
from firstsight.sources.base import Pixels, UnreadableImage
from firstsight.sources.decode import decode, sizes
from firstsight.sources.folder import Folder

ASIDE = 255
"""Number of the pixels that are of no class."""
VOC = ("background", *VOC_CLASSES)
"""Classes of Pascal VOC's masks."""

UNMARKED = "images without a mask"
MISSING = "masks without an image"
NO_MASK = "listed images without a mask"
UNREADABLE = "masks or images unreadable"
COLOURS = "masks that hold colours, not indices"
OTHER_SIZE = "masks of another size than their image"
NO_CLASS = "masks with a number that is no category's"
_COSTLY = (MISSING, NO_MASK, UNREADABLE, COLOURS, OTHER_SIZE, NO_CLASS)


@dataclass(frozen=True, kw_only=True)
class Marked:
    """One image and its mask."""

    name: str
    """Path of the image relative to the root of the images, with `/`."""
    mask: str
    """Path of its mask relative to the root of the masks."""
    width: int
    """Pixels, of the upright image and of the mask."""
    height: int
    sum: int
    """A checksum of the mask's numbers."""


@dataclass(frozen=True, kw_only=True)
class SegmentedImages:
    """Images whose pixels are marked."""

    root: Path
    masks_root: Path
    pictures: tuple[Marked, ...]
    categories: tuple[str, ...]
    """Names, in the order of their numbers."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """What was left out when the set was opened, by kind."""

    def __len__(self) -> int:
        return len(self.pictures)

    def told(self) -> list[str]:
        """A line for each kind of fault: how many, and where at first."""
        return told(self.faults)

    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""
        name = self.pictures[index].name
        try:
            data = (self.root / name).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error
        return decode(data)

    def indices(self, index: int) -> NDArray[np.uint8]:
        """(H, W) the class of each pixel of image `index`, 255 for none."""
        return _numbers(self.masks_root / self.pictures[index].mask)


def open_segmented(
    images: str, annotations: str, categories: Sequence[str] = (), *, max_bad: float = 0.01
) -> SegmentedImages:
    """The images below the folder `images` with the masks of their names that `annotations` means.

    `annotations` is a folder of masks, or a list of names of VOC's `ImageSets/Segmentation`, whose
    masks are in `SegmentationClass` beside `ImageSets`. `categories` are the names of classes 0,
    1, ...; without them those in `classes.txt` (one a line) in or beside the folder of masks, and
    of VOC's own list `background` and its twenty.

    Images without a mask are left out; so are those whose mask is missing though it is listed,
    cannot be read, has another size or holds a number that is no category's: of these `max_bad` is
    the share that may be, and more are a `UserError` that names the first.
    """
    path = Path(annotations)
    listed = path.is_file()
    if not path.exists() or (listed and path.suffix.lower() != ".txt"):
        raise UserError(
            f"{annotations} is no folder of index masks; give --annotations one, or a list of "
            "VOC's ImageSets/Segmentation"
        )
    masks = path.resolve().parents[2] / "SegmentationClass" if listed else path
    names = tuple(categories) or _names(masks) or (VOC if listed else ())
    if not 1 <= len(names) <= ASIDE:
        raise UserError(
            f"{annotations} names {len(names)} classes; give 1 to {ASIDE} by --categories, or a "
            "line each in classes.txt beside the masks"
        )
    pictures, marked, faults = _by_name(images), _by_name(str(masks)), Faults()
    wanted = path.read_text(encoding="utf-8").split() if listed else sorted(marked)
    for name in [] if listed else sorted(set(pictures) - set(marked)):
        faults.note(UNMARKED, pictures[name])
    found = []
    for name in wanted:
        if name not in pictures or name not in marked:
            faults.note(MISSING if name not in pictures else NO_MASK, name)
            continue
        one = _checked(Path(images), pictures[name], masks, marked[name], len(names), faults)
        if one is not None:
            found.append(one)
    lost = faults.total(_COSTLY)
    if lost > max_bad * (lost + len(found)) or not found:
        raise UserError(
            f"{annotations} does not fit the images in {images}: {lost} of {lost + len(found)} "
            f"masks cannot be used ({faults.reasons(_COSTLY)}); mend --annotations, or allow more "
            "by --max-bad"
        )
    return SegmentedImages(
        root=Path(images),
        masks_root=masks,
        pictures=tuple(found),
        categories=names,
        faults=faults.kept(),
    )


def _names(masks: Path) -> tuple[str, ...]:
    """The lines of classes.txt in a folder of masks or beside it; none where there is no such."""
    for folder in (masks, masks.parent):
        file = folder / "classes.txt"
        if file.is_file():
            return tuple(filter(None, map(str.strip, file.read_text("utf-8").splitlines())))
    return ()


def _by_name(folder: str) -> dict[str, str]:
    source = Folder(folder)
    names = [source.identity(i) for i in range(len(source))]
    return {str(PurePosixPath(name).with_suffix("")): name for name in names}


def _checked(
    images: Path, name: str, masks: Path, mask: str, classes: int, faults: Faults
) -> Marked | None:
    """An image with its mask; None, and a fault noted, where they do not fit."""
    try:
        (_, upright), (stored, _) = sizes(images / name), sizes(masks / mask)
        with Image.open(masks / mask) as file:
            mode = file.mode
        if mode not in ("L", "P", "1"):
            faults.note(COLOURS, f"{mask} ({mode})")
            return None
        numbers = _numbers(masks / mask)
    except UnreadableImage as error:
        faults.note(UNREADABLE, f"{mask} of {name} ({error})")
        return None
    if upright != stored:
        said = f"{stored[0]} x {stored[1]}, the upright image is {upright[0]} x {upright[1]}"
        faults.note(OTHER_SIZE, f"{mask} ({said})")
        return None
    wrong = numbers[(numbers != ASIDE) & (numbers >= classes)]
    if wrong.size:
        faults.note(NO_CLASS, f"{mask} (class {wrong[0]} of {classes})")
        return None
    check = zlib.crc32(numbers.tobytes())
    return Marked(name=name, mask=mask, width=stored[0], height=stored[1], sum=check)


def _numbers(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as file:
            return np.array(file, np.uint8)
    except Exception as error:  # decoders raise anything
        raise UnreadableImage(f"{path}: {type(error).__name__}: {error}") from error


def confusion(
    truth: NDArray[np.integer[Any]], found: NDArray[np.integer[Any]], classes: int
) -> NDArray[np.int64]:
    """(classes, classes) pixels by their class (rows) and the one found (columns).

    Pixels whose true class is 255 are left aside. Sums over images are sums of these.
    """
    counted = truth != ASIDE
    pairs = truth[counted].astype(np.int64) * classes + found[counted].astype(np.int64)
    return np.bincount(pairs.ravel(), minlength=classes * classes).reshape(classes, classes)


def mean_iou(table: NDArray[np.int64]) -> dict[str, Any]:
    """Figures in percent from a `confusion`; higher is better.

    `mIoU`: the mean over classes of the pixels that are right over those that are of the class or
    found to be; classes of which there are neither do not count, and are None in `per_class`.
    `accuracy`: the share of pixels that are right.
    """
    right = np.diag(table).astype(np.float64)
    either = table.sum(axis=0) + table.sum(axis=1) - right
    there = either > 0
    each = 100 * right[there] / either[there]
    shares = np.full(len(table), np.nan)
    shares[there] = each
    total = int(table.sum())
    return {
        "mIoU": float(each.mean()) if there.any() else None,
        "accuracy": 100 * float(right.sum()) / total if total else None,
        "per_class": [None if np.isnan(one) else float(one) for one in shares],
    }
