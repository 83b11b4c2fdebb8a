"""Threads or processes? Views from JPEG by as many of either, images per second of the wall clock.

    python benchmarks/workers.py PHOTOS [--workers 2] [--images 2048] [--size 224]

PHOTOS is any SOURCE. Batches of MoCo v2 views are made by the loader's processes (their start is in
it), and by threads of one process that call the same function; one thread alone is the first row.
All in turn in every round, the best of each counts. Needs as many free cores as workers.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import torch

from firstsight import open_source
from firstsight.loader import Steps, batches
from firstsight.order import Epochs
from firstsight.process import keep_freed_memory
from firstsight.views import PRESETS

BATCH = 32


def main() -> None:
    """Measures the three ways and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    source = open_source(args.photos)
    order = Epochs(len(source), min(BATCH, len(source)), 0)
    views, count = PRESETS["mocov2"], max(args.workers, args.images // order.batch_size)
    steps = Steps(source=source, views=views, size=args.size, order=order, seed=0, rank=0, world=1)

    def threads() -> None:
        with ThreadPoolExecutor(args.workers) as pool:
            list(pool.map(lambda step: len(steps.batch(step)), range(count)))

    def processes() -> None:
        for batch in batches(steps, 0, count, args.workers):
            len(batch)

    def alone() -> None:
        for step in range(count):
            steps.batch(step)

    best: dict[str, float] = {}
    for _ in range(args.rounds):
        for made in (alone, threads, processes):
            began = time.perf_counter()
            made()
            seconds = time.perf_counter() - began
            best[made.__name__] = min(seconds, best.get(made.__name__, seconds))
    for name, seconds in best.items():
        rate = count * order.batch_size / seconds
        print(f"{name:10}{rate:9.1f} images/s{best['alone'] / seconds:7.2f} x", flush=True)


if __name__ == "__main__":
    main()
