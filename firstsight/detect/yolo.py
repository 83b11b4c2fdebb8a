"""YOLO's text: a file an image, a line an object: class, then centre, width and height as shares.

A line with more numbers is a polygon: class, then x, y, x, y, ... Names of classes come from
`classes.txt` (or `obj.names`), a name a line, or from `data.yaml` (`names`), in the folder or in
one of the two above it. An image without a file, or with an empty one, has no objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import yaml

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

_LISTS = ("classes.txt", "obj.names")
_TABLES = ("data.yaml", "dataset.yaml", "data.yml")


def is_yolo(path: Path) -> bool:
    """Whether `path` is such a table, or a folder that holds text files and no XML."""
    if path.is_dir():
        return any(path.rglob("*.txt"))
    return path.suffix in (".yaml", ".yml")


def read_yolo(path: Path, root: Path, identities: Sequence[str], masks: bool = True) -> WrittenSet:
    """All that the files say of the images with these paths (relative to `root`).

    Files are matched by the path without its ending; a file without an image is one whose image
    is missing. Beside a `data.yaml` the files lie where the images do, with `labels` for `images`
    in the path. Raises `UserError` where names of classes are missing.
    """
    folder = path if path.is_dir() else _beside(root)
    categories, ids = numbered(_names(path, folder), path)
    files = {_key(file.relative_to(folder)): file for file in sorted(folder.rglob("*.txt"))}
    files = {key: file for key, file in files.items() if file.name not in _LISTS}
    number = {one: i for i, one in enumerate(ids)}
    faults, images = Faults(), []
    for name in identities:
        file = _file_of(name, files)
        image = WrittenImage(name=name, image_id=name)
        if file is not None:
            image.objects = _objects(files.pop(file), number, masks, faults)
        images.append(image)
    images += [WrittenImage(name=key, image_id=key) for key in files]
    return WrittenSet(
        categories=categories, category_ids=ids, images=images, faults=faults, relative=True
    )


def _beside(root: Path) -> Path:
    """The folder of the texts of the images in `root`: its last `images` is `labels` there."""
    parts = list(root.absolute().parts)
    for at in range(len(parts) - 1, 0, -1):
        if parts[at] == "images":
            return Path(*parts[:at], "labels", *parts[at + 1 :])
    return root


def _key(path: Path | PurePosixPath) -> str:
    return str(PurePosixPath(*path.parts).with_suffix(""))


def _file_of(name: str, files: dict[str, Path]) -> str | None:
    """The key of the text of an image: its path, or the end of it (`images/` and `labels/`)."""
    key = PurePosixPath(_key(PurePosixPath(name)))
    for at in range(len(key.parts)):
        ending = str(PurePosixPath(*key.parts[at:]))
        if ending in files:
            return ending
    return None


def _names(path: Path, folder: Path) -> dict[int, str]:
    places = [path] if not path.is_dir() else []
    for up in (folder, *folder.parents[:2]):
        places += [up / name for name in (*_LISTS, *_TABLES)]
    for place in places:
        if not place.is_file():
            continue
        try:
            if place.name in _LISTS:
                lines = place.read_text(encoding="utf-8").splitlines()
                return dict(enumerate(line.strip() for line in lines if line.strip()))
            named = yaml.safe_load(place.read_text(encoding="utf-8"))["names"]
            rows = named.items() if isinstance(named, dict) else enumerate(named)
            return {int(number): str(name) for number, name in rows}
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
            raise damaged(place, error) from None
    raise UserError(
        f"{path} does not say what its classes are called; put a classes.txt (a name a line) or a "
        "data.yaml with names into it, and give it to --annotations"
    )


def _objects(file: Path, number: dict[int, int], masks: bool, faults: Faults) -> list[Written]:
    found = []
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(file, error) from None
    for at, line in enumerate(lines):
        words, what = line.split(), f"line {at + 1} of {file.name}"
        if not words:
            continue
        try:
            label, box, mask = _parsed(words)
        except ValueError:
            faults.note(NO_NUMBERS, what)
            continue
        if label not in number:
            faults.note(NO_CATEGORY, f"{what} (class {label})")
            continue
        found.append(Written(box=box, label=number[label], what=what, mask=mask if masks else None))
    return found


def _parsed(
    words: list[str],
) -> tuple[int, tuple[float, float, float, float], list[list[float]] | None]:
    label, values = int(words[0]), [float(word) for word in words[1:]]
    if len(values) == 4:
        across, down, width, height = four(values)
        x1, y1 = across - width / 2, down - height / 2
        return label, (x1, y1, x1 + width, y1 + height), None
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"{len(values)} numbers")
    x, y = values[::2], values[1::2]
    return label, four([min(x), min(y), max(x), max(y)]), [values]
