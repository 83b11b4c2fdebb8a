"""How healthy a backbone is, without labels: do views of an image meet, do images stay apart?"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from firstsight import checkpoint, distributed, methods
from firstsight.backbones import Layer
from firstsight.errors import UserError
from firstsight.features import Reader, refuse_unusable
from firstsight.maps import page, place
from firstsight.metrics import (
    Distractors,
    alignment,
    class_alignment,
    effective_rank,
    feature_std,
    instance_accuracy,
    lidar,
    sampled_uniformity,
    spectrum,
    spread,
    uniformity,
)
from firstsight.pairs import see
from firstsight.sources import fetch, open_source

Uniformity = Literal["exact", "published"]

IMAGES = 5000
"""Images looked at unless told otherwise: with two views of each, minutes on two cores."""

MAP_IMAGES = 300
"""Images on a map, each with its two views: a page of about a megabyte."""

COLLAPSED = 0.02
"""Spread of directions below which all images count as alike; untrained networks have 0.1 or so."""


def run(
    checkpoint_spec: str,
    *,
    data: str,
    preset: str = "mocov2",
    dataset_mode: str = "normal",
    images: int = IMAGES,
    topk: Sequence[int] = (1, 5),
    distractors: Distractors = "published",
    uniformity: Uniformity = "exact",
    map: place.How | None = None,
    map_images: int = MAP_IMAGES,
    out: str = "",
    layer: Layer = "backbone",
    size: int = 0,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 256,
    workers: int = 0,
    download: bool = False,
    device: str = "auto",
    threads: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of any source of images, with all that they depend on; `firstsight.metrics` has each.

    In names, `d` is the originals and `sd` their first views; `d-sd` compares these two, `sd-sd`
    the two views. `data` is a folder of static views, or any source: then two views of each image
    are drawn with `preset`. `images` 0 looks at all. Class alignment is there where labels are.

    `map` and `out` write a page that shows `map_images` of them in two dimensions (`maps.place` has
    the ways; with `out` alone by pca); of a run folder its report shows the map too.
    """
    began = time.perf_counter()
    where = distributed.start(device, threads)
    backbone, about = methods.network(checkpoint_spec, layer, "--layer")
    reader = Reader.like(about, size, precision=precision, batch_size=batch_size, workers=workers)
    backbone.to(where)
    if download:
        fetch(data)
    source = open_source(data)
    seen = see(backbone, source, reader, mode=dataset_mode, preset=preset, images=images, seed=seed)
    d, sd, sd2 = seen.original, seen.first, seen.second
    refuse_unusable(d, sd, sd2)
    result: dict[str, Any] = {
        "protocol": {
            "checkpoint": checkpoint_spec,
            "data": data,
            "layer": layer,
            "uniformity": uniformity,
            "distractors": distractors,
            **seen.protocol,
            "seed": seed,
        },
        "alignment": {"d-sd": alignment(d, sd), "sd-sd": alignment(sd, sd2)},
        "uniformity": {"d": _uniform(d, uniformity, seed), "sd": _uniform(sd, uniformity, seed)},
    }
    if seen.labels is not None and bool((seen.labels.bincount() > 1).any()):
        result["class_alignment"] = {
            "d": class_alignment(d, seen.labels),
            "sd": class_alignment(sd, seen.labels),
        }
    if map or out:
        about_map = f"{checkpoint_spec} on {data}"
        drawn = place.drawn(seen, map or "pca", map_images, source.classes, seed)
        _write_map(drawn, about_map, result["protocol"], out or "map.html", Path(checkpoint_spec))
        result["map"] = {"how": drawn["how"], "images": drawn["images"], "out": out or "map.html"}
    values = spectrum(d)
    return {
        **result,
        "effective_rank": effective_rank(d),
        "lidar": lidar(torch.stack([sd, sd2], dim=1)),
        "spectrum": [float(f"{value:.4g}") for value in values.tolist()],
        "instance_accuracy": {
            "d-sd": _by_k(instance_accuracy(d, sd, topk, distractors)),
            "sd-sd": _by_k(instance_accuracy(sd, sd2, topk, distractors)),
        },
        "feature_std": feature_std(d),
        "spread": float(spread(d)),
        "collapse": collapse(d),
        "images": len(d),
        "unreadable": seen.unreadable,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _write_map(
    drawn: dict[str, Any], title: str, protocol: dict[str, Any], out: str, run_folder: Path
) -> None:
    """The page `out` and, where the network is that of a run, what its report shows."""
    if distributed.rank() > 0:
        return
    said = "protocol: " + ", ".join(f"{key} {value}" for key, value in protocol.items())
    try:
        Path(out).write_text(page.page(drawn, title, said), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); use another --out") from None
    if (run_folder / "config.yaml").is_file():
        (run_folder / "pictures").mkdir(exist_ok=True)
        checkpoint.write_json(run_folder / "pictures" / "map.json", drawn)


def collapse(x: torch.Tensor) -> str:
    """In words, whether the rows of `x` (N, D) have collapsed: `none`, or what kind it is."""
    apart, width = float(spread(x)), min(x.shape)
    if apart < COLLAPSED:
        return (
            f"complete: all images look alike (spread {apart:.2g}, where 0 is one point and 1 an "
            "even cloud)"
        )
    rank = effective_rank(x - x.mean(dim=0))
    if rank < max(2.0, math.sqrt(width) / 4):
        return f"dimensional: images differ in about {rank:.1f} of {x.shape[1]} dimensions"
    return "none"


def _uniform(x: torch.Tensor, how: Uniformity, seed: int) -> float:
    return uniformity(x) if how == "exact" else sampled_uniformity(x, seed=seed)


def _by_k(found: dict[int, float]) -> dict[str, float]:
    return {str(k): value for k, value in found.items()}
