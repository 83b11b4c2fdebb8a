"""torchvision's sets by name, read from files in their layout that the test writes itself.

Their real files were not tried here: the checksums that torchvision holds them to are replaced.
"""

import hashlib
import pickle

import numpy as np
import pytest
import torchvision

from firstsight import open_source
from firstsight.errors import UserError
from firstsight.sources import fetch, named

SHAPES = {"cifar10": (32, 32), "cifar100": (32, 32), "stl10": (96, 96)}


def images(count, side):
    """(N, side, side, 3): every value is a function of its place, so that axes cannot be mixed."""
    n, y, x, c = np.ogrid[:count, :side, :side, :3]
    return ((n * 7 + y * 3 + x * 5 + c * 50) % 256).astype(np.uint8)


def digest(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, name):
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[
        name
    ]
    key = {"cifar10": "labels", "cifar100": "fine_labels"}[name]
    names = {"cifar10": "label_names", "cifar100": "fine_label_names"}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, value):
        (folder / file).write_bytes(pickle.dumps(value))
        return file, digest(folder / file)

    start, listed = 0, {}
    for split, files in (("train", ["one", "two"]), ("test", ["three"])):
        listed[split] = []
        for file in files:
            pixels = images(12, 32)[start % 12 :][:4].transpose(0, 3, 1, 2).reshape(4, -1)
            value = {"data": pixels, key: [start % 3, 1, 2, 0]}
            listed[split].append(write(file, value))
            start += 4
    meta = write("names", {names: ["cat", "dog", "tench"]})
    monkeypatch.setattr(kind, "train_list", listed["train"])
    monkeypatch.setattr(kind, "test_list", listed["test"])
    monkeypatch.setattr(kind, "meta", {"filename": meta[0], "key": names, "md5": meta[1]})


def write_stl10(root, monkeypatch):
    kind = torchvision.datasets.STL10
    folder = root / kind.base_folder
    folder.mkdir(parents=True)

    def write(file, values):
        (folder / file).write_bytes(values.tobytes())
        return [file, digest(folder / file)]

    stored = images(12, 96).transpose(0, 3, 2, 1)  # columns first, as its authors wrote them
    parts = [
        write("train_X.bin", stored[:4]),
        write("train_y.bin", np.array([1, 2, 3, 1], np.uint8)),
        write("unlabeled_X.bin", stored[8:]),
    ]
    tests = [write("test_X.bin", stored[4:8]), write("test_y.bin", np.array([2] * 4, np.uint8))]
    (folder / kind.class_names_file).write_text("cat\ndog\ntench\n")
    monkeypatch.setattr(kind, "train_list", parts)
    monkeypatch.setattr(kind, "test_list", tests)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_images_and_labels_are_those_of_the_files(name, tmp_path, monkeypatch):
    side = SHAPES[name][0]
    if name == "stl10":
        write_stl10(tmp_path, monkeypatch)
        labels = {"train": [0, 1, 2, 0], "test": [1] * 4}
        firsts = {"train": 0, "test": 4}
    else:
        write_cifar(tmp_path, monkeypatch, name)
        labels = {"train": [0, 1, 2, 0, 1, 1, 2, 0], "test": [2, 1, 2, 0]}
        firsts = {"train": 0, "test": 8}
    expected = images(12, side)
    for split, numbers in labels.items():
        source = open_source(f"{name}:{split}@{tmp_path}")
        assert len(source) == len(numbers) and source.labels.tolist() == numbers
        assert source.classes == ("cat", "dog", "tench")
        for i in range(len(source)):
            assert np.array_equal(source.pixels(i), expected[firsts[split] + i])
        assert source.identity(1) == f"{name}/{split}/000001"
        travelled = pickle.loads(pickle.dumps(source))
        assert len(pickle.dumps(source)) < 2000  # without its pixels
        assert np.array_equal(travelled.pixels(3), source.pixels(3))


def test_what_has_no_labels_has_none(tmp_path, monkeypatch):
    write_stl10(tmp_path, monkeypatch)
    source = open_source(f"stl10:unlabeled@{tmp_path}")
    assert len(source) == 4 and source.labels is None and source.classes == ()
    assert np.array_equal(source.pixels(0), images(12, 96)[8])


def test_without_a_root_the_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    write_cifar(tmp_path / "sets", monkeypatch, "cifar10")
    monkeypatch.setenv("FIRSTSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FIRSTSIGHT_DATA", raising=False)
    with pytest.raises(UserError, match=f"{tmp_path}/cache/data"):
        open_source("cifar10:train")
    monkeypatch.setenv("FIRSTSIGHT_DATA", str(tmp_path / "sets"))
    assert len(open_source("cifar10:train")) == 8


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    asked = []
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "download", lambda self: asked.append(self.root))
    with pytest.raises(UserError, match=r"are not in .*; add --download, or use cifar10:test@ROOT"):
        open_source(f"cifar10:test@{tmp_path}")
    assert not asked and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be downloaded"):  # the files are still not there
        fetch("scenes:train", "", str(tmp_path), f"cifar10:test@{tmp_path}")
    assert asked == [tmp_path]
    with pytest.raises(UserError, match="ImageNet cannot be downloaded for you"):
        fetch(f"imagenet:val@{tmp_path}")


def test_a_damaged_file_is_not_taken(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    with open(tmp_path / "cifar-10-batches-py" / "two", "ab") as file:
        file.write(b".")
    with pytest.raises(UserError, match="or not whole"):
        open_source(f"cifar10:train@{tmp_path}")


def test_unknown_splits_and_a_missing_imagenet_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match="did you mean 'stl10:unlabeled'"):
        open_source("stl10:unlabelled")
    with pytest.raises(UserError, match="use imagenet:train@ROOT"):
        open_source(f"imagenet:train@{tmp_path}")
    assert named.parts("photos:train") is None


def test_a_flag_reaches_it(tmp_path, monkeypatch, capsys):
    from firstsight import cli, run

    asked = []
    monkeypatch.setattr(run, "fetch", lambda *specs: asked.append(specs))
    args = ["pretrain", "simclr", "--data", f"cifar10:train@{tmp_path}", "--device", "cpu"]
    with pytest.raises(SystemExit):
        cli.main([*args, "--download", "--probe-test", "scenes:test@20"])
    assert asked == [(f"cifar10:train@{tmp_path}", "", "scenes:test@20")]
    assert "add --download" in capsys.readouterr().err
