"""Tar files: order, labels, an index that is kept and never trusted too far, broken files."""

import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.sources import UnreadableImage, open_source
from firstsight.sources import tar as module
from firstsight.sources.tar import Tar
from tests.sources.pictures import png


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIRSTSIGHT_CACHE", str(tmp_path / "cache"))


def shard(path, members, form=tarfile.PAX_FORMAT):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def greys(source):
    return [int(source.pixels(index)[0, 0, 0]) for index in range(len(source))]


def identities(source):
    return [source.identity(index) for index in range(len(source))]


def test_shards_of_webdataset(tmp_path):
    folder = tmp_path / "shards"
    shard(folder / "1.tar", {"k9.png": png(3), "k9.json": b'{"label": 12, "x": 1}'})
    shard(folder / "0.tar", {"k2.cls": b"7\n", "k2.png": png(1), "k1.jpg": png(2), "k1.cls": b"12"})
    (folder / "notes.md").touch()
    source = open_source(str(folder))
    assert isinstance(source, Tar)
    assert identities(source) == ["0.tar/k2.png", "0.tar/k1.jpg", "1.tar/k9.png"]
    assert greys(source) == [1, 2, 3]
    assert source.classes == ("7", "12") and source.labels.tolist() == [0, 1, 1]
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and greys(copy) == [1, 2, 3]


@pytest.mark.parametrize("beside", ["photo.png", "cats/photo.png"])
def test_a_tar_beside_photographs_is_passed_over(tmp_path, beside):
    folder = tmp_path / "photos"
    shard(folder / "backup.tar", {"old.png": png(1)})
    (folder / beside).parent.mkdir(exist_ok=True)
    (folder / beside).write_bytes(png(2))
    assert identities(open_source(str(folder))) == [beside]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_tar_of_a_folder_of_classes(tmp_path, form):
    name = "cat/" + "long" * 22 + "é.png"
    source = open_source(
        str(shard(tmp_path / "x.tar", {"dog/a.b.png": png(4), name: png(5), "a/.x.png": b""}, form))
    )
    assert identities(source) == ["dog/a.b.png", name] and greys(source) == [4, 5]
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [1, 0]


def test_what_belongs_to_an_image_is_none(tmp_path):
    members = {"a.jpg": png(1), "a.seg.png": png(2), "b.v2.png": png(3), "a.json": b"[1]"}
    source = Tar(shard(tmp_path / "x.tar", members))
    assert identities(source) == ["a.jpg", "b.v2.png"] and source.labels is None


def test_names_in_any_encoding(tmp_path):
    path = shard(tmp_path / "x.tar", {"\udcff.png": png(1)}, tarfile.GNU_FORMAT)
    assert identities(Tar(path)) == ["\udcff.png"] and len(Tar(path).fingerprint()) == 16


def test_the_index_is_made_once_and_anew_when_the_file_is_another(tmp_path, monkeypatch):
    path = shard(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)})
    scanned, real = [], module._scanned
    monkeypatch.setattr(module, "_scanned", lambda path: scanned.append(path) or real(path))
    assert greys(Tar(path)) == greys(Tar(path)) == [1, 2] and len(scanned) == 1
    shard(path, {"c.png": png(3), "a.png": png(1)})
    os.utime(path, ns=(1, 1))
    assert greys(Tar(path)) == [3, 1] and len(scanned) == 2
    (kept,) = (tmp_path / "cache" / "tar").iterdir()
    for broken in ("", "{}", "[1]", json.dumps({"version": 1, "stamp": 5, "members": []})):
        kept.write_text(broken)
        assert greys(Tar(path)) == [3, 1]
    assert len(scanned) == 6


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FIRSTSIGHT_CACHE", str(tmp_path / "file" / "cache"))
    assert greys(Tar(shard(tmp_path / "x.tar", {"a.png": png(1)}))) == [1]


@pytest.mark.parametrize("keep", [0, 100, 512, 600, 1024, 1030, 1536, 2048])
def test_a_tar_cut_anywhere_is_named(tmp_path, keep):
    """Also behind a member (1024): tarfile alone would take that for its end."""
    path = shard(tmp_path / "cut.tar", {"a.png": png(1), "b.png": png(2)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.tar.*(not a whole|cut short)"):
        Tar(path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)}, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"hello!"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.tar.*cut short"):
        Tar(path)


def test_what_cannot_be_indexed_is_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as file:
        file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(UserError, match="uncompressed"):
        open_source(str(tmp_path / "x.tar.gz"))
    with pytest.raises(UserError, match="No such file"):
        open_source(str(tmp_path / "no.tar"))
    with pytest.raises(UserError, match="no images in"):
        Tar(shard(tmp_path / "empty.tar", {"a.txt": b"x"}))
    with tarfile.open(tmp_path / "twice.tar", "w") as file:
        file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
        file.addfile(tarfile.TarInfo("a.png"), io.BytesIO())
    with pytest.raises(UserError, match=r"holds 'a\.png' twice"):
        Tar(tmp_path / "twice.tar")


def test_bad_bytes_are_an_unreadable_image(tmp_path):
    source = Tar(shard(tmp_path / "x.tar", {"a.png": b"no image", "b.png": png(2)}))
    with pytest.raises(UnreadableImage):
        source.pixels(0)
    assert np.all(source.pixels(1) == 2)


def test_a_file_that_changes_under_the_run_is_refused(tmp_path):
    path = shard(tmp_path / "x.tar", {"a.png": png(1), "b.png": png(2)})
    source = Tar(path)
    assert source.pixels(0)[0, 0, 0] == 1
    with open(path, "r+b") as file:
        file.write(b"x")
    os.utime(path, ns=(1, 1))
    with pytest.raises(UserError, match="has changed"):
        source.pixels(1)
