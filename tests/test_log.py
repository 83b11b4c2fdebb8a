"""Loggers: the same figures in every place, a step once, whatever came before."""

import contextlib
import csv
import json
import math
import sys

import pytest

from firstsight import log
from firstsight.errors import UserError


def rows(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_gets_later_columns_and_never_a_step_twice(tmp_path):
    first = log.Log(tmp_path, 0, ["csv"])
    first.write(0, {"knn": 1.5})
    first.write(10, {"loss": 3.0, "lr": 0.1})
    first.write(10, {"loss": 9.0})
    first.write(20, {"loss": 2.0, "lr": 0.2, "knn_quick": 7.25})
    first.write(30, {"loss": 1.0})
    first.close()
    assert [r["step"] for r in rows(tmp_path)] == ["0", "10", "20", "30"]
    resumed = log.Log(tmp_path, 20, ["csv"])  # the checkpoint is of step 20
    resumed.write(30, {"loss": 1.5, "lr": 0.3, "new": 4.0})
    resumed.close()
    assert rows(tmp_path) == [
        {"step": "0", "knn": "1.5", "loss": "", "lr": "", "knn_quick": "", "new": ""},
        {"step": "10", "knn": "", "loss": "3.0", "lr": "0.1", "knn_quick": "", "new": ""},
        {"step": "20", "knn": "", "loss": "2.0", "lr": "0.2", "knn_quick": "7.25", "new": ""},
        {"step": "30", "knn": "", "loss": "1.5", "lr": "0.3", "knn_quick": "", "new": "4.0"},
    ]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines] == [0, 10, 20, 30] and lines[-1]["new"] == 4.0


def test_a_table_asked_for_later_holds_the_whole_run(tmp_path):
    first = log.Log(tmp_path, 0, [])
    first.write(10, {"loss": 3.0})
    first.close()
    assert not (tmp_path / "log.csv").exists() and not (tmp_path / "events").exists()
    log.Log(tmp_path, 10, ["csv", "jsonl"]).close()
    assert rows(tmp_path) == [{"step": "10", "loss": "3.0"}]


def test_what_is_no_number_is_null_as_other_readers_of_json_want_it(tmp_path):
    with contextlib.closing(log.Log(tmp_path, 0, ["jsonl", "csv"])) as written:
        written.write(1, {"loss": math.nan, "lr": math.inf, "data_wait": 0.5})
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()

    def refuse(word):
        raise AssertionError(word)

    expected = {"step": 1, "loss": None, "lr": None, "data_wait": 0.5}
    assert json.loads(line, parse_constant=refuse) == expected
    log.Log(tmp_path, 1, ["jsonl", "csv"]).close()  # both are read again
    assert log.read_log(tmp_path / "log.jsonl")[0]["loss"] is None


def test_a_damaged_line_of_the_log_costs_no_other(tmp_path):
    first = log.Log(tmp_path, 0, ["jsonl"])
    for step in range(1, 6):
        first.write(step, {"loss": step / 2})
    first.close()
    file = tmp_path / "log.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff" + lines[1][1:]
    lines[2] = lines[2].replace(b'"step"', b'"stfp"')
    file.write_bytes(b"".join(lines)[:-4])  # and the last is half written
    log.Log(tmp_path, 4, ["jsonl"]).close()  # goes on after step 4
    assert [json.loads(line) for line in file.open()] == [
        {"step": 1, "loss": 0.5},
        {"step": 4, "loss": 2.0},
    ]


class Gone:
    """What stderr is when the terminal or the pipe behind it has gone."""

    def __init__(self):
        self.asked = []

    def isatty(self):
        return False

    def write(self, text):
        self.asked.append(text)
        raise BrokenPipeError(32, "Broken pipe")


def test_a_run_goes_on_when_nobody_listens(monkeypatch):
    monkeypatch.setattr("sys.stderr", gone := Gone())
    log.say("stopping")
    with log.Meter("simclr", 0, 10) as meter:
        meter._spoke -= 60
        meter.show(3, "loss 1.0")
    assert gone.asked[0] == "stopping\n" and gone.asked[1].startswith("simclr 3/10 loss 1.0")


FAKE = """
import json, pathlib
asked = []
class Run:
    def log(self, figures, step): asked.append((step, figures))
    def finish(self): asked.append("finished")
def init(**options):
    asked.append(options)
    return Run()
"""


def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "simclr-001"
    folder.mkdir()
    for step in (0, 10):
        log.require(["wandb"])
        one = log.Log(folder, step, ["wandb"], {"epochs": 3})
        one.write(step + 10, {"loss": 1.0})
        one.close()
    begun, first, end, again, second, _ = sys.modules.pop("wandb").asked
    assert first == (10, {"loss": 1.0}) and second[0] == 20 and end == "finished"
    assert begun == again and begun["id"] and begun["resume"] == "allow"
    assert begun["config"] == {"epochs": 3} and begun["name"] == "simclr-001"


def test_wandb_is_imported_only_when_asked_and_missed_in_a_sentence(monkeypatch):
    assert "wandb" not in sys.modules
    log.require(["jsonl", "csv", "tensorboard"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'firstsight\[wandb\]'"):
        log.require(["wandb"])


def test_every_logger_has_a_flag():
    import typing

    from firstsight.settings import Pretrain

    hint = typing.get_type_hints(Pretrain)["loggers"]
    assert set(typing.get_args(typing.get_args(hint)[0])) == set(log.WRITERS)
