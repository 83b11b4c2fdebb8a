"""Checkpoints that go bad, disks and memory that run out: what is left of a run, and what it says.

Each row of docs/reliability.md names its test: in this folder, in tests/test_killed.py, or beside
what it breaks. Those that start processes are slow.
"""

import random
import subprocess
import sys
import threading

import pytest
import torch

from benchmarks.rough_weather import same, weights
from firstsight import checkpoint
from firstsight.engine import room, state
from firstsight.errors import UserError
from firstsight.log import read_log
from tests.rough_weather.small import newest, train
from tests.tiny import config

SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in ("empty", "no zip", "of another method")]


@pytest.mark.parametrize("fault", ["cut", "flipped", *SLOW])
def test_a_checkpoint_that_went_bad_is_passed_over_aloud(fault, stopped, whole, capsys):
    data = newest(stopped).read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 4
    other = torch.load(newest(stopped)) | {"name": "byol"}
    bad = {"cut": data[: len(data) // 2], "flipped": bytes(flipped), "empty": b""}
    if fault == "of another method":
        torch.save(other, newest(stopped))
    else:
        newest(stopped).write_bytes(bad.get(fault, b"nonsense"))
    train(stopped)
    said = capsys.readouterr().err
    why = {"flipped": "does not match its checksum", "of another method": "a checkpoint of byol"}
    assert why.get(fault, "not a readable checkpoint") in said and "step-00000009.pt" in said
    assert "taking the one before it" in said
    assert [r["step"] for r in read_log(stopped / "log.jsonl")] == list(range(7, 13))
    assert same(weights(stopped), weights(whole))


def test_every_bit_of_a_checkpoint_is_guarded_or_does_not_count(tmp_path):
    """Flipped one by one: either it is found, or what is read is what was written.

    Some hundred of them, others in each run of the test.
    """
    state = {"step": 3, "x": torch.arange(7.0), "about": {"a": [1, 2]}}
    path = checkpoint.save(tmp_path, 3, state, keep=1)
    data, found = path.read_bytes(), 0
    for place in random.sample(range(len(data)), 150):
        wrong = bytearray(data)
        wrong[place] ^= 1 << place % 8
        path.write_bytes(bytes(wrong))
        read, complaints = checkpoint.newest(tmp_path)
        found += bool(complaints)
        if read is not None:
            assert read["step"] == 3 and torch.equal(read["x"], state["x"])
            assert read["about"] == state["about"]
    assert found


@pytest.mark.slow
def test_a_checkpoint_of_another_run_is_passed_over(stopped, tmp_path, capsys):
    """As good as ours, and the same architecture."""
    other = torch.load(newest(stopped))
    other["settings"] = other["settings"] | {"seed": 5}
    torch.save(other, newest(stopped))
    assert train(stopped).done == 12
    assert "is of another run, --seed 5 (here 0); taking the one before" in capsys.readouterr().err


def test_where_no_checkpoint_is_whole_the_run_does_not_begin_anew(stopped):
    for path in (stopped / "checkpoints").glob("step-*"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint can be gone on with: .*another --out"):
        train(stopped)


def test_a_damaged_file_is_not_judged_either(stopped):
    data = bytearray(newest(stopped).read_bytes())
    data[len(data) // 2] ^= 1
    newest(stopped).write_bytes(bytes(data))
    with pytest.raises(UserError, match="does not match its checksum"):
        checkpoint.load_backbone(str(newest(stopped)))


def test_every_so_many_steps_a_checkpoint_is_kept_for_good(tmp_path):
    for step in range(2, 15, 2):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2, keep_every=4)
    kept = [int(p.stem[-8:]) for p in sorted(tmp_path.glob("step-*"))]
    assert kept == [4, 8, 12, 14]
    with pytest.raises(UserError, match="--keep-every 5 is no multiple of --save-every 3"):
        config("simclr", tmp_path, keep_every=5)


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path):
    (tmp_path / ".step-00000007.pt.part").write_bytes(b"half")
    (tmp_path / ".last.part").symlink_to("nowhere")
    checkpoint.save(tmp_path, 8, {"step": 8}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000008.pt"]


@pytest.mark.slow
def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """The copy is of the moment it was asked for, however long writing takes; never two at once."""
    real, go_on, at_work = checkpoint.save, threading.Event(), []

    def slow(folder, step, values, *rest):
        at_work.append(step)
        assert len(at_work) == 1 and go_on.wait(20)
        real(folder, step, values, *rest)
        at_work.remove(step)

    monkeypatch.setattr(checkpoint, "save", slow)
    steps, advance = [], state.State.advance

    def counted(self, *arguments):
        steps.append(list(at_work))
        if self.step == 5:  # the one after the sixth has to wait for that of the third
            go_on.set()
        advance(self, *arguments)

    monkeypatch.setattr(state.State, "advance", counted)
    train(tmp_path / "slow", keep=9)
    assert steps[3:6] == [[3], [3], [3]]
    monkeypatch.undo()
    train(tmp_path / "plain", keep=9)
    for step in (3, 6, 9, 12):
        one, other = (
            torch.load(tmp_path / name / "checkpoints" / f"step-{step:08d}.pt")
            for name in ("slow", "plain")
        )
        assert one["step"] == step and same(one["method"], other["method"])


@pytest.mark.slow
def test_a_full_disk_is_told_at_the_next_step_and_costs_no_checkpoint(tmp_path, monkeypatch):
    real, written = torch.save, iter(range(9))

    def full(values, file):
        real(values, file)
        if next(written) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*step-00000006.*No space.*make room"):
        train(tmp_path)
    assert checkpoint.newest(tmp_path / "checkpoints")[0]["step"] == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))
    train(tmp_path)
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 13))


