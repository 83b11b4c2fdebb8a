"""Instance discrimination: is a view told from all other images by being nearest to its own?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from firstsight import distributed, methods
from firstsight.backbones import Layer
from firstsight.errors import UserError
from firstsight.features import Reader, refuse_unusable
from firstsight.metrics import Distractors, instance_accuracy
from firstsight.pairs import MODES, Pairs, pair_of, see
from firstsight.sources import open_source
from firstsight.sources.static import StaticViews

Mode = Literal["normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask", "all"]


def instance(
    checkpoint_spec: str,
    *,
    data: str,
    dataset_mode: Mode = "normal",
    topk: int = 5,
    distractors: Distractors = "published",
    preset: str = "mocov2",
    images: int = 0,
    layer: Layer = "backbone",
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Percent of images whose view is among the 1 to `topk` nearest, with all it depends on.

    `d-sd`: an original asks for its first view; `sd-sd`: a first view asks for the second. Each
    competes with what `metrics.instance_ranks` names. `data` is a folder of static views
    (`firstsight data views`), of whose pairs `dataset_mode` takes one, or all there are in turn
    (figures of each under `modes`, and their means); of any other source two views are drawn with
    `preset`.

    differs from the paper: its code stops at mode all, and asks with half of the classes only where
    a path holds "auged-train". Raises `UserError` where the views asked for are not there.
    """
    began = time.perf_counter()
    where = distributed.start(device, threads)
    backbone, about = methods.network(checkpoint_spec, layer, "--layer")
    reader = Reader.like(about, size, precision=precision, batch_size=batch_size, workers=workers)
    backbone.to(where)
    source = open_source(data)
    if topk < 1:
        raise UserError(f"--topk {topk} will not do; give 1 or more")
    modes: list[str] = [dataset_mode]
    if dataset_mode == "all":
        if not isinstance(source, StaticViews):
            raise UserError(f"--dataset-mode all needs static views, and {data} holds none")
        modes = [mode for mode in MODES if max(MODES[mode]) < source.groups.shape[1]]
    elif isinstance(source, StaticViews):
        pair_of(source, dataset_mode)
    figures, seen = {}, None
    for mode in modes:
        seen = see(backbone, source, reader, mode=mode, preset=preset, images=images, seed=seed)
        refuse_unusable(seen.original, seen.first, seen.second)
        figures[mode] = accuracies(seen, range(1, topk + 1), distractors)
    assert seen is not None
    if topk >= len(seen.original):
        raise UserError(
            f"--topk {topk} of {len(seen.original)} images finds every view; "
            f"use --topk {len(seen.original) - 1} or fewer"
        )
    return {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "data": data,
            "distractors": distractors,
            "layer": layer,
            "representation": "norm",
            **seen.protocol,
            "mode": dataset_mode,
            "seed": seed,
        },
        **_mean(list(figures.values())),
        **({"modes": figures} if dataset_mode == "all" else {}),
        "images": len(seen.original),
        "unreadable": seen.unreadable,
        "seconds": round(time.perf_counter() - began, 1),
    }


def accuracies(
    seen: Pairs, topk: Sequence[int], distractors: Distractors
) -> dict[str, dict[str, float]]:
    """`d-sd` and `sd-sd`: percent for each k."""
    found = {
        "d-sd": instance_accuracy(seen.original, seen.first, topk, distractors),
        "sd-sd": instance_accuracy(seen.first, seen.second, topk, distractors),
    }
    return {name: {str(k): value for k, value in ks.items()} for name, ks in found.items()}


def _mean(figures: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {k: sum(one[name][k] for one in figures) / len(figures) for k in ks}
        for name, ks in figures[0].items()
    }
