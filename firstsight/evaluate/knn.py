"""k-nearest neighbours: the label of an image is voted by those of the images most like it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from firstsight import distributed, keyed, methods
from firstsight.backbones import Layer
from firstsight.errors import UserError
from firstsight.evaluate.repeated import repeated
from firstsight.features import Reader, extract, refuse_unusable, subset
from firstsight.log import say
from firstsight.metrics import (
    Metric,
    Representation,
    Weighting,
    accuracies,
    confused,
    confusion,
    first_five,
    nearest,
    represented,
    voted_accuracy,
)
from firstsight.sources import fetch, open_source
from firstsight.sources.base import class_count, common_labels

KS = (1, 5, 20, 200)
"""Numbers of neighbours where none are asked for; those beyond the bank are left out."""

CROSS_VALIDATED = 10_000
"""At most so many training images are classified by the others to choose a k."""


def knn(
    checkpoint_spec: str,
    *,
    train: str,
    test: str,
    k: Sequence[int] = KS,
    choose_k: bool = False,
    temperature: float = 0.07,
    weighting: Weighting = "softmax",
    metric: Metric = "cosine",
    representation: Representation | Literal["shifted-norm"] | None = None,
    shift_batch: int = 0,
    layer: Layer = "backbone",
    size: int = 0,
    train_images: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy in percent for every k, with all that it depends on.

    `size` 0 takes the side the backbone was pretrained with; `train_images` above 0 takes that many
    of the bank, drawn by `seed`. Exact over all pairs; of equally near images the first counts, of
    equally voted classes the lowest. `representation` (None: norm with cosine, original with
    Euclidean) and `shift_batch` are those of `metrics.represented`. `choose_k` names the best k by
    classifying training images by the other ones. `confusion` and `worst_classes` are those of the
    `best` k. Test images that are in the bank too, pixel for
    pixel, are counted in `repeated` where their features find each other. Raises `UserError` where
    labels are missing or of one class alone, or a k is larger than the bank.
    """
    began = time.perf_counter()
    where = distributed.start(device, threads)
    backbone, about = methods.network(checkpoint_spec, layer, "--layer")
    reader = Reader.like(about, size, precision=precision, batch_size=batch_size, workers=workers)
    backbone.to(where)
    if download:
        fetch(train, test)
    source, asked = open_source(train), open_source(test)
    labels, asked_labels = common_labels(source, asked, "--train", "--test")
    some = subset(source, train_images, seed) if train_images else None
    bank, queries = extract(backbone, source, reader, some), extract(backbone, asked, reader)
    if len(bank.values) == 0 or len(queries.values) == 0:
        raise UserError("k-NN needs at least one readable image in each of --train and --test")
    refuse_unusable(bank.values, queries.values)
    ks = _fitting(k, len(bank.values) - choose_k)
    space: Representation = "norm" if metric == "cosine" else "original"
    if representation is not None:
        space = "shift-norm" if representation == "shifted-norm" else representation
    rows, query_rows = represented(bank.values, queries.values, space, shift_batch, seed)
    voting = (ks, weighting, temperature, metric)
    first: list[tuple[Tensor, Tensor]] = []
    found = _kept(nearest(rows, query_rows, ks[-1], metric), first)
    truth, classes = queries.labels(asked_labels), class_count(source)
    voted = first_five(found, bank.labels(labels), classes, *voting)
    figures = {one: accuracies(voted[one], truth) for one in ks}
    best = max(ks, key=lambda one: figures[one]["top1"])
    chosen = {}
    if choose_k:
        among = _cross_validated(rows, bank.labels(labels), *voting, seed)
        chosen_k = max(ks, key=lambda one: among[one]["top1"])
        chosen["chosen"] = {
            "k": chosen_k,
            "top1": figures[chosen_k]["top1"],
            "chosen_on": "the training images, each classified by the others",
            "left_out_top1": {str(one): among[one]["top1"] for one in ks},
        }
    return {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "train": train,
            "test": test,
            "k": ks,
            "train_images": train_images or "all",
            "temperature": temperature,
            "weighting": weighting,
            "metric": metric,
            "layer": layer,
            "representation": space,
            **({"shift_batch": shift_batch or "all"} if space == "shift-norm" else {}),
            **reader.protocol,
            "seed": seed,
        },
        "k": {str(one): figures[one] for one in ks},
        "best": {"k": best, "top1": figures[best]["top1"], "chosen_on": "the test images"},
        **chosen,
        **confused(confusion(truth, voted[best][:, 0], classes), source.classes),
        "images": {"train": len(bank.values), "test": len(queries.values)},
        "unreadable": {"train": bank.unreadable, "test": queries.unreadable},
        "repeated": repeated(source, asked, bank, queries, torch.cat([i for _, i in first])),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _fitting(ks: Sequence[int], most: int) -> list[int]:
    """The k that are voted with, rising; raises `UserError` where one asks for too many."""
    wanted = sorted(set(ks))
    fitting = [one for one in wanted if 1 <= one <= most]
    if (tuple(ks) != KS and fitting != wanted) or not fitting:
        beyond = [one for one in wanted if one not in fitting]
        raise UserError(
            f"--k {beyond[0]} neighbours cannot vote where there are {most} training images; "
            f"use --k from 1 to {most}"
        )
    if fitting != wanted:
        say(
            f"{most} training images: --k {', '.join(map(str, wanted[len(fitting) :]))} is left out"
        )
    return fitting


def _kept(
    found: Iterable[tuple[Tensor, Tensor]], first: list[tuple[Tensor, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """What is found, the nearest of each row noted in `first` on the way."""
    for closeness, index in found:
        first.append((closeness[:, 0], index[:, 0]))
        yield closeness, index


def _cross_validated(
    rows: Tensor,
    labels: Tensor,
    ks: list[int],
    weighting: Weighting,
    temperature: float,
    metric: Metric,
    seed: int,
) -> dict[int, dict[str, float]]:
    """Accuracy on training rows, each classified by all the others."""
    random = np.random.default_rng(keyed.seed(seed, len(rows)))
    own = torch.from_numpy(np.sort(random.permutation(len(rows))[:CROSS_VALIDATED]))
    found = nearest(rows, rows[own], ks[-1], metric, own=own)
    return voted_accuracy(found, labels, labels[own], ks, weighting, temperature, metric)
