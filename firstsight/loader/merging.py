"""What stands behind the foreground of a view: masks, partners, and the merged image.

Masks reach the views through a file, also where the run makes it. They are read once, and each
process that makes views holds one bit of foreground for each cell of each image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firstsight.settings import Pretrain
from firstsight.sources.base import Pixels, Source, readable
from firstsight.sources.masks import constant_grid, foreground, foregrounds_of
from firstsight.views import Views
from firstsight.views.merge import Merges, draw_merges, exchanged, merged


@dataclass(frozen=True, kw_only=True)
class Merger:
    """Images of a source with other images' background."""

    source: Source
    views: Views
    seed: int
    foregrounds: NDArray[np.bool_]
    """(N, n, n) cells of each image that stay."""

    def draw(self, epoch: int, index: NDArray[np.int64]) -> Merges:
        """What the views of the images at `index` (B,) are merged with in this epoch."""
        count, n, _ = self.foregrounds.shape
        return draw_merges(self.views, n * n, count, seed=self.seed, epoch=epoch, index=index)

    def shown(
        self, image: Pixels, position: int, merges: Merges, b: int, v: int, bad: list[str]
    ) -> Pixels:
        """What view `v` of row `b` is cut out of: `image` itself, or merged, (H, W, 3) as it is.

        `position` is where the source has the image; a partner that cannot be decoded is replaced
        as any image is, and its name added to `bad`.
        """
        partner = int(merges.partners[b, v])
        if partner < 0:
            return image
        partner, other = readable(self.source, partner, self.seed, bad)
        merge, (order, *random) = self.views.merge, merges.numbers[b, v]
        own, others = self.foregrounds[position], self.foregrounds[partner]
        if merge.foreground == "random":
            own, others = (foreground(u.reshape(own.shape), merge.share) for u in random)
        return merged(image, other, exchanged(own, others, order), merge.side)

    def one(self, image: Pixels, position: int) -> Callable[[int, int, int], Pixels]:
        """(epoch, any row, view) -> what that view of one image is cut out of."""

        def whole(epoch: int, _: int, view: int) -> Pixels:
            return self.shown(image, position, self.draw(epoch, np.array([position])), 0, view, [])

        return whole


def merger_of(config: Pretrain, source: Source, seed: int | None = None) -> Merger | None:
    """What merges the backgrounds of a run whose masks exist; None where it asks for nothing.

    `seed` is that of the views: another than the run's after it went back to a checkpoint.
    """
    if config.views.merge.probability == 0:
        return None
    return Merger(
        source=source,
        views=config.views,
        seed=config.seed if seed is None else seed,
        foregrounds=foregrounds(config, source),
    )


def masks_file(config: Pretrain) -> Path:
    """The file of masks of a run: the one that was given, or the one that it makes."""
    given = config.views.merge.masks
    return Path(given) if given else Path(config.out) / "masks.json"


def foregrounds(config: Pretrain, source: Source) -> NDArray[np.bool_]:
    """(N, n, n) cells of each image that stay; `UserError` where the masks miss some images."""
    merge = config.views.merge
    if merge.foreground == "masks":
        return foregrounds_of(masks_file(config), source, merge.share)
    # where they are random, just their number counts
    cells = foreground(constant_grid(merge.grid), merge.share)
    return np.broadcast_to(cells, (len(source), *cells.shape))


def fingerprint(cells: NDArray[np.bool_]) -> str:
    """SHA-256 of all foregrounds: tells whether masks are the same in all that counts."""
    return hashlib.sha256(f"{cells.shape}".encode() + np.packbits(cells).tobytes()).hexdigest()
