"""What linear probes add to a training step: ResNet-18, 64 px, three probes, in percent.

    python benchmarks/probe_cost.py [--batch-size 64] [--rounds 5]

Two ways to learn: from the run's own batch, at every step; from batches of a labelled source, every
20 steps (decoding them included). Both are timed beside SimCLR's forward, backward and update on
ready-made views, so the making of views, which would make the share smaller, is left out. The best
of the rounds counts, for the step and for the probes alike.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch

from firstsight import distributed, methods, optim
from firstsight.batch import Batch
from firstsight.features import Reader
from firstsight.probe import KnnProbe, Online
from firstsight.settings import begun
from firstsight.sources import open_source

SIZE = 64


def best(rounds: int, step: Callable[[int], object]) -> float:
    """Seconds of the fastest of some calls."""
    times = []
    for number in range(rounds):
        began = time.perf_counter()
        step(number)
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Measures and prints two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    device = distributed.start("cpu", torch.get_num_threads())
    _, defaults, own = methods.describe("simclr")
    values = {"size": SIZE, "backbone": "resnet18", "batch_size": args.batch_size}
    values |= {"probe": "linear", "workers": 0}
    config = begun(defaults, own, values, "benchmark")
    method = methods.build("simclr", config, 1000).train()
    optimizer = optim.build("sgd", optim.groups(method, ()), 1e-4)
    optim.set_rate(optimizer, 0.01)
    views = tuple(torch.randn(args.batch_size, 3, SIZE, SIZE) for _ in range(2))
    none = torch.zeros(args.batch_size)
    batch = Batch(views=views, crops=(none, none), flips=(none, none), index=none)

    def train(number: int) -> None:
        torch.autograd.backward(method(batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    train(0)
    step = best(args.rounds, train)
    count = args.rounds + 1
    source, aside = open_source("scenes:train@512"), open_source("scenes:train@256")
    features = torch.randn(args.batch_size, method.backbone.width)
    labels = torch.arange(args.batch_size) % 10
    print(f"SimCLR, ResNet-18, {args.batch_size} x 2 views of {SIZE} px: {1000 * step:.0f} ms")
    for name, train_source, every in (("own batch", source, 1), ("labels aside", aside, 20)):
        knn = KnnProbe(
            train=train_source,
            test=aside,
            reader=Reader(size=SIZE),
            k=1,
            temperature=0.1,
            images=9,
            seed=0,
        )
        asked = dataclasses.replace(config, probe_every=every)
        online = Online(knn, asked, source, method.backbone.width, device)
        online.begin(0, count * every)

        def learn(number: int, online: Online = online, every: int = every) -> None:
            for done in range(number * every, (number + 1) * every):
                online.learn(done, count * every, method.backbone, features, labels)

        learn(0)
        seconds = best(args.rounds, lambda number: learn(number + 1)) / every
        print(f"3 probes, {name}: {1000 * seconds:.2f} ms a step, {seconds / step:.2%} of it")


if __name__ == "__main__":
    main()
