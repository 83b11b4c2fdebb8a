"""Files that somebody made to do harm, and a network that is not asked."""

import os
import socket

import pytest
import torch

from firstsight import checkpoint, run
from firstsight.errors import UserError
from firstsight.sources import open_source
from tests.rough_weather.small import newest, train
from tests.tiny import config


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.slow
def test_a_hostile_checkpoint_in_a_run_executes_nothing(stopped, tmp_path, capsys):
    torch.save({"step": 9, "x": Evil(tmp_path / "owned")}, newest(stopped))
    train(stopped)
    assert "nothing of it was run" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_hostile_masks_and_settings_execute_nothing(tmp_path):
    import pickle

    from firstsight.settings import read_yaml
    from firstsight.sources.masks import read_masks

    masks, settings = tmp_path / "m.json", tmp_path / "c.yaml"
    masks.write_bytes(pickle.dumps(Evil(tmp_path / "owned")))
    with pytest.raises(UserError, match="is not JSON"):
        read_masks(masks)
    settings.write_text(f"size: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    with pytest.raises(UserError, match="is not plain YAML"):
        read_yaml(settings)
    assert not (tmp_path / "owned").exists()


def test_names_in_a_source_lead_nowhere_when_they_are_saved(tmp_path):
    """An archive whose members are called ../../evil is unpacked by `subset` and `views`."""
    import zipfile

    from firstsight import data
    from tests.sources.pictures import png

    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for number, name in enumerate(("../../evil.png", "/tmp/evil-abs.png", "a/b.png")):
            file.writestr(name, png(number))
    inside = tmp_path / "in" / "side"
    inside.mkdir(parents=True)
    for what in ("subset", "views"):
        try:
            if what == "subset":
                data.subset(str(tmp_path / "x.zip"), out=str(inside / what), images=3)
            else:
                data.views(str(tmp_path / "x.zip"), out=str(inside / what), size=16)
        except UserError:
            pass  # refused is as good
    found = {p for p in tmp_path.rglob("*.png") if inside not in p.parents}
    assert not found and not os.path.exists("/tmp/evil-abs.png")


@pytest.mark.slow
def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def refused(*arguments):
        raise AssertionError(f"network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    settings = config("simclr", tmp_path, data="scenes:train@32", probe_test="scenes:test@20")
    assert (run.pretrain("simclr", settings) / "summary.json").exists()
    with pytest.raises(UserError, match="--download"):
        open_source("cifar10:train")


def test_a_hostile_checkpoint_executes_nothing(tmp_path):
    torch.save({"step": 1, "x": Evil(tmp_path / "owned")}, tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.read(tmp_path / "step-00000001.pt")
    assert not (tmp_path / "owned").exists()
