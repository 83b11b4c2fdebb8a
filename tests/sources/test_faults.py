"""Sources that go bad under a run: replaced, named and counted, or refused in one sentence."""

import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from firstsight import cli, data, run
from firstsight.errors import UserError
from firstsight.loader import Chunks, Steps, batches, chunks
from firstsight.log import printable, read_log, say
from firstsight.order import Epochs
from firstsight.sources import UnreadableImage, open_source
from firstsight.sources.decode import decode
from firstsight.views import PRESETS
from tests.sources.pictures import encoded, noise, png
from tests.tiny import config


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        picture = Image.fromarray(noise(24, 30, number))
        (folder / f"{number:02}.png").write_bytes(encoded(picture, "PNG"))
    return folder


def zeros(path, count):
    """An archive of `count` images of no bytes; zipfile would write at a million for long."""
    local, entries = bytearray(), bytearray()
    for number in range(count):
        name = b"%07d.png" % number
        entries += b"PK\1\2" + struct.pack("<6H3L5H2L", 20, 20, 0, 0, 0, 33, 0, 0, 0, len(name),
                                            0, 0, 0, 0, 0, len(local)) + name  # fmt: skip
        local += b"PK\3\4" + struct.pack("<5H3L2H", 20, 0, 0, 0, 33, 0, 0, 0, len(name), 0) + name
    at, size = len(local), len(entries)
    end = b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, at)
    end += b"PK\6\7" + struct.pack("<LQL", 0, at + size, 1)
    end += b"PK\5\6" + struct.pack("<4H2LH", 0, 0, *[min(count, 0xFFFF)] * 2, size, at, 0)
    path.write_bytes(local + entries + end)
    return path


def made(source, workers=0, first=0):
    maker = Steps(source=source, views=PRESETS["simclr-small"], size=32,
                  order=Epochs(len(source), 8, 0), seed=0, rank=0, world=1)  # fmt: skip
    return list(batches(maker, first, 2, workers))


