"""A zip archive of images, read in place by many threads and processes at once."""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.sources.base import Encoded, UnreadableImage
from firstsight.sources.directory import FLAGS, METHOD, SIZE, read_directory
from firstsight.sources.files import Opened
from firstsight.sources.paths import (
    EXTENSIONS,
    class_folders,
    has_extension,
    is_image,
    sort_by_folder,
)

MAX_BYTES = 512 << 20
"""A member that declares more than this, packed or unpacked, is not read."""

_LOCAL_HEADER = 30  # bytes before the name; the directory's copy of the extra field may differ
_STORED, _DEFLATED, _ENCRYPTED = 0, 8, 1


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
        members, table = read_directory(self.path)
        self._file = Opened(self.path)
        row_of = {name: row for row, name in enumerate(members)}
        map_file = map_of(self.path)
        if map_file.exists():
            rows, numbers = _read_map(map_file, self.path, row_of)
            self._names = [members[row] for row in rows]  # the very same strings: a million of them
            self.classes, self.labels = _classes(numbers, map_file.with_name("classes.txt"))
        else:
            self._names = list(filter(is_image, row_of))
            sort_by_folder(self._names)
            self.classes, self.labels = class_folders(self._names)
            rows = array("q", (row_of[name] for name in self._names))
        if not self._names:
            raise UserError(
                f"no images in {self.path!r} (looked for {', '.join(EXTENSIONS)}); "
                "point --data at an archive that holds some"
            )
        if len(row_of) < len(members):
            _refuse_twice(self.path, members, self._names)
        del row_of, members  # of a million names it takes as much as they do
        # Plain numbers instead of objects: a million of these is what workers are sent.
        chosen = np.frombuffer(rows, np.int64)
        same = np.array_equal(chosen, np.arange(len(table)))
        self._entries = table if same else table[chosen]
        if not self._entries[:, SIZE].any():
            raise UserError(
                f"all {len(self)} images in {self.path!r} have zero bytes; make the archive again"
            )
        kinds = np.unique(self._entries[:, [METHOD, FLAGS]], axis=0, return_index=True)
        for (method, flags), first in zip(kinds[0].tolist(), kinds[1].tolist(), strict=True):
            if wrong := unreadable_kind(self.path, self._names[first], method, flags):
                raise wrong

    def __len__(self) -> int:
        return len(self._names)

    def identity(self, index: int) -> str:
        """The path of image `index` inside the archive."""
        return self._names[index]

    def size(self, index: int) -> int:
        """Bytes of image `index`, unpacked, as the archive declares them."""
        return int(self._entries[index, SIZE])

    def encoded(self, index: int) -> bytes:
        """The file of image `index`, unpacked and checked; raises `UnreadableImage`."""
        return member(self._file, self._entries[index])


def member(file: Opened, entry: NDArray[np.int64]) -> bytes:
    """One member of an archive by its row of the directory; raises `UnreadableImage`."""
    offset, packed, size, checksum, method, _ = entry.tolist()
    if max(packed, size) > MAX_BYTES:
        raise UnreadableImage(f"declares {max(packed, size)} bytes; at most {MAX_BYTES} are read")
    try:
        header = file.read(_LOCAL_HEADER, offset)
        if header[:4] != b"PK\3\4" or len(header) < _LOCAL_HEADER:
            raise UnreadableImage("the archive is damaged: no member where one should begin")
        name_size, extra_size = struct.unpack("<HH", header[26:30])
        start = offset + _LOCAL_HEADER + name_size + extra_size
        data = file.read(packed, start)
        if method == _DEFLATED:
            # One byte more than declared is enough to see that the declaration was a lie.
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except (OSError, zlib.error) as error:
        raise UnreadableImage(str(error)) from error
    if len(data) != size or zlib.crc32(data) != checksum:
        raise UnreadableImage("the archive is damaged: a member differs from its checksum")
    return data


def unreadable_kind(path: str, name: str, method: int, flags: int) -> UserError | None:
    """Why members of this kind cannot be read, or None where they can."""
    if flags & _ENCRYPTED:
        return UserError(
            f"{name!r} in {path!r} is encrypted; point --data at an archive that is not"
        )
    if method not in (_STORED, _DEFLATED):
        return UserError(
            f"{name!r} in {path!r} is packed by method {method}, allowed are "
            "0 (store) and 8 (deflate); repack it with zip -0 and point --data at that"
        )
    return None


