"""Ground truth: one reader for each kind of file that says where the objects are.

All boxes come out as (x1, y1, x2, y2), half-open floats in pixels of the upright image, however
their file counts: COCO writes x, y, width, height; Pascal VOC and ImageNet count pixels from 1 and
include the last one; `boxes.csv` counts from 0 and includes it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError

_KINDS = (
    "a CSV (path,x1,y1,x2,y2 or filename,xmin,ymin,xmax,ymax or ImageId,PredictionString), "
    "COCO's JSON, a folder of Pascal VOC's or ImageNet's XML, or the folder of CUB's "
    "images.txt and bounding_boxes.txt"
)


@dataclass
class Marked:
    """What is marked in one image."""

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Class of each box; empty where the file does not say."""


@dataclass
class Manifest:
    """Boxes of many images, as a file has them."""

    path: str
    kind: str
    """csv, coco, xml or cub: how the published code scales them depends on it."""
    images: dict[str, Marked] = field(default_factory=dict)
    """By the path or name that the file gives; an image in it may have no box."""
    degenerate: int = 0
    """Boxes without width or height, which are left out."""
    crowds: int = 0
    """COCO's regions of many objects, which are left out."""

    def add(self, key: str, box: Any, name: str = "") -> None:
        """One box with x1, y1, x2, y2 in half-open floats."""
        marked = self.images.setdefault(key.replace("\\", "/"), Marked())
        x1, y1, x2, y2 = (float(value) for value in box)
        if not np.isfinite((x1, y1, x2, y2)).all() or x2 <= x1 or y2 <= y1:
            self.degenerate += 1
            return
        marked.boxes.append((x1, y1, x2, y2))
        marked.names.append(name)

    def add_inclusive(self, key: str, box: Any, first: int, name: str = "") -> None:
        """One box whose last pixel is its own and whose first pixel in an image is `first`.

        Where both ends are one pixel the box has no width or height, as COCO would write it.
        """
        x1, y1, x2, y2 = (float(value) for value in box)
        flat = x2 <= x1 or y2 <= y1
        end = 0 if flat else 1
        self.add(key, (x1 - first, y1 - first, x2 - first + end, y2 - first + end), name)


def read_boxes(path: str) -> Manifest:
    """The boxes in a file or folder of any known kind, recognised by what is in it.

    Raises `UserError` where it is of no known kind, damaged, or holds no image.
    """
    where = Path(path)
    if not where.exists():
        raise UserError(f"there is no {path}; --boxes takes {_KINDS}")
    if where.name == "bounding_boxes.txt":
        where = where.parent
    try:
        if (where / "bounding_boxes.txt").exists():
            manifest = _cub(where)
        elif where.is_dir() or where.suffix.lower() == ".xml":
            manifest = _xml(where)
        elif where.suffix.lower() == ".json":
            manifest = _coco(where)
        else:
            manifest = _csv(where)
    except (OSError, ValueError, KeyError, TypeError, ElementTree.ParseError, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"cannot read boxes from {path} ({reason}); it should be {_KINDS}"
        ) from None
    if not manifest.images:
        raise UserError(f"{path} marks no image; it should be {_KINDS}")
    return manifest


def _csv(path: Path) -> Manifest:
    manifest = Manifest(str(path), "csv")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        columns = [name.strip() for name in rows.fieldnames or ()]
        if "PredictionString" in columns:
            for row in rows:
                _prediction(manifest, row["ImageId"], row["PredictionString"])
            return manifest
        keys = [c for c in ("path", "filename", "file_name", "image") if c in columns]
        corners, first = ("x1", "y1", "x2", "y2"), 0
        if "xmin" in columns:  # tables made from Pascal VOC's files count as these do
            corners, first = ("xmin", "ymin", "xmax", "ymax"), 1
        if not keys or not set(corners) <= set(columns):
            raise ValueError(f"columns {', '.join(columns) or '(none)'}")
        names = next((c for c in ("class", "label") if c in columns), "")
        for row in rows:
            box = [row[c] for c in corners]
            manifest.images.setdefault(row[keys[0]], Marked())
            if any(box):  # an image without objects may have a row with empty cells
                manifest.add_inclusive(row[keys[0]], box, first, row[names] if names else "")
    return manifest


