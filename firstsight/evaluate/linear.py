"""A linear classifier on frozen features: how well classes can be told apart by one linear layer.

Two ways. On **cached features** (the default): features are extracted once, several learning
rates and weight decays are trained side by side, one of them is chosen on a held-out tenth of the
training images, trained again on all of them, and read on the test images. Or **as published**:
the protocols of the papers, which train on random crops and so read images in every epoch.

What the test images decide is never called the result: `top1` is that of the last epoch; the best
epoch stands beside it, marked as chosen on them.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from firstsight import distributed, keyed
from firstsight.backbones import Backbone
from firstsight.errors import UserError
from firstsight.evaluate.drifting import Drifting, Tested, still
from firstsight.evaluate.opened import opened
from firstsight.evaluate.protocols import Protocol, Representation, overridden, stated
from firstsight.evaluate.repeated import repeated, repeated_files
from firstsight.features import Reader, Seen, extract, pooled, refuse_unusable
from firstsight.loader import Steps, batches
from firstsight.log import Meter, say
from firstsight.metrics import confused, confusion, nearest
from firstsight.nets.heads import Descent, Heads, prepared
from firstsight.order import Epochs
from firstsight.sources.base import Source
from firstsight.views import Interpolation, Views

HELD_OUT = 10
"""Of so many training images one is held out while settings are compared."""


def linear(
    checkpoint_spec: str,
    *,
    train: str,
    test: str,
    protocol: str = "cached",
    epochs: int | None = None,
    lr: Sequence[float] = (),
    base_lr: float | None = None,
    weight_decay: Sequence[float] = (),
    optimizer: Literal["sgd", "lars"] | None = None,
    momentum: float | None = None,
    nesterov: bool | None = None,
    batch_size: int | None = None,
    warmup_epochs: float | None = None,
    schedule: Literal["cosine", "step"] | None = None,
    drops: Sequence[float] = (),
    once_an_epoch: bool | None = None,
    init_std: float | None = None,
    batch_norm: Literal["rest", "batch"] | None = None,
    representation: Representation | None = None,
    min_scale: float | None = None,
    interpolation: Interpolation | None = None,
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy in percent of a linear classifier on the frozen backbone, with all it depends on.

    `protocol` names where all numbers start (`PROTOCOLS`); what is given wins. Fewer `epochs`
    shorten the warm-up, and move the drops, with them. `size` 0 takes the side the backbone was
    pretrained with. Test images that were learnt from are counted in `repeated`. Raises `UserError`
    where labels are missing, or features are not numbers.
    """
    began = time.perf_counter()
    given = {
        "lr": tuple(lr),
        "base_lr": base_lr,
        "weight_decay": tuple(weight_decay),
        "optimizer": optimizer,
        "momentum": momentum,
        "nesterov": nesterov,
        "batch_size": batch_size,
        "warmup_epochs": warmup_epochs,
        "schedule": schedule,
        "drops": tuple(drops),
        "once_an_epoch": once_an_epoch,
        "init_std": init_std,
        "batch_norm": batch_norm,
        "representation": representation,
        "min_scale": min_scale,
        "interpolation": interpolation,
    }
    how = overridden(protocol, epochs, given)
    backbone, reader, source, asked, labels, asked_labels, classes, _ = opened(
        checkpoint_spec,
        train=train,
        test=test,
        size=size,
        precision=precision,
        interpolation=how.interpolation,
        workers=workers,
        download=download,
        device=device,
        threads=threads,
    )
    with untouched(backbone):
        queries = extract(backbone, asked, reader)
        test_rows = queries.values, queries.labels(asked_labels)
        if how.augment:
            refuse_unusable(queries.values)
            again = repeated_files(source, range(len(source)), asked)
            net, tested = backbone, still(*test_rows)
            if how.batch_norm == "batch":
                net = Drifting(backbone)
                tested = net.tested(asked, reader, test_rows[1])
            figures, bad = augmented(net, source, reader, classes, tested, how, seed)
        else:
            bank = extract(backbone, source, reader)
            seen = Seen(bank.values, bank.labels(labels), *test_rows)
            figures, bad = cached(seen, classes, how, seed), bank.unreadable
            near = torch.cat([index for _, index in nearest(bank.values, queries.values, 1)])
            again = repeated(source, asked, bank, queries, near[:, 0])
    table = confusion(test_rows[1], figures.pop("predicted"), classes)
    return {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "train": train,
            "test": test,
            **stated(protocol, how),
            **reader.protocol,
            "seed": seed,
        },
        **figures,
        **confused(table, source.classes),
        "images": {"train": len(source) - bad, "test": len(queries.values)},
        "unreadable": {"train": bad, "test": queries.unreadable},
        "repeated": again,
        "seconds": round(time.perf_counter() - began, 1),
    }


