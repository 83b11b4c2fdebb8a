"""Images with the objects that are marked in them, checked against the files before training.

Boxes are (x1, y1, x2, y2), half-open floats in pixels of the upright image, whatever the file
counts. An image whose file stores it turned (EXIF) is turned upright, and its annotations are taken
to be of the upright picture; where the stated size says that they were made on the stored one, the
image is left out and counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.detect import written as known
from firstsight.detect.coco import read_coco
from firstsight.detect.masks import BadMask, Segmentation, bitmap, checked
from firstsight.detect.voc import read_voc
from firstsight.detect.written import Fault, Faults, Written, WrittenImage, WrittenSet
from firstsight.detect.yolo import is_yolo, read_yolo
from firstsight.errors import UserError
from firstsight.sources.base import Pixels, UnreadableImage
from firstsight.sources.decode import decode, sizes
from firstsight.sources.folder import Folder

_KINDS = (
    "COCO's JSON, a folder of Pascal VOC's XML or a list of its ImageSets, a folder of YOLO's text "
    "(with classes.txt or data.yaml) or its data.yaml, or a CSV of path,x1,y1,x2,y2"
)
_OVERHANG = 1.0  # pixels that a box may reach beyond the image: files round


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

    def told(self) -> list[str]:
        """A line for each kind of fault: how many, and where at first."""
        return known.told(self.faults)

    @property
    def has_masks(self) -> bool:
        """Whether the objects have masks."""
        return any(picture.objects.masks for picture in self.pictures)

    def pixels(self, index: int) -> Pixels:
        """Image `index`, upright and RGB, (H, W, 3) uint8; raises `UnreadableImage`."""
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
    images: str,
    annotations: str,
    *,
    masks: bool = True,
    max_bad: float = 0.01,
    categories: Sequence[str] = (),
) -> AnnotatedImages:
    """The images below the folder `images` with what `annotations` marks in them.

    `annotations` is recognised by content: COCO's JSON; a folder of Pascal VOC's XML, or a list of
    its `ImageSets/Main`; a folder of YOLO's text (with `classes.txt` or `data.yaml`) or its
    `data.yaml`; a `boxes.csv`. `masks=False` passes over masks. `max_bad` is the share of images,
    and of objects, that may be left out as faulty: more are a `UserError`, which names them.
    `categories` are the names that count where the file does not list its own (VOC, CSV): those of
    the set that a detector learnt from.
    """
    names = Folder(images)
    identities = [names.identity(i) for i in range(len(names))]
    read = _read(annotations, images, identities, masks, categories)
    found = _Lookup(identities)
    with_masks = any(one.mask is not None for image in read.images for one in image.objects)
    pictures = []
    for image in read.images:
        name = found.of(image.name) or found.of(image.other_name)
        if name is None:
            read.faults.note(known.MISSING, image.name)
            continue
        size = _size(Path(images) / name, image, read.faults)
        if size is not None:
            objects = _placed(image.objects, size, read, with_masks)
            pictures.append(
                Picture(
                    name=name,
                    image_id=image.image_id,
                    width=size[0],
                    height=size[1],
                    objects=objects,
                )
            )
    _refuse(read, pictures, images, annotations, max_bad)
    return AnnotatedImages(
        root=Path(images),
        pictures=tuple(pictures),
        categories=read.categories,
        category_ids=read.category_ids,
        faults=read.faults.kept(),
    )


def _read(
    annotations: str,
    images: str,
    identities: Sequence[str],
    masks: bool,
    categories: Sequence[str],
) -> WrittenSet:
    """What the file or folder says, by the reader of its kind."""
    path = Path(annotations)
    if not path.exists():
        raise UserError(f"there is no {annotations}; --annotations takes {_KINDS}")
    if path.is_dir():
        if any(path.rglob("*.xml")):
            return read_voc(path, categories)
    elif "ImageSets" in path.parts:
        return read_voc(path, categories)
    elif path.suffix.lower() == ".csv":
        return _csv(path, categories)
    elif _begins(path, "{", "["):
        return read_coco(path, masks)
    if is_yolo(path):
        return read_yolo(path, Path(images), identities, masks)
    raise UserError(f"{annotations} is of no known kind; --annotations takes {_KINDS}")


def _begins(path: Path, *marks: str) -> bool:
    with open(path, "rb") as file:
        return file.read(64).decode("utf-8", "replace").lstrip("\ufeff \t\r\n").startswith(marks)


def _csv(path: Path, categories: Sequence[str]) -> WrittenSet:
    from firstsight.localize.boxes import read_boxes

    manifest, faults = read_boxes(str(path)), Faults()
    if manifest.degenerate:
        faults.note(known.NO_AREA, path.name, manifest.degenerate)
    named = {name or "object" for one in manifest.images.values() for name in one.names}
    names = tuple(categories) or tuple(sorted(named)) or ("object",)
    number = {name: i for i, name in enumerate(names)}
    images = []
    for key, marked in manifest.images.items():
        image = WrittenImage(name=key, image_id=key)
        pairs = zip(marked.boxes, marked.names, strict=True)
        for at, (box, name) in enumerate(pairs):
            label, what = number.get(name or "object"), f"box {at + 1} of {key}"
            if label is None:
                faults.note(known.NO_CATEGORY, f"{what} ({name})")
            else:
                image.objects.append(Written(box=box, label=label, what=what))
        images.append(image)
    return WrittenSet(
        categories=names, category_ids=tuple(number.values()), images=images, faults=faults
    )


class _Lookup:
    """Finds an image by its path, else by its file's name, else by that without its ending."""

    def __init__(self, identities: Sequence[str]) -> None:
        self.paths = set(identities)
        self.ends: dict[str, list[str]] = {}
        for name in identities:
            last = name.rpartition("/")[2]
            for key in {last, last.rpartition(".")[0]}:
                self.ends.setdefault(key, []).append(name)

    def of(self, name: str) -> str | None:
        """The path of the one image that `name` fits; None where none or several do."""
        name = name.replace("\\", "/").removeprefix("./")
        if name in self.paths:
            return name
        several = self.ends.get(name.rpartition("/")[2], [])
        several = [one for one in several if len(several) == 1 or one.endswith(f"/{name}")]
        return several[0] if len(several) == 1 else None


