"""`hf:NAME:SPLIT`, by a stand-in with the calls of `datasets` that are made."""

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

    def load_dataset(name, split, download_config):
        if not download_config.local_files_only:
            here.update(elsewhere)
        if (name, split) not in here:
            raise ConnectionError(f"Couldn't reach {name}\nmore lines")
        return here[name, split]

    module = types.SimpleNamespace(
        Image=Image,
        load_dataset=load_dataset,
        DownloadConfig=lambda local_files_only: types.SimpleNamespace(
            local_files_only=local_files_only
        ),
    )
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
