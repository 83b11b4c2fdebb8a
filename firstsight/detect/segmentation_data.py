"""Semantic segmentation: images with index masks beside them, and the mean IoU over classes.

A mask is a PNG of the image's name and size whose pixels are numbers of classes, grey or by a
palette (whose colours mean nothing); 255 is left aside, as Pascal VOC has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from firstsight.errors import UserError
from firstsight.sources.base import Pixels, UnreadableImage
from firstsight.sources.decode import decode, sizes
from firstsight.sources.folder import Folder

ASIDE = 255
"""Number of the pixels that are of no class."""


@dataclass(frozen=True, kw_only=True)
class SegmentedImages:
    """Images whose pixels are marked."""

    root: Path
    masks_root: Path
    names: tuple[str, ...]
    """Paths of images relative to `root`."""
    masks: tuple[str, ...]
    """Paths of their masks relative to `masks_root`."""
    categories: tuple[str, ...]
    """Names, in the order of their numbers."""

    def __len__(self) -> int:
        return len(self.names)

    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""
        try:
            data = (self.root / self.names[index]).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{self.names[index]}: {error.strerror}") from error
        return decode(data)

    def indices(self, index: int) -> NDArray[np.uint8]:
        """(H, W) the class of each pixel of image `index`, 255 for none.

        Raises `UserError` where a number is no category's: the mask was made for other ones.
        """
        path = self.masks_root / self.masks[index]
        numbers = _numbers(path)
        wrong = numbers[(numbers != ASIDE) & (numbers >= len(self.categories))]
        if wrong.size:
            raise UserError(
                f"{path} holds class {wrong[0]}, and there are {len(self.categories)} "
                "(--categories); name them all"
            )
        return numbers


def open_segmented(
    images: str, masks: str, categories: Sequence[str], *, only: str = ""
) -> SegmentedImages:
    """The images below the folder `images` that have a mask of their name below `masks`.

    `categories` are the names of classes 0, 1, ...; `only` is a list of names, one a line, as
    VOC's `ImageSets/Segmentation` has them. Raises `UserError` where no image has a mask, a listed
    name lacks its image or mask, sizes differ, or a mask is no picture of indices.
    """
    if not 1 <= len(categories) <= ASIDE:
        raise UserError(f"{len(categories)} categories; index masks hold 1 to {ASIDE}")
    pictures, marked = _by_name(images), _by_name(masks)
    wanted = sorted(set(pictures) & set(marked))
    if only:
        try:
            wanted = Path(only).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {only} ({error}); give a list of names") from None
        for name in wanted:
            for there, folder in ((pictures, images), (marked, masks)):
                if name not in there:
                    raise UserError(f"{only} names {name}, and {folder} has none of that name")
    if not wanted:
        raise UserError(
            f"no image in {images} has a mask of its name in {masks} (the images begin with "
            f"{min(pictures)}, the masks with {min(marked)}); point both at folders that fit"
        )
    for name in wanted:
        _check(Path(images) / pictures[name], Path(masks) / marked[name])
    return SegmentedImages(
        root=Path(images),
        masks_root=Path(masks),
        names=tuple(pictures[name] for name in wanted),
        masks=tuple(marked[name] for name in wanted),
        categories=tuple(categories),
    )


def _by_name(folder: str) -> dict[str, str]:
    source = Folder(folder)
    names = [source.identity(i) for i in range(len(source))]
    return {str(PurePosixPath(name).with_suffix("")): name for name in names}


def _check(image: Path, mask: Path) -> None:
    try:
        (_, upright), (stored, _) = sizes(image), sizes(mask)
        with Image.open(mask) as file:
            mode = file.mode
    except UnreadableImage as error:
        raise UserError(f"cannot read {image} or its mask {mask} ({error}); mend it") from None
    if mode not in ("L", "P", "1"):
        raise UserError(f"{mask} holds colours ({mode}), not indices; save it with one channel")
    if upright != stored:
        raise UserError(
            f"{mask} has {stored[0]} x {stored[1]} pixels, and {image} has {upright[0]} x "
            f"{upright[1]}; a mask is as large as its (upright) image"
        )


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
