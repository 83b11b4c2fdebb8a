"""k-nearest neighbours: the label of an image is voted by those of the images most like it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    truth, classes = queries.labels(asked_labels), class_count(source)
    search = Search(rows, bank.labels(labels), classes, ks, weighting, temperature, metric)
    voted, near = search(query_rows)
    figures = {one: accuracies(voted[one], truth) for one in ks}
    best = max(ks, key=lambda one: figures[one]["top1"])
    chosen = {}
    if choose_k:
        among = _cross_validated(search, seed)
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
        "repeated": repeated(source, asked, bank, queries, near),
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


@dataclass(frozen=True)
class Search:
    """The bank of a k-NN reading, and how it is asked."""

    rows: Tensor
    """(N, C)."""
    labels: Tensor
    """(N,)."""
    classes: int
    ks: list[int]
    """Rising."""
    weighting: Weighting
    temperature: float
    metric: Metric

    def __call__(
        self, queries: Tensor, own: Tensor | None = None
    ) -> tuple[dict[int, Tensor], Tensor]:
        """For each k the five classes (M, 5) that are voted first, and the nearest row (M,).

        Each rank asks for its share of `queries` (M, C), on its own device, and all of them get the
        whole answer. `own` (M,) are rows that each must not find.
        """
        rank, world, count = distributed.rank(), distributed.world(), len(queries)
        mine = slice(count * rank // world, count * (rank + 1) // world)
        found = self._asked(queries[mine], None if own is None else own[mine])
        parts = [part for part in distributed.collect(found) if len(part[1])]
        every = {k: torch.cat([voted[k] for voted, _ in parts]) for k in self.ks}
        return every, torch.cat([near for _, near in parts])

    def _asked(self, queries: Tensor, own: Tensor | None) -> tuple[dict[int, Tensor], Tensor]:
        """The answer for these rows, on the CPU."""
        if not len(queries):  # more ranks than rows
            return {}, torch.empty(0, dtype=torch.long)
        device = distributed.device()
        device = device if device.type == "cuda" else torch.device("cpu")  # mps has no float64
        rows, asked = self.rows.to(device), queries.to(device)
        left_out = None if own is None else own.to(device)
        first: list[Tensor] = []

        def noted() -> Iterator[tuple[Tensor, Tensor]]:
            for closeness, index in nearest(rows, asked, self.ks[-1], self.metric, left_out):
                first.append(index[:, 0])
                yield closeness, index

        voting = (self.classes, self.ks, self.weighting, self.temperature, self.metric)
        voted = first_five(noted(), self.labels.to(device), *voting)
        return {k: best.cpu() for k, best in voted.items()}, torch.cat(first).cpu()


def _cross_validated(search: Search, seed: int) -> dict[int, dict[str, float]]:
    """Accuracy on training rows, each classified by all the others."""
    count = len(search.rows)
    random = np.random.default_rng(keyed.seed(seed, count))
    own = torch.from_numpy(np.sort(random.permutation(count)[:CROSS_VALIDATED]))
    voted, _ = search(search.rows[own], own)
    return {k: accuracies(voted[k], search.labels[own]) for k in search.ks}
