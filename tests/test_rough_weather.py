"""Runs that are killed, starved, lied to and attacked: what of them is left, and what they say.

Each row of docs/reliability.md names its test here, in tests/test_engine.py or in
tests/sources/test_faults.py. Those that start processes are slow.
"""

import dataclasses
import os
import random
import signal
import socket
import sys
import threading
import time

import pytest
import torch

from benchmarks.rough_weather import children, same, weights
from firstsight import checkpoint, engine, loader, room, run, state, update
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.sources import open_source
from tests.tiny import Patches, config


def train(folder, source=None, salt=0, **values):
    settings = config("simclr", folder, loggers=("jsonl",), **values)
    return engine.pretrain("simclr", settings, source or Patches(), None, folder, salt)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run of 12 steps, with a checkpoint every 3."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, keep=9)
    return folder


@pytest.fixture
def stopped(whole, tmp_path):
    """A run that has checkpoints after 3, 6 and 9 steps; 6 is `last`."""
    saved = tmp_path / "checkpoints"
    saved.mkdir()
    for step in (3, 6, 9):
        name = f"step-{step:08d}.pt"
        (saved / name).write_bytes((whole / "checkpoints" / name).read_bytes())
    (saved / "last").symlink_to("step-00000009.pt")
    return tmp_path


def newest(folder):
    return folder / "checkpoints" / "step-00000009.pt"


# --- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "flipped", "empty", "no zip", "of another method"])
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


# --- numbers


def poison(monkeypatch, steps, value=torch.nan):
    """Spoil the batch of each of these calls."""
    real, calls = update.on_device, iter(range(1000))

    def poisoned(*arguments):
        batch = real(*arguments)
        if next(calls) in steps:
            return dataclasses.replace(batch, views=(batch.views[0] * value, batch.views[1]))
        return batch

    monkeypatch.setattr(update, "on_device", poisoned)


@pytest.mark.slow
def test_a_run_goes_back_from_numbers_that_are_none(tmp_path, monkeypatch, capsys):
    """To its last checkpoint, and on with other views; the log is cut back with it."""
    settings = config("simclr", tmp_path / "a", data="scenes:train@32", epochs=3.0)
    plain = dataclasses.replace(settings, out=str(tmp_path / "b"))
    poison(monkeypatch, [7])
    run.pretrain("simclr", settings)
    said = capsys.readouterr().err
    assert (
        "nan at step 7" in said and "going back to it with other views (1 of --rollbacks 3)" in said
    )
    monkeypatch.undo()
    run.pretrain("simclr", plain)
    once, never = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [r["step"] for r in once] == [r["step"] for r in never] == list(range(1, 13))
    assert [r["loss"] for r in once[:6]] == [r["loss"] for r in never[:6]]
    assert all(a["loss"] != b["loss"] for a, b in zip(once[6:], never[6:], strict=True))
    assert torch.load(tmp_path / "a" / "checkpoints" / "last")["salt"] == 1


@pytest.mark.slow
def test_after_a_roll_back_a_run_is_as_exact_as_before(stopped, whole):
    """Salted once: the same again, whether stopped in between or not."""
    train(stopped, salt=1)
    once = weights(stopped)
    assert not same(once, weights(whole))
    for path in sorted((stopped / "checkpoints").glob("step-*"))[1:]:
        path.unlink()
    (stopped / "checkpoints" / newest(whole).name).write_bytes(newest(whole).read_bytes())
    train(stopped, salt=1, epochs=10 / 6)
    train(stopped, epochs=2.0)  # takes the salt from the checkpoint
    assert torch.load(stopped / "checkpoints" / "last")["salt"] == 1


@pytest.mark.slow
def test_it_goes_back_so_many_times_and_no_more(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(4, 1000))
    settings = config("simclr", tmp_path, data="scenes:train@32", rollbacks=2)
    with pytest.raises(UserError, match=r"nan at step 3.*start another run with a lower --lr"):
        run.pretrain("simclr", settings)
    assert capsys.readouterr().err.count("going back") == 2


