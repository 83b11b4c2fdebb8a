"""Readings over a run, and of a run that is still being written."""

import json

import pytest

from firstsight import cli, folders
from firstsight.errors import UserError
from firstsight.evaluate import knn, over_snapshots
from firstsight.report import write_report
from firstsight.settings import plain, write_yaml
from tests.test_engine import train
from tests.tiny import config

ASKED = {"train": "scenes:train@60", "test": "scenes:test@30", "k": (5,), "device": "cpu"}


def test_a_reading_is_drawn_over_the_run_while_it_is_written(tmp_path, capsys):
    folder = tmp_path / "run"
    train(folder, epochs=1.0)  # six steps, each of them a snapshot
    write_yaml(folder / "config.yaml", {"name": "simclr", **plain(config("simclr", folder))})
    with open(folder / "log.jsonl", "a") as file:
        file.write('{"step": 7, "lo')
    (folder / "checkpoints" / ".step-00000009.pt.part").write_bytes(b"half")
    with folders.only_writer(folder):  # as the process that trains holds it
        args = ["evaluate", "knn", str(folder), "--snapshots", "--k", "5", "--device", "cpu"]
        args += ["--train", ASKED["train"], "--test", ASKED["test"]]
        cli.main([*args, "--json", str(tmp_path / "over.json")])
        page = write_report([folder], tmp_path / "report.html").read_text()
        last = knn(str(folder), **ASKED)
    results = json.loads((tmp_path / "over.json").read_text())
    assert [one["step"] for one in results] == [1, 2, 3, 4, 5, 6]
    assert results == json.loads((folder / "readings" / "knn.json").read_text())
    assert results[-1]["top1"] == results[-1]["k"]["5"]["top1"] == last["k"]["5"]["top1"]
    assert results[2]["protocol"]["checkpoint"].endswith("step-00000003.safetensors")
    assert "knn of the snapshots" in page and "Not finished: step 6" in page


def test_any_reading_goes_over_the_snapshots(tmp_path):
    with pytest.raises(UserError, match="holds no snapshots"):
        over_snapshots(str(tmp_path), "linear", lambda spec: {})
    (tmp_path / "snapshots").mkdir()
    for step in (20, 100):
        (tmp_path / "snapshots" / f"step-{step:08d}.safetensors").touch()
    results = over_snapshots(str(tmp_path), "linear", lambda spec: {"top1": float(len(spec))})
    assert [one["step"] for one in results] == [20, 100]
    assert (tmp_path / "readings" / "linear.json").exists()


def test_a_damaged_reading_is_one_sentence(tmp_path):
    write_yaml(tmp_path / "config.yaml", {"name": "simclr", "size": 32})
    (tmp_path / "readings").mkdir()
    (tmp_path / "readings" / "knn.json").write_text('[{"step": 3}]')
    with pytest.raises(UserError, match=r"knn.json is damaged .*; remove it"):
        write_report([tmp_path], tmp_path / "report.html")
