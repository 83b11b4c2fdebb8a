"""The directory at the end of a zip archive, read at once into plain numbers.

`zipfile` makes an object of each member: a million of them take ten seconds and more than a GiB.
The format: APPNOTE.TXT of PKWARE, 4.3.12 to 4.3.16 and 4.5.3.
"""

from __future__ import annotations

import os
import struct
from array import array
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError

OFFSET, PACKED, SIZE, CHECKSUM, METHOD, FLAGS = range(6)
"""Columns of `Directory.table`."""

_ENTRY = struct.Struct("<4s4x2H4x3L3H8xL")  # 46 bytes, then name, extra field and comment
_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_FULL = 0xFFFFFFFF  # the true number stands in the extra field


class Directory(NamedTuple):
    """The members of an archive but for folders, in its order."""

    names: list[str]
    table: NDArray[np.int64]
    """(N, 6): where the member begins, bytes packed and unpacked, CRC-32, method, flags."""


class _Damaged(Exception):
    """What is wrong with a directory."""


def read_directory(path: str) -> Directory:
    """All members of a zip archive; raises `UserError` where it is none, or cut short.

    Names are taken as UTF-8 where they are that, and as the bytes of a file system else.
    """
    try:
        with open(path, "rb") as file:
            return _members(*_found(file))
    except OSError as error:
        raise UserError(
            f"cannot read {path!r} ({error.strerror or error}); point --data at a zip archive"
        ) from error
    except (_Damaged, struct.error, IndexError, OverflowError) as error:
        raise UserError(
            f"{path!r} is not a whole zip archive ({error}); copy it again, or point --data at one"
        ) from error


def _found(file: BinaryIO) -> tuple[bytes, int, int]:
    """The bytes of the directory, its number of entries, and the bytes before the archive."""
    length = file.seek(0, os.SEEK_END)
    file.seek(max(0, length - _END.size - 0xFFFF - _LOCATOR.size))
    start, tail = file.tell(), file.read()
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        raise _Damaged("no directory at its end")
    _, _, _, _, count, size, offset, _ = _END.unpack_from(tail, at)
    end = start + at
    if at >= _LOCATOR.size and tail[at - _LOCATOR.size :][:4] == b"PK\6\7":
        # Whatever lies before the archive is not counted in, so look where it has to be.
        end -= _LOCATOR.size + _END_64.size
        file.seek(max(0, end))
        signature, _, _, _, _, _, _, count, size, offset = _END_64.unpack(file.read(_END_64.size))
        if signature != b"PK\6\6":
            raise _Damaged("its 64-bit directory does not end where it should")
    before = end - size - offset
    if before < 0:
        raise _Damaged("the end of its directory points before its beginning")
    file.seek(end - size)
    return file.read(size), count, before


def _members(data: bytes, count: int, before: int) -> Directory:
    names: list[str] = []
    numbers = array("q")  # tuples of a million rows would take 300 MiB
    at = 0
    while at < len(data):
        signature, flags, method, checksum, packed, size, named, extra, comment, offset = (
            _ENTRY.unpack_from(data, at)
        )
        if signature != b"PK\1\2":
            raise _Damaged(f"entry {len(names) + 1} of its directory does not begin like one")
        start = at + _ENTRY.size
        raw = data[start : start + named]
        if _FULL in (packed, size, offset):
            field = data[start + named : start + named + extra]
            size, packed, offset = _large(field, size, packed, offset)
        at = start + named + extra + comment
        numbers.extend((offset + before, packed, size, checksum, method, flags))
        names.append(raw.decode("utf-8", "surrogateescape"))
    if len(names) & 0xFFFF != count & 0xFFFF or at != len(data):
        raise _Damaged(f"its directory holds {len(names)} entries and declares {count}")
    table = np.frombuffer(numbers, np.int64).reshape(-1, 6)
    if not any(name.endswith("/") for name in names):
        return Directory(names, table)
    kept = [row for row, name in enumerate(names) if not name.endswith("/")]
    return Directory([names[row] for row in kept], table[kept])


def _large(field: bytes, *numbers: int) -> list[int]:
    """Numbers of 32 bits, those that are full replaced by 64-bit ones from the extra field."""
    at = 0
    while at + 4 <= len(field):
        kind, length = struct.unpack_from("<2H", field, at)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", field, at + 4))
            found = [next(wide, -1) if number == _FULL else number for number in numbers]
            if -1 not in found:
                return found
        at += 4 + length
    raise _Damaged("a large member lacks its 64-bit size")