def _refuse_twice(path: str, members: list[str], images: list[str]) -> None:
    """Two files of one name are two answers to which image that is."""
    wanted, first = set(images), dict[str, int]()
    for entry, name in enumerate(members, start=1):
        if name in wanted and name in first:
            raise UserError(
                f"{name!r} is in {path!r} twice, as entries {first[name]} and {entry}; make the "
                "archive again, with one image of a name"
            )
        first[name] = entry


def map_of(archive: str) -> Path:
    """Where the map of an archive lies, if it has one."""
    beside = Path(archive)
    return beside.with_name(f"{beside.stem}_map.txt")


def map_lines(
    map_file: Path, archive: str, rows: Mapping[str, int]
) -> Iterator[tuple[int, int] | UserError]:
    """Row and integer of each line of the map that is right, and an error for each that is not.

    `rows` are those of the members in the directory of the archive.
    """
    first_line = array("q", bytes(8 * (1 + max(rows.values(), default=0))))  # 0: not yet
    empty = True
    for count, line in enumerate(_lines(map_file), start=1):
        if not line.strip():
            continue
        empty = False
        name, tab, text = line.rstrip("\r").rpartition("\t")
        number = _integer(text)
        wrong = ""
        if not tab:
            wrong = f"no TAB in {line.strip()!r}; each line is path, TAB, integer label"
        elif number is None:
            wrong = f"the label {text!r} is not an integer; each line is path, TAB, integer label"
        elif not has_extension(name):
            wrong = f"{name!r} does not end like an image; allowed are {', '.join(EXTENSIONS)}"
        elif name not in rows:
            wrong = f"{archive!r} holds no {name!r}; allowed are paths as unzip -l lists them"
        elif first := first_line[rows[name]]:
            wrong = (
                f"{name!r} is there twice, first in line {first}; "
                "allowed is one line for each image"
            )
        if wrong or number is None:
            yield UserError(f"{map_file}, line {count}: {wrong}")
        else:
            first_line[rows[name]] = count
            yield rows[name], number

    if empty:
        yield UserError(
            f"{str(map_file)!r} is empty; write path, TAB, integer label for each image, or remove "
            "the file to take all images of the archive"
        )


def _lines(map_file: Path) -> Iterator[str]:
    """The lines of a map, one at a time: of a million, all would take 150 MiB."""
    try:
        with open(map_file, "rb") as file:
            for count, line in enumerate(file):  # only \n ends one: splitlines would cut odd names
                text = line.rstrip(b"\n").decode("utf-8", "surrogateescape")  # need not be UTF-8
                yield text if count else text.removeprefix("\ufeff")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {str(map_file)!r} ({reason}); make it readable") from error


def _integer(text: str) -> int | None:
    try:
        number = int(text)
    except ValueError:
        return None
    return number if abs(number) < 2**63 else None


def _read_map(
    map_file: Path, archive: str, rows: Mapping[str, int]
) -> tuple[array[int], array[int]]:
    """Rows and integers of the map in its order; the first wrong line is a `UserError`.

    As arrays: lists of a million integers take 40 MiB each.
    """
    found, numbers = array("q"), array("q")
    for line in map_lines(map_file, archive, rows):
        if isinstance(line, UserError):
            raise line
        found.append(line[0])
        numbers.append(line[1])
    return found, numbers


def _classes(numbers: array[int], names_file: Path) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    values, labels = np.unique(np.frombuffer(numbers, np.int64), return_inverse=True)
    distinct: list[int] = values.tolist()
    try:
        text = names_file.read_text("utf-8", "surrogateescape")
        names = [line.strip() for line in text.splitlines() if line.strip()]
    except OSError:
        names = []
    if distinct[0] >= 0 and distinct[-1] < len(names):
        return tuple(names), values[labels]
    if len(names) != len(distinct):
        names = [str(number) for number in distinct]
    return tuple(names), labels.astype(np.int64)
