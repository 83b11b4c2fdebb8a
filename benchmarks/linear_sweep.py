"""Seconds of `evaluate linear` on cached features: a sweep of 12 settings, choice, retraining.

    OMP_NUM_THREADS=2 python benchmarks/linear_sweep.py [--images 50000] [--width 512]

The features are synthetic (classes as overlapping clouds): the arithmetic does not depend on what
is in them. Extraction is not part of it. The floor is the time that the matrix products of the same
batches take alone, measured in the same run; it says how much the rest costs.
"""

import argparse
import time

import torch

from firstsight import distributed
from firstsight.evaluate.linear import HELD_OUT, cached
from firstsight.evaluate.protocols import PROTOCOLS
from firstsight.features import Seen


def clouds(images: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels."""
    labels = torch.arange(images) % classes
    centres = 0.1 * torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    return centres[labels] + torch.randn(images, width), labels


def products(rows: int, width: int, outputs: int) -> float:
    """Seconds of one step's matrix products, forward and backward; the best of many."""
    x, w, g = (torch.randn(s) for s in ((rows, width), (outputs, width), (rows, outputs)))
    best = float("inf")
    for _ in range(200):
        began = time.perf_counter()
        torch.mm(x, w.T)
        torch.mm(g.T, x)
        best = min(best, time.perf_counter() - began)
    return best


def main() -> None:
    """Measures and prints one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--classes", type=int, default=10)
    args = parser.parse_args()
    distributed.start("cpu", torch.get_num_threads())
    torch.manual_seed(0)
    how = PROTOCOLS["cached"]
    train = clouds(args.images, args.width, args.classes)
    test = clouds(args.test_images, args.width, args.classes)
    began, used = time.perf_counter(), time.process_time()
    result = cached(Seen(*train, *test), args.classes, how, seed=0)
    seconds, used = time.perf_counter() - began, time.process_time() - used

    count = len(how.settings)
    steps = how.epochs * args.images / how.batch_size
    floor = steps * (1 - 1 / HELD_OUT) * products(how.batch_size, args.width, count * args.classes)
    floor += steps * products(how.batch_size, args.width, args.classes)
    print(
        f"{args.images} x {args.width} features, {args.classes} classes, {count} settings, "
        f"{how.epochs} epochs, {torch.get_num_threads()} threads: {seconds:.1f} s, "
        f"of the processor {used:.1f} s "
        f"(floor {floor:.1f} s), top-1 {result['top1']:.1f} %, chosen {result['chosen']}"
    )


if __name__ == "__main__":
    main()