def _prediction(manifest: Manifest, key: str, text: str) -> None:
    """A line of ImageNet's LOC_*_solution.csv: class x1 y1 x2 y2, repeated."""
    words = text.split()
    manifest.images.setdefault(key, Marked())
    for at in range(0, len(words) - 4, 5):
        manifest.add_inclusive(key, words[at + 1 : at + 5], 1, words[at])
    manifest.kind = "xml"  # the same numbers as in the XML


def _coco(path: Path) -> Manifest:
    manifest = Manifest(str(path), "coco")
    data = json.loads(path.read_text())
    names = {one["id"]: str(one["name"]) for one in data.get("categories", ())}
    files = {one["id"]: str(one["file_name"]) for one in data["images"]}
    for file in files.values():
        manifest.images.setdefault(file, Marked())
    for one in data["annotations"]:
        if one.get("iscrowd"):
            manifest.crowds += 1
            continue
        x, y, width, height = one["bbox"]
        box = (x, y, x + width, y + height)
        manifest.add(files[one["image_id"]], box, names.get(one["category_id"], ""))
    return manifest


def _xml(path: Path) -> Manifest:
    """Keys are the paths of the XML files without their ending: published sets agree on these."""
    manifest = Manifest(str(path), "xml")
    root = path if path.is_dir() else path.parent
    for file in sorted(path.rglob("*.xml")) if path.is_dir() else [path]:
        key = str(PurePosixPath(file.relative_to(root).with_suffix("")))
        manifest.images.setdefault(key, Marked())
        try:
            tree = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file}: {error}") from None
        for thing in tree.iter("object"):
            corners = [thing.findtext(f"bndbox/{c}") for c in ("xmin", "ymin", "xmax", "ymax")]
            if None in corners:
                raise ValueError(f"{file}: an object without bndbox")
            manifest.add_inclusive(key, corners, 1, (thing.findtext("name") or "").strip())
    return manifest


def _cub(folder: Path) -> Manifest:
    manifest = Manifest(str(folder), "cub")
    files = dict(_numbered(folder / "images.txt"))
    for number, rest in _numbered(folder / "bounding_boxes.txt"):
        x, y, width, height = (float(value) for value in rest.split())
        manifest.images.setdefault(files[number], Marked())
        manifest.add(files[number], (x, y, x + width, y + height))
    return manifest


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text().splitlines():
        if line.strip():
            number, _, rest = line.strip().partition(" ")
            yield number, rest.strip()


def scaled(boxes: NDArray[np.float64], width: int, height: int, size: int) -> NDArray[np.float64]:
    """Boxes (n, 4) of an image of that width and height in its square resize, as floats."""
    return boxes * (size / np.array([width, height, width, height], np.float64))


def scaled_as_published(
    boxes: NDArray[np.float64], width: int, height: int, size: int, kind: str
) -> NDArray[np.float64]:
    """The same as Tobias' code has it, for boxes that were read from files of this kind.

    CUB: x, y, width and height are each cut to whole pixels. ImageNet's and VOC's XML: every
    coordinate is lowered by 1, so that the last pixel of each box is lost.
    """
    if kind == "xml":
        boxes = boxes - np.array([0.0, 0.0, 1.0, 1.0])
    if kind != "cub":
        return scaled(boxes, width, height, size)
    corner, extent = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    factor = size / np.array([width, height], np.float64)
    corner, extent = np.trunc(corner * factor), np.trunc(extent * factor)
    return np.concatenate([corner, corner + extent], axis=1)