@contextmanager
def untouched(backbone: Backbone) -> Iterator[None]:
    """Hold the backbone to being the same, bit for bit, when the block ends."""
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    yield
    changed = [n for n, tensor in backbone.state_dict().items() if not before[n].equal(tensor)]
    if changed:
        raise RuntimeError(f"a reading changed the backbone: {', '.join(changed[:3])}")


# On cached features


def cached(seen: Seen, classes: int, how: Protocol, seed: int) -> dict[str, Any]:
    """Accuracy of the setting that a held-out part of the training images chooses."""
    refuse_unusable(seen.train, seen.test)
    figures: dict[str, Any] = {}
    prepare = prepared(seen.train, how.representation)
    settings = how.settings
    every = torch.arange(len(seen.train))
    if len(settings) > 1:
        held = held_out(seen.train_labels, seed)
        heads = _heads(settings, seen.train.shape[1], classes, how, seed, prepare)
        rows = _rows(seen, every[~held], how.batch_size, seed)
        steps = math.ceil(int((~held).sum()) / how.batch_size)
        for _ in trained(heads, settings, how, rows, steps, f"{len(settings)} settings"):
            pass
        judged = heads.judged(seen.train[held], seen.train_labels[held])
        best = best_of(judged)
        figures = _choice(settings, judged, best, int(held.sum()))
        settings = [settings[best]]
    heads = _heads(settings, seen.train.shape[1], classes, how, seed, prepare)
    rows = _rows(seen, every, how.batch_size, seed)
    steps = math.ceil(len(every) / how.batch_size)
    return read(heads, settings, how, rows, steps, still(seen.test, seen.test_labels)) | figures


def held_out(labels: Tensor, seed: int) -> Tensor:
    """(N,) of bool: a random tenth of the rows, the same share of every class to within one row."""
    if len(labels) < 2:
        raise UserError("a linear reading needs at least two readable training images")
    random = np.random.default_rng(keyed.seed(seed, len(labels)))
    by_class = np.lexsort((random.permutation(len(labels)), labels.numpy()))
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[torch.from_numpy(by_class[random.integers(min(HELD_OUT, len(labels))) :: HELD_OUT])] = True
    return held


def best_of(judged: Sequence[dict[str, float]]) -> int:
    """The setting of the highest top-1; of equal ones that of the lowest cross-entropy."""

    def merit(position: int) -> tuple[float, float]:
        loss = judged[position]["loss"]
        return judged[position]["top1"], -loss if math.isfinite(loss) else -math.inf

    return max(range(len(judged)), key=merit)


def _choice(
    settings: list[tuple[float, float]], judged: list[dict[str, float]], best: int, images: int
) -> dict[str, Any]:
    lr, weight_decay = settings[best]
    rates = [rate for rate, _ in settings]
    if len(set(rates)) > 1 and lr in (min(rates), max(rates)):
        say(f"the best learning rate, {lr:g}, is at the edge of those tried; --lr takes others")
    top1 = judged[best]["top1"]
    error = math.sqrt(top1 * (100 - top1) / images)  # of a share, in percent
    alike = sum(j["top1"] >= top1 - error for j in judged)
    if alike > 1:
        say(
            f"the choice rests on {images} held-out images: {alike} of {len(settings)} settings "
            f"are within one standard error ({error:.1f} points) of the best"
        )
    return {
        "chosen": {
            "lr": lr,
            "weight_decay": weight_decay,
            "standard_error": round(error, 2),
            "on": f"a held-out tenth of the training images ({images})",
        },
        "sweep": [
            {
                "lr": lr,
                "weight_decay": decay,
                "held_out_top1": j["top1"],
                "held_out_loss": j["loss"],
            }
            for (lr, decay), j in zip(settings, judged, strict=True)
        ],
    }


