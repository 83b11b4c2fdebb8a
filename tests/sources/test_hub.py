"""`hf:NAME:SPLIT`: by `datasets` itself (slow), and by a stand-in with the calls that are made."""

import pickle
import socket
import sys
import types

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.sources import UnreadableImage, fetch, open_source
from tests.sources.pictures import png


class Image:
    def __init__(self, decode=True):
        self.decode = decode


class ClassLabel:
    def __init__(self, names):
        self.names = names


class Rows:
    def __init__(self, features, columns):
        self.features, self.columns = features, columns

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        assert not self.features["picture"].decode, "decoded by the package"
        return {name: column[key] for name, column in self.columns.items()}

    def select_columns(self, names):
        return Rows(self.features, {name: self.columns[name] for name in names})

    def cast_column(self, name, kind):
        return Rows({**self.features, name: kind}, self.columns)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    (tmp_path / "b.png").write_bytes(png(7))
    files = [
        {"bytes": png(5), "path": None},
        {"bytes": None, "path": str(tmp_path / "b.png")},
        {"bytes": None, "path": None},
    ]
    features = {"id": object(), "picture": Image(), "kind": ClassLabel(["cat", "dog"])}
    columns = {"id": [1, 2, 3], "picture": files, "kind": [1, 0, 1]}
    here = {("me/pets", "train"): Rows(features, columns)}
    elsewhere = {("me/far", "test"): Rows(features, columns)}

    switches = types.SimpleNamespace(HF_HUB_OFFLINE=False)

    def load_dataset(name, split):
        if not switches.HF_HUB_OFFLINE:
            here.update(elsewhere)
        if (name, split) not in here:
            raise ConnectionError(f"Couldn't reach {name}\nmore lines")
        return here[name, split]

    module = types.SimpleNamespace(Image=Image, load_dataset=load_dataset, config=switches)
    hub = types.SimpleNamespace(constants=types.SimpleNamespace(HF_HUB_OFFLINE=False))
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return columns


def test_images_labels_and_names(hub):
    source = open_source("hf:me/pets:train")
    assert len(source) == 3 and source.classes == ("cat", "dog")
    assert source.labels.dtype == np.int64 and source.labels.tolist() == [1, 0, 1]
    assert [int(source.pixels(i)[0, 0, 0]) for i in (0, 1)] == [5, 7]
    assert source.identity(1) == "me/pets:train/00000001" and source.spec == "hf:me/pets:train"
    with pytest.raises(UnreadableImage):
        source.pixels(2)


def test_a_test_split_without_labels_has_none(hub):
    hub["kind"][:] = [-1, -1, -1]
    source = open_source("hf:me/pets:train")
    assert source.labels is None and source.classes == ()


def test_nothing_is_downloaded_unasked(hub):
    with pytest.raises(UserError, match=r"hf:me/far:test cannot be loaded \(Couldn't .*--download"):
        open_source("hf:me/far:test")
    fetch("hf:me/far:test")
    assert len(open_source("hf:me/far:test")) == 3


def test_what_is_missing_is_said(hub, monkeypatch):
    with pytest.raises(UserError, match="names no split"):
        open_source("hf:pets")
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset",
                        lambda *_, **__: Rows({"text": object()}, {"text": ["a"]}))  # fmt: skip
    with pytest.raises(UserError, match="no column of images, only text"):
        open_source("hf:me/pets:train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"firstsight\[datasets\]"):
        open_source("hf:me/pets:train")


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The package itself, with a set of two images in each form that it reads from a folder."""
    datasets = pytest.importorskip("datasets", reason="pip install 'firstsight[datasets]'")
    folder = tmp_path_factory.mktemp("sets")
    for number, name in enumerate(["train/cat/1.png", "train/dog/2.png"]):
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).write_bytes(png(number))
    kinds = datasets.Features(
        {
            "mask": datasets.Value("string"),
            "image": datasets.Image(),
            "other": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    files = [str(folder / "files" / name) for name in ("train/dog/2.png", "train/cat/1.png")]
    columns = {"mask": ["a", "b"], "image": files, "other": files[::-1], "label": [1, 0]}
    rows = datasets.Dataset.from_dict(columns, features=kinds, split="train")
    (folder / "parquet").mkdir()
    rows.to_parquet(folder / "parquet" / "train.parquet")
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": rows}).save_to_disk(folder / "splits")
    return datasets, folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "greys"),
    [("files", [0, 1]), ("parquet", [1, 0]), ("saved", [1, 0]), ("splits", [1, 0])],
)
def test_sets_of_the_package_itself(real, form, greys, monkeypatch, tmp_path):
    datasets, folder = real
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    source = open_source(f"hf:{folder / form}:train")
    assert [int(source.pixels(i)[0, 0, 0]) for i in range(2)] == greys
    assert source.classes == ("cat", "dog") and source.labels.tolist() == greys
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint() and copy.pixels(0)[0, 0, 0] == greys[0]
    with pytest.raises(UserError, match=rf"hf:.*{form}:test cannot be loaded"):
        open_source(f"hf:{folder / form}:test")


@pytest.mark.slow
def test_the_package_itself_asks_nobody_unasked(real, monkeypatch, tmp_path):
    datasets, _ = real
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = []

    def ask(*where, **_):
        asked.append(where)
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    with pytest.raises(UserError, match=r"hf:me/pets:train cannot be loaded .*; add --download"):
        open_source("hf:me/pets:train")
    assert asked == [] and not datasets.config.HF_HUB_OFFLINE
