"""What a detector is shown: sizes and flips drawn, boxes and masks moved along, batches.

What is drawn for an image is a pure function of (seed, epoch, image), as views are in pretraining:
workers, ranks and interruptions change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from firstsight import keyed
from firstsight.detect.annotations import AnnotatedImages, Picture
from firstsight.detect.segmentation_data import SegmentedImages
from firstsight.detect.settings import Training
from firstsight.errors import UserError
from firstsight.order import Epochs
from firstsight.sources.base import Pixels, UnreadableImage

ImageSet = AnnotatedImages | SegmentedImages
LEAST_SIDE = 32
"""Smaller training images are left out, as in MMDetection."""
_SIDE, _FLIP, _LEFT, _TOP = 0, 1, 2, 3  # what is drawn, as a part of its key
_ATTEMPTS = 50


class Shown(NamedTuple):
    """One image as a detector is shown it, or asked about it."""

    image: Tensor
    """(3, h, w) uint8 RGB."""
    target: dict[str, Tensor]
    """Boxes (n, 4), labels (n,), and masks (n, h, w) where they are wanted; or indices (h, w)."""


class Batch(NamedTuple):
    """The share of one rank of a batch."""

    images: list[Tensor]
    targets: list[dict[str, Tensor]]
    bad: tuple[str, ...]
    """Images that could not be decoded, replaced by others."""


def to_device(batch: Batch, device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images as floats in 0 to 1, and their targets."""
    images = [image.to(device).float() / 255 for image in batch.images]
    targets = [{key: value.to(device) for key, value in one.items()} for one in batch.targets]
    return images, targets


def side_of(config: Training, epoch: int, index: int) -> int:
    """The drawn shorter side of an image, pixels."""
    u = float(keyed.uniform(config.seed, epoch, index, _SIDE))
    if config.scales == "range":
        least, most = config.short_sides[0], config.short_sides[-1]
        return least + int(u * (most - least + 1))
    return config.short_sides[int(u * len(config.short_sides))]


def flipped(config: Training, epoch: int, index: int) -> bool:
    """Whether an image is mirrored."""
    return float(keyed.uniform(config.seed, epoch, index, _FLIP)) < config.flip


