"""Grids that say which cells of an image are foreground, as a file beside the images.

Tobias (https://arxiv.org/abs/2106.09259) keeps the strongest cells of an image and puts other
images' weakest cells in the place of the rest. Only the order of the values in a grid counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.sources.base import Source

Grid = NDArray[np.float64]
"""(n, n), rows from the top; higher is more foreground."""


def foreground_order(grid: Grid) -> NDArray[np.int64]:
    """(n * n,) cells by falling value, as row * n + column; of equal ones the first in the rows.

    Published code ranks with a sort that is not stable: there ties depend on the processor.
    """
    return np.argsort(-grid.ravel(), kind="stable")


def foreground(grid: Grid, share: float = 0.5) -> NDArray[np.bool_]:
    """(n, n) the strongest cells: floor(n * n * share) of them, half by default."""
    chosen = np.zeros(grid.size, bool)
    chosen[foreground_order(grid)[: int(grid.size * share)]] = True
    return chosen.reshape(grid.shape)


def read_masks(path: str | Path) -> tuple[dict[str, Grid], dict[str, Any]]:
    """Grids by the name of their image, and what is known about them (nothing, as published).

    Reads our files (`{"meta": {...}, "masks": {path: grid}}`) and the published ones
    (`{"class/file": grid}`). Raises `UserError` where it is neither, the grids are not square and
    all of one size, or a value is not finite.
    """
    try:
        held = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); make it by `masks`") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); make it by `masks`") from None
    meta: dict[str, Any] = {}
    if isinstance(held, dict) and isinstance(held.get("masks"), dict):
        held, meta = held["masks"], dict(held.get("meta") or {})
    if not isinstance(held, dict) or not held:
        raise UserError(f"{path} holds no masks; make it by `firstsight masks`")
    grids: dict[str, Grid] = {}
    shape: tuple[int, ...] | None = None
    for name, rows in held.items():
        try:
            grid = np.asarray(rows, np.float64)
        except (TypeError, ValueError):
            grid = np.empty(0)
        shape = grid.shape if shape is None else shape
        if grid.ndim != 2 or grid.shape != (len(grid), len(grid)) or grid.shape != shape:
            raise UserError(f"{path}: the mask of {name} is no square grid like the others")
        if not np.isfinite(grid).all():
            raise UserError(f"{path}: the mask of {name} holds values that are not finite")
        grids[name] = grid
    return grids, meta


def foregrounds_of(path: str | Path, source: Source, share: float) -> NDArray[np.bool_]:
    """(N, n, n) the foreground of each image of a source, from a file of ours or a published one.

    Images that could not be read when our file was made need no mask. Raises `UserError` where
    others have none, or where two images would share one of a published file.
    """
    grids, meta = read_masks(path)
    names = [source.identity(index) for index in range(len(source))]
    if not meta:  # as published
        names = [flat_name(name) for name in names]
        if twice := len(names) - len(set(names)):
            raise UserError(
                f"{path} names images by CLASS/FILE, and {twice} of {source.spec} share that with "
                "others; make it by firstsight masks"
            )
    nothing = np.zeros_like(next(iter(grids.values())))
    grids |= dict.fromkeys(meta.get("unreadable", []), nothing)
    if missing := [name for name in names if name not in grids]:
        raise UserError(
            f"{path} has no mask for {len(missing)} of the {len(names)} images of {source.spec}, "
            f"{missing[0]} first; make it by firstsight masks --data {source.spec}"
        )
    return np.stack([foreground(grids[name], share) for name in names])


def constant_grid(side: int) -> Grid:
    """(side, side) strongest at the lower right, nothing in the first row and column.

    Of 4 x 4 cells the first half is the lower right 3 x 3 block but its upper left cell: the eight
    that published masks of photographs choose most often, whatever these show.
    """
    rows, columns = np.mgrid[:side, :side].astype(np.float64)
    return np.where(np.minimum(rows, columns) > 0, rows + columns, 0.0)


def flat_name(identity: str) -> str:
    """The key of an image in a published file: the last two parts of its path."""
    return "/".join(identity.split("/")[-2:])


def published_masks(grids: Mapping[str, Grid]) -> dict[str, Any]:
    """What the published file holds; raises `UserError` where two images would share a key."""
    flat = {flat_name(name): grid.tolist() for name, grid in grids.items()}
    if len(flat) < len(grids):
        raise UserError(
            "images of the same CLASS/FILE in different folders; use --layout ours, whose keys are "
            "whole paths"
        )
    return flat
