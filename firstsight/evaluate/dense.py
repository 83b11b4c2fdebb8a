"""Dense reading: which class does a cell of the feature map show, told by that cell alone?

Pooled features say what is in an image. Methods that learn from regions (SCRL, DenseCL, PixPro) put
their gain into the cells, which image-level probing under-rates: here a cell is what a whole image
is in `evaluate knn` and `evaluate linear`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from firstsight import checkpoint, distributed, keyed
from firstsight.backbones import Backbone
from firstsight.errors import UserError
from firstsight.evaluate.linear import cached
from firstsight.evaluate.marks import (
    ASIDE,
    Marks,
    cell_counts,
    cell_labels,
    marks_of,
    said,
    same_classes,
)
from firstsight.evaluate.protocols import overridden, stated
from firstsight.features import Reader, Seen, refuse_unusable
from firstsight.loader import normalised
from firstsight.localize.images import squares
from firstsight.log import Meter
from firstsight.metrics import class_ious, confusion, first_five, nearest
from firstsight.nets import cast_to
from firstsight.sources import fetch, open_source
from firstsight.sources.base import Source

Mixed = Literal["counted", "left-out"]


@dataclass(frozen=True, kw_only=True)
class Cells:
    """The cells of the images of a source that are of a class."""

    values: Tensor
    """(N, C) float32, on the CPU."""
    labels: Tensor
    """(N,)."""
    images: int
    """Images that could be read and are marked."""
    unreadable: int
    mixed: int
    """Cells, of all, that show more than one class."""
    aside: int
    """Cells that are of no class, and not among the rows."""
    shape: tuple[int, int]
    """Rows and columns of the map of an image."""


def dense(
    checkpoint_spec: str,
    *,
    train: str,
    test: str,
    train_marks: str = "",
    test_marks: str = "",
    mixed: Mixed = "counted",
    stage: int | None = None,
    k: int = 20,
    temperature: float = 0.07,
    epochs: int = 20,
    cells: int = 50_000,
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 64,
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Cell accuracy and mean IoU in percent, by k-NN and by a linear classifier on single cells.

    Marks are those of `marks_of`: index masks, boxes, or a source's own. Each image is squeezed
    into a square of `size` pixels. A cell is of the class of most of its pixels, of equals the
    lowest; cells of several classes are counted so, or with `mixed` left-out not used at all, in
    training and testing. `cells` above 0 is the most that are learnt from, drawn by `seed`. `stage`
    takes an earlier map of the backbone. The linear classifier's setting is chosen on a held-out
    tenth of the cells, whose images others of its cells are from. `most_frequent` is what always
    naming the class that most training cells have would get.

    Raises `UserError` where marks are missing or their classes cannot be matched.
    """
    began = time.perf_counter()
    where = distributed.start(device, threads)
    backbone, about = checkpoint.load_backbone(checkpoint_spec)
    reader = Reader.like(
        about, size, precision=precision, batch_size=batch_size, workers=workers, crop="whole"
    )
    backbone.to(where)
    if stage is not None and not 0 <= stage <= backbone.last_stage:
        raise UserError(
            f"{backbone.name} has stages 0 to {backbone.last_stage}, not --stage {stage}"
        )
    if download:
        fetch(train, test)
    source, asked = open_source(train), open_source(test)
    marks = marks_of(source, train_marks, "--train-marks")
    asked_marks = marks_of(asked, test_marks, "--test-marks")
    names, renumbered = same_classes(marks, asked_marks)
    bank = cells_of(backbone, source, marks, reader, stage, mixed == "counted")
    queries = cells_of(backbone, asked, asked_marks, reader, stage, mixed == "counted")
    truth = queries.labels
    if renumbered is not None:
        truth = torch.from_numpy(renumbered)[truth].long()
    refuse_unusable(bank.values, queries.values)
    rows, labels = drawn(bank, cells, seed)
    if len(torch.unique(labels)) < 2:
        raise UserError(f"the cells of {train} show one class only; give images that are marked")
    k = min(k, len(rows))
    names = said(names, int(max(labels.max(), truth.max())))
    classes, how = len(names), overridden("cached", epochs, {})
    seen = Seen(rows, labels, queries.values, truth)
    voted = first_five(
        nearest(rows, queries.values, k), labels, classes, [k], "softmax", temperature
    )
    trained = cached(seen, classes, how, seed)
    commonest = torch.full_like(truth, int(labels.bincount().argmax()))
    return {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "train": train,
            "test": test,
            "marks": {"train": train_marks or marks.kind, "test": test_marks or asked_marks.kind},
            "cell_label": "the class of most of its pixels, of equals the lowest; 255 is none",
            "mixed_cells": mixed,
            "stage": "last" if stage is None else stage,
            "map": list(bank.shape),
            "k": k,
            "temperature": temperature,
            "weighting": "softmax",
            "metric": "cosine",
            "linear": {**stated("cached", how), "layer": "cells", "chosen": trained["chosen"]},
            "cells": cells or "all",
            **reader.protocol,
            "seed": seed,
        },
        "knn": overlap(confusion(truth, voted[k][:, 0], classes), names),
        "linear": overlap(confusion(truth, trained["predicted"], classes), names),
        "most_frequent": overlap(confusion(truth, commonest, classes), names),
        "cells": {"train": len(rows), "test": len(truth)},
        "mixed": {"train": bank.mixed, "test": queries.mixed},
        "aside": {"train": bank.aside, "test": queries.aside},
        "images": {"train": bank.images, "test": queries.images},
        "unreadable": {"train": bank.unreadable, "test": queries.unreadable},
        "seconds": round(time.perf_counter() - began, 1),
    }


