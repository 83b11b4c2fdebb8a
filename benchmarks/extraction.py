"""Features from a packed source beside the backbone's own rate on one fixed batch, in turn.

    OMP_NUM_THREADS=2 python benchmarks/extraction.py [--images 2000] [--backbone resnet18]

The images are generated scenes of 96 pixels, packed as they are (`firstsight data pack`, raw), in a
folder that is removed again; the evaluation view is cut from each. Says images a second of both
(the best of the rounds), by the wall and by the processor, and their ratio: 1 where reading,
cutting and collecting cost nothing.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from firstsight import data, distributed, load_backbone
from firstsight.features import Reader, extract, pooled
from firstsight.sources import open_source


def main() -> None:
    """Measures and prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    threads = torch.get_num_threads()
    distributed.start("auto", threads)
    backbone = load_backbone(f"random:{args.backbone}").to(distributed.device())
    reader = Reader(size=args.size, batch_size=args.batch_size, workers=args.workers)
    fixed = torch.randint(0, 256, (args.batch_size, 3, args.size, args.size), dtype=torch.uint8)
    batches = args.images // args.batch_size
    found: dict[str, list[tuple[float, float]]] = {"packed": [], "fixed": []}
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "scenes.pack")
        data.pack(f"scenes:train@{args.images}", out=packed)
        source = open_source(packed)
        pooled(backbone, fixed, reader)  # the first pass is slow
        for _ in range(args.rounds):
            for name in found:
                began, used = time.perf_counter(), time.process_time()
                if name == "packed":
                    extract(backbone, source, reader)
                else:
                    for _ in range(batches):
                        pooled(backbone, fixed, reader).cpu()
                seconds, worked = time.perf_counter() - began, time.process_time() - used
                found[name].append((seconds, worked))
    for what, place in (("wall", 0), ("processor", 1)):
        packed_rate = args.images / min(one[place] for one in found["packed"])
        fixed_rate = batches * args.batch_size / min(one[place] for one in found["fixed"])
        print(
            f"{what}: {packed_rate:.0f} images/s from the packed file, {fixed_rate:.0f} of the "
            f"backbone alone, ratio {packed_rate / fixed_rate:.2f} ({args.backbone} at "
            f"{args.size} px, {threads} threads, {args.workers} workers)"
        )


if __name__ == "__main__":
    main()