@pytest.mark.slow
def test_features_that_become_alike_are_named_once(tmp_path, monkeypatch, capsys):
    real = update.gradients

    def collapsed(*arguments):
        output = real(*arguments)
        return dataclasses.replace(output, features=torch.ones_like(output.features))

    monkeypatch.setattr(update, "gradients", collapsed)
    train(tmp_path)
    said = capsys.readouterr().err
    assert said.count("collapse: feature_spread 0.0000 at step 2 ") == 1
    monkeypatch.undo()
    train(tmp_path / "well")
    assert "collapse" not in capsys.readouterr().err


# --- data


class Lazy(Patches):
    """Patches that take an hour, from number 30 on."""

    def pixels(self, index):
        if index >= 30:
            time.sleep(3600)
        return super().pixels(index)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path, whole, capsys):
    source, made = Patches(), []
    steps = loader.Steps(
        source=source, views=config("simclr", tmp_path).views, size=32,
        order=engine.order_of(config("simclr", tmp_path), 48), seed=0, rank=0, world=1,
    )  # fmt: skip
    others = set(children(os.getpid()))  # ranks of other tests, trackers of what is shared
    for number, batch in enumerate(loader.batches(steps, 0, 12, 1)):
        made.append(batch)
        if number == 2:
            (worker,) = set(children(os.getpid())) - others
            os.kill(worker, signal.SIGKILL)
            time.sleep(0.3)  # amid a step nothing is raised
    assert "was killed before step" in capsys.readouterr().err
    for one, other in zip(made, loader.batches(steps, 0, 12, 0), strict=True):
        assert torch.equal(one.views[0], other.views[0])


@pytest.mark.slow
def test_other_images_are_gone_on_with_where_that_is_allowed(stopped, capsys):
    with pytest.raises(UserError, match=r"\(48 then, 50 now\); use --allow-changed-data"):
        train(stopped, Patches(50))
    assert train(stopped, Patches(50), allow_changed_data=True).done == 12
    assert "(48 then, 50 now); going on with these" in capsys.readouterr().err


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(stopped, whole, monkeypatch):
    """Neither that of now nor that of the files: what counts is the number of steps."""
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    for age, path in enumerate(sorted((stopped / "checkpoints").glob("step-*"))):
        os.utime(path, (10**9 - age * 1000,) * 2)  # the newest seems the oldest
    train(stopped)
    assert [r["step"] for r in read_log(stopped / "log.jsonl")] == [10, 11, 12]
    assert same(weights(stopped), weights(whole))


# a process cannot get rid of an audit hook: it rests until it is asked to look
_LOOKING = {"at": None}


def _hook(event, arguments):
    if event == "open" and _LOOKING["at"] and isinstance(arguments[0], str):
        path, _, flags = arguments
        writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(_LOOKING["at"]) and writing:
            raise PermissionError(30, "Read-only file system", path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_that_cannot_be_written_is_enough(kind, tmp_path):
    from PIL import Image

    from firstsight import data
    from tests.sources.pictures import encoded, noise

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(16):
        file = photos / f"{number:02}.png"
        file.write_bytes(encoded(Image.fromarray(noise(24, 30, number)), "PNG"))
        file.chmod(0o444)
    if kind == "zip":
        data.zip_up(str(photos), out=str(tmp_path / "photos.zip"))
    photos.chmod(0o555)
    sys.addaudithook(_hook)
    _LOOKING["at"] = str(photos)
    try:
        spec = str(photos) + (".zip" if kind == "zip" else "")
        run.pretrain("simclr", config("simclr", tmp_path / "run", data=spec, epochs=1.0))
    finally:
        _LOOKING["at"] = None
        photos.chmod(0o755)
    assert (tmp_path / "run" / "summary.json").exists()


# --- attackers, network


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
