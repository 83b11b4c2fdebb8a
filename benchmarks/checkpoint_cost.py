"""What checkpoints cost a run, and how soon a stopped run trains again.

    python benchmarks/checkpoint_cost.py cost
    python benchmarks/checkpoint_cost.py resume

cost: MoCo v2 with ResNet-18 at 64 pixels, batch 128 and a queue of 65,536, a checkpoint every 100
steps. Three parts of it are timed on the spot: a step, the copy that training waits for, and the
processor time of the thread that writes. The share is (copy + writing) / 100 steps, as if writing
took its time from training entirely, which is the worst that two cores can do. A whole run with
checkpoints beside one without would need hours to tell 2 % from noise.

resume: a packed source of 1,000,000 images, a run that stopped at a step in the midst of an epoch:
seconds from the end of the imports to the first step taken, and of these those that reading the
checkpoint takes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from firstsight import checkpoint, data, distributed, engine, methods, optim, run
from firstsight.engine import state, update
from firstsight.engine.trial import run as trial
from firstsight.log import read_log
from firstsight.settings import Pretrain, begun
from firstsight.sources import open_source, packed

STEPS, ALLOWED, SOON = 100, 0.02, 5.0


def settings(source: str, out: Path, **more: object) -> Pretrain:
    """The run that the target names."""
    _, defaults, own = methods.describe("mocov2")
    asked = {"data": source, "out": str(out), "backbone": "resnet18", "size": 64, "workers": 1}
    asked |= {"batch_size": 128, "precision": "fp32", "layout": "contiguous", "device": "cpu"}
    asked |= {"method": {"queue_size": 65_536}, "loggers": ["jsonl"]}
    return begun(defaults, own, asked | more, "benchmark")


def cost(folder: Path) -> None:
    """Print what a step and a checkpoint take."""
    config = settings("scenes:train@256", folder)
    distributed.start("cpu", 0)
    step = trial("mocov2", config, config.batch_size, 256).seconds
    method = methods.build("mocov2", config, 256)
    held = state.State(
        out=folder, name="mocov2", config=config, source=open_source(config.data), method=method,
        optimizer=optim.of(method, config), scaler=update.scaler(config),
    )  # fmt: skip
    for group in held.optimizer.param_groups:  # as after a first step
        for weight in group["params"]:
            held.optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    copies, writes = [], []
    for number in range(1, 4):
        held.step = number
        began, used = time.perf_counter(), time.process_time()
        held.save()
        copies.append(time.perf_counter() - began)
        held.settle()
        writes.append(time.process_time() - used)
    size = (folder / "checkpoints" / "last").resolve().stat().st_size
    share = (min(copies) + min(writes)) / (STEPS * step)
    print(f"a step {step:.2f} s, a checkpoint of {size / 2**20:.0f} MiB every {STEPS} of them:")
    print(f"copy {min(copies):.3f} s, processor time in all {min(writes):.3f} s, {share:.2%}")
    assert share < ALLOWED


def many(path: Path, images: int) -> None:
    """A packed file of so many images, all of them the same picture of 8 x 8 pixels."""
    small = path.with_name("few.pack")
    data.pack("scenes:train@2", out=str(small), side=8)
    head, table, manifest = packed.read(str(small))
    rows = np.repeat(table[:1], images)
    manifest |= {"images": [f"class/{i:07}.png" for i in range(images)], "labels": None}
    manifest |= {"classes": [], "table": hashlib.sha256(rows.tobytes()).hexdigest()}
    begin = packed.head_bytes(head)
    end = int(table["offset"][0] + table["length"][0])
    with open(path, "wb") as file:
        file.write(small.read_bytes()[: max(len(begin), end)])
        at = file.tell()
        file.write(rows.tobytes())
        place, text = file.tell(), json.dumps(manifest).encode()
        file.write(text + packed.TAIL.pack(at, rows.nbytes, place, len(text), packed.END))


def resume(folder: Path, images: int, step: int) -> None:
    """Print how soon a run that stopped at `step` takes the next one."""
    source = folder / "many.pack"
    many(source, images)
    out = folder / "run"
    small = {"backbone": "timm:test_resnet", "size": 32, "batch_size": 8, "save_every": 1}
    config = settings(str(source), out, **small, epochs=8 * (step + 2) / images, log_every=1)
    opened = open_source(str(source))
    distributed.start("cpu", 1)
    out.mkdir()
    method = methods.build("mocov2", config, images)
    held = state.State(
        out=out, name="mocov2", config=config, source=opened, method=method,
        optimizer=optim.of(method, config), scaler=update.scaler(config), step=step,
    )  # fmt: skip
    held.save()
    held.settle()
    run.write_yaml(out / "config.yaml", {"name": "mocov2", **run.plain(config)})
    began = time.perf_counter()
    checkpoint.newest(out / "checkpoints")
    load = time.perf_counter() - began

    class Taken(Exception):
        pass

    def taken(*_: object) -> None:
        raise Taken

    engine.State.advance = taken  # type: ignore[method-assign, assignment]
    began = time.perf_counter()
    with contextlib.suppress(Taken):
        run.pretrain("mocov2", config)
    seconds = time.perf_counter() - began
    assert not read_log(out / "log.jsonl")
    print(
        f"{images} images, going on at step {step}: {seconds:.2f} s to the end of the first step,"
    )
    print(f"{load:.2f} s of them for reading the checkpoint")
    assert seconds - load < SOON


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("cost", "resume"))
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--step", type=int, default=77_777)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(distributed.cores()))
    with tempfile.TemporaryDirectory() as folder:
        if asked.what == "cost":
            cost(Path(folder))
        else:
            resume(Path(folder), asked.images, asked.step)


if __name__ == "__main__":
    main()
