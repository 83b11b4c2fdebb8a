"""Rows in host memory or in a file through whole runs of PIC: stopped, killed, on two ranks."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from firstsight import checkpoint, distributed, engine, methods
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.prototypes import fetched, stores
from firstsight.prototypes.rows import Rows
from firstsight.prototypes.stores import File, record
from tests.methods.test_all import batch_of
from tests.test_stores import Stopped
from tests.tiny import Patches, config


def pic(folder, place, **values):
    own = {"negatives": 12, "prototypes_in": place}
    asked = {"order": "sliding", "window_size": 16, "window_stride": 4, "epochs": 2.0}
    return config("pic", folder, method=own | values.pop("method", {}), **asked | values)


def ended(folder, place, **values):
    """A run, and its last checkpoint."""
    folder.mkdir(exist_ok=True)
    engine.pretrain("pic", pic(folder, place, **values), Patches(48), None, folder)
    return torch.load(folder / "checkpoints" / "last")


def told(folder):
    return [
        {k: v for k, v in r.items() if k not in ("images_per_second", "data_wait")}
        for r in read_log(folder / "log.jsonl")
    ]


def same_networks(one, other):
    keys = [k for k in one["method"] if not k.startswith("prototypes.")]
    assert keys and all(torch.equal(one["method"][k], other["method"][k]) for k in keys)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, ended(folder, "device")


@pytest.mark.parametrize("place", ["host", "file"])
def test_a_run_is_the_same_wherever_its_prototypes_rest(place, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(fetched, "IDLE", 2)
    expected, saved = whole
    same_networks(saved, ended(tmp_path, place))
    assert told(tmp_path) == told(expected)
    file = tmp_path / "prototypes" / "machine-000" / "rows"
    assert file.exists() == (place == "file")
    if place == "file":
        records = np.fromfile(file, record(16))
    else:
        state = torch.load(tmp_path / "checkpoints" / "last")["method"]
        records = state["prototypes.store._extra_state"].numpy().view(record(16))[:, 0]
    met = records["steps"] > 0
    weight = saved["method"]["prototypes.weight"].numpy()
    np.testing.assert_array_equal(records["weight"][met], weight[met])
    assert met.sum() > 30


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [(stores, "_write", 20), (stores, "_write", 100), (checkpoint, "save", 1), (os, "fsync", 9)],
)
def test_a_run_that_ends_while_it_writes_goes_on_bit_for_bit(
    module, name, at, whole, tmp_path, monkeypatch
):
    """A row, or the checkpoint for which all rows were written already, or anything."""
    monkeypatch.setattr(fetched, "IDLE", 2)
    expected, saved = whole
    left, real = iter(range(at)), getattr(module, name)

    def failing(*arguments):
        if next(left, None) is None:
            raise Stopped
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, failing)
        with pytest.raises(Stopped):
            ended(tmp_path, "file")
    same_networks(saved, ended(tmp_path, "file", workers=1))
    assert told(tmp_path) == told(expected)


def test_a_run_goes_back_past_a_damaged_checkpoint(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fetched, "IDLE", 2)
    expected, saved = whole
    ended(tmp_path, "file")
    last = tmp_path / "checkpoints" / "last"
    last.resolve().write_bytes(b"not a checkpoint")
    same_networks(saved, ended(tmp_path, "file"))
    assert "taking the one before it" in capsys.readouterr().err
    assert told(tmp_path)[-1] == told(expected)[-1]


def test_a_run_that_ends_while_its_only_kept_checkpoint_is_replaced_goes_on(
    whole, tmp_path, monkeypatch
):
    """That after step 6 is never whole, and 9 is due: 3 must still be there with its prototypes."""
    monkeypatch.setattr(fetched, "IDLE", 2)
    expected, saved = whole
    save, commit = checkpoint.save, File.commit

    def stopping(self, step, keep):
        commit(self, step, keep)
        if step == 9:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", lambda *a: save(*a) if a[1] == 3 else None)
        patch.setattr(File, "commit", stopping)
        with pytest.raises(Stopped):
            ended(tmp_path, "file", keep=1)
    assert torch.load(tmp_path / "checkpoints" / "last")["step"] == 3
    same_networks(saved, ended(tmp_path, "file", keep=1))
    assert told(tmp_path) == told(expected)


def test_a_checkpoint_kept_for_good_is_not_gone_on_with(tmp_path, capsys):
    """Its prototypes are lost: refused, and all stays as it was."""
    kept = {"keep": 1, "keep_every": 3}
    ended(tmp_path, "file", **kept)
    for path in sorted((tmp_path / "checkpoints").glob("step-*"))[1:]:
        path.write_bytes(b"")
    before = (tmp_path / "prototypes/machine-000/rows").read_bytes()
    with pytest.raises(UserError, match=r"to step 3 .* not --keep-every\); use another --out"):
        ended(tmp_path, "file", **kept)
    assert (tmp_path / "prototypes/machine-000/rows").read_bytes() == before
    assert [record["step"] for record in told(tmp_path)] == list(range(1, 13))


KILLED = """
import os, signal, sys
from pathlib import Path
from firstsight.prototypes import fetched, stores
from tests.test_stores_of_runs import ended
fetched.IDLE, left, real = 2, iter(range(100)), stores._write
def killing(file, data):
    if next(left, None) is None:
        real(file, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    real(file, data)
stores._write = killing
ended(Path(sys.argv[1]), "file")
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_rows_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment)
    assert done.returncode == -9 and (tmp_path / "checkpoints" / "last").exists()
    monkeypatch.setattr(fetched, "IDLE", 2)
    expected, saved = whole
    same_networks(saved, ended(tmp_path, "file"))
    assert told(tmp_path) == told(expected)


