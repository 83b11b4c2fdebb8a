"""Full fine-tuning: the backbone is where training starts, and a fresh linear head is on top.

All labels or a few of them (semi-supervised); the images of pretraining or others (transfer). What
the test images decide is never called the result: `top1` is that of the last epoch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from firstsight import distributed, keyed, parallel
from firstsight.backbones import Backbone
from firstsight.errors import UserError, require_positive, require_share, unknown
from firstsight.evaluate.linear import crops, refuse_uneven
from firstsight.evaluate.opened import opened
from firstsight.evaluate.repeated import repeated_files
from firstsight.features import Reader, extract, refuse_unusable
from firstsight.loader import Steps, batches, normalised
from firstsight.log import Meter, say
from firstsight.metrics import confused, confusion
from firstsight.nets import cast_to
from firstsight.nets.heads import Heads, prepared
from firstsight.optim import cosine
from firstsight.order import Epochs
from firstsight.settings import plain
from firstsight.sources.base import Pixels, Source
from firstsight.views import Interpolation


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a backbone and its head are trained: SGD on the cross-entropy, all weights moving."""

    lr: float
    """Peak learning rate of the backbone, absolute."""
    head_lr: float
    """Peak learning rate of the head, absolute."""
    weight_decay: float = 0.0
    """Weight decay of all weights."""
    momentum: float = 0.9
    """Momentum of SGD."""
    batch_size: int = 256
    """Images a step, over all ranks; fewer images than that are one batch."""
    epochs: int
    """Passes over the training images."""
    schedule: Literal["cosine", "step"] = "step"
    """Half a cosine to zero at every step, or a factor at each drop, between epochs."""
    drops: tuple[float, ...] = ()
    """Where the step schedule drops, as shares of the epochs."""
    factor: float = 0.2
    """What the learning rates are multiplied by at each drop."""
    representation: Literal["original", "norm"] = "original"
    """Features as they are, or of unit length, before the head."""
    min_scale: float = 0.08
    """Smallest random crop, share of the image area."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resize, in training and testing."""

    def __post_init__(self) -> None:
        require_positive("--", self, "lr", "head_lr", "batch_size", "epochs", "min_scale", "factor")
        require_share("--", self, "momentum", "min_scale", "factor")

    def rate(self, step: int, steps_an_epoch: int) -> float:
        """The learning rates of `step` (from 0), as a share of their peaks."""
        if self.schedule == "cosine":
            return cosine(step / (self.epochs * steps_an_epoch), 1.0, 0.0)
        epoch = step // steps_an_epoch
        # a whole number of epochs must not be missed by rounding of its share
        return self.factor ** sum(epoch >= drop * self.epochs - 1e-9 for drop in self.drops)


TUNINGS: dict[str, Tuning] = {
    # Caron et al. 2020 (https://arxiv.org/abs/2006.09882), eval_semisup of its code: 10 %, and 1 %
    # differs from the paper: its batch-norm takes its statistics over all devices
    "swav-10": Tuning(lr=0.01, head_lr=0.2, epochs=20, drops=(0.6, 0.8)),
    "swav-1": Tuning(lr=0.02, head_lr=5.0, epochs=20, drops=(0.6, 0.8)),
    # Shi et al. 2022 (https://arxiv.org/abs/2107.14762), main_transfer --finetune and its scripts.
    # differs from the paper: its code never goes back into training mode after the first test, so
    # that batch-norm and dropout rest from the second epoch on; here each epoch trains all of it.
    "ssl-small": Tuning(
        lr=0.01,
        head_lr=0.01,
        epochs=100,
        drops=(0.4, 0.7),
        representation="norm",
        min_scale=0.2,
        interpolation="bicubic",
    ),
}
"""The published ways by name."""


