"""An archive holds what its source held; what is wrong with one is said line by line."""

import errno
import json
import zipfile
from pathlib import Path

import pytest

from firstsight import cli, data, open_source
from firstsight.data import zipped
from firstsight.errors import UserError
from tests.sources.pictures import png


def folder(root, *paths):
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return root


def seen(source):
    return [
        (source.identity(i), int(source.pixels(i)[0, 0, 0]), source.classes[source.labels[i]])
        for i in range(len(source))
    ]


def test_an_archive_is_the_same_source_as_its_folder(tmp_path):
    photos = folder(
        tmp_path / "photos", "dog/1.png", "cat/x y@2.png", "dog/deep/3.PNG", "ant/é.png"
    )
    done = data.zip_up(str(photos), out=str(tmp_path / "a" / "train.zip"))
    assert done["images"] == 4 and done["skipped"] == []
    source = open_source(str(tmp_path / "a" / "train.zip"))
    assert seen(source) == seen(open_source(str(photos)))
    assert source.fingerprint() == open_source(str(photos)).fingerprint()
    with zipfile.ZipFile(tmp_path / "a" / "train.zip") as file:
        assert {info.compress_type for info in file.infolist()} == {zipfile.ZIP_STORED}
    assert (tmp_path / "a" / "train_map.txt").read_bytes().count(b"\n") == 4
    assert data.verify(str(tmp_path / "a" / "train.zip"), decode=True)["problems"] == []
    first = (tmp_path / "a" / "train.zip").read_bytes()
    data.zip_up(str(photos), out=str(tmp_path / "a" / "train.zip"))
    assert (tmp_path / "a" / "train.zip").read_bytes() == first


def test_train_and_val_agree_on_their_classes(tmp_path):
    train = folder(tmp_path / "train", "ant/1.png", "bee/2.png", "cat/3.png")
    val = folder(tmp_path / "val", "cat/1.png", "bee/2.png")
    for name in (train, val):
        data.zip_up(str(name), out=str(tmp_path / f"{name.name}.zip"))
    assert open_source(str(tmp_path / "val.zip")).classes == ("ant", "bee", "cat")
    assert seen(open_source(str(tmp_path / "val.zip"))) == seen(open_source(str(val)))
    other = folder(tmp_path / "other", "dog/1.png", "bee/2.png")
    with pytest.raises(UserError, match=r"classes\.txt lacks the class 'dog'"):
        data.zip_up(str(other), out=str(tmp_path / "other.zip"))
    assert not (tmp_path / "other.zip").exists()


def test_lists_give_names_that_stay_inside_and_other_sources_png(tmp_path):
    photos = folder(tmp_path / "p", "1.png", "2.png")
    with open(bytes(photos) + b"/\xff.png", "wb") as file:
        file.write(png(9))
    (tmp_path / "lists").mkdir()
    lines = [f"{photos}/1.png 5\n".encode(), b"../p/2.png 3\n", b"../p/\xff.png 5\n"]
    (tmp_path / "lists" / "l.txt").write_bytes(b"".join(lines))
    data.zip_up(str(tmp_path / "lists" / "l.txt"), out=str(tmp_path / "l.zip"))
    source = open_source(str(tmp_path / "l.zip"))
    inside = [*f"{photos}".split("/"), "1.png"]
    assert seen(source) == [
        ("/".join(inside[1:]), 0, "5"),
        ("p/2.png", 1, "3"),
        ("p/\\xff.png", 9, "5"),
    ]
    data.zip_up("scenes:train@3", out=str(tmp_path / "s" / "scenes.zip"))
    one, other = open_source(str(tmp_path / "s" / "scenes.zip")), open_source("scenes:train@3")
    assert all((one.pixels(i) == other.pixels(i)).all() for i in range(3))
    assert [one.classes[k] for k in one.labels] == [other.classes[k] for k in other.labels]


def test_two_images_of_one_name_are_refused(tmp_path):
    folder(tmp_path, "p/1.png", "1.png")
    (tmp_path / "l.txt").write_text("p/1.png\n../p/1.png\n")
    folder(tmp_path.parent / "p", "1.png")
    with pytest.raises(UserError, match=r"'../p/1\.png' and 'p/1\.png' .* both be called"):
        data.zip_up(str(tmp_path / "l.txt"), out=str(tmp_path / "l.zip"))


