"""Images with the objects that are marked in them, checked against the files before training.

Boxes are (x1, y1, x2, y2), half-open floats in pixels of the upright image, whatever the file
counts. An image whose file stores it turned (EXIF) is turned upright, and its annotations are taken
to be of the upright picture; where the stated size says that they were made on the stored one, the
image is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.detect.masks import Segmentation, bitmap
from firstsight.errors import UserError
from firstsight.sources.base import Pixels, UnreadableImage


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of one image; n may be 0."""

    boxes: NDArray[np.float32]
    """(n, 4) x1, y1, x2, y2 in pixels, half-open."""
    labels: NDArray[np.int64]
    """(n,) positions in the set's categories."""
    crowd: NDArray[np.bool_]
    """(n,) COCO's regions of many objects: no targets, and no fault to find or to miss."""
    area: NDArray[np.float32]
    """(n,) in pixels: the file's own (in COCO that of the mask), else that of the box."""
    difficult: NDArray[np.bool_]
    """(n,) VOC's mark: targets like others, but no fault to find or to miss."""
    masks: tuple[Segmentation, ...] = ()
    """(n,) as read; empty where the set has none."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One image of a set."""

    name: str
    """Path relative to the root of the images, with `/`."""
    image_id: int | str
    """As the file has it; the name where it has none."""
    width: int
    """Pixels, of the upright image."""
    height: int
    objects: Objects


@dataclass(frozen=True, kw_only=True)
class Fault:
    """How often one thing was wrong, and where at first."""

    count: int
    examples: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnnotatedImages:
    """A set of images with objects of known categories."""

    root: Path
    pictures: tuple[Picture, ...]
    categories: tuple[str, ...]
    """Names, in the order of the labels."""
    category_ids: tuple[int, ...]
    """As in the file, rising, gaps and all; 0, 1, 2, ... where it has none."""
    faults: Mapping[str, Fault] = field(default_factory=dict)
    """What was left out or cut when the set was opened, by kind."""

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return any(picture.objects.masks for picture in self.pictures)

    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""
        from firstsight.sources.decode import decode

        path = self.root / self.pictures[index].name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{path}: {error.strerror}") from error
        return decode(data)

    def bitmaps(self, index: int) -> NDArray[np.bool_]:
        """(n, H, W) the masks of the objects of image `index`; `UserError` where it has none."""
        picture = self.pictures[index]
        objects = picture.objects
        if len(objects) and not objects.masks:
            raise UserError(
                f"the objects of {picture.name} have no masks; train without masks, or give "
                "--annotations that hold them"
            )
        drawn = [bitmap(one, picture.height, picture.width) for one in objects.masks]
        return np.array(drawn, bool).reshape(len(objects), picture.height, picture.width)


@dataclass(frozen=True, kw_only=True)
class Detections:
    """What a detector found in one image; n may be 0."""

    boxes: NDArray[np.float32]
    """(n, 4) x1, y1, x2, y2 in pixels of the upright image, half-open."""
    scores: NDArray[np.float32]
    """(n,) higher is surer."""
    labels: NDArray[np.int64]
    """(n,) positions in the set's categories."""
    masks: tuple[Mapping[str, Any], ...] | None = None
    """(n,) run lengths (`masks.encode`), where the detector finds masks."""


def open_annotated(
    images: str, annotations: str, *, masks: bool = True, max_bad: float = 0.01
) -> AnnotatedImages:
    """The images below the folder `images` with what `annotations` marks in them.

    `annotations` is recognised by content: COCO's JSON; a folder of Pascal VOC's XML, or a list of
    its `ImageSets/Main`; a folder of YOLO's text (with `classes.txt` or `data.yaml`) or its
    `data.yaml`; a `boxes.csv`. `masks=False` passes over masks. `max_bad` is the share of images,
    and of objects, that may be left out as faulty: more are a `UserError`, which names them.
    """
    raise NotImplementedError
