"""Rows that rest in host memory or in a file: the same rows, and a file that goes back."""

import errno
import os
import shutil

import numpy as np
import pytest
import torch

from firstsight.errors import UserError
from firstsight.prototypes import fetched, stores
from firstsight.prototypes.rows import Rows
from firstsight.prototypes.stores import File, all_initial, initial, record

SETTINGS = {"momentum": 0.9, "decay": 1e-2}
EVERY = np.arange(40)


def test_first_rows_are_a_function_of_seed_and_row():
    rows = initial(np.arange(3000), 127, seed=5)
    assert rows.dtype == np.float32 and rows.shape == (3000, 127)
    np.testing.assert_array_equal(initial(np.array([70, 3]), 127, seed=5), rows[[70, 3]])
    np.testing.assert_array_equal(all_initial(3000, 127, 5).numpy(), rows)
    assert not np.array_equal(initial(np.array([3]), 127, seed=6)[0], rows[3])
    assert rows.mean() == pytest.approx(0, abs=1e-4) and rows.std() == pytest.approx(0.01, rel=0.01)
    within = (np.abs(rows) < 0.01).mean()  # of a normal distribution
    assert within == pytest.approx(0.6827, abs=0.003)
    close = np.corrcoef(rows.T) - np.eye(127)
    assert np.abs(close).max() < 0.1  # five standard errors


def kept(place, folder, idle=0, count=40, dim=6):
    """Rows on the device or fetched, in a folder if they need one."""
    torch.manual_seed(3)
    made = fetched.of(place, count, dim, **SETTINGS)
    if place != "device":
        made.idle = idle
        made.open(folder, None)
    return made


def walk(rows, steps, start=0, used=3):
    """Some rows moved at each step, those of the last `used` steps in use; what was seen."""
    generator = torch.Generator().manual_seed(0)
    plan = [torch.randperm(40, generator=generator)[:5] for _ in range(start + steps + 1)]
    seen = []
    for t in range(start, start + steps):
        recent = torch.cat(plan[max(0, t - used) : t + 1]).unique()
        seen.append(rows.now(recent, coming=plan[t + 1]).clone())
        gradient = torch.randn(len(recent), 6, generator=torch.Generator().manual_seed(t))
        rows.move(recent, gradient, lr=0.03 if t < 30 else 0.01)
        rows.rest(torch.cat(plan[max(0, t + 1 - used) : t + 1]).unique())
    return seen


def contents(rows):
    """All weights and velocities, as they rest."""
    if isinstance(rows, Rows) and not isinstance(rows, fetched.Fetched):
        return torch.cat([rows.weight, rows.velocity, rows.current[:, None]], 1)
    rows.flush()
    found = rows.store.read(EVERY)
    steps = (found["steps"] - 1)[:, None].astype(np.float32)
    return torch.from_numpy(np.concatenate([found["weight"], found["velocity"], steps], 1))


@pytest.mark.parametrize("idle", [0, 7, 1000])
@pytest.mark.parametrize("place", ["host", "file"])
def test_fetched_rows_are_rows_bit_for_bit(place, idle, tmp_path):
    plain, away = kept("device", None), kept(place, tmp_path, idle)
    for expected, got in zip(walk(plain, 60), walk(away, 60), strict=True):
        assert torch.equal(expected, got)
    assert torch.equal(contents(plain), contents(away))
    assert len(away.weight) <= (25 if idle == 0 else 40)  # no more than were in use at once


def test_what_is_read_ahead_is_used_and_never_what_was_overwritten_since(tmp_path):
    rows, asked = kept("file", tmp_path), []
    real = rows.store.read
    rows.store.read = lambda index: asked.append(index.tolist()) or real(index)
    rows.now(torch.arange(5), coming=torch.tensor([3, 9, 8, 9]))
    rows.now(torch.tensor([8, 9]))
    assert asked == [[0, 1, 2, 3, 4], [8, 9], []]  # by the thread, and nothing was left to read
    rows.now(torch.arange(5), coming=torch.tensor([20]))
    rows.move(torch.arange(5), torch.ones(5, 6), lr=0.1)
    rows.rest(torch.tensor([0]))
    moved = rows.now(torch.arange(5))
    expected = kept("device", None)
    expected.now(torch.arange(5))
    expected.move(torch.arange(5), torch.ones(5, 6), lr=0.1)
    assert torch.equal(moved, expected.weight[:5])


def test_a_file_begins_empty_whatever_the_number_of_rows(tmp_path):
    count = 3_000_000
    rows = kept("file", tmp_path, count=count, dim=128)
    rows.now(torch.tensor([5, count - 1]))
    rows.move(torch.tensor([5, count - 1]), torch.ones(2, 128), lr=0.1)
    rows.commit(1, keep=2)
    file = tmp_path / "machine-000" / "rows"
    assert file.stat().st_size == count * record(128).itemsize > 3e9
    assert file.stat().st_blocks * 512 < 1e6 and len(rows.weight) == 2