def fitted(width: int, height: int, short: int, long: int) -> tuple[int, int]:
    """Width and height with the shorter side `short`, or the longer one `long` where that is less.

    Rounded as in detectron2 and MMDetection; torchvision cuts fractions off.
    """
    scale = min(short / min(width, height), long / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def resized(pixels: Pixels, width: int, height: int) -> Tensor:
    """(3, height, width) uint8: means over areas where the image shrinks, else bilinear."""
    smaller = width < pixels.shape[1]
    way = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    made = cv2.resize(pixels, (width, height), interpolation=way)
    return torch.from_numpy(made).permute(2, 0, 1)


def shown(
    pixels: Pixels,
    picture: Picture,
    size: tuple[int, int],
    flip: bool,
    masks: NDArray[np.bool_] | None = None,
) -> Shown:
    """An image of `size` (width, height), mirrored or not, with the objects that are no crowds.

    Masks (n, H, W) are those of all objects, and are taken at the nearest pixel.
    """
    objects, (width, height) = picture.objects, size
    scale = np.array([width / picture.width, height / picture.height] * 2, np.float32)
    boxes = objects.boxes * scale
    if flip:
        boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    kept = learnable(picture)
    target = {
        "boxes": torch.from_numpy(boxes[kept]),
        "labels": torch.from_numpy(objects.labels[kept]),
    }
    image = resized(pixels, width, height)
    if masks is not None:
        moved = [_nearest(mask, width, height) for mask in masks[kept]]
        stack = np.array(moved, np.uint8).reshape(-1, height, width)
        target["masks"] = torch.from_numpy(stack)
    if flip:
        image = image.flip(2)
        if "masks" in target:
            target["masks"] = target["masks"].flip(2)
    return Shown(image.contiguous(), target)


def marked(pixels: Pixels, indices: Pixels, size: tuple[int, int], flip: bool) -> Shown:
    """An image of `size` (width, height), mirrored or not, with the class of each of its pixels,
    which is that of the nearest."""
    image = resized(pixels, *size)
    moved = torch.from_numpy(cv2.resize(indices, size, interpolation=cv2.INTER_NEAREST_EXACT))
    if flip:
        image, moved = image.flip(2), moved.flip(1)
    return Shown(image.contiguous(), {"indices": moved})


def cut(one: Shown, config: Training, epoch: int, index: int) -> Shown:
    """A square of `config.crop` pixels of a marked image, drawn; all of what is smaller."""
    height, width = one.image.shape[1:]
    draws = [float(keyed.uniform(config.seed, epoch, index, part)) for part in (_LEFT, _TOP)]
    x, y = (
        int(u * (side - min(config.crop, side) + 1))
        for u, side in zip(draws, (width, height), strict=True)
    )
    rows, columns = slice(y, y + config.crop), slice(x, x + config.crop)
    indices = one.target["indices"][rows, columns]
    return Shown(one.image[:, rows, columns].contiguous(), {"indices": indices})


def _nearest(mask: NDArray[np.bool_], width: int, height: int) -> Pixels:
    grey = mask.astype(np.uint8)
    return np.asarray(cv2.resize(grey, (width, height), interpolation=cv2.INTER_NEAREST), np.uint8)


def learnable(picture: Picture) -> NDArray[np.bool_]:
    """(n,) which objects a detector learns: no crowds, and no boxes without an area."""
    boxes = picture.objects.boxes
    inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
    return np.asarray(inside & ~picture.objects.crowd, bool)


def worth_training(images: ImageSet, keep_empty: bool) -> NDArray[np.int64]:
    """Positions of the images that are trained on."""
    if isinstance(images, SegmentedImages):
        return np.arange(len(images))
    return np.array(
        [
            position
            for position, one in enumerate(images.pictures)
            if keep_empty or (min(one.width, one.height) >= LEAST_SIDE and learnable(one).any())
        ],
        np.int64,
    )


class Grouped(Epochs):
    """Epochs in batches of wide images or of tall ones, each in the drawn order.

    What does not fill a batch of its kind is left out of that epoch.
    """

    def __init__(self, wide: NDArray[np.bool_], batch_size: int, seed: int) -> None:
        super().__init__(len(wide), batch_size, seed)
        self._wide = wide
        kinds = (int(wide.sum()), int((~wide).sum()))
        self.steps_per_epoch = sum(count // batch_size for count in kinds)
        if not self.steps_per_epoch:
            raise UserError(
                f"{kinds[0]} wide and {kinds[1]} tall images fill no batch of {batch_size} of one "
                f"kind; use --batch-size {max(kinds)} or --group-shapes False"
            )
        self._grouped = -1
        self._batches: NDArray[np.int64] = np.empty((0, batch_size), np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) images of `step`, over all ranks."""
        if (epoch := self.epoch(step)) != self._grouped:
            random = np.random.default_rng(keyed.seed(self.seed, epoch))
            order = random.permutation(self.images)
            parts = []
            for kind in (True, False):
                members = order[self._wide[order] == kind]
                whole = len(members) - len(members) % self.batch_size
                parts.append(members[:whole].reshape(-1, self.batch_size))
            batches = np.concatenate(parts)
            self._grouped, self._batches = epoch, batches[random.permutation(len(batches))]
        return np.asarray(self._batches[step % self.steps_per_epoch])


def order_of(images: ImageSet, chosen: NDArray[np.int64], config: Training) -> Epochs:
    """In which order the chosen images are visited."""
    if not config.group_shapes:
        return Epochs(len(chosen), config.batch_size, config.seed)
    wide = [images.pictures[i].width >= images.pictures[i].height for i in chosen]
    return Grouped(np.array(wide, bool), config.batch_size, config.seed)


@dataclass(frozen=True, kw_only=True)
class Steps(Dataset[Any]):
    """Step -> this rank's share of its batch."""

    images: ImageSet
    chosen: NDArray[np.int64]
    """Positions of the images that are trained on."""
    order: Epochs
    config: Training
    rank: int
    world: int

    def __getitem__(self, step: int) -> Batch | UserError:
        """The batch of one step; an error is raised again by the loader."""
        epoch = self.order.epoch(step)
        index = np.array_split(self.order.indices(step), self.world)[self.rank]
        bad: list[str] = []
        try:
            made = [self._shown(epoch, int(place), bad) for place in index]
        except UserError as error:
            return error
        return Batch([one.image for one in made], [one.target for one in made], tuple(bad))

    def _shown(self, epoch: int, place: int, bad: list[str]) -> Shown:
        config, at, pixels = self.config, *self._readable(place, bad)
        picture: Any = self.images.pictures[at]
        side = side_of(config, epoch, place)
        size = fitted(picture.width, picture.height, side, config.long_side)
        flip = flipped(config, epoch, place)
        if isinstance(self.images, SegmentedImages):
            whole = marked(pixels, self.images.indices(at), size, flip)
            return cut(whole, config, epoch, place) if config.crop else whole
        masks = self.images.bitmaps(at) if config.detector == "mask-rcnn" else None
        return shown(pixels, picture, size, flip, masks)

    def _readable(self, place: int, bad: list[str]) -> tuple[int, Pixels]:
        """An image that can be decoded: that at `place`, or one that always stands in for it."""
        for attempt in range(_ATTEMPTS):
            at = int(self.chosen[place])
            try:
                return at, self.images.pixels(at)
            except UnreadableImage:
                bad.append(self.images.pictures[at].name)
                stand_in = keyed.hashed(self.config.seed, place, attempt)
                place = int(stand_in % np.uint64(len(self.chosen)))
        raise UserError(f"{_ATTEMPTS} images in turn cannot be decoded, {bad[0]} first")


@dataclass(frozen=True, kw_only=True)
class Asked(Dataset[Any]):
    """Number -> some images as they are judged, and the positions of those that could be read."""

    images: ImageSet
    side: int
    long_side: int
    batch_size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)

    def __getitem__(self, number: int) -> tuple[list[Tensor], Sequence[int]]:
        """Images (3, h, w) uint8 and their positions."""
        first, found, read = number * self.batch_size, [], []
        for position in range(first, min(first + self.batch_size, len(self.images))):
            picture = self.images.pictures[position]
            try:
                pixels = self.images.pixels(position)
            except UnreadableImage:
                continue
            size = fitted(picture.width, picture.height, self.side, self.long_side)
            found.append(resized(pixels, *size))
            read.append(position)
        return found, read
