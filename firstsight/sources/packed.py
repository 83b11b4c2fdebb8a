"""A packed file, `X.pack`: images of a bounded side, decoded (or encoded anew) once and for all.

    head       MAGIC, length (8 bytes), JSON: what it was made of, and how
    records    RECORD, then its pixels (H, W, 3) or its JPEG, for each image in turn
    table      (N,) RECORDS: where each image lies, its size here and its original size
    manifest   JSON: identities, classes, labels, what was left out, the hash of the table
    tail       TAIL: where table and manifest lie

The table holds a hash of each image and the manifest one of the table, so the manifest stands for
every byte. A file without a tail is not whole and is refused. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.sources.base import Pixels, Source, UnreadableImage
from firstsight.sources.files import Opened, stamp

MAGIC = b"firstsight pack 1\n"
END = b"whole pack"
TAIL = struct.Struct("<QQQQ10s")
RECORDS = np.dtype(
    [
        ("index", "<i8"),
        ("offset", "<i8"),
        ("length", "<i8"),
        ("size", "<i4", (2,)),
        ("full", "<i4", (2,)),
        ("hash", "S16"),
    ]
)
"""Position in the source; where its bytes begin, how many; width and height here and originally."""


class Packed(Source):
    """The images of `X.pack`, mapped into memory: any of them is at hand without decoding.

    `pixels` of a raw pack are a view of the file that must not be written. Crops are drawn in
    pixels of the original (`full_size`), so a pack gives the views of its source, from smaller
    pictures. Raises `UserError` where the file is no pack, or not whole.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = self.spec = os.fspath(path)
        try:
            self._file = Opened(self.path)
            head, self._table, manifest = read(self.path)
        except OSError as error:
            raise UserError(f"cannot read {self.path!r} ({error.strerror or error})") from error
        self.format: str = head["format"]
        self._names: list[str] = manifest["images"]
        self.classes = tuple(manifest["classes"])
        if manifest["labels"] is not None:
            self.labels = np.array(manifest["labels"], np.int64)
        self._map: mmap.mmap | None = None

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def identity(self, index: int) -> str:
        """As in the source that was packed."""
        return self._names[index]

    def full_size(self, index: int, pixels: Pixels) -> tuple[int, int]:
        """Width and height of the original."""
        width, height = self._table["full"][index].tolist()
        return width, height

    def pixels(self, index: int) -> Pixels:
        """Image `index`, RGB, (H, W, 3) uint8, of its size here; raises `UnreadableImage`."""
        row = self._table[index]
        data = self._mapped()[int(row["offset"]) : int(row["offset"] + row["length"])]
        if self.format == "jpeg":
            from firstsight.sources.decode import decode

            return decode(bytes(data))
        width, height = row["size"].tolist()
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)

    def contents(self) -> str:
        """Of the hashes of all images."""
        return hashlib.sha256(self._table["hash"].tobytes()).hexdigest()[:16]

    def damaged(self, index: int) -> bool:
        """Whether the bytes of image `index` differ from their hash."""
        row = self._table[index]
        data = self._mapped()[int(row["offset"]) : int(row["offset"] + row["length"])]
        return digest(data) != bytes(row["hash"])

    def _mapped(self) -> memoryview:
        file = self._file.opened()
        if stamp(file.fileno()) != self._file._stamp:  # reading what was cut off would be a crash
            raise UserError(
                f"{self.path!r} has changed since it was opened; let it rest, and run again"
            )
        if self._map is None:
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise UnreadableImage(str(error)) from error
        return memoryview(self._map)


def read(path: str) -> tuple[dict[str, Any], NDArray[Any], dict[str, Any]]:
    """Head, table and manifest of a whole pack; raises `UserError` where it is not one."""
    try:
        with open(path, "rb") as file:
            head, _ = read_head(file.read(1 << 16))
            file.seek(-TAIL.size, os.SEEK_END)
            at, length, place, size, end = TAIL.unpack(file.read(TAIL.size))
            if end != END:
                raise ValueError("it has no end")
            file.seek(at)
            table = file.read(length)
            file.seek(place)
            manifest = json.loads(file.read(size))
        if hashlib.sha256(table).hexdigest() != manifest["table"]:
            raise ValueError("its table differs from its hash")
    except (ValueError, KeyError, struct.error) as error:
        raise UserError(
            f"{path!r} is not a whole packed file ({error}); make it with firstsight data pack"
        ) from error
    return head, np.frombuffer(table, RECORDS), manifest


def head_bytes(head: dict[str, Any]) -> bytes:
    """What a pack begins with."""
    text = json.dumps(head, sort_keys=True).encode()
    return MAGIC + struct.pack("<Q", len(text)) + text


def read_head(data: bytes) -> tuple[dict[str, Any], int]:
    """The head and where it ends; raises `ValueError`."""
    if not data.startswith(MAGIC):
        raise ValueError("it does not begin like one")
    (length,) = struct.unpack_from("<Q", data, len(MAGIC))
    start = len(MAGIC) + 8
    return dict(json.loads(data[start : start + length])), start + length


def digest(data: bytes | memoryview) -> bytes:
    """The hash of an image's bytes: 16 hexadecimal digits of BLAKE2."""
    return hashlib.blake2b(data, digest_size=8).hexdigest().encode()
