"""A source as a packed file: decoded (or encoded anew) once, of a bounded side."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight.data.each import each
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.sources import Source, UnreadableImage, open_source
from firstsight.sources.packed import END, RECORDS, TAIL, digest, head_bytes
from firstsight.views.apply import Pixels, resize

Format = Literal["raw", "jpeg"]

_QUALITY = 95


class _Image(NamedTuple):
    data: bytes
    size: tuple[int, int]
    full: tuple[int, int]


def pack(
    source: str, *, out: str, side: int = 512, format: Format = "raw", workers: int = 0
) -> dict[str, Any]:
    """Write the images of a SOURCE, none longer than `side` pixels, into the packed file `out`.

    The original sizes are kept. The file appears whole or not at all; what is there of an
    interrupted one (`.X.pack.part`) is gone on from by the same call, and begun anew where source
    or settings differ. Images that cannot be read are left out, named and counted.

    Raises `UserError` where it cannot be written, a full disk included.
    """
    target = Path(out)
    if target.suffix.lower() != ".pack":
        raise UserError(f"--out must end in .pack, not {out!r}")
    if side < 1:
        raise UserError(f"--side must be 1 or more, not {side}")
    images = open_source(source)
    head = {"source": images.fingerprint(), "side": side, "format": format, "quality": _QUALITY}
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "r+b" if part.exists() else "w+b") as file:
            rows = _resumed(file, head_bytes(head))
            resumed = len(rows)
            _written(file, rows, images, head, workers)
            kept = _finished(file, rows, images)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        raise UserError(
            f"cannot write {out} ({error.strerror}); make room and run the same command again: it "
            f"goes on where it stopped (remove {part} to give up)"
        ) from error
    left_out = sorted(set(range(len(images))) - set(kept))
    return {
        "out": out,
        "images": len(kept),
        "skipped": [images.identity(index) for index in left_out],
        "resumed": resumed,
        "bytes": target.stat().st_size,
    }


def _resumed(file: BinaryIO, head: bytes) -> list[NDArray[Any]]:
    """The records of an interrupted file that are whole; the rest of it is cut off."""
    rows: list[NDArray[Any]] = []
    end = len(head)
    if file.read(end) != head:
        file.seek(0)
        file.truncate()
        file.write(head)
        return rows
    while len(text := file.read(RECORDS.itemsize)) == RECORDS.itemsize:
        row = np.frombuffer(text, RECORDS)[0]
        start = end + RECORDS.itemsize
        if row["index"] != len(rows) or row["offset"] != start:
            break
        if digest(file.read(int(row["length"]))) != row["hash"]:
            break
        rows.append(row)
        end = start + int(row["length"])
    file.seek(end)
    file.truncate()
    return rows


def _written(
    file: BinaryIO, rows: list[NDArray[Any]], images: Source, head: dict[str, Any], workers: int
) -> None:
    first = len(rows)

    def made(number: int) -> _Image | str:
        try:
            return _image(images, first + number, head["side"], head["format"])
        except UnreadableImage as error:
            return str(error)

    for index, image in enumerate(each(made, len(images) - first, "packing", workers), first):
        if isinstance(image, str):
            say(f"left out {images.identity(index)}: {image}")
            image = _Image(b"", (0, 0), (0, 0))
        offset = file.tell() + RECORDS.itemsize
        found = (index, offset, len(image.data), image.size, image.full, digest(image.data))
        row = np.array([found], RECORDS)
        file.write(row.tobytes() + image.data)
        rows.append(row[0])


def _image(images: Source, index: int, side: int, format: Format) -> _Image:
    pixels = images.pixels(index)
    small = _bounded(pixels, side)
    if format == "jpeg":
        options = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
        data = cv2.imencode(".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), options)[1].tobytes()
    else:
        data = small.tobytes()
    return _Image(data, (small.shape[1], small.shape[0]), images.full_size(index, pixels))


def _bounded(pixels: Pixels, side: int) -> Pixels:
    """The image, no longer than `side` pixels, antialiased."""
    height, width = pixels.shape[:2]
    if max(height, width) <= side:
        return pixels
    scale = side / max(height, width)
    return resize(pixels, max(1, round(width * scale)), max(1, round(height * scale)))


def _finished(file: BinaryIO, rows: list[NDArray[Any]], images: Source) -> list[int]:
    """Table, manifest and tail; the positions in the source of the images that are in."""
    table = np.array([row for row in rows if row["length"]], RECORDS)
    if not len(table):
        raise UserError(f"none of the {len(images)} images of {images.spec} can be read")
    kept: list[int] = table["index"].tolist()
    manifest = {
        "source": images.spec,
        "images": [images.identity(index) for index in kept],
        "classes": list(images.classes),
        "labels": None if images.labels is None else images.labels[kept].tolist(),
        "left_out": len(images) - len(kept),
        "table": hashlib.sha256(table.tobytes()).hexdigest(),
    }
    text = json.dumps(manifest).encode()
    at = file.tell()
    place = at + table.nbytes
    file.write(table.tobytes() + text + TAIL.pack(at, table.nbytes, place, len(text), END))
    return kept
