"""The directory of a zip archive, against `zipfile`; a large one in little time and memory."""

import io
import struct
import time
import tracemalloc
import zipfile
import zlib

import pytest

from firstsight.errors import UserError
from firstsight.sources.directory import read_directory
from firstsight.sources.zip import Zip


def same_as_zipfile(path):
    names, table = read_directory(str(path))
    with zipfile.ZipFile(path) as file:
        infos = [info for info in file.infolist() if not info.is_dir()]
    assert names == [info.filename for info in infos]
    assert table.tolist() == [
        [i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type, i.flag_bits]
        for i in infos
    ]
    return table


@pytest.mark.parametrize("before", [b"", b"#!/bin/sh\n" * 9])
@pytest.mark.parametrize("comment", [b"", b"made by hand PK\6\7 " * 50])
def test_members_as_zipfile_lists_them(tmp_path, before, comment):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("folder/", b"")
        file.writestr("folder/ä.png", b"x" * 300, zipfile.ZIP_DEFLATED)
        with file.open("large.png", "w", force_zip64=True) as member:
            member.write(b"hello")
        info = zipfile.ZipInfo("c.png")
        info.comment, info.extra = b"a comment", b"\x99\x99\4\0abcd"
        file.writestr(info, b"")
        file.comment = comment
    path = tmp_path / "x.zip"
    path.write_bytes(before + buffer.getvalue())
    assert len(same_as_zipfile(path)) == 3


def test_more_members_than_sixteen_bits_count(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for number in range(65_540):
            file.writestr(zipfile.ZipInfo(f"{number}.png"), b"")
    assert len(same_as_zipfile(tmp_path / "x.zip")) == 65_540


def test_offsets_beyond_four_gib_and_their_sizes(tmp_path):
    """A directory alone, as it would stand behind five GiB of members."""
    wide = struct.pack("<2H3Q", 1, 24, 5 << 30, 6 << 30, 7 << 30)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 0, 0, 0, 9, *[0xFFFFFFFF] * 2, 5,
                        len(wide), 0, 0, 0, 0, 0xFFFFFFFF) + b"a.png" + wide  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0)
    (tmp_path / "x.zip").write_bytes(entry + end)
    names, table = read_directory(str(tmp_path / "x.zip"))
    assert names == ["a.png"] and table.tolist() == [[7 << 30, 6 << 30, 5 << 30, 9, 0, 0]]
    (tmp_path / "x.zip").write_bytes(entry.replace(wide, wide[:2] + b"\x08" + wide[3:]) + end)
    with pytest.raises(UserError, match="64-bit size"):
        read_directory(str(tmp_path / "x.zip"))


def test_only_full_numbers_are_taken_from_the_extra_field(tmp_path):
    wide = struct.pack("<2H2Q", 1, 16, 6 << 30, 7 << 30)
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 45, 45, 0, 8, 0, 0, 9, 0xFFFFFFFF, 1234, 5,
                        len(wide), 0, 0, 0, 0, 0xFFFFFFFF) + b"a.png" + wide  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entry), 0, 0)
    (tmp_path / "x.zip").write_bytes(entry + end)
    table = read_directory(str(tmp_path / "x.zip")).table
    assert table.tolist() == [[7 << 30, 6 << 30, 1234, 9, 8, 0]]


def many_empty(path, count):
    """An archive of empty members, written by hand: `zipfile` would take minutes."""
    entries = bytearray()
    for number in range(count):
        name = b"class%03d/image_%07d.png" % (number % 1000, number)
        entries += struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, len(name),
                               0, 0, 0, 0, 0, 0) + name  # fmt: skip
    low = count & 0xFFFF
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, low, low, len(entries), 0, 0)
    path.write_bytes(entries + end)
    return path


def test_a_hundred_thousand_empty_members_open_fast_and_are_refused(tmp_path):
    path = many_empty(tmp_path / "x.zip", 100_000)
    began = time.process_time()
    with pytest.raises(UserError, match=r"all 100000 images .* have zero bytes"):
        Zip(path)
    assert time.process_time() - began < 3  # a third of a second where nothing else runs
    tracemalloc.start()
    with pytest.raises(UserError):
        Zip(path)
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_names_that_are_not_utf_8_are_bytes_of_a_file_system(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.writestr("@@.png", b"x")
    data = (tmp_path / "x.zip").read_bytes().replace(b"@@.png", b"\xff@.png")
    (tmp_path / "x.zip").write_bytes(data)
    assert read_directory(str(tmp_path / "x.zip")).names == ["\udcff@.png"]
    assert zlib.crc32(b"x") == read_directory(str(tmp_path / "x.zip")).table[0, 3]