def overlap(table: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Figures of a (K, K) `confusion` in percent; classes that are nowhere do not count."""
    ious = class_ious(table)
    there = ious.isfinite()
    return {
        "accuracy": 100 * float(table.diagonal().sum() / table.sum()),
        "mean_iou": float(ious[there].mean()),
        "iou": {name: float(ious[i]) for i, name in enumerate(names) if there[i]},
    }


def drawn(bank: Cells, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features and labels of `count` cells at most (0: all), drawn by seed, in their order."""
    if not count or count >= len(bank.labels):
        return bank.values, bank.labels
    random = np.random.default_rng(keyed.seed(seed, count))
    index = torch.from_numpy(np.sort(random.permutation(len(bank.labels))[:count]))
    return bank.values[index], bank.labels[index]


def cells_of(
    backbone: Backbone, source: Source, marks: Marks, reader: Reader, stage: int | None, mixed: bool
) -> Cells:
    """The marked cells of a source, in its order, whatever the number of ranks."""
    distributed.same_buffers(backbone)
    known = marks.known()
    rows: list[tuple[int, Tensor, Tensor]] = []
    several, shape = 0, (0, 0)
    parts = squares(
        source, known, reader.size, reader.batch_size, reader.workers, reader.interpolation
    )
    with Meter(f"cells of {source.spec}", 0, len(known)) as meter:
        for pixels, told in parts:
            maps = _maps(backbone, pixels, reader, stage)  # (B, C, h, w)
            shape = (maps.shape[2], maps.shape[3])
            for values, (index, width, height) in zip(maps, told.tolist(), strict=True):
                counts = cell_counts(marks.numbers(index, width, height), *shape)
                labels, mixes = cell_labels(counts, mixed)
                several += int(mixes.sum())
                kept = torch.from_numpy(labels != ASIDE).flatten()
                flat = torch.from_numpy(labels).flatten()[kept].long()
                rows.append((index, values.flatten(1).T[kept].clone(), flat))
            meter.show(min(len(rows) * distributed.world(), len(known)))
    every = distributed.collect((rows, several, shape))
    found = sorted((row for part, _, _ in every for row in part), key=lambda row: row[0])
    if not sum(len(labels) for _, _, labels in found):
        raise UserError(
            f"no cell of {source.spec} is of a class (maps have {shape[0]} x {shape[1]}); "
            "use a larger --size, an earlier --stage, or --mixed counted"
        )
    values = torch.cat([values for _, values, _ in found])
    shape = max(one for _, _, one in every)
    return Cells(
        values=values,
        labels=torch.cat([labels for _, _, labels in found]),
        images=len(found),
        unreadable=len(known) - len(found),
        mixed=sum(one for _, one, _ in every),
        aside=len(found) * shape[0] * shape[1] - len(values),
        shape=shape,
    )


@torch.no_grad()
def _maps(backbone: Backbone, pixels: Tensor, reader: Reader, stage: int | None) -> Tensor:
    """(B, C, h, w) float32 on the CPU; the mode that the backbone is in stays."""
    device = next(backbone.parameters()).device
    images = normalised(pixels.to(device), reader.mean, reader.std, torch.contiguous_format)
    training = backbone.training
    backbone.eval()
    with cast_to(reader.precision, device):
        maps = backbone.feature_map(images) if stage is None else backbone.stage_map(images, stage)
    backbone.train(training)
    return maps.float().cpu()