class Stopped(Exception):
    pass


@pytest.mark.parametrize("at", [1, 2, 4, 9, 21, 38, 60])
def test_a_file_that_was_left_in_the_middle_of_writing_goes_back(at, tmp_path, monkeypatch):
    """Cut off within the record or the log entry that is the `at`-th to be written since."""
    rows = kept("file", tmp_path)
    walk(rows, 10)
    rows.commit(10, keep=2)
    expected, left = contents(rows), iter(range(at))
    real = stores._write

    def failing(file, data):
        if next(left, None) is None:
            real(file, data[: len(data) // 2])
            raise Stopped
        real(file, data)

    monkeypatch.setattr(stores, "_write", failing)
    with pytest.raises(Stopped):
        walk(rows, 50, start=10)
    monkeypatch.setattr(stores, "_write", real)
    again = fetched.of("file", 40, 6, **SETTINGS)
    again.seed.copy_(rows.seed)  # as the checkpoint does
    again.open(tmp_path, 10)
    assert torch.equal(contents(again), expected)


def test_a_row_is_overwritten_only_when_what_it_held_is_on_the_disk(tmp_path, monkeypatch):
    rows, done = kept("file", tmp_path), []
    rows.commit(0, keep=1)
    write, sync = stores._write, os.fsync
    names = {rows.store._log.fileno(): "log", rows.store._rows.fileno(): "rows"}

    def writing(file, data):
        done.append(f"write {names[file.fileno()]}")
        write(file, data)

    def syncing(number):
        done.append(f"sync {names.get(number, 'other')}")
        sync(number)

    monkeypatch.setattr(stores, "_write", writing)
    monkeypatch.setattr(stores.os, "fsync", syncing)
    rows.now(torch.arange(3))
    rows.flush()
    assert done == ["write log", "sync log"] + ["write rows"] * 3
    done.clear()
    rows.flush()  # what these held at the checkpoint is known
    rows.commit(5, keep=1)
    assert done[:7] == ["write rows"] * 6 + ["sync rows"]


def test_every_checkpoint_that_is_kept_can_be_gone_back_to(tmp_path):
    """Of 2: also 10, which is the newest but one while the checkpoint after 20 is being written."""
    rows, expected = kept("file", tmp_path), {}
    for step in (5, 10, 15, 20, 25):
        walk(rows, 5, start=step - 5)
        rows.commit(step, keep=2)
        expected[step] = contents(rows)
    walk(rows, 5, start=25)
    folder = tmp_path / "machine-000"
    assert sorted(path.name for path in folder.glob("undo-*")) == [
        f"undo-{s:08d}" for s in (10, 15, 20, 25)]  # fmt: skip
    for step in (25, 20, 15, 10):
        copy = tmp_path / f"copy-{step}"
        shutil.copytree(folder, copy / "machine-000")
        for _ in range(2):  # once more does no harm
            rows.open(copy, step)
            assert torch.equal(contents(rows), expected[step])
        left = sorted(p.name for p in (copy / "machine-000").glob("undo-*"))
        assert left == [f"undo-{s:08d}" for s in (10, 15, 20, 25) if s <= step]
        rows.rests.step = step
        walk(rows, 5, start=step)  # and goes on, and back again
        rows.open(copy, step)
        assert torch.equal(contents(rows), expected[step])
    with pytest.raises(UserError, match=r"to step 5 \(they can to 10, 15, 20, 25: as"):
        rows.open(tmp_path, 5)


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, monkeypatch):
    rows = kept("file", tmp_path)
    walk(rows, 10)
    rows.commit(10, keep=1)
    expected = contents(rows)

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(stores, "_write", full)
        with pytest.raises(UserError, match=r"cannot write .* \(No space left on device\); make"):
            walk(rows, 20, start=10)
    rows.open(tmp_path, 10)
    assert torch.equal(contents(rows), expected)
    monkeypatch.setattr(stores.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(UserError, match=r"40 prototypes take 0.0 GB and .* make room"):
        kept("file", tmp_path / "other")


def test_a_damaged_log_is_refused(tmp_path):
    rows = kept("file", tmp_path)
    rows.commit(0, keep=1)
    walk(rows, 20)
    log = tmp_path / "machine-000" / "undo-00000000"
    data = bytearray(log.read_bytes())
    data[40] ^= 1
    log.write_bytes(data)
    with pytest.raises(UserError, match="undo-00000000 is damaged; use another --out"):
        rows.open(tmp_path, 0)


def test_a_trial_writes_nothing():
    rows = fetched.of("file", 40, 6, **SETTINGS)
    rows.idle = 0
    walk(rows, 8)
    assert isinstance(rows.store, File) and rows.store._rows is None
