import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.sources import open_source, outlines, painting, scenes
from firstsight.sources.scenes import Scenes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FIRSTSIGHT_CACHE", str(folder))
    return folder


def everything(source):
    pixels = np.stack([source.pixels(i) for i in range(len(source))])
    masks = np.stack([source.mask(i) for i in range(len(source))])
    return pixels, masks


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(everything(a), everything(b), strict=True))


def test_shapes_and_labels():
    source = Scenes("train", 40)
    assert len(source) == 40 and len(source.classes) == 10
    assert source.pixels(3).shape == (96, 96, 3) and source.pixels(3).dtype == np.uint8
    assert source.mask(3).shape == (96, 96) and source.mask(3).dtype == np.bool_
    assert source.boxes.shape == (40, 4) and source.boxes.dtype == np.float32
    assert source.labels.dtype == np.int64
    for ten in source.labels.reshape(-1, 10):
        assert sorted(ten) == list(range(10))
    assert len({tuple(ten) for ten in source.labels.reshape(-1, 10).tolist()}) == 4
    source.pixels(3)[:] = 0
    assert source.pixels(3).any(), "pixels are a copy"


def test_boxes_are_tight_and_half_open():
    source = Scenes("test", 60)
    for index, (x1, y1, x2, y2) in enumerate(source.boxes.astype(int)):
        mask = source.mask(index)
        inside = mask[y1:y2, x1:x2]
        assert inside.sum() == mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        assert 0.25 <= inside.size / mask.size <= 0.60


def test_neither_box_nor_lean_tells_the_class():
    sizes = {label: [] for label in range(10)}
    for number in range(600):
        rng = np.random.default_rng(number)
        label = number % 10
        points = painting._placed(rng, outlines.SHAPES[label](rng))[0]
        sizes[label].append(points.max(0) - points.min(0))
    share = np.array([np.prod(sizes[label], -1).mean() / 96**2 for label in range(10)])
    aspect = np.array([np.log(np.divide(*np.transpose(sizes[k]))).mean() for k in range(10)])
    assert np.ptp(share) < 0.1 and np.ptp(aspect) < 0.3


def test_a_picture_depends_on_nothing_but_split_and_index(cache):
    many = Scenes("train", 150)  # painted by several processes
    few = Scenes("train", 7)  # by this one
    assert all(np.array_equal(many.pixels(i), few.pixels(i)) for i in range(7))
    assert many.labels[:7].tolist() == few.labels.tolist()
    again = scenes._paint_some("train", 140, 150)
    assert np.array_equal(again["pixels"][9], many.pixels(149))


def test_splits_and_pictures_all_differ():
    train, test = Scenes("train", 100), Scenes("test", 100)
    seen = {source.pixels(i).tobytes() for source in (train, test) for i in range(100)}
    assert len(seen) == 200
    assert train.labels.tolist() != test.labels.tolist()
    assert train.fingerprint() != test.fingerprint()
    assert train.identity(5) != test.identity(5)


def test_the_cache_is_used_and_named_by_version(cache, monkeypatch):
    first = Scenes("train", 12)
    (file,) = cache.iterdir()
    assert file.name == f"scenes-v{painting.VERSION}-train-12.npy"
    monkeypatch.setattr(scenes, "_paint_some", None)
    assert same(first, Scenes("train", 12))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"rubbish" * 100,
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-4],
    ],
    ids=["half", "empty", "rubbish", "one bit", "checksum", "unfinished"],
)
def test_a_damaged_cache_is_painted_again(cache, damage):
    first = everything(Scenes("train", 12))
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.unlink()  # not in place: `first` may still map it
    file.write_bytes(damage(whole))
    again = everything(Scenes("train", 12))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_an_unwritable_cache_falls_back_to_memory(tmp_path, monkeypatch):
    first = Scenes("train", 12)
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FIRSTSIGHT_CACHE", str(tmp_path / "file" / "cache"))
    memory = Scenes("train", 12)
    assert not isinstance(memory._rows, np.memmap)
    assert same(first, memory)
    assert same(first, pickle.loads(pickle.dumps(memory)))


def test_a_full_disk_leaves_no_half_file(cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes.np, "save", full)
    assert Scenes("train", 12).pixels(0).any()
    assert list(cache.iterdir()) == []


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.delenv("FIRSTSIGHT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert scenes.cache_folder() == tmp_path / "firstsight"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert scenes.cache_folder() == tmp_path / ".cache" / "firstsight"


def test_pickles_without_its_pictures():
    source = Scenes("train", 100)
    data = pickle.dumps(source)
    assert len(data) < 10_000
    assert same(source, pickle.loads(data))


def test_several_may_paint_the_same_cache_at_once(cache):
    made = []
    threads = [threading.Thread(target=lambda: made.append(Scenes("test", 30))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 3 and same(made[0], made[1]) and same(made[1], made[2])
    assert len(list(cache.iterdir())) == 1


def test_a_script_without_a_main_guard_may_open_scenes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from firstsight.sources import open_source\nprint(len(open_source('scenes:test@200')))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == ("200\n", 0)


def test_a_process_that_fails_is_made_up_for(monkeypatch):
    first = Scenes("train", 140)
    monkeypatch.setattr(scenes.sys, "executable", "/bin/false")
    assert np.array_equal(scenes._paint_all("train", 140)["pixels"][139], first.pixels(139))


def test_open_source_takes_scenes():
    source = open_source("scenes:test@20")
    assert isinstance(source, Scenes) and len(source) == 20 and source.spec == "scenes:test@20"
    assert scenes.COUNTS == {"train": 4000, "test": 1000}


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("scenes:trian", "did you mean 'scenes:train'"),
        ("scenes", "there are: scenes:train, scenes:test"),
        ("scenes:train@many", r"'many' is not a number of scenes"),
        ("scenes:train@0", r"'0' is not a number of scenes"),
        ("scenes:train@", r"'' is not a number of scenes"),
        ("cifar99:train", "no source called 'cifar99:train'"),
        ("nowhere/at/all", "there is no 'nowhere/at/all'"),
        ("nowhere.zip", "cannot read 'nowhere.zip'"),
        (__file__, "a file of no known kind"),
    ],
)
def test_anything_else_is_refused_with_what_is_understood(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_importing_sources_is_light():
    script = "import sys, firstsight.sources; print({'cv2', 'torch', 'PIL'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "set()\n"
