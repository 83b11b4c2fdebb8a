"""COCO's JSON: images, categories (ids with gaps), boxes as x, y, width and height, masks.

https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firstsight.detect.written import (
    NO_CATEGORY,
    NO_NUMBERS,
    TWICE,
    UNLISTED,
    Faults,
    Written,
    WrittenImage,
    WrittenSet,
    damaged,
    four,
    numbered,
)
from firstsight.errors import UserError


def read_coco(path: Path, masks: bool = True) -> WrittenSet:
    """All that the file says; raises `UserError` where it is not COCO's.

    Ids of images may be numbers or text, and 25 is the same image as "25". An image without
    annotations is one without objects. `masks=False` passes over segmentations.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(path, error) from None
    if not isinstance(data, dict) or not all(
        isinstance(data.get(key), list) for key in ("images", "annotations", "categories")
    ):
        raise UserError(
            f"{path} has no lists of images, annotations and categories, as COCO's instances have; "
            "give such a file to --annotations"
        )
    faults = Faults()
    try:
        names, ids = numbered(_categories(data["categories"], path), path)
        images = _images(data["images"], faults)
        label = {one: i for i, one in enumerate(ids)}
        for at, one in enumerate(data["annotations"]):
            _add(one, f"annotation {one.get('id', at)}", images, label, masks, faults)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(path, error) from None
    return WrittenSet(
        categories=names, category_ids=ids, images=list(images.values()), faults=faults
    )


def _categories(rows: list[dict[str, Any]], path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for row in rows:
        number = int(row["id"])
        if number in names:
            raise UserError(f"{path} has two categories with the id {number}; number them apart")
        names[number] = str(row["name"])
    return names


def _images(rows: list[dict[str, Any]], faults: Faults) -> dict[str, WrittenImage]:
    images: dict[str, WrittenImage] = {}
    for row in rows:
        number, name = row["id"], str(row["file_name"])
        if str(number) in images:
            faults.note(TWICE, f"{name} (id {number})")
            continue
        size = None
        if row.get("width") and row.get("height"):
            size = int(row["width"]), int(row["height"])
        images[str(number)] = WrittenImage(
            name=name, image_id=number if isinstance(number, int) else str(number), size=size
        )
    return images


def _add(
    one: dict[str, Any],
    what: str,
    images: dict[str, WrittenImage],
    label: dict[int, int],
    masks: bool,
    faults: Faults,
) -> None:
    image = images.get(str(one["image_id"]))
    if image is None:
        faults.note(UNLISTED, f"{what} (image {one['image_id']})")
        return
    what = f"{what} of {image.name}"
    category = one["category_id"]
    try:
        number = label[int(category)]
    except (KeyError, TypeError, ValueError):
        faults.note(NO_CATEGORY, f"{what} (category {category})")
        return
    try:
        x, y, width, height = four(one["bbox"])
        area = float(one["area"]) if one.get("area") is not None else None
    except (KeyError, TypeError, ValueError):
        faults.note(NO_NUMBERS, f"{what} ({one.get('bbox')})")
        return
    mask = one.get("segmentation") if masks else None
    image.objects.append(
        Written(
            box=(x, y, x + width, y + height),
            label=number,
            what=what,
            crowd=bool(one.get("iscrowd")),
            area=area,
            mask=mask or None,
        )
    )