def finetune(
    checkpoint_spec: str,
    *,
    train: str,
    test: str,
    labels: str = "100%",
    protocol: str = "swav-10",
    epochs: int | None = None,
    lr: float | None = None,
    head_lr: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
    schedule: Literal["cosine", "step"] | None = None,
    drops: Sequence[float] = (),
    representation: Literal["original", "norm"] | None = None,
    min_scale: float | None = None,
    interpolation: Interpolation | None = None,
    mean_per_class: bool = False,
    test_every: int = 1,
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy in percent after training the whole network on labels, with all it depends on.

    `labels` is how many of each class to learn from: a share ("1%") or a number ("13"), drawn by
    `seed`. `protocol` names where all numbers start (`TUNINGS`); what is given wins, and drops move
    with the epochs. The test images are read every `test_every` epochs and after the last; those
    that were learnt from are counted in `repeated`. Raises `UserError` where labels are missing, or
    the backbone's features are not numbers.
    """
    began = time.perf_counter()
    given = {
        "epochs": epochs,
        "lr": lr,
        "head_lr": head_lr,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "schedule": schedule,
        "drops": tuple(drops),
        "representation": representation,
        "min_scale": min_scale,
        "interpolation": interpolation,
    }
    if protocol not in TUNINGS:
        raise unknown("protocol", protocol, TUNINGS)
    changes: dict[str, Any] = {k: v for k, v in given.items() if v not in (None, ())}
    how = dataclasses.replace(TUNINGS[protocol], **changes)
    backbone, reader, source, asked, own, asked_labels, classes, where = opened(
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
    learnt = chosen(own, labels, seed)
    part = Part(source, learnt)
    how = dataclasses.replace(how, batch_size=min(how.batch_size, _whole(len(part))))
    refuse_uneven(how.batch_size)
    some = np.arange(min(len(part), reader.batch_size))
    refuse_unusable(extract(backbone, part, reader, some).values)
    again = repeated_files(source, learnt, asked)
    heads = Heads(
        1, backbone.width, classes, seed=seed, prepare=prepared(Tensor(), how.representation)
    )
    bad: set[str] = set()
    curve = []
    for epoch in tuned(backbone, heads.to(where), part, how, reader, seed, bad):
        if epoch % test_every == 0 or epoch == how.epochs:
            queries = extract(backbone, asked, reader)
            figures = heads.judged(queries.values, queries.labels(asked_labels))[0]
            curve.append({"epoch": epoch, **figures})
    last = curve[-1]
    if not math.isfinite(last["loss"]):
        raise UserError(f"training diverged at a learning rate of {how.lr:g}; use a lower --lr")
    guessing = math.log(classes)
    if last["loss"] > 2 * guessing:
        say(
            f"in the end the loss is {last['loss']:.3g}, where guessing has {guessing:.3g}: "
            "training ran wild; try a lower --lr or --head-lr"
        )
    best = max(curve, key=lambda one: one["top1"])
    found = heads.predicted(queries.values)[:, 0]
    table = confusion(queries.labels(asked_labels), found, classes)
    lost = len(set[str]().union(*distributed.collect(bad)))
    return {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "train": train,
            "test": test,
            "labels": labels,
            "name": protocol,
            **plain(how),
            "flips": 0.5,
            **reader.protocol,
            "seed": seed,
        },
        "top1": last["top1"],
        "top5": last["top5"],
        **({"mean_per_class": last["mean_per_class"]} if mean_per_class else {}),
        "best_top1": best["top1"],
        "best_epoch": best["epoch"],
        "best_chosen_on": "the test images",
        "curve": [{"epoch": one["epoch"], "top1": one["top1"]} for one in curve],
        **confused(table, source.classes),
        "images": {"train": len(part) - lost, "test": len(queries.values)},
        "unreadable": {"train": lost, "test": queries.unreadable},
        "repeated": again,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _whole(images: int) -> int:
    """The largest batch that so many images fill, the same share for every rank."""
    world = distributed.world()
    if images < max(2, world):
        raise UserError(f"{images} labelled images are too few; use a larger --labels")
    return images // world * world


def chosen(labels: NDArray[np.int64], amount: str, seed: int) -> NDArray[np.int64]:
    """Positions of a random part of each class: a share ("1%") or a number ("13") of its images.

    A share is rounded to whole images, one at least; a number takes all where there are fewer.
    """
    text = amount.strip()
    try:
        value = float(text.removesuffix("%")) if text.endswith("%") else int(text)
    except ValueError:
        value = math.nan
    if not (0 < value <= 100 if text.endswith("%") else value >= 1):
        raise UserError(f"--labels {amount} will not do; give a share such as 10%, or a number")
    random = np.random.default_rng(keyed.seed(seed, len(labels)))
    parts = []
    for kind in np.unique(labels):
        of_class = random.permutation(np.flatnonzero(labels == kind))
        wanted = round(len(of_class) * value / 100) if text.endswith("%") else int(value)
        parts.append(of_class[: max(1, wanted)])
    return np.sort(np.concatenate(parts))


class Part(Source):
    """Some of the images of a labelled source."""

    def __init__(self, source: Source, index: NDArray[np.int64]) -> None:
        assert source.labels is not None
        self.spec, self.classes = source.spec, source.classes
        self.labels = source.labels[index]
        self._source, self._index = source, index

    def __len__(self) -> int:
        return len(self._index)

    def identity(self, index: int) -> str:
        """That of the image in the source."""
        return self._source.identity(int(self._index[index]))

    def pixels(self, index: int) -> Pixels:
        """Those of the image in the source; raises `UnreadableImage`."""
        return self._source.pixels(int(self._index[index]))


class _Whole(nn.Module):
    """The backbone with one head: images (B, 3, H, W) to logits (B, K)."""

    def __init__(self, backbone: Backbone, heads: Heads) -> None:
        super().__init__()
        self.backbone, self.heads = backbone, heads

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.heads(self.backbone.features(images).float())
        return logits[:, 0]


def tuned(
    backbone: Backbone,
    heads: Heads,
    part: Source,
    how: Tuning,
    reader: Reader,
    seed: int,
    bad: set[str],
) -> Iterator[int]:
    """Train backbone and head in place; yields after each epoch. Unreadable names go into `bad`.

    Each rank sees its share of a batch, with batch-norm statistics of its own.
    """
    order = Epochs(len(part), how.batch_size, seed)
    steps = order.steps_per_epoch
    maker = Steps(
        source=part,
        views=crops(how.min_scale, reader),
        size=reader.size,
        order=order,
        seed=seed,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    model = parallel.replica(_Whole(backbone, heads))
    groups = [
        {"params": [p for p in backbone.parameters() if p.requires_grad], "lr": how.lr},
        {"params": list(heads.parameters()), "lr": how.head_lr},
    ]
    optimizer = torch.optim.SGD(groups, momentum=how.momentum, weight_decay=how.weight_decay)
    peaks = [how.lr, how.head_lr]
    device = distributed.device()
    with Meter("fine-tuning", 0, how.epochs) as meter:
        for step, batch in enumerate(batches(maker, 0, how.epochs * steps, reader.workers)):
            if step % steps == 0:
                model.train()  # a reading of the test images came between
            assert batch.label is not None
            bad.update(batch.bad)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * how.rate(step, steps)
            torch.manual_seed(keyed.seed(seed, step, distributed.rank()))  # dropout
            images = normalised(
                batch.views[0].to(device), reader.mean, reader.std, torch.contiguous_format
            )
            with cast_to(reader.precision, device):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), batch.label.to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            if (step + 1) % steps == 0:
                meter.show((step + 1) // steps)
                yield (step + 1) // steps
