import io
import multiprocessing
import pickle
import threading
import tracemalloc
import zipfile

import pytest
from PIL import Image

from firstsight.errors import UserError
from firstsight.sources import UnreadableImage, open_source
from firstsight.sources import zip as module
from firstsight.sources.zip import Zip
from tests.sources.pictures import encoded, noise, png


def archive(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def pictures(*names):
    return {name: png(number) for number, name in enumerate(names)}


def identities(source):
    return [source.identity(index) for index in range(len(source))]


@pytest.fixture
def train(tmp_path):
    return archive(tmp_path / "train.zip", pictures("a.png", "b.png", "x/c@2.PNG", "notes.txt"))


def write_map(train, text):
    map_file = train.with_name("train_map.txt")
    map_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return map_file


def test_a_map_gives_order_and_labels(train):
    write_map(train, "x/c@2.PNG\t7\r\n\r\n\na.png\t-1\nb.png\t7")
    source = Zip(train)
    assert identities(source) == ["x/c@2.PNG", "a.png", "b.png"]
    assert source.labels.tolist() == [1, 0, 1] and source.classes == ("-1", "7")
    assert [source.pixels(index)[0, 0, 0] for index in range(3)] == [2, 0, 1]


def test_a_map_may_leave_images_out_and_start_with_a_byte_order_mark(train):
    write_map(train, b"\xef\xbb\xbfb.png\t0\n")
    assert identities(Zip(train)) == ["b.png"]


@pytest.mark.parametrize(
    ("names", "classes", "labels"),
    [
        ("ant\nbee\n", ("ant", "bee"), [1, 0]),  # one name for each label
        ("a\nb\nc\nd\ne", ("a", "b", "c", "d", "e"), [4, 2]),  # one name for each integer
        ("a\nb\nc", ("2", "4"), [1, 0]),  # neither
    ],
)
def test_names_of_classes(train, names, classes, labels):
    write_map(train, "a.png\t4\nb.png\t2\n")
    train.with_name("classes.txt").write_text(names)
    source = Zip(train)
    assert source.classes == classes and source.labels.tolist() == labels


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a.png\t0\nb.png 1\n", 2, "no TAB"),
        ("a.png\t0\n\nb.png\tone\n", 3, "'one' is not an integer"),
        ("a.png\t0\r\nb.png\tone\r\n", 2, "'one' is not an integer"),
        ("a.png\t1.5\n", 1, "'1.5' is not an integer"),
        ("a.png\t\n", 1, "'' is not an integer"),
        (f"a.png\t{10**30}\n", 1, "is not an integer"),
        ("a.png\t0\r\nnotes.txt\t1\r\n", 2, "does not end like an image"),
        ("a.png\t0\nmissing.png\t1\n", 2, "holds no 'missing.png'"),
        ("a.png\t0\nb.png\t0\na.png\t0\n", 3, "twice, first in line 1"),
    ],
)
def test_a_wrong_line_is_named(train, text, line, message):
    map_file = write_map(train, text)
    with pytest.raises(UserError) as caught:
        Zip(train)
    assert str(caught.value).startswith(f"{map_file}, line {line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "\n \r\n"])
def test_an_empty_map_is_refused(train, text):
    write_map(train, text)
    with pytest.raises(UserError, match=r"train_map\.txt' is empty"):
        Zip(train)


def test_a_map_that_cannot_be_read_is_refused(train):
    train.with_name("train_map.txt").mkdir()
    with pytest.raises(UserError, match=r"cannot read '.*train_map\.txt' \(Is a directory\)"):
        Zip(train)


def test_an_at_sign_is_a_letter_wherever_it_stands(tmp_path):
    (tmp_path / "a@b.zip@").mkdir()
    path = archive(tmp_path / "a@b.zip@" / "t@1.zip", pictures("c@d/x@.png", "@/y.png"))
    path.with_name("t@1_map.txt").write_text("@/y.png\t0\nc@d/x@.png\t1\n")
    source = open_source(str(path))
    assert identities(source) == ["@/y.png", "c@d/x@.png"]
    assert [int(source.pixels(i)[0, 0, 0]) for i in range(2)] == [1, 0]


def test_names_of_archive_and_map_in_any_encoding(tmp_path):
    path = archive(tmp_path / "x.zip", pictures("caf_.png", "b.png"))
    path.write_bytes(path.read_bytes().replace(b"caf_.png", b"caf\x82.png"))
    assert identities(Zip(path)) == ["b.png", "caf\udc82.png"]
    path.with_name("x_map.txt").write_bytes(b"caf\x82.png\t3\r\nb.png\t1\r\n")
    source = Zip(path)
    assert [int(source.pixels(i)[0, 0, 0]) for i in range(2)] == [0, 1]
    assert source.labels.tolist() == [1, 0]
    path.with_name("x_map.txt").write_bytes(b"caf\xe9.png\t3\n")
    with pytest.raises(UserError, match=r"x_map\.txt, line 1: .*holds no 'caf") as caught:
        Zip(path)
    str(caught.value).encode("utf-8", "backslashreplace")


@pytest.mark.parametrize("mapped", [True, False])
def test_an_image_that_is_there_twice_is_refused_with_both_places(train, mapped):
    with zipfile.ZipFile(train, "a") as file, pytest.warns(UserWarning, match="Duplicate"):
        file.writestr("notes.txt", b"other notes")  # what is no image may be there twice
        file.writestr("b.png", png(9))
    if mapped:
        write_map(train, "a.png\t0\nx/c@2.PNG\t1\n")
        assert len(Zip(train)) == 2  # not one of the map: nobody asks for it
        write_map(train, "a.png\t0\nb.png\t1\n")
    with pytest.raises(UserError, match=r"'b\.png' .* twice, as entries 2 and 6; "):
        Zip(train)


def test_folders_give_labels_where_there_is_no_map(tmp_path):
    path = archive(
        tmp_path / "x.zip", pictures("dog/a.png", "cat/b.jpg", "__MACOSX/._b.jpg", ".h/a.png")
    )
    source = Zip(path)
    assert identities(source) == ["cat/b.jpg", "dog/a.png"]
    assert source.classes == ("cat", "dog") and source.labels.tolist() == [0, 1]
    flat = Zip(archive(tmp_path / "flat.zip", pictures("b.png", "c.png", "a.png")))
    assert identities(flat) == ["a.png", "b.png", "c.png"] and flat.labels is None


def test_paths_that_climb_are_only_names(tmp_path):
    path = archive(tmp_path / "x.zip", pictures("../../evil.png", "/abs.png"))
    before = sorted(tmp_path.rglob("*"))
    source = Zip(path)
    assert {source.pixels(i)[0, 0, 0] for i in range(len(source))} == {0, 1}
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(train, keep):
    data = train.read_bytes()
    train.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(UserError, match="is not a whole zip archive"):
        Zip(train)


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.zip").write_text("hello")
    with pytest.raises(UserError, match="is not a whole zip archive"):
        Zip(tmp_path / "x.zip")
    with pytest.raises(UserError, match="No such file"):
        Zip(tmp_path / "missing.zip")
    with pytest.raises(UserError, match="no images in"):
        Zip(archive(tmp_path / "empty.zip", {"a.txt": b""}))
    with pytest.raises(UserError, match="method 14"):
        Zip(archive(tmp_path / "lzma.zip", pictures("a.png"), zipfile.ZIP_LZMA))


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_is_an_unreadable_image_and_its_neighbours_are_fine(tmp_path, method):
    pixels = noise(30, 40)
    raw = encoded(Image.fromarray(pixels), "BMP")
    path = archive(tmp_path / "x.zip", {"a.bmp": raw, "b.bmp": raw, "c.bmp": raw}, method)
    data = bytearray(path.read_bytes())
    at = data.index(b"b.bmp") + 500
    data[at : at + 20] = b"\xff" * 20
    path.write_bytes(bytes(data))
    source = Zip(path)
    with pytest.raises(UnreadableImage):
        source.pixels(1)
    for index in (0, 2):
        assert source.pixels(index).tobytes() == pixels.tobytes()


def test_a_lying_directory_is_an_unreadable_image(train):
    data = train.read_bytes()
    at = data.index(b"PK\1\2") + 42  # where the directory says that a.png begins
    train.write_bytes(data[:at] + b"\7\0\0\0" + data[at + 4 :])
    with pytest.raises(UnreadableImage, match="damaged"):
        Zip(train).pixels(0)


def test_a_member_that_declares_too_much_is_not_read(train, monkeypatch):
    source = Zip(train)
    monkeypatch.setattr(module, "MAX_BYTES", 10)
    with pytest.raises(UnreadableImage, match="at most 10"):
        source.pixels(0)


def test_a_bomb_is_not_unpacked_beyond_what_it_declares(tmp_path):
    path = archive(tmp_path / "x.zip", {"a.png": bytes(50_000_000)})
    data = path.read_bytes().replace((50_000_000).to_bytes(4, "little"), (50).to_bytes(4, "little"))
    path.write_bytes(data)
    with pytest.raises(UnreadableImage, match="checksum"):
        source = Zip(path)
        tracemalloc.start()
        source.pixels(0)
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def _read_all(source, answers):
    answers.put([int(source.pixels(index % len(source))[0, 0, 0]) for index in range(300)])


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_one_object_in_several_processes_at_once(tmp_path, start):
    source = Zip(archive(tmp_path / "x.zip", pictures(*(f"{k:02}.png" for k in range(20)))))
    expected = [index % 20 for index in range(300)]
    assert source.pixels(3)[0, 0, 0] == 3  # the handle is open before the others start
    context = multiprocessing.get_context(start)
    answers = context.Queue()
    workers = [context.Process(target=_read_all, args=(source, answers)) for _ in range(2)]
    for worker in workers:
        worker.start()
    own = [int(source.pixels(index % 20)[0, 0, 0]) for index in range(300)]
    assert [answers.get(timeout=60) for _ in workers] == [expected, expected]
    assert own == expected
    for worker in workers:
        worker.join(10)


def test_one_object_in_several_threads_at_once(tmp_path):
    source = Zip(archive(tmp_path / "x.zip", pictures(*(f"{k:02}.png" for k in range(20)))))
    wrong = []

    def read():
        wrong.extend(k for k in range(400) if source.pixels(k % 20)[0, 0, 0] != k % 20)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_each_process_opens_its_own_handle(train, monkeypatch):
    source = Zip(train)
    source.pixels(0)
    inherited = source._file.opened()
    monkeypatch.setattr(module.os, "getpid", lambda: -1)
    assert source._file.opened() is not inherited


def test_pickles_small_and_without_its_handle(train):
    source = Zip(train)
    source.pixels(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy._file._handle is None and copy.pixels(1)[0, 0, 0] == 1
    assert copy.fingerprint() == source.fingerprint()


def test_archives_with_something_before_them_are_read(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.png", png(5))
    (tmp_path / "x.zip").write_bytes(b"#!/bin/sh\nexit\n" + buffer.getvalue())
    assert Zip(tmp_path / "x.zip").pixels(0)[0, 0, 0] == 5


def test_open_source_takes_an_archive(train):
    source = open_source(str(train))
    assert isinstance(source, Zip) and source.spec == str(train)
