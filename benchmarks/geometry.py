"""Seconds of the exact geometry of features: alignment, uniformity over all pairs, effective rank.

    OMP_NUM_THREADS=2 python benchmarks/geometry.py [--images 50000] [--width 512]

The features are random: the arithmetic does not depend on what is in them.
"""

import argparse
import time

import torch

from firstsight import distributed
from firstsight.metrics import alignment, class_alignment, effective_rank, uniformity


def main() -> None:
    """Measures and prints a line for each figure, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=512)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    distributed.start("cpu", threads)
    torch.manual_seed(0)
    x, y = (torch.randn(args.images, args.width) for _ in range(2))
    labels = torch.arange(args.images) % 10
    figures = {
        "alignment": lambda: alignment(x, y),
        "class alignment": lambda: class_alignment(x, labels),
        "uniformity": lambda: uniformity(x),
        "effective rank": lambda: effective_rank(x),
    }
    wall = processor = 0.0
    for name, figure in figures.items():
        began, used = time.perf_counter(), time.process_time()
        value = figure()
        seconds, worked = time.perf_counter() - began, time.process_time() - used
        print(f"{name}: {value:.4f}, {seconds:.1f} s, of the processor {worked:.1f} s")
        wall, processor = wall + seconds, processor + worked
    print(
        f"{args.images} features of {args.width}, {threads} threads: {wall:.1f} s in all, "
        f"of the processor {processor:.1f} s"
    )


if __name__ == "__main__":
    main()
