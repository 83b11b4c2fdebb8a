"""Pascal VOC's XML: one file an image, corners counted from 1 with the last pixel included."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from firstsight.detect.written import (
    NO_CATEGORY,
    NO_NUMBERS,
    Faults,
    Written,
    WrittenImage,
    WrittenSet,
    damaged,
    four,
    numbered,
)
from firstsight.errors import UserError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)
"""Those of Pascal VOC, in its order."""


def voc_files(path: Path) -> list[Path]:
    """The XML files that `path` means: all below a folder, or those that a list names.

    A list is a file of VOC's `ImageSets/Main`: a name a line, the files in `Annotations` beside
    `ImageSets`; of the lists of one class (`cat_train.txt`) lines with -1 are passed over.
    """
    if path.is_dir():
        return sorted(path.rglob("*.xml"))
    folder = next((up / "Annotations" for up in path.parents if up.name == "ImageSets"), None)
    folder = folder.parent.parent / "Annotations" if folder else path.parent / "Annotations"
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    names = [line[0] for line in lines if line and line[1:] != ["-1"]]
    absent = [name for name in names if not (folder / f"{name}.xml").is_file()]
    if absent:
        raise UserError(
            f"{path} names {absent[0]} and {folder} has no {absent[0]}.xml ({len(absent)} of "
            f"{len(names)} are not there); give --annotations the list of that folder"
        )
    return [folder / f"{name}.xml" for name in names]


def read_voc(path: Path, categories: Sequence[str] = ()) -> WrittenSet:
    """All that the files say; raises `UserError` where one is damaged.

    Categories are VOC's twenty where all names are among them, else the names found, sorted,
    unless they are given. VOC writes no masks into its XML.
    """
    faults = Faults()
    read = [_image(file, faults) for file in voc_files(path)]
    found = {name for _, names in read for name in names}
    names = tuple(categories) or tuple(sorted(found))
    if not categories and found and found <= set(VOC_CLASSES):
        names = VOC_CLASSES
    names, ids = numbered(dict(enumerate(names)), path)
    number = {name: i for i, name in enumerate(names)}
    for image, own in read:
        written, image.objects = image.objects, []
        for one, name in zip(written, own, strict=True):
            if name not in number:
                faults.note(NO_CATEGORY, f"{one.what} ({name})")
                continue
            one.label = number[name]
            image.objects.append(one)
    return WrittenSet(
        categories=names, category_ids=ids, images=[image for image, _ in read], faults=faults
    )


def _image(file: Path, faults: Faults) -> tuple[WrittenImage, list[str]]:
    """An image, and the categories of its objects, which are numbered later."""
    try:
        tree = ElementTree.parse(file).getroot()
        size = int(tree.findtext("size/width") or 0), int(tree.findtext("size/height") or 0)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise damaged(file, error) from None
    written = (tree.findtext("filename") or "").strip()
    # a renamed pair of files keeps the name that was written into it: its own name comes first
    name = written if Path(written).stem == file.stem else file.stem
    image = WrittenImage(
        name=name, other_name=written, image_id=file.stem, size=size if all(size) else None
    )
    names = []
    for at, thing in enumerate(tree.iter("object")):
        what = f"object {at + 1} of {file.name}"
        corners = [thing.findtext(f"bndbox/{c}") for c in ("xmin", "ymin", "xmax", "ymax")]
        try:
            x1, y1, x2, y2 = four(corners)
        except (TypeError, ValueError):
            faults.note(NO_NUMBERS, what)
            continue
        flat = x2 <= x1 or y2 <= y1  # of both ends at one pixel nothing is left, as in COCO
        box = (x1 - 1, y1 - 1, x2 - flat, y2 - flat)
        difficult = (thing.findtext("difficult") or "0").strip() == "1"
        image.objects.append(Written(box=box, label=-1, what=what, difficult=difficult))
        names.append((thing.findtext("name") or "").strip())
    return image, names
