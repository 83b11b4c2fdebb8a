"""A zip archive of images, read in place by many threads and processes at once."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.sources.base import Encoded, UnreadableImage
from firstsight.sources.files import Opened
from firstsight.sources.paths import EXTENSIONS, class_folders, has_extension, is_image

MAX_BYTES = 512 << 20
"""A member that declares more than this, packed or unpacked, is not read."""

_LOCAL_HEADER = 30  # bytes before the name; the directory's copy of the extra field may differ
_STORED, _DEFLATED, _ENCRYPTED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, 1


class Zip(Encoded):
    """The images of `NAME.zip`, never extracted.

    `NAME_map.txt` beside it, where it is there, says which images and in which order: path inside
    the archive, TAB, integer label. The labels become 0 to C - 1 in the order of the integers,
    whose decimals are the class names. With `classes.txt` beside it, one name a line, either as
    many as there are labels or one for each integer from 0, the names are its lines; in the latter
    case the integers stay as they are, so that a test set may lack a class.

    Without a map, all images are taken, sorted by path, labelled by their folders where these spell
    classes (`class_folders`).

    The directory of the archive is read once, here.

    Raises `UserError` where the archive, a line of the map, or what both say together is wrong.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.spec = self.path
        members = directory(self.path)
        self._file = Opened(self.path)
        beside = Path(self.path)
        map_file = beside.with_name(f"{beside.stem}_map.txt")
        if map_file.exists():
            self._names, numbers = _read_map(map_file, self.path, members)
            self.classes, self.labels = _classes(numbers, beside.with_name("classes.txt"))
        else:
            self._names = sorted(filter(is_image, members), key=lambda name: name.split("/"))
            self.classes, self.labels = class_folders(self._names)
        if not self._names:
            raise UserError(
                f"no images in {self.path!r} (looked for {', '.join(EXTENSIONS)}); "
                "point --data at an archive that holds some"
            )
        chosen = [members[name] for name in self._names]
        for info in chosen:
            _refuse_unreadable_kind(self.path, info)
        # Plain numbers instead of ZipInfo objects: a million of these is what workers are sent.
        self._entries = np.array(
            [
                (i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type)
                for i in chosen
            ],
            np.int64,
        )

    def __len__(self) -> int:
        return len(self._names)

    def identity(self, index: int) -> str:
        """The path of image `index` inside the archive."""
        return self._names[index]

    def size(self, index: int) -> int:
        """Bytes of image `index`, unpacked, as the archive declares them."""
        return int(self._entries[index, 2])

    def encoded(self, index: int) -> bytes:
        """The file of image `index`, unpacked and checked; raises `UnreadableImage`."""
        offset, packed, size, checksum, method = self._entries[index].tolist()
        if max(packed, size) > MAX_BYTES:
            raise UnreadableImage(
                f"declares {max(packed, size)} bytes; at most {MAX_BYTES} are read"
            )
        try:
            header = self._file.read(_LOCAL_HEADER, offset)
            if header[:4] != b"PK\3\4" or len(header) < _LOCAL_HEADER:
                raise UnreadableImage("the archive is damaged: no member where one should begin")
            name_size, extra_size = struct.unpack("<HH", header[26:30])
            start = offset + _LOCAL_HEADER + name_size + extra_size
            data = self._file.read(packed, start)
            if method == _DEFLATED:
                # One byte more than declared is enough to see that the declaration was a lie.
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except (OSError, zlib.error) as error:
            raise UnreadableImage(str(error)) from error
        if len(data) != size or zlib.crc32(data) != checksum:
            raise UnreadableImage("the archive is damaged: a member differs from its checksum")
        return data


def directory(path: str) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name, folders left out; refuses what is no whole archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename: info for info in archive.infolist() if not info.is_dir()}
    except OSError as error:
        raise UserError(
            f"cannot read {path!r} ({error.strerror or error}); point --data at a zip archive"
        ) from error
    # The last three are how zipfile stumbles over a directory of random bytes.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(
            f"{path!r} is not a whole zip archive ({error}); copy it again, or point --data at one"
        ) from error


def _refuse_unreadable_kind(path: str, info: zipfile.ZipInfo) -> None:
    if info.flag_bits & _ENCRYPTED:
        raise UserError(
            f"{info.filename!r} in {path!r} is encrypted; point --data at an archive that is not"
        )
    if info.compress_type not in (_STORED, _DEFLATED):
        raise UserError(
            f"{info.filename!r} in {path!r} is packed by method {info.compress_type}, allowed are "
            "0 (store) and 8 (deflate); repack it with zip -0 and point --data at that"
        )


def _read_map(
    map_file: Path, archive: str, members: dict[str, zipfile.ZipInfo]
) -> tuple[list[str], list[int]]:
    """Paths and integers of the map in its order; each wrong line is a `UserError`."""
    try:
        # Paths need not be UTF-8. Only \n ends a line here: splitlines would cut odd names.
        lines = map_file.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {str(map_file)!r} ({reason}); make it readable") from error
    lines[0] = lines[0].removeprefix("\ufeff")
    first_line: dict[str, int] = {}
    numbers: list[int] = []

    for count, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{map_file}, line {count}"
        name, tab, text = line.rstrip("\r").rpartition("\t")
        if not tab:
            raise UserError(
                f"{where}: no TAB in {line.strip()!r}; each line is path, TAB, integer label"
            )
        try:
            number = int(text)
        except ValueError:
            raise UserError(
                f"{where}: the label {text!r} is not an integer; each line is path, TAB, "
                "integer label"
            ) from None
        if not has_extension(name):
            raise UserError(
                f"{where}: {name!r} does not end like an image; allowed are {', '.join(EXTENSIONS)}"
            )
        if name not in members:
            raise UserError(
                f"{where}: {archive!r} holds no {name!r}; allowed are paths as unzip -l lists them"
            )
        if name in first_line:
            raise UserError(
                f"{where}: {name!r} is there twice, first in line {first_line[name]}; "
                "allowed is one line for each image"
            )
        first_line[name] = count
        numbers.append(number)

    if not numbers:
        raise UserError(
            f"{str(map_file)!r} is empty; write path, TAB, integer label for each image, or remove "
            "the file to take all images of the archive"
        )
    return list(first_line), numbers


def _classes(numbers: list[int], names_file: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    distinct = sorted(set(numbers))
    try:
        text = names_file.read_text("utf-8", "surrogateescape")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError:
        names = []
    if distinct[0] >= 0 and distinct[-1] < len(names):
        return tuple(names), np.array(numbers, np.int64)
    if len(names) != len(distinct):
        names = [str(number) for number in distinct]
    place = {number: label for label, number in enumerate(distinct)}
    return tuple(names), np.array([place[number] for number in numbers], np.int64)
