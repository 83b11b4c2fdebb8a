import os
import pickle

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.sources import UnreadableImage, open_source
from firstsight.sources.folder import Folder
from tests.sources.pictures import png


def make(root, *paths):
    for number, path in enumerate(paths):
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(number))
    return root


def identities(source):
    return [source.identity(index) for index in range(len(source))]


def test_class_folders_give_labels_in_order_of_their_names(tmp_path):
    source = Folder(make(tmp_path, "dog/2.PNG", "cat/1.jpg", "dog/1.jpeg", "ant/deep/er/x.webp"))
    assert identities(source) == ["ant/deep/er/x.webp", "cat/1.jpg", "dog/1.jpeg", "dog/2.PNG"]
    assert source.classes == ("ant", "cat", "dog")
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [0, 1, 2, 2]
    # What a file is called does not matter to what it holds.
    assert [source.pixels(index)[0, 0, 0] for index in range(4)] == [3, 1, 2, 0]


@pytest.mark.parametrize(
    "paths",
    [("b.png", "a.png"), ("x/a.png", "x/b.png"), ("x/a.png", "y/b.png", "c.png")],
    ids=["flat", "one folder", "an image beside the folders"],
)
def test_other_layouts_have_no_labels(tmp_path, paths):
    source = Folder(make(tmp_path, *paths))
    assert source.labels is None and source.classes == ()
    assert identities(source) == sorted(paths)


def test_folders_without_images_are_no_classes(tmp_path):
    make(tmp_path, "x/a.png", "y/b.png")
    (tmp_path / "aaa" / "empty").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("no image")
    assert Folder(tmp_path).classes == ("x", "y")


def test_order_goes_by_folder_and_not_by_character(tmp_path):
    source = Folder(make(tmp_path, "a/2.png", "a-b/1.png", "a/1.png", "A/9.png"))
    assert identities(source) == ["A/9.png", "a/1.png", "a/2.png", "a-b/1.png"]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    source = Folder(make(tmp_path, "a.png", ".b.png", ".git/c.png", "x/.d.png", "x/._e.jpg"))
    assert identities(source) == ["a.png"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    root = make(tmp_path / "root", "x/a.png", "y/b.png")
    elsewhere = make(tmp_path / "elsewhere", "c.png")
    (root / "x" / "up").symlink_to(root)
    (root / "y" / "across").symlink_to(root / "x")
    (root / "z").symlink_to(elsewhere)
    (root / "z2").symlink_to(elsewhere / "missing")
    assert identities(Folder(root)) == ["x/a.png", "y/b.png", "z/c.png"]


def test_strange_names_are_only_names(tmp_path):
    strange = ["é@x.png", "tab\there.png", "new\nline.png"]
    make(tmp_path, *strange)
    with open(os.path.join(os.fsencode(tmp_path), b"\xff\xfe.png"), "wb") as file:
        file.write(png(77))
    source = Folder(tmp_path)
    assert set(identities(source)) == {*strange, "\udcff\udcfe.png"}
    at = identities(source).index("\udcff\udcfe.png")
    assert source.pixels(at)[0, 0].tolist() == [77, 77, 77]
    assert len(source.fingerprint()) == 16


def test_an_empty_folder_is_refused_with_what_was_looked_for(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=rf"{tmp_path}.*jpg.*webp.*--data"):
        Folder(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        Folder(tmp_path / "missing")


def test_a_bad_or_vanished_file_is_unreadable(tmp_path):
    source = Folder(make(tmp_path, "a.png", "b.png"))
    (tmp_path / "a.png").write_bytes(b"no image")
    (tmp_path / "b.png").unlink()
    for index in (0, 1):
        with pytest.raises(UnreadableImage):
            source.pixels(index)


def test_pickles(tmp_path):
    source = Folder(make(tmp_path, "x/a.png", "y/b.png"))
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy.pixels(1)[0, 0, 0] == 1


def test_open_source_takes_a_folder(tmp_path):
    source = open_source(str(make(tmp_path, "a.png")))
    assert isinstance(source, Folder) and source.spec == str(tmp_path)
