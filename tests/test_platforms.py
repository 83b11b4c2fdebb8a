"""Other platforms: processes that are spawned and not forked."""

import functools
import os
import subprocess
import sys

import pytest
import torch

from firstsight import loader, open_source
from tests.test_engine import steps_of
from tests.tiny import Patches


@pytest.mark.parametrize("kind", ["patches", "scenes"])
def test_spawned_workers_make_the_same_views(kind, monkeypatch):
    source = Patches() if kind == "patches" else open_source("scenes:train@20")
    expected = steps_of(source, 0, count=2)
    spawning = functools.partial(loader.DataLoader, multiprocessing_context="spawn")
    monkeypatch.setattr(loader, "DataLoader", spawning)
    for one, other in zip(expected, steps_of(source, 1, count=2), strict=True):
        assert torch.equal(one.index, other.index)
        for a, b in zip(one.views + one.crops, other.views + other.crops, strict=True):
            assert torch.equal(a, b)


def test_scenes_are_painted_where_processes_spawn(tmp_path):
    script = tmp_path / "no_guard.py"
    script.write_text(
        "import multiprocessing\nmultiprocessing.set_start_method('spawn')\n"
        "from firstsight.sources import scenes\n"
        "painted = scenes._paint_all('train', 2 * scenes._ALONE)\n"
        "assert (painted == scenes._paint_some('train', 0, len(painted))).all()\nprint('once')\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "once\n"
