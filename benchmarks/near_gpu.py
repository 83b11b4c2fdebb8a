"""Training from photographs beside the model alone on fixed input: what the data costs a GPU.

    python benchmarks/near_gpu.py --data photos.pack --batch 256 --size 224 --workers 16

For each backbone: the optimiser step of a method on one batch that lies on the device as floats
(model alone), then on batches from a packed source (made of --data where that is another), with
colours by the workers and on the device, then from pixels held on the device. All rows in turn in
every round, the best round of each counts. Wanted: 90 % of the model-alone rate. `--compile` lets
torch compile the backbone and the colours of the device.

Without a GPU it shows no more than that it runs:

    python benchmarks/near_gpu.py --data scenes:train@64 --backbones timm:test_resnet \\
        --size 32 --batch 8 --steps 2 --rounds 1 --workers 0 --device cpu
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from firstsight import backbones, data, distributed, methods, optim
from firstsight.batch import Batch
from firstsight.engine import update
from firstsight.loader import LAYOUTS, batches, on_device, prefetch
from firstsight.loader.resident import maker_of
from firstsight.loader.windows import order_of
from firstsight.nets import cast_to
from firstsight.settings import Pretrain, begun
from firstsight.sources import Source, open_source

ROWS = {
    "packed, colours by workers": {},
    "packed, colours on the device": {"views_on": "device"},
    "resident": {"resident": True},
}
"""What differs from row to row."""


def settled(name: str, args: argparse.Namespace) -> Pretrain:
    """A method's own settings with those of the measurement."""
    _, defaults, own = methods.describe(args.method)
    cuda = distributed.device().type == "cuda"
    values = {
        "data": args.data,
        "backbone": name,
        "size": args.size,
        "batch_size": args.batch,
        "workers": args.workers,
        "precision": "bf16" if cuda else "fp32",
        "layout": "channels_last" if cuda else "contiguous",
        "compile": args.compile,
        "warmup_epochs": 0.0,
    }
    return begun(defaults, own, values, "benchmark")


class Training:
    """A method and its optimiser, which rows share: the weights do not change the time."""

    def __init__(self, config: Pretrain, images: int, method: str) -> None:
        self.config, self.device = config, distributed.device()
        self.method = methods.build(method, config, images)
        self.method.to(self.device, memory_format=LAYOUTS[config.layout])  # type: ignore[call-overload]
        self.method.train()
        self.optimizer = optim.of(self.method, config)
        self.scaler = update.scaler(config)
        if config.compile:
            backbones.compile_all(self.method)

    def step(self, batch: Batch, config: Pretrain) -> None:
        """A whole step of training on a batch of the loader."""
        update.gradients(self.method, batch, self.scaler, config)
        update.apply(self.method, self.optimizer, self.scaler, config, 0.0, 1e-4)

    def alone(self, batch: Batch) -> None:
        """The same on floats that lie on the device."""
        with cast_to(self.config.precision, self.device):
            loss: torch.Tensor = self.method(batch).loss
        nn.Module.zero_grad(self.method)
        torch.autograd.backward(loss)
        update.apply(self.method, self.optimizer, self.scaler, self.config, 0.0, 1e-4)


def waited_for() -> float:
    """The time when the device has done what it was told."""
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def of_model_alone(training: Training, batch: Batch, steps: int) -> tuple[float, float]:
    """Seconds of `steps` steps, and the share of them that training waited: none."""
    training.alone(batch)
    training.alone(batch)
    began = waited_for()
    for _ in range(steps):
        training.alone(batch)
    return waited_for() - began, 0.0


def of_stream(
    training: Training, config: Pretrain, stream: Iterator[Batch], steps: int, warm: int
) -> tuple[float, float]:
    """Seconds of `steps` steps after `warm` others, and the share of them that training waited."""
    for _ in range(warm):
        training.step(next(stream), config)
    began, waited = waited_for(), 0.0
    for _ in range(steps):
        asked = time.perf_counter()
        batch = next(stream)
        waited += time.perf_counter() - asked
        training.step(batch, config)
    seconds = waited_for() - began
    return seconds, waited / seconds


def measured(name: str, source: Source, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Row -> images per second, share of the model-alone rate, share of time waited."""
    config, device = settled(name, args), distributed.device()
    order = order_of(config, len(source))
    training = Training(config, len(source), args.method)
    configs = {row: dataclasses.replace(config, **other) for row, other in ROWS.items()}
    makers = {row: maker_of(one, source, order, device, 0) for row, one in configs.items()}
    fixed = makers["packed, colours by workers"].batch(0)
    fixed = on_device(fixed, config.views, device, LAYOUTS[config.layout])
    warm = max(2, 2 * args.workers)  # what workers had ready is used up
    best: dict[str, tuple[float, float]] = {}
    for _ in range(args.rounds):
        found = {"model alone": of_model_alone(training, fixed, args.steps)}
        for row, maker in makers.items():
            made = batches(maker, 0, warm + args.steps + 1, args.workers)
            stream = prefetch.ahead(made, device)
            found[row] = of_stream(training, configs[row], stream, args.steps, warm)
            del made, stream  # its workers end here
        for row, one in found.items():
            best[row] = min(best.get(row, one), one)
    alone = best["model alone"][0]
    return {
        row: {
            "images_per_second": args.steps * args.batch / seconds,
            "of_model_alone": alone / seconds,
            "data_wait": waited,
        }
        for row, (seconds, waited) in best.items()
    }


def main(typed: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Measures all rows of all backbones and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="SOURCE; what is no .pack is packed first")
    parser.add_argument("--side", type=int, default=500, help="longest side of packed images")
    names = ["resnet50", "timm:vit_small_patch16_224"]
    parser.add_argument("--backbones", nargs="+", default=names)
    parser.add_argument("--method", default="simclr")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=50, help="measured in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=distributed.cores())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--json", help="file for the figures")
    args = parser.parse_args(typed)
    distributed.start(args.device, args.threads)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pack = args.data
        if not pack.endswith(".pack"):
            pack = f"{folder}/images.pack"
            data.pack(args.data, out=pack, side=args.side)
        source = open_source(pack)
        for name in args.backbones:
            found[name] = measured(name, source, args)
            print(f"\n{name}, {args.method}, batch {args.batch} at {args.size} px")
            for row, figures in found[name].items():
                rate, share, wait = figures.values()
                print(f"  {row:32}{rate:10.1f} images/s{share:8.1%} of alone{wait:8.1%} waited")
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))
    return found


if __name__ == "__main__":
    main()
