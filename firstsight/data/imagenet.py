"""ILSVRC's validation images come in one folder: sort them into folders of their classes."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import Any, Literal

from firstsight.errors import UserError
from firstsight.log import Meter
from firstsight.sources.paths import has_extension

By = Literal["link", "copy", "move"]

_HEADERS = ("imageid", "image", "id", "file", "filename", "path")


def sort_imagenet_val(
    images: str, *, truth: str, out: str, classes: str = "", by: By = "link"
) -> dict[str, Any]:
    """Put every validation image into OUT/CLASS/ as a link, a copy, or itself; what was done.

    `truth` is a CSV of image and class (further words behind the class are passed over, as in
    Kaggle's LOC_val_solution.csv), or the text of the development kit: a class number a line,
    line i for image i. Numbers need `classes`: line k begins with the name of class k.

    Called again it goes on where it was interrupted. Raises `UserError`, before anything is placed,
    for an image that the truth does not name, and for a named image that is nowhere.
    """
    folder, target = Path(images), Path(out)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name the one with ILSVRC2012_val_*.JPEG")
    class_of = _truth(Path(truth), classes)
    places = {name: target / label / name for name, label in class_of.items()}
    found = {p.name: p for p in folder.iterdir() if p.is_file() and has_extension(p.name)}
    strange = sorted(found.keys() - places.keys())
    if strange:
        raise UserError(
            f"{len(strange)} images in {folder} are not named in {truth}, {strange[0]} first; "
            "take them out, or use another --truth"
        )
    todo = {name: place for name, place in places.items() if not place.exists()}
    lacking = sorted(todo.keys() - found.keys())
    if lacking:
        raise UserError(
            f"{len(lacking)} images that {truth} names are not in {folder}, {lacking[0]} first"
        )
    with Meter(f"sorting into {target}", 0, len(todo)) as meter:
        for number, (name, place) in enumerate(sorted(todo.items()), start=1):
            try:
                _place(found[name], place, by)
            except OSError as error:
                raise UserError(
                    f"cannot write {place} ({error.strerror}); use another --out"
                ) from None
            meter.show(number)
    return {
        "out": str(target),
        "by": by,
        "classes": len(set(class_of.values())),
        "images": len(places),
        "placed": len(todo),
    }


def _place(image: Path, place: Path, by: By) -> None:
    """One image at its place, whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if by == "link":
        place.unlink(missing_ok=True)  # a link that leads nowhere any more
        place.symlink_to(os.path.relpath(image.resolve(), place.parent.resolve()))
        return
    part = place.with_name(f".{place.name}.part")
    shutil.copyfile(image, part)
    os.replace(part, place)
    if by == "move":
        image.unlink()


def _truth(path: Path, classes: str) -> dict[str, str]:
    """Class of each image by the name of its file."""
    rows = [row for row in csv.reader(_lines(path, "--truth")) if row]
    if rows and rows[0][0].strip().lower() in _HEADERS:
        rows = rows[1:]
    if not rows:
        raise UserError(f"{path} names no image; use --truth with the ground truth of ILSVRC")
    if len(rows[0]) == 1:
        return _numbered([row[0].strip() for row in rows], path, classes)
    found: dict[str, str] = {}
    for row in rows:
        words = row[1].split() if len(row) > 1 else []
        if not words or words[0] in (".", "..") or {"/", "\\"} & set(words[0]):
            raise UserError(f"{path} gives no class for {row[0]!r}; a line is: image, class")
        name = row[0].strip()
        found[name if has_extension(name) else f"{name}.JPEG"] = words[0]
    return found


def _numbered(numbers: list[str], path: Path, classes: str) -> dict[str, str]:
    if not classes:
        raise UserError(
            f"{path} holds numbers of classes; add --classes FILE, whose line k begins with the "
            "name of class k (or use a CSV of image and class)"
        )
    names = [line.split()[0] for line in _lines(Path(classes), "--classes") if line.split()]
    for number in numbers:
        if not (number.isdecimal() and 1 <= int(number) <= len(names)):
            raise UserError(f"{path}: {number!r} is none of the {len(names)} classes in {classes}")
    return {
        f"ILSVRC2012_val_{i:08d}.JPEG": names[int(number) - 1]
        for i, number in enumerate(numbers, start=1)
    }


def _lines(path: Path, flag: str) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} ({error}); give {flag} a text file") from None