def huge_png():
    """60,000 x 60,000 pixels declared, a line of zeros delivered."""

    def chunk(kind, content):
        whole = kind + content
        return struct.pack(">I", len(content)) + whole + struct.pack(">I", zlib.crc32(whole))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(bytes(60_000 * 3 + 1)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def test_files_deleted_cut_and_replaced_while_training(photos):
    source = open_source(str(photos))
    before = made(source)
    (photos / "03.png").unlink()
    whole = (photos / "07.png").read_bytes()
    (photos / "07.png").write_bytes(whole[: len(whole) // 2])
    (photos / "09.png").write_bytes(b"<html>no image any more</html>")
    (photos / "11.png").write_bytes(huge_png())
    after = made(source)
    wrong = {"03.png", "07.png", "09.png", "11.png"}
    assert set().union(*(batch.bad for batch in after)) == wrong
    for old, new in zip(before, after, strict=True):
        for row, index in enumerate(new.index.tolist()):
            same = all((a[row] == b[row]).all() for a, b in zip(old.views, new.views, strict=True))
            assert same == (f"{index:02}.png" not in wrong)
    for other in (made(source, workers=2), [*after[:1], *made(source, first=1)]):
        for one, two in zip(after, other, strict=True):
            assert all((a == b).all() for a, b in zip(one.views, two.views, strict=True))


def test_a_run_names_and_counts_them(photos, tmp_path, capfd):
    (photos / "03.png").write_bytes(b"")
    with open(os.fsencode(photos) + b"/\xff\n.png", "wb") as file:
        file.write(huge_png())
    settings = config("simclr", tmp_path / "run", data=str(photos), epochs=4.0, max_bad=0.2)
    run.pretrain("simclr", settings)
    said = capfd.readouterr().err
    assert "cannot decode 03.png: replaced" in said
    assert "cannot decode \\xff\\n.png: replaced" in said
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["bad_images"] == 2
    with pytest.raises(UserError, match="2 images cannot be decoded, 03"):
        run.pretrain("simclr", config("simclr", tmp_path / "no", data=str(photos), epochs=4.0))


def huge(kind):
    """A whole small file of this kind whose header is then made to declare 60,000 x 60,000."""
    if kind == "PNG":
        return huge_png()
    data = bytearray(encoded(Image.fromarray(noise(16, 24)), kind))
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    elif kind == "BMP":
        data[18:26] = struct.pack("<LL", 60_000, 60_000)
    elif kind == "GIF":  # the screen, and the picture on it
        data[6:10] = struct.pack("<HH", 60_000, 60_000)
        at = data.index(b"\x2c\0\0\0\0") + 5
        data[at : at + 4] = struct.pack("<HH", 60_000, 60_000)
    else:  # TIFF: the values of its tags 256 and 257
        for tag in (256, 257):
            at = data.index(struct.pack("<HH", tag, 4)) + 8
            data[at : at + 4] = struct.pack("<L", 60_000)
    return bytes(data)


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: b + bytes(1 << 20)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "TIFF"])
def test_a_picture_of_60000_pixels_a_side_takes_no_memory(kind, wrap):
    tracemalloc.start()
    with pytest.raises(UnreadableImage, match=r"60000 x 60000 pixels|3600000000 pixels"):
        decode(wrap(huge(kind)))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_commands_pass_a_huge_picture_over_by_name(photos, tmp_path):
    (photos / "huge.jpg").write_bytes(huge("JPEG"))
    told = data.info(str(photos))
    assert "huge.jpg" in str(told["unreadable"]) and "60000 x 60000" in str(told["unreadable"])
    assert data.pack(str(photos), out=str(tmp_path / "x.pack"))["skipped"] == ["huge.jpg"]
    assert len(open_source(str(tmp_path / "x.pack"))) == 16


def test_a_folder_that_cannot_be_read_is_refused(photos, monkeypatch):
    (photos / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the superuser reads every folder
    with pytest.raises(UserError, match=r"cannot read the folder .*closed' \(Permission denied\)"):
        open_source(str(photos))


def test_an_archive_that_changes_under_the_run_is_refused_by_workers_too(photos, tmp_path):
    archive = tmp_path / "x.zip"
    data.zip_up(str(photos), out=str(archive))
    source = open_source(str(archive))
    made(source)
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("more.png", png(1))
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"x\.zip' has changed since it was opened"):
            made(source, workers)
        with pytest.raises(UserError, match=r"^'.*x\.zip' has changed since it was opened[^\n]*$"):
            list(chunks(Chunks(source=source, index=np.arange(4), size=32, batch_size=2), workers))


def test_an_archive_that_is_replaced_by_name_is_read_as_it_was_where_it_is_open(photos, tmp_path):
    archive, other = tmp_path / "x.zip", tmp_path / "y.zip"
    data.zip_up(str(photos), out=str(archive))
    source = open_source(str(archive))
    before = source.pixels(0)
    data.subset(str(photos), out=str(tmp_path / "few"), images=3)
    data.zip_up(str(tmp_path / "few"), out=str(other))
    os.replace(other, archive)
    assert (source.pixels(0) == before).all()
    with pytest.raises(UserError, match="has changed"):  # a worker opens the new one
        made(pickle.loads(pickle.dumps(source)))


@pytest.mark.parametrize("count", [3000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_an_archive_of_nothing_but_empty_images_is_refused(tmp_path, count):
    archive = zeros(tmp_path / "x.zip", count)
    began = time.process_time()
    with pytest.raises(UserError, match=rf"all {count} images in '.*' have zero bytes"):
        open_source(str(archive))
    assert time.process_time() - began < 20
    if count == 3000:
        assert len(data.verify(str(archive))["problems"]) == count


def test_nothing_but_empty_files_is_refused(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.png").touch()
    with pytest.raises(UserError, match=r"50 images in turn cannot be decoded, .*png first"):
        made(open_source(str(folder)))


def test_links_that_lead_in_circles_end(photos):
    (photos / "up").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    (photos / "a.png").symlink_to(photos / "b.png")
    (photos / "b.png").symlink_to(photos / "a.png")
    assert len(open_source(str(photos))) == 16


def test_names_in_any_encoding_can_be_printed_and_logged(tmp_path, capsys):
    name = b"caf\xe9 \xe2\x98\x95\n.png".decode("utf-8", "surrogateescape")
    assert printable(name) == "caf\\xe9 ☕\\n.png"
    printable(name).encode()
    say(f"cannot decode {name}")
    assert "caf\\xe9" in capsys.readouterr().err
    folder = tmp_path / "p"
    for number, part in enumerate((b"a", b"b\xe9")):
        os.makedirs(os.fsencode(folder) + b"/" + part)
        with open(os.fsencode(folder) + b"/" + part + b"/caf\xe9.png", "wb") as file:
            file.write(png(number))
    cli.main(["data", "info", str(folder), "--json", str(tmp_path / "r.json")])
    cli.main(["data", "zip", str(folder), "--out", str(tmp_path / "x.zip")])
    cli.main(["data", "subset", str(folder), "--out", str(tmp_path / "s"), "--images", "2"])
    cli.main(["data", "views", str(folder), "--out", str(tmp_path / "v"), "--size", "16"])
    cli.main(["data", "pack", str(folder), "--out", str(tmp_path / "x.pack")])
    assert json.loads((tmp_path / "r.json").read_text())["labels"] == {"a": 1, "b\\xe9": 1}
    for made_of in ("x.zip", "s", "v", "x.pack"):
        source = open_source(str(tmp_path / made_of))
        assert {int(source.pixels(i)[0, 0, 0]) for i in range(2)} <= {0, 1}
        assert np.unique(source.labels).tolist() == [0, 1]
