"""What logging costs of a step: a run's figures to every writer, beside a step of training.

    python benchmarks/logging_cost.py

A step is that of SimCLR, ResNet-18 at 64 pixels, by the trial of a dry run on this machine; figures
are written every 10 steps, as a run does unless told. W&B is left out: it needs an account.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from firstsight import methods, run
from firstsight.log import Log
from firstsight.settings import begun

WRITES, EVERY, ALLOWED = 2000, 10, 0.01
FIGURES = ("epoch", "loss", "lr", "images_per_second", "data_wait", "bad_images", "similarity")


def cost(loggers: tuple[str, ...]) -> float:
    """Seconds that a write takes, the last flush included."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        log = Log(Path(folder), 0, loggers)
        for step in range(1, WRITES + 1):
            log.write(step * EVERY, dict.fromkeys(FIGURES, step / 3))
        log.close()
        return (time.perf_counter() - began) / WRITES


def main() -> None:
    """Print the table."""
    _, defaults, own = methods.describe("simclr")
    asked = {"data": "scenes:train@512", "backbone": "resnet18", "size": 64, "batch_size": 64}
    asked |= {"workers": 0, "device": "cpu", "precision": "fp32", "layout": "contiguous"}
    step = run.dry_run("simclr", begun(defaults, own, asked, "benchmark"))["seconds_per_step"]
    print(f"a step: {step} s; figures every {EVERY} steps; at most {ALLOWED:.0%} is allowed")
    for loggers in ((), ("tensorboard",), ("csv",), ("tensorboard", "csv")):
        seconds = cost(loggers)
        share = seconds / EVERY / step
        print(f"{' '.join(('jsonl', *loggers)):<24} {seconds * 1e3:6.3f} ms a write, {share:.4%}")
        assert share < ALLOWED


if __name__ == "__main__":
    main()
