"""Readings over a run, and of a run that is still being written."""

import json

import pytest

from firstsight import cli, diagnose, evaluate, localize
from firstsight.engine import folders
from firstsight.errors import UserError
from firstsight.evaluate import kept, knn, over_snapshots
from firstsight.readings import FIGURES
from firstsight.report import write_report
from firstsight.settings import plain, write_yaml
from tests.test_engine import train
from tests.test_report import make_run
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
    assert "k-NN at its best k, of the snapshots" in page and "Not finished: step 6" in page


def test_any_reading_goes_over_the_snapshots(tmp_path):
    with pytest.raises(UserError, match="holds no snapshots"):
        over_snapshots(str(tmp_path), "linear", lambda spec: {})
    (tmp_path / "snapshots").mkdir()
    for step in (20, 100):
        (tmp_path / "snapshots" / f"step-{step:08d}.safetensors").touch()
    results = over_snapshots(str(tmp_path), "linear", lambda spec: {"top1": float(len(spec))})
    assert [one["step"] for one in results] == [20, 100]
    assert (tmp_path / "readings" / "linear.json").exists()


ARGUMENTS = {name: ["evaluate", name] for name in FIGURES}
ARGUMENTS |= {"diagnose": ["diagnose"], "localize": ["localize"]}


@pytest.mark.parametrize("name", FIGURES)
def test_every_reading_is_a_curve_over_the_run(name, tmp_path, monkeypatch, capsys):
    """Its figures are found in its result, printed, kept, and drawn by the report."""
    run = make_run(tmp_path / "run", [{"step": 40, "loss": 1.0}], finished=False)
    (run / "snapshots").mkdir()
    for step in (20, 40):
        (run / "snapshots" / f"step-{step:08d}.safetensors").touch()

    def reading(spec, **asked):
        assert "snapshots" not in asked
        result = {"protocol": {"checkpoint": spec}}
        for place, figure in enumerate(FIGURES[name]):
            inner = result
            for key in figure.path[:-1]:
                inner = inner.setdefault(key, {})
            inner[figure.path[-1]] = (31.25 if "20" in spec else 53.75) + place
        return result

    module = diagnose if name == "diagnose" else localize if name == "localize" else evaluate
    monkeypatch.setattr(module, "run" if name in ("diagnose", "localize") else name, reading)
    alone = name in ("instance", "diagnose", "localize")
    data = ["--data", "a"] if alone else ["--train", "a", "--test", "b"]
    cli.main([*ARGUMENTS[name], str(run), *data, "--snapshots"])
    shown = capsys.readouterr().out
    kept = json.loads((run / "readings" / f"{name}.json").read_text())
    assert [one["step"] for one in kept] == [20, 40]
    page = write_report([run], tmp_path / "report.html").read_text()
    for place, figure in enumerate(FIGURES[name]):
        assert [figure.of(one) for one in kept] == [31.25 + place, 53.75 + place]
        assert f"{31.25 + place:.2f}" in shown and f"{53.75 + place:.2f}" in shown
        title = f"<h3>{figure.said}, of the snapshots</h3>"
        assert title.lower() in page.lower() and "K-NN" not in page
        assert f"run, step 20: {31.25 + place:.1f}" in page


def test_a_reading_of_a_run_stays_in_its_folder(tmp_path, capsys):
    """With the step of its checkpoint; nothing else keeps one, and it is never in the way."""
    run = make_run(tmp_path / "run")
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000070.pt").touch()
    (run / "checkpoints" / "last").symlink_to("step-00000070.pt")
    result = {"best": {"k": 5, "top1": 61.25}, "protocol": {"k": [5]}, "images": {"test": 9}}
    assert kept(str(run), "knn", lambda spec: result) is result
    found = json.loads((run / "readings" / "last" / "knn.json").read_text())
    assert found == {**result, "step": 70, "top1": 61.25}
    before = sorted(tmp_path.rglob("*"))
    assert kept("random:resnet18", "knn", lambda spec: result) is result
    assert kept(str(run / "checkpoints" / "last"), "knn", lambda spec: result) is result
    assert sorted(tmp_path.rglob("*")) == before
    (run / "readings" / "last" / "knn.json").unlink()
    (run / "readings" / "last").rmdir()
    (run / "readings" / "last").touch()  # no folder can be made there
    assert kept(str(run), "knn", lambda spec: result) is result
    assert "is not kept for the report" in capsys.readouterr().err


def test_a_map_is_of_one_network(tmp_path):
    with pytest.raises(UserError, match="leave out --snapshots, or --map"):
        cli.diagnose([str(tmp_path), "--data", "a", "--snapshots", "--map", "pca"])


def test_a_damaged_reading_is_one_sentence(tmp_path):
    write_yaml(tmp_path / "config.yaml", {"name": "simclr", "size": 32})
    (tmp_path / "readings").mkdir()
    (tmp_path / "readings" / "knn.json").write_text('[{"step": 3}]')
    with pytest.raises(UserError, match=r"knn.json is damaged .*; remove it"):
        write_report([tmp_path], tmp_path / "report.html")