def one_rank(rank, folder):
    distributed.start("cpu")
    moved(folder, rank, 2)
    distributed.stop()


def moved(folder, rank, world):
    """Prototypes after some steps whose batches share few images; the network stays."""
    from pathlib import Path

    method = methods.build("pic", pic(folder, "file", method={"negatives": 6}), images=48)
    method.eval()
    rows = method.prototypes
    rows.idle = 0
    rows.open(Path(folder) / str(world), None)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    order = [(torch.arange(8) * 5 + 11 * t) % 48 for t in range(9)]
    for t in range(8):
        batch = batch_of(8, 1, (32,), seed=t)
        part = type(batch)(
            views=tuple(v[share] for v in batch.views),
            crops=tuple(c[share] for c in batch.crops),
            flips=tuple(f[share] for f in batch.flips),
            index=order[t][share],
            coming=order[t + 1],
        )
        torch.manual_seed(t)
        method(part).loss.backward()
        method.after_step(0.5, 0.1)
        if t == 4:
            rows.commit(5, keep=1)
    rows.commit(8, keep=1)
    return rows.store.read(np.arange(48))


def test_two_ranks_keep_one_file_as_one_process_does(tmp_path, on_ranks):
    alone = moved(str(tmp_path), 0, 1)
    on_ranks(one_rank, str(tmp_path))
    found = np.fromfile(tmp_path / "2" / "machine-000" / "rows", record(16))
    met = found["steps"] > 0
    np.testing.assert_array_equal(found["steps"][met], alone["steps"][met])
    for part in ("weight", "velocity"):
        np.testing.assert_allclose(found[part][met], alone[part][met], rtol=1e-4, atol=1e-6)
    assert met.sum() > 30


def test_where_prototypes_rest_fits_what_is_asked(tmp_path):
    with pytest.raises(UserError, match="file is for some in use at a time; add --"):
        pic(tmp_path, "file", method={"negatives": 0})
    one = ended(tmp_path / "one", "file", epochs=1.0)
    assert not [k for k in one["method"] if k.startswith("prototypes.weight")]
    values = {"init": str(tmp_path / "one"), "init_policy": "all"}
    with pytest.raises(UserError, match="--init-policy all has no prototypes of a run that kept"):
        ended(tmp_path / "two", "file", **values)
    every = methods.build("pic", pic(tmp_path, "host", method={"negatives": 48}), images=48)
    assert type(every.prototypes) is Rows