def _size(path: Path, image: WrittenImage, faults: Faults) -> tuple[int, int] | None:
    """Width and height of the upright image, by its header; None where it cannot be used."""
    try:
        stored, upright = sizes(path)
    except UnreadableImage as error:
        faults.note(known.UNREADABLE, f"{image.name} ({error})")
        return None
    if image.size is None or image.size == upright:
        return upright
    turned = ", turned by its EXIF: mark the upright picture" if image.size == stored else ""
    width, height = image.size
    said = f"{image.name} ({width} x {height}, but is {upright[0]} x {upright[1]}{turned})"
    faults.note(known.OTHER_SIZE, said)
    return None


def _placed(
    marked: Sequence[Written], size: tuple[int, int], read: WrittenSet, with_masks: bool
) -> Objects:
    """The objects that can be, cut at the edges of the image of this width and height."""
    boxes, kept, masks = [], [], []
    for one in marked:
        box = _box(one, size, read)
        mask = _mask(one, size, read) if box is not None and with_masks else None
        if box is None or (with_masks and mask is None):
            continue
        boxes.append(box)
        kept.append(one)
        if mask is not None:
            masks.append(mask)
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    own = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    areas = [own[i] if one.area is None else one.area for i, one in enumerate(kept)]
    return Objects(
        boxes=corners,
        labels=np.array([one.label for one in kept], np.int64),
        crowd=np.array([one.crowd for one in kept], bool),
        area=np.array(areas, np.float32),
        difficult=np.array([one.difficult for one in kept], bool),
        masks=tuple(masks),
    )


def _box(one: Written, size: tuple[int, int], read: WrittenSet) -> list[float] | None:
    (width, height), faults = size, read.faults
    edge = np.array([width, height, width, height], np.float64)
    box = np.array(one.box) * (edge if read.relative else 1)
    said = f"{one.what} ({', '.join(f'{value:g}' for value in box)} in {width} x {height})"
    x1, y1, x2, y2 = np.float32(box).tolist()
    if x2 <= x1 or y2 <= y1:
        faults.note(known.NO_AREA, said)
    elif x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
        faults.note(known.OUTSIDE, said)
    elif (box < -_OVERHANG).any() or (box > edge + _OVERHANG).any():
        faults.note(known.CUT, said)
        return [float(value) for value in box.clip(0, edge)]
    else:
        return [x1, y1, x2, y2]
    return None


def _mask(one: Written, size: tuple[int, int], read: WrittenSet) -> Segmentation | None:
    width, height = size
    if one.mask is None:
        read.faults.note(known.NO_MASK, one.what)
        return None
    try:
        return checked(one.mask, height, width, size if read.relative else (1, 1))
    except BadMask as error:
        read.faults.note(known.BAD_MASK, f"{one.what} ({error})")
        return None


def _refuse(
    read: WrittenSet, pictures: Sequence[Picture], images: str, annotations: str, max_bad: float
) -> None:
    """Raise `UserError` where too much was left out, or nothing is left; note empty categories."""
    faults = read.faults
    left = sum(len(picture.objects) for picture in pictures)
    for lost, kinds, there, name in (
        (faults.total(known.IMAGES), known.IMAGES, len(pictures), "images"),
        (faults.total(known.OBJECTS), known.OBJECTS, left, "objects"),
    ):
        if lost <= max_bad * (lost + there) and there:
            continue
        if not lost:
            raise UserError(f"{annotations} marks no {name}; give --annotations that mark some")
        raise UserError(
            f"{annotations} does not fit the images in {images}: {lost} of {lost + there} {name} "
            f"cannot be used ({faults.reasons(kinds)}); mend --annotations, or allow more by "
            "--max-bad"
        )
    used = {int(label) for picture in pictures for label in picture.objects.labels}
    for i, name in enumerate(read.categories):
        if i not in used:
            faults.note(known.EMPTY_CLASS, name)
