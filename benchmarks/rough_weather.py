"""Runs that are killed at random moments, run for long, and watched for memory.

    python benchmarks/rough_weather.py kill --times 30
    python benchmarks/rough_weather.py soak --minutes 3
    python benchmarks/rough_weather.py memory --steps 100000

kill: `kill -9` at random moments, some of them while a checkpoint is being written, each time gone
on with; the weights at the end must be those of an unbroken run, bit for bit. soak: two processes
under torchrun, one of which (or a process of its loader) is killed every now and then, at times
with its last checkpoint damaged; the run must end with the right number of steps and a log without
a gap. memory: a long run of tiny steps, its memory and that of its loader read on the way; they
must stay flat.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from firstsight import data
from firstsight.log import read_log

TINY = [
    *("--data", "scenes:train@64", "--backbone", "timm:test_resnet", "--size", "32"),
    *("--batch-size", "8", "--threads", "1", "--precision", "fp32", "--layout", "contiguous"),
    *("--device", "cpu", "--warmup-epochs", "0", "--log-every", "1", "--loggers", "jsonl"),
]


def command(out: Path, *more: str, method: str = "simclr") -> list[str]:
    """The command of a small run; flags in `more` win."""
    run = [sys.executable, "-m", "firstsight", "pretrain", method]
    return [*run, *TINY, "--out", str(out), *more]


def weights(out: Path) -> dict[str, torch.Tensor]:
    """All networks of a run at its last checkpoint."""
    state = torch.load(out / "checkpoints" / "last", weights_only=True)
    return dict(state["method"])


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two runs ended alike, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def gaps(out: Path, steps: int) -> list[int]:
    """Steps that the log of a run should hold and does not, or holds twice."""
    found = [record["step"] for record in read_log(out / "log.jsonl")]
    return sorted(set(range(1, steps + 1)) ^ set(found)) + [s for s in found if found.count(s) > 1]


def kill_at_random(folder: Path, times: int, seed: int, steps: int = 96) -> int:
    """How many of `times` kills met a run at work; raises where its end differs."""
    draw = random.Random(seed)
    more = ("--workers", "1", "--epochs", str(steps / 8), "--save-every", "2")
    subprocess.run(command(folder / "whole", *more), check=True, capture_output=True)
    cut, met, writing = folder / "cut", 0, 0
    for _ in range(times):
        reached = len(read_log(cut / "log.jsonl"))
        process = subprocess.Popen(
            command(cut, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        amid = draw.random() < 0.4  # wait for a checkpoint that is being written
        # at most a share of the steps for each kill, so that all of them meet a run at work
        further = draw.randrange(max(2, steps // times + 2))
        while process.poll() is None:
            moved = (
                any((cut / "checkpoints").glob(".step-*"))
                if amid and len(read_log(cut / "log.jsonl")) != reached
                else not amid and len(read_log(cut / "log.jsonl")) > reached + further
            )
            if moved:
                break
            time.sleep(0.0005)
        time.sleep(draw.random() * 0.05)
        if process.poll() is None:
            met += 1
            writing += any((cut / "checkpoints").glob(".step-*"))
        process.kill()
        process.wait()
    subprocess.run(command(cut, *more), check=True, capture_output=True)
    if not same(weights(folder / "whole"), weights(cut)) or gaps(cut, steps):
        raise SystemExit(f"the run that was killed {met} times ended otherwise")
    print(f"killed {met} times, {writing} of them amid a checkpoint; bit-equal, no gap in the log")
    return met


def soak(folder: Path, minutes: float, seed: int, every: float = 40.0) -> Counter[str]:
    """What was done to a run of two processes, until it ended as it should."""
    draw, out, done = random.Random(seed), folder / "soak", Counter[str]()
    steps = 8 * max(1, round(minutes * 60 * 8 / 8))  # some eight a second on two cores
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc-per-node", "2", "--max-restarts", "1000"]
    more = ("--workers", "1", "--epochs", str(steps / 8), "--save-every", "20", "--timeout", "30")
    process = subprocess.Popen([*launch, *command(out, *more)[1:]], stderr=subprocess.DEVNULL)
    reached, due, began = 0, time.monotonic() + every, time.monotonic()
    while process.poll() is None:
        time.sleep(0.2)
        now = len(read_log(out / "log.jsonl"))
        if time.monotonic() < due or now < reached + 25:  # a restart has to get somewhere first
            continue
        done[broken(out, draw)] += 1
        reached, due = now, time.monotonic() + every * (0.5 + draw.random())
    summary = json.loads((out / "summary.json").read_text())
    if process.returncode or summary["steps"] != steps or gaps(out, steps):
        raise SystemExit(f"ended with {summary['steps']} of {steps} steps, gaps {gaps(out, steps)}")
    told = ", ".join(f"{count} times {what}" for what, count in done.items())
    seconds = time.monotonic() - began
    print(f"{steps} steps in {seconds:.0f} s, {told}; the log without a gap")
    return done


def broken(out: Path, draw: random.Random) -> str:
    """Kill a rank of a run or a process of its loader; or a rank, and its last checkpoint rots."""
    beats = [json.loads(path.read_text()) for path in (out / "watch").glob("rank-*.json")]
    rank = int(draw.choice(beats)["pid"])
    what = draw.choice(["a rank killed", "a loader killed", "a rank killed, a checkpoint damaged"])
    saved = sorted((out / "checkpoints").glob("step-*.pt"))
    with contextlib.suppress(ProcessLookupError):
        for pid in children(rank) if "loader" in what else [rank]:
            os.kill(pid, signal.SIGKILL)
    if "damaged" in what and len(saved) > 1:
        with open(saved[-1], "r+b") as file:
            file.seek(saved[-1].stat().st_size // 2)
            file.write(b"rotten")
    return what


def children(pid: int) -> list[int]:
    """Processes that a process has started, where that is Linux."""
    try:
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def memory(folder: Path, steps: int) -> list[tuple[int, float, float]]:
    """(step, MiB of the run, MiB of its loader) on the way of a long run."""
    out, seen, pack = folder / "memory", [], folder / "scenes.pack"
    data.pack("scenes:train@64", out=str(pack), side=8)
    more = ("--data", str(pack), "--backbone", "resnet18", "--size", "8", "--batch-size", "2")
    more = (*more, "--workers", "1", "--epochs", str(steps / 32), "--save-every", "1000")
    more = (*more, "--log-every", "50", "--loggers", "jsonl", "csv", "tensorboard")
    more = (*more, "--optimizer", "sgd", "--method.hidden", "32", "--method.dim", "16")
    run = [sys.executable, "-c", ONE_LAYER, *command(out, *more)[3:]]
    with subprocess.Popen(run, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(1)
            step = max((record["step"] for record in read_log(out / "log.jsonl")), default=0)
            if step and (not seen or step >= seen[-1][0] + steps / 20):
                seen.append((step, held(process.pid), sum(map(held, children(process.pid)))))
                told = "step {:>7}  run {:7.1f} MiB  loader {:7.1f} MiB"
                print(told.format(*seen[-1]), flush=True)
    return seen


ONE_LAYER = """
import sys
import torch
from firstsight import backbones, cli
class OneLayer(backbones.Backbone):
    name, stem, width, map_width, stride = "one layer", "standard", 8, 8, 8
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 8, 8, stride=8)
    def feature_map(self, images):
        return self.layer(images).relu()
    def features(self, images):
        return self.feature_map(images).mean(dim=(2, 3))
backbones.build = lambda *_: OneLayer()
cli.main(sys.argv[1:])
"""
"""A run whose network takes no time: what may grow is around it."""


def held(pid: int) -> float:
    """MiB of memory that is no file's, of pages shared with another process this one's part.

    Pages of libraries would go up and down with the other processes on the machine that share them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    own = ("Pss_Anon:", "Pss_Shmem:")
    return sum(int(line.split()[1]) for line in lines if line.startswith(own)) / 1024


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("kill", "soak", "memory"))
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "kill":
            kill_at_random(Path(folder), asked.times, asked.seed)
        elif asked.what == "soak":
            soak(Path(folder), asked.minutes, asked.seed)
        else:
            memory(Path(folder), asked.steps)


if __name__ == "__main__":
    main()
