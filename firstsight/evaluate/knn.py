"""k-nearest neighbours: the label of an image is voted by those of the images most like it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from firstsight import distributed, methods
from firstsight.features import Reader, extract, subset
from firstsight.metrics import Metric, Weighting, knn_accuracy
from firstsight.sources import fetch, open_source
from firstsight.sources.base import common_labels


def knn(
    checkpoint_spec: str,
    *,
    train: str,
    test: str,
    k: Sequence[int] = (1, 5, 20, 200),
    temperature: float = 0.07,
    weighting: Weighting = "softmax",
    metric: Metric = "cosine",
    layer: Literal["backbone", "embedding"] = "backbone",
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
    of the bank, drawn by `seed`. Exact over all pairs. Raises `UserError` where labels are missing.
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
    ks = sorted({min(one, len(bank.values)) for one in k})
    figures = knn_accuracy(
        bank.values,
        bank.labels(labels),
        queries.values,
        queries.labels(asked_labels),
        ks,
        weighting,
        temperature,
        metric,
    )
    best = max(ks, key=lambda one: figures[one]["top1"])
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
            "representation": "norm" if metric == "cosine" else "original",
            **reader.protocol,
            "seed": seed,
        },
        "k": {str(one): figures[one] for one in ks},
        "best": {"k": best, "top1": figures[best]["top1"], "chosen_on": "the test images"},
        "images": {"train": len(bank.values), "test": len(queries.values)},
        "unreadable": {"train": bank.unreadable, "test": queries.unreadable},
        "seconds": round(time.perf_counter() - began, 1),
    }
