"""Whole runs in processes of their own that are killed, asked to stop, or made to hang."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from benchmarks.rough_weather import (
    children,
    command,
    gaps,
    kill_at_random,
    same,
    soak,
    weights,
)
from firstsight.log import read_log

pytestmark = pytest.mark.slow
AT_WORK = ("--workers", "1", "--epochs", "12")


def begun(command, log, lines, **more):
    """A process whose run has written so many lines of its log."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **more)
    while len(read_log(log)) < lines:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    return process


def launched(out, *more):
    """The command of two ranks under torchrun."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2"]
    return [*launch, *command(out, "--workers", "0", *more)[1:]]


def beat(out, rank):
    return json.loads((out / "watch" / f"rank-{rank:04d}.json").read_text())


def test_kill_9_at_random_moments_changes_nothing(tmp_path):
    """A few moments; `benchmarks/rough_weather.py kill --times 30` for more, or KILLS=30."""
    assert kill_at_random(tmp_path, int(os.environ.get("KILLS", "3")), seed=time.time_ns()) > 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 96 steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(command(folder, *AT_WORK), check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_what_people_and_schedulers_send_before_they_kill_leaves_a_checkpoint(
    number, whole, tmp_path
):
    """To the whole group, as a terminal does: workers get it too."""

    def heard():  # also where these tests run behind nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    own = {"start_new_session": True, "preexec_fn": heard}
    process = begun(command(tmp_path, *AT_WORK), tmp_path / "log.jsonl", 10, **own)
    asked = time.monotonic()
    if number == "SIGHUP":  # the terminal goes away, and nobody reads what is said
        process.stderr.close()
        process.stderr = None
    os.killpg(process.pid, getattr(signal, number))
    err = process.communicate(timeout=60)[1] or "stopping"
    assert process.returncode == 130 and "stopping" in err and "Traceback" not in err, err
    assert time.monotonic() - asked < 10
    steps = read_log(tmp_path / "log.jsonl")[-1]["step"]
    assert (tmp_path / "checkpoints" / "last").resolve().name == f"step-{steps:08d}.pt"
    subprocess.run(command(tmp_path, *AT_WORK), check=True, capture_output=True)
    assert same(weights(tmp_path), weights(whole)) and not gaps(tmp_path, 96)


def test_a_second_writer_is_refused_and_readers_may_read(tmp_path):
    more = ("--workers", "0", "--epochs", "40", "--save-every", "5")
    process = begun(command(tmp_path, *more), tmp_path / "log.jsonl", 12)
    try:
        second = subprocess.run(command(tmp_path, *more), capture_output=True, text=True)
        assert second.returncode == 2 and "being written by another process" in second.stderr
        read = "import firstsight, sys; print(firstsight.load_backbone(sys.argv[1]).width)"
        reader = subprocess.run([sys.executable, "-c", read, str(tmp_path)], capture_output=True)
        assert reader.returncode == 0 and int(reader.stdout) > 0
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


HUNG = """
import os, sys, time
from firstsight import cli
from firstsight.sources.scenes import Scenes
real = Scenes.pixels
def pixels(self, index):
    if index == 40 and os.environ.get("RANK", "1") == "1":
        time.sleep(3600)
    return real(self, index)
Scenes.pixels = pixels
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_loader_that_hangs_is_named_with_stacks(workers, tmp_path):
    args = command(tmp_path, "--workers", workers, "--timeout", "3")[3:]
    done = subprocess.run(
        [sys.executable, "-c", HUNG, *args], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "the run hangs: it waits for the loader for" in done.stderr
    stacks = (tmp_path / "watch" / "rank-0000.stacks").read_text()
    assert "in over" in stacks and "in pixels" in stacks  # the loop, and where its data hangs


def test_a_loader_that_hangs_on_one_rank_is_named_with_stacks_of_all(tmp_path):
    (tmp_path / "hung.py").write_text(HUNG)
    args = command(tmp_path, "--workers", "0", "--timeout", "4")[3:]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*launch, "2", str(tmp_path / "hung.py"), *args], capture_output=True, text=True, timeout=90
    )
    said = r"firstsight: rank 1 of 2 hangs: it waits for the loader for \d+ s, at step \d"
    assert done.returncode and re.search(said, done.stderr), done.stderr
    stacks = [(tmp_path / "watch" / f"rank-{rank:04d}.stacks").read_text() for rank in range(2)]
    assert "in pixels" in stacks[1] and "all_reduce" in stacks[0]


def test_a_rank_that_is_killed_is_named(tmp_path):
    more = ("--epochs", "8", "--save-every", "4", "--timeout", "6")
    process = begun(launched(tmp_path, *more), tmp_path / "log.jsonl", 10)
    os.kill(beat(tmp_path, 1)["pid"], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    said = r"firstsight: rank 1 of 2 is gone \(it trains, .*at step \d+, process"
    assert process.returncode and re.search(said, err), err


def test_a_long_run_in_small_goes_on_after_each_failure(tmp_path):
    """Restarted by torchrun; SOAK=3 for minutes, with more failures."""
    minutes = float(os.environ.get("SOAK", "0.15"))
    done = soak(tmp_path, minutes, seed=int(time.time()), every=4 if minutes < 1 else 40)
    assert done.total() > 0


def test_a_rank_that_hangs_is_named_by_the_others(tmp_path):
    more = ("--epochs", "40", "--timeout", "4")
    process = begun(launched(tmp_path, *more), tmp_path / "log.jsonl", 10)
    frozen = beat(tmp_path, 1)["pid"]
    os.kill(frozen, signal.SIGSTOP)
    try:
        while "ended" not in beat(tmp_path, 0)["doing"]:
            time.sleep(0.1)
    finally:
        os.kill(frozen, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    said = r"firstsight: rank 1 of 2 hangs: it trains for \d+ s, its heartbeat stands still, at s"
    assert process.returncode and re.search(said, err), err
    assert "File" in (tmp_path / "watch" / "rank-0000.stacks").read_text()
    assert children(process.pid) == []