def test_a_run_whose_checkpoints_will_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "disk", lambda folder: 1 << 20)
    with pytest.raises(UserError, match=r"take [\d.]+ MiB and .* has 1\.0 MiB left; make room"):
        train(tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_disk_that_fills_and_memory_that_goes_are_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(room, "require_disk", lambda *_: None)
    monkeypatch.setattr(room, "disk", lambda folder: 5 << 20)
    monkeypatch.setattr(room, "memory", lambda: 1 << 20)
    train(tmp_path, epochs=1.0, timeout=1.0)
    said = capsys.readouterr().err
    assert said.count("5.0 MiB left, a checkpoint takes") == 1
    assert "a copy of the state takes 2.9 MiB, 1.0 MiB of memory is left" in said
    assert "1.0 MiB of memory are left on this machine; use fewer --workers" in said


def test_memory_is_the_least_of_the_machine_and_the_container(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  800 kB\n")
    monkeypatch.setattr(room, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    assert room.memory() == 800 << 10
    for name, text in (("max", "600000"), ("current", "500000"), ("stat", "inactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert room.memory() == 100_100
    (tmp_path / "memory.max").write_text("max\n")
    assert room.memory() == 800 << 10


def test_a_checkpoint_of_another_architecture_is_refused_by_name(stopped):
    with pytest.raises(UserError, match=r"another architecture: .*check --backbone and --stem"):
        train(stopped, backbone="resnet18")


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    """In a process of its own that may write no file of more than 300 kB."""
    checkpoint.save(tmp_path, 1, {"step": 1, "x": torch.zeros(10)}, keep=2)
    script = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import torch
from pathlib import Path
from firstsight import checkpoint
from firstsight.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
try:
    checkpoint.save(Path({str(tmp_path)!r}), 2, {{"step": 2, "x": torch.randn(200_000)}}, keep=1)
except UserError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "refused: cannot write" in done.stdout and "make room" in done.stdout, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000001.pt"]
    assert checkpoint.read(tmp_path / "last")["step"] == 1


def test_going_back_past_a_damaged_checkpoint_keeps_what_is_saved_next(tmp_path):
    for step in (1, 3):
        checkpoint.save(tmp_path, step, {"step": step}, keep=5)
    checkpoint.save(tmp_path, 2, {"step": 2}, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "step-00000002.pt"]
    assert checkpoint.read(tmp_path / "last")["step"] == 2
