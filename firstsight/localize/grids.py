"""`firstsight masks`: how strong the activations are in each cell of a grid, for every image."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import checkpoint, distributed
from firstsight.errors import UserError
from firstsight.localize import published
from firstsight.localize.activation import activation_sum
from firstsight.localize.commands import Masks
from firstsight.localize.eyes import Eye, open_eye
from firstsight.localize.network import last_stride, weights_hash
from firstsight.localize.reading import seen
from firstsight.log import Meter
from firstsight.sources import fetch, open_source
from firstsight.sources.base import Source
from firstsight.sources.masks import Grid, foreground, published_masks
from firstsight.version import __version__

CONSTANT = 0.02
"""A cell is constant where it is foreground in at most this share of the images, or in all but."""


def masks(checkpoint: str = "random:resnet50", **settings: Any) -> dict[str, Any]:
    """Write the grids of all images of a SOURCE, and say how much they differ between images.

    `settings` are the fields of `commands.Masks` (`data` and `out` at least). Raises `UserError`
    where a map is not finite, as no order of cells comes from it.
    """
    ask = Masks(checkpoint=checkpoint, **settings)
    distributed.start(ask.device, ask.threads)
    if ask.download:
        fetch(ask.data)
    return write_masks(ask, open_source(ask.data))


def write_masks(ask: Masks, source: Source) -> dict[str, Any]:
    """`masks` of a source that is open, on all ranks; the first one writes."""
    began = time.perf_counter()
    if ask.compat and last_stride(ask.checkpoint, ask.last_stride) != ask.last_stride:
        ask = dataclasses.replace(ask, last_stride=2)  # the published masks are of a stock ResNet
    eye = open_eye(ask, ask.seed, distributed.device())
    grids, unreadable = make_grids(source, eye, ask.grid, ask.compat)
    meta = _meta(ask, eye)
    layout = ask.layout or ("published" if ask.compat else "ours")
    if distributed.rank() == 0:
        listed = {name: grid.tolist() for name, grid in grids.items()}
        without = [name for name in map(source.identity, range(len(source))) if name not in grids]
        ours = {"meta": {**meta, "unreadable": without}, "masks": listed}
        _write(Path(ask.out), published_masks(grids) if layout == "published" else ours)
    shares = np.mean([foreground(grid) for grid in grids.values()], axis=0)
    return {
        "protocol": {"data": ask.data, **meta},
        "out": ask.out,
        "layout": layout,
        "images": len(grids),
        "unreadable": unreadable,
        "entropy": entropy(shares),
        "constant_cells": constant_cells(shares),
        "foreground": shares.tolist(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def make_grids(
    source: Source, eye: Eye, side: int = 4, compat: bool = False
) -> tuple[dict[str, Grid], int]:
    """A grid of `side` cells a side for each image by its identity, and how many cannot be read.

    A cell holds the mean of the activation sum over its area, exactly, however the cells of the map
    lie to it; with `compat` the published max-pooling. Raises `UserError` where a map holds NaN.
    """
    index = np.arange(len(source))
    found: list[tuple[int, Tensor]] = []
    with Meter(f"masks of {source.spec}", 0, len(index)) as meter:
        for pixels, told in seen(eye, source, index):
            cells = eye.cells(pixels)
            maps = published.pooled_grid(cells) if compat else activation_sum(cells)
            if compat and maps.shape[1:] != (side, side):
                raise UserError(
                    f"the published pooling makes {maps.shape[1]} x {maps.shape[2]} cells of this "
                    f"map; use --grid {maps.shape[1]}, or leave out --compat"
                )
            grids = maps.cpu() if compat else cell_means(maps, side).cpu()
            found += zip(told[:, 0].tolist(), grids, strict=True)
            meter.show(min(len(found) * distributed.world(), len(index)))
    every = sorted((row for rows in distributed.collect(found) for row in rows), key=_position)
    if not every:
        raise UserError(f"none of {len(index)} images of {source.spec} can be read; check --data")
    for i, grid in every:
        if not grid.isfinite().all():
            raise UserError(
                f"the map of {source.identity(i)} holds NaN or infinity; use --bn batch or a "
                "smaller --init"
            )
    named = {source.identity(i): grid.numpy() for i, grid in every}
    return named, len(index) - len(every)


def _position(row: tuple[int, Tensor]) -> int:
    return row[0]


def cell_means(maps: Tensor, side: int) -> Tensor:
    """(B, side, side) the mean of maps (B, h, w) over each of side x side equal parts, by area."""
    rows, columns = (_overlaps(n, side).to(maps.device, maps.dtype) for n in maps.shape[1:])
    return rows @ maps @ columns.T


def _overlaps(cells: int, parts: int) -> Tensor:
    """(parts, cells) which share of each of `parts` equal lengths each of `cells` ones covers."""
    edges = torch.arange(cells + 1, dtype=torch.float64) * parts  # in 1 / (cells * parts)
    cuts = torch.arange(parts + 1, dtype=torch.float64) * cells
    low = torch.maximum(edges[None, :-1], cuts[:-1, None])
    high = torch.minimum(edges[None, 1:], cuts[1:, None])
    return (high - low).clamp(min=0) / cells


def entropy(shares: NDArray[np.float64]) -> float:
    """Bits a cell, 0 to 1, of how often it is foreground; 0: all masks are the same.

    `shares` are (n, n), 0 to 1. A mask that follows the objects has nearly 1.
    """
    p = np.stack([shares, 1 - shares])
    logs = np.log2(p, out=np.zeros_like(p), where=p > 0)
    return float(-(p * logs).sum(axis=0).mean()) + 0.0


def constant_cells(shares: NDArray[np.float64]) -> float:
    """Share of cells that are foreground in (nearly) no mask, or in (nearly) all: `CONSTANT`."""
    return float(((shares <= CONSTANT) | (shares >= 1 - CONSTANT)).mean())


def _meta(ask: Masks, eye: Eye) -> dict[str, Any]:
    pool = "max 2 x 2, stride 2, padding 1, then sum" if ask.compat else "mean of the sum by area"
    return {
        "checkpoint": ask.checkpoint,
        "seed": ask.seed,
        "weights_sha256": weights_hash(eye.backbone),
        "init": ask.init,
        "activation": ask.activation,
        "last_stride": last_stride(ask.checkpoint, ask.last_stride) or "own",
        "stages": "all" if eye.stages is None else eye.stages,
        "bn": ask.bn,
        "padding": ask.padding,
        "input_size": eye.reader.size,
        "resample": ask.resample,
        "precision": ask.precision,
        "grid": ask.grid,
        "pool": pool,
        "version": __version__,
    }


def _write(path: Path, held: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}); use another --out") from None
    checkpoint.write_json(path, held)
