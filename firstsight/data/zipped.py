"""A source as a zip archive with its map, and the check of such an archive."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from firstsight.data.each import each
from firstsight.data.names import encoded, names_inside
from firstsight.errors import UserError
from firstsight.log import Meter, say
from firstsight.sources import Source, UnreadableImage, open_source
from firstsight.sources.decode import decode as decoded
from firstsight.sources.directory import FLAGS, METHOD, SIZE, read_directory
from firstsight.sources.files import Opened
from firstsight.sources.paths import is_image
from firstsight.sources.zip import map_lines, map_of, member, unreadable_kind

_DATE = (1980, 1, 1, 0, 0, 0)  # the same source gives the same bytes on any day


def zip_up(source: str, *, out: str) -> dict[str, Any]:
    """Write the images of a SOURCE into the archive `out`, uncompressed, and their labels beside.

    The files go in as they are (images that have no file, as PNG), in the order of the source.
    X_map.txt beside X.zip has path, TAB, integer label; classes.txt names the classes, and where it
    is there already, the labels are numbered as it says, so that train.zip and val.zip agree. Both
    appear whole or not at all. Files that cannot be read are left out, named and counted.
    """
    target = Path(out)
    if target.suffix.lower() != ".zip":
        raise UserError(f"--out must end in .zip, not {out!r}")
    images = open_source(source)
    names = names_inside(images)
    map_file = target.with_name(f"{target.stem}_map.txt")
    known = _class_names(images, target.with_name("classes.txt"))
    numbers = [known.index(name) for name in images.classes]
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        skipped = _written(images, names, part)
        map_file.unlink(missing_ok=True)  # the old one does not fit the new archive
        if images.labels is not None:
            labels = [numbers[label] for label in images.labels]
            lines = [f"{names[i]}\t{labels[i]}\n" for i in range(len(names)) if i not in skipped]
            _replace(map_file, "".join(lines))
            _replace(target.with_name("classes.txt"), "".join(f"{name}\n" for name in known))
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); use another --out") from error
    finally:
        part.unlink(missing_ok=True)
    return {
        "out": out,
        "images": len(names) - len(skipped),
        "skipped": [names[index] for index in sorted(skipped)],
        "bytes": target.stat().st_size,
        "map": None if images.labels is None else str(map_file),
    }


def _written(images: Source, names: list[str], part: Path) -> set[int]:
    """Write all members; the positions of those that could not be read."""
    skipped: set[int] = set()
    with (
        zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive,
        Meter("zipping", 0, len(images)) as meter,
    ):
        for index, name in enumerate(names):
            try:
                archive.writestr(zipfile.ZipInfo(name, _DATE), encoded(images, index))
            except UnreadableImage as error:
                skipped.add(index)
                say(f"left out {images.identity(index)}: {error}")
            meter.show(index + 1)
    if len(skipped) == len(names):
        raise UserError(f"none of the {len(names)} images of {images.spec} can be read")
    return skipped


def _replace(file: Path, text: str) -> None:
    """Write a text whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, "utf-8", "surrogateescape")
    os.replace(part, file)


def _class_names(images: Source, file: Path) -> list[str]:
    """The names that the integers of a map stand for: those in `file` where it is there."""
    for name in images.classes:
        if [name] != name.strip().splitlines():
            raise UserError(f"a class {name!r} cannot be a line of {file}; rename it")
    if not file.exists():
        return list(images.classes)
    lines = file.read_text("utf-8", "surrogateescape").splitlines()
    known = [line.strip() for line in lines if line.strip()]
    lacking = [name for name in images.classes if name not in known]
    if lacking:
        raise UserError(
            f"{file} lacks the class {lacking[0]!r}; use another folder for --out, or remove {file}"
        )
    return known


def verify(archive: str, *, decode: bool = False, workers: int = 0) -> dict[str, Any]:
    """What is wrong with an archive and its map, line by line; with `decode` also its images.

    `problems` has one message for each; `notes` what is strange and harmless.
    """
    result: dict[str, Any] = {"archive": archive, "images": 0, "labels": 0}
    problems: list[str] = []
    notes: list[str] = []
    result |= {"problems": problems, "notes": notes}
    try:
        names, table = read_directory(archive)
    except UserError as error:
        problems.append(str(error))
        return result
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if not is_image(name):
            continue
        if name in rows:
            problems.append(f"{archive}, entry {row + 1}: {name!r} is there twice")
        if wrong := unreadable_kind(archive, name, *table[row, [METHOD, FLAGS]].tolist()):
            problems.append(str(wrong))
        if not table[row, SIZE]:
            problems.append(f"{archive}, entry {row + 1}: {name!r} has zero bytes")
        if name.startswith("/") or ".." in name.split("/"):
            notes.append(f"{name!r} leads out of the archive: only a name here, never unpacked")
        rows[name] = row
    result["images"] = len(rows)
    if not rows:
        problems.append(f"{archive} holds no image")
    map_file = map_of(archive)
    if map_file.exists():
        named = set()
        for line in map_lines(map_file, archive, rows):
            if isinstance(line, UserError):
                problems.append(str(line))
            else:
                named.add(line[0])
        result["labels"] = len(named)
        if left := len(rows) - len(named):
            notes.append(f"{left} images are not in {map_file}: no run will see them")
    if decode:
        problems += _undecodable(archive, list(rows), table[list(rows.values())], workers)
    return result


def _undecodable(archive: str, names: list[str], entries: Any, workers: int) -> list[str]:
    file = Opened(archive)

    def wrong(index: int) -> str:
        try:
            decoded(member(file, entries[index]))
        except UnreadableImage as error:
            return f"{archive}: {names[index]!r} cannot be decoded ({error})"
        return ""

    return [one for one in each(wrong, len(names), "decoding", workers) if one]
