"""Images and two views of each, as a backbone sees them: what measures without labels look at.

The views are files of a folder of static views, or drawn from any source with a named recipe.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight.backbones import Backbone
from firstsight.errors import UserError, unknown
from firstsight.features import Features, Reader, extract
from firstsight.settings import preset_views
from firstsight.sources.base import Pixels, Source
from firstsight.sources.static import StaticViews
from firstsight.views import Views
from firstsight.views.apply import apply
from firstsight.views.draw import draw

MODES = {"normal": (1, 2), "g-mask": (3, 4), "rand-g-mask": (5, 6), "avg-mask": (7, 8)}
MODES |= {"rand-avg-mask": (9, 10)}
"""Which two views of each image a mode of static views compares (ssl-small, eval.instdisc)."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Features of N images and of two views of each; row n of all three is image n."""

    original: Tensor
    """(N, C)."""
    first: Tensor
    """(N, C)."""
    second: Tensor
    """(N, C)."""
    labels: Tensor | None
    """(N,), where the source has them."""
    source: Source
    """Holds the images and the views."""
    positions: Tensor
    """(N, 3) where in it each image and its two views are."""
    unreadable: int
    """Images left out, as they or a view of theirs cannot be decoded."""
    protocol: dict[str, Any]
    """Which views these are, and how they were read."""


class Drawn(Source):
    """Image n of a source, and behind it its views: position n * (1 + V) is the original.

    A view is a pure function of (seed, position in the source, number of the view).
    """

    def __init__(self, source: Source, views: Views, size: int, seed: int) -> None:
        self.spec, self.source = source.spec, source
        self.views, self.size, self.seed = views, size, seed
        self.count = 1 + views.total
        self.groups = np.arange(len(source) * self.count).reshape(-1, self.count)

    def __len__(self) -> int:
        return len(self.source) * self.count

    def identity(self, index: int) -> str:
        """The name of the image, with the number of the view."""
        return f"{self.source.identity(index // self.count)}-{index % self.count}"

    def pixels(self, index: int) -> Pixels:
        """The original, or one of its views in its final size; raises `UnreadableImage`."""
        image, number = divmod(index, self.count)
        pixels = self.source.pixels(image)
        if number == 0:
            return pixels
        drawn = draw(self.views, pixels.shape[1::-1], seed=self.seed, epoch=0, index=[image])
        return apply(pixels, drawn, 0, number - 1, self.size, self.views.interpolation)


def see(
    backbone: Backbone,
    source: Source,
    reader: Reader,
    *,
    mode: str = "normal",
    preset: str = "mocov2",
    images: int = 0,
    seed: int = 0,
) -> Pairs:
    """Features of images (`images` of them drawn by `seed`, 0: all) and of two views of each.

    Originals are read as in every evaluation; views as they are, in one size. Static views offer
    the pairs of `MODES`; of any other source two views are drawn with `preset`. Raises `UserError`
    for a mode that the views do not have, or fewer than two images.
    """
    views: StaticViews | Drawn
    if isinstance(source, StaticViews):
        first, second = pair_of(source, mode)
        said = {"views": f"static, {source.kind}", "mode": mode, "view_size": source.size_of_views}
        views, labels = source, source.labels
        labels = None if labels is None else labels[source.groups[:, 0]]
    else:
        if mode != "normal":
            raise UserError(f"--dataset-mode {mode} needs a folder of static views; leave it out")
        (first, second), recipe = (1, 2), _two(preset, reader.size)
        said = {"views": f"drawn, {preset}", "mode": mode, "view_size": reader.size}
        views, labels = Drawn(source, recipe, reader.size, seed), source.labels
    some = np.arange(len(views.groups))
    if images and images < len(some):
        some = np.sort(np.random.default_rng(seed).permutation(some)[:images])
    return _read(backbone, views, reader, some, (first, second), labels, said)


def pair_of(source: StaticViews, mode: str) -> tuple[int, int]:
    """The numbers of the two views that `mode` compares."""
    if mode not in MODES:
        raise unknown("mode of static views", mode, MODES)
    pair = MODES[mode]
    if max(pair) >= source.groups.shape[1]:
        raise UserError(
            f"{source.spec} holds {source.groups.shape[1] - 1} views of each image, and "
            f"--dataset-mode {mode} needs {max(pair)}; write them with firstsight data views "
            "--aug hard"
        )
    return pair


def _two(preset: str, size: int) -> Views:
    views = preset_views(preset, size)
    if views.total < 2:
        raise UserError(f"--preset {preset} draws one view; use one of two views, such as mocov2")
    return views


def _read(
    backbone: Backbone,
    views: StaticViews | Drawn,
    reader: Reader,
    some: NDArray[np.int64],
    pair: tuple[int, int],
    labels: NDArray[np.int64] | None,
    said: dict[str, Any],
) -> Pairs:
    groups = views.groups[some][:, [0, *pair]]  # (N, 3)
    if len(groups) < 2:
        raise UserError(f"{views.spec} holds {len(groups)} image; give --data two or more")
    whole = dataclasses.replace(reader, crop="whole")
    originals = extract(backbone, views, reader, groups[:, 0])
    others = extract(backbone, views, whole, groups[:, 1:].ravel())
    rows = [_rows(originals, groups[:, 0]), *(_rows(others, groups[:, k]) for k in (1, 2))]
    kept = torch.stack(rows).ge(0).all(dim=0)  # (N,)
    if int(kept.sum()) < 2:
        raise UserError(f"fewer than two images of {views.spec} can be read, with their views")
    first, second = (others.values[row[kept]] for row in rows[1:])
    return Pairs(
        original=originals.values[rows[0][kept]],
        first=first,
        second=second,
        labels=None if labels is None else torch.from_numpy(labels[some])[kept],
        source=views,
        positions=torch.from_numpy(groups)[kept],
        unreadable=int((~kept).sum()),
        protocol={**said, **reader.protocol, "view_of_views": whole.protocol["view"]},
    )


def _rows(features: Features, positions: NDArray[np.int64]) -> Tensor:
    """(N,) the row of each position among the features; -1 where it could not be read."""
    place = torch.searchsorted(features.index, torch.from_numpy(positions))
    place = place.clamp_max(max(0, len(features.index) - 1))
    if len(features.index) == 0:
        return torch.full((len(positions),), -1)
    return torch.where(features.index[place] == torch.from_numpy(positions), place, -1)