def test_a_file_that_cannot_be_read_is_left_out_and_named(tmp_path, capsys):
    photos = folder(tmp_path / "p", "a/1.png", "a/2.png", "b/3.png")
    (tmp_path / "l.txt").write_text("p/a/1.png 0\np/gone.png 1\np/b/3.png 1\n")
    done = data.zip_up(str(tmp_path / "l.txt"), out=str(tmp_path / "l.zip"))
    assert done["skipped"] == ["p/gone.png"] and done["images"] == 2
    assert "left out p/gone.png" in capsys.readouterr().err
    assert len(open_source(str(tmp_path / "l.zip"))) == 2 and photos.exists()


def test_a_full_disk_leaves_the_old_archive_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "x.zip"
    data.zip_up(str(folder(tmp_path / "p", "a/1.png", "b/2.png")), out=str(out))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("x*")}

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipped.zipfile.ZipFile, "writestr", full)
    with pytest.raises(UserError, match="No space left"):
        data.zip_up(str(tmp_path / "p"), out=str(out))
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("x*")}
    assert not list(tmp_path.glob(".x*"))


def test_labels_that_are_gone_take_their_map_with_them(tmp_path):
    data.zip_up(str(folder(tmp_path / "p", "a/1.png", "b/2.png")), out=str(tmp_path / "x.zip"))
    data.zip_up(str(folder(tmp_path / "q", "1.png")), out=str(tmp_path / "x.zip"))
    assert not (tmp_path / "x_map.txt").exists()
    assert open_source(str(tmp_path / "x.zip")).labels is None


def test_verify_names_every_problem_with_its_place(tmp_path, capsys):
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("a.png", "../b.png", "left.png"):
            file.writestr(name, png(1))
        file.writestr("empty.png", b"")
        file.writestr("text.png", b"no image")
        file.writestr("lzma.png", png(1), zipfile.ZIP_LZMA)
        with pytest.warns(UserWarning):
            file.writestr("a.png", png(2))
    lines = ["a.png\t0", "no tab", "", "a.png\tx", "b.txt\t1", "gone.png\t1", "a.png\t1"]
    lines += ["../b.png\t1", "empty.png\t1", "text.png\t1", "lzma.png\t1"]
    (tmp_path / "x_map.txt").write_text("\r\n".join(lines))
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "verify", str(archive), "--json", str(tmp_path / "r.json")])
    said = capsys.readouterr()
    assert caught.value.code == 2 and "has 8 problems in 6 images" in said.err
    result = json.loads((tmp_path / "r.json").read_text())
    found = "\n".join(result["problems"])
    for message in (
        f"{archive}, entry 4: 'empty.png' has zero bytes",
        f"{archive}, entry 7: 'a.png' is there twice",
        "'lzma.png' in .*",
        f"{tmp_path}/x_map.txt, line 2: no TAB",
        "line 4: the label 'x' is not",
        "line 5: 'b.txt' does not end like an image",
        "holds no 'gone.png'",
        "line 7: 'a.png' is there twice, first in line 1",
    ):
        assert message.partition(" in .*")[0] in found
    assert result["notes"] == [
        "'../b.png' leads out of the archive: only a name here, never unpacked",
        f"1 images are not in {tmp_path}/x_map.txt: no run will see them",
    ]
    decoded = data.verify(str(archive), decode=True, workers=2)["problems"]
    undecodable = [line for line in decoded if "cannot be decoded" in line]
    assert [name in "".join(undecodable) for name in ("text", "empty", "lzma", "left")] == [
        True, True, True, False,
    ]  # fmt: skip


def test_verify_of_what_is_no_archive(tmp_path):
    Path(tmp_path / "x.zip").write_text("hello")
    assert "not a whole zip archive" in data.verify(str(tmp_path / "x.zip"))["problems"][0]
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as file:
        file.writestr("a.txt", b"x")
    assert "holds no image" in data.verify(str(tmp_path / "y.zip"))["problems"][0]


def test_the_commands(tmp_path, capsys):
    folder(tmp_path / "p", "a/1.png", "b/2.png")
    cli.main(["data", "zip", str(tmp_path / "p"), "--out", str(tmp_path / "x.zip")])
    cli.main(["data", "verify", str(tmp_path / "x.zip"), "--decode"])
    assert "images" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["data", "zip", str(tmp_path / "p"), "--out", str(tmp_path / "x.tar")])
    assert "must end in .zip" in capsys.readouterr().err