def _rows(seen: Seen, index: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the training rows at `index`, all of them in each epoch, without end."""
    for epoch in itertools.count():
        generator = torch.Generator().manual_seed(keyed.seed(seed, epoch))
        shuffled = index[torch.randperm(len(index), generator=generator)]
        for rows in torch.split(shuffled, batch_size):
            yield seen.train[rows], seen.train_labels[rows]


# As published


def augmented(
    backbone: Backbone,
    source: Source,
    reader: Reader,
    classes: int,
    tested: Tested,
    how: Protocol,
    seed: int,
) -> tuple[dict[str, Any], int]:
    """Accuracy after training on random crops and flips, and how many images were unreadable."""
    refuse_uneven(how.batch_size)
    order = Epochs(len(source), how.batch_size, seed)
    maker = Steps(
        source=source,
        views=crops(how.min_scale, reader),
        size=reader.size,
        order=order,
        seed=seed,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    bad: set[str] = set()

    def rows() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches(maker, 0, how.epochs * order.steps_per_epoch, reader.workers):
            assert batch.label is not None
            bad.update(batch.bad)
            features = pooled(backbone, batch.views[0], reader)
            labels = batch.label.to(features.device)
            # each rank trains the same head on the whole batch: there is no gradient to average
            yield distributed.gather(features), distributed.gather(labels)

    prepare = prepared(torch.empty(0), how.representation)
    heads = _heads(how.settings, backbone.width, classes, how, seed, prepare)
    figures = read(heads, how.settings, how, rows(), order.steps_per_epoch, tested)
    return figures, len(set[str]().union(*distributed.collect(bad)))


def refuse_uneven(batch_size: int) -> None:
    """Raise `UserError` where a batch is not the same number of images for every rank."""
    world = distributed.world()
    if batch_size % world:
        raise UserError(
            f"batch size {batch_size} does not divide over {world} ranks; "
            f"use --batch-size {batch_size - batch_size % world + world}"
        )


def crops(min_scale: float, reader: Reader) -> Views:
    """The views that classifiers train on: random crops and flips."""
    return Views(
        counts=(1,),
        min_scale=(min_scale,),
        interpolation=reader.interpolation,
        jitter=0.0,
        gray=0.0,
        blur=(0.0,),
        mean=reader.mean,
        std=reader.std,
    )


# Both ways


def trained(
    heads: Heads,
    settings: list[tuple[float, float]],
    how: Protocol,
    rows: Iterator[tuple[Tensor, Tensor]],
    steps_an_epoch: int,
    what: str,
) -> Iterator[int]:
    """Train the heads, each with its own (learning rate, weight decay); yields after each epoch.

    `rows` gives the features (B, C) and labels (B,) of each step.
    """
    descent = Descent(
        heads,
        settings,
        momentum=how.momentum,
        nesterov=how.nesterov,
        lars="larc" if how.optimizer == "lars" else "",  # the variant that excludes nothing
    )
    with Meter(f"linear, {what}", 0, how.epochs) as meter:
        for step in range(how.epochs * steps_an_epoch):
            features, labels = next(rows)
            descent.step(features, labels, how.rate(step, steps_an_epoch))
            if (step + 1) % steps_an_epoch == 0:
                epoch = (step + 1) // steps_an_epoch
                meter.show(epoch)
                yield epoch


def read(
    heads: Heads,
    settings: list[tuple[float, float]],
    how: Protocol,
    rows: Iterator[tuple[Tensor, Tensor]],
    steps_an_epoch: int,
    tested: Tested,
) -> dict[str, Any]:
    """Train one head and read it on the test rows after every epoch; the last one counts.

    `predicted` (M,) are the classes that it then gives them.
    """
    (setting,) = settings
    curve = []
    for _ in trained(heads, settings, how, rows, steps_an_epoch, "one setting"):
        test, labels = tested()
        curve.append(heads.judged(test, labels)[0])
    if not math.isfinite(curve[-1]["loss"]):
        raise UserError(f"training diverged at a learning rate of {setting[0]:g}; use a lower --lr")
    best = max(range(len(curve)), key=lambda epoch: curve[epoch]["top1"])
    return {
        "top1": curve[-1]["top1"],
        "top5": curve[-1]["top5"],
        "mean_per_class": curve[-1]["mean_per_class"],
        "best_top1": curve[best]["top1"],
        "best_epoch": best + 1,
        "best_chosen_on": "the test images",
        "predicted": heads.predicted(test)[:, 0],
    }


def _heads(
    settings: list[tuple[float, float]],
    width: int,
    classes: int,
    how: Protocol,
    seed: int,
    prepare: nn.Module,
) -> Heads:
    heads = Heads(len(settings), width, classes, seed=seed, std=how.init_std, prepare=prepare)
    return heads.to(distributed.device())
