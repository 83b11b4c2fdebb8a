"""Pictures of a run for its report: the views drawn, and what the backbone finds alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import checkpoint, distributed, keyed
from firstsight.backbones import Backbone
from firstsight.features import Features, Reader, extract, subset
from firstsight.loader.merging import merger_of
from firstsight.metrics import nearest
from firstsight.probe import KnnProbe
from firstsight.settings import Pretrain
from firstsight.sources.base import Pixels, Source, UnreadableImage, common_labels
from firstsight.views.apply import eval_view, resize
from firstsight.views.sheet import sheet

PHOTOGRAPHS = 4
"""Images on the sheet of views."""
QUERIES = 6
"""Rows of neighbours."""
NEIGHBOURS = 8
"""Nearest images in each row."""
BANK = 2000
"""Images among which neighbours are sought."""

_CELL = 88  # pixels a side
_FRAME = 4
_GAP = 6
_WIDEST = 1400
# Told apart by people who see no red or no green, too; the wrong ones also bear a cross.
_SAME, _OTHER, _NEUTRAL = (0, 140, 100), (213, 94, 0), (128, 128, 128)
_ATTEMPTS = 50


def save(
    out: Path,
    config: Pretrain,
    source: Source,
    probe: KnnProbe | None,
    untrained: Backbone,
    trained: Backbone,
) -> None:
    """Write the pictures of a run, and their captions, into `out/pictures`.

    `views.png`: photographs of the source with the crops drawn from them, and the views.
    `neighbours-untrained.png`, `neighbours-trained.png`: a query in each row and its nearest
    neighbours by each backbone, framed by whether they are of the query's class. Queries come from
    the probe's test source and neighbours from its bank; without a probe both from the source.
    Everything is fixed by the seed. All ranks take part, the first one writes.
    """
    search = Search.of(config, source, probe)
    found = {
        "neighbours-untrained": search.neighbours(untrained),
        "neighbours-trained": search.neighbours(trained),
    }
    if distributed.rank() > 0:
        return
    folder = out / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    photographs = views_sheet(config, source)
    if photographs is not None:
        write_png(folder / "views.png", photographs)
    for name, rows in found.items():
        if rows.index.numel():
            write_png(folder / f"{name}.png", search.picture(rows))
            captions[name] = search.caption(rows)
    checkpoint.write_json(folder / "captions.json", captions)


@dataclass(frozen=True)
class Neighbours:
    """Rows of nearest neighbours."""

    queries: Tensor
    """(Q,) positions in the source of queries."""
    index: Tensor
    """(Q, K) positions in the source of the bank, nearest first."""


@dataclass(frozen=True, kw_only=True)
class Search:
    """Fixed queries, and a fixed bank to find their neighbours in."""

    source: Source
    """Holds the queries."""
    bank_source: Source
    queries: NDArray[np.int64]
    bank: NDArray[np.int64]
    reader: Reader

    @classmethod
    def of(cls, config: Pretrain, source: Source, probe: KnnProbe | None) -> Search:
        """What to search for in a run; a function of its settings."""
        if probe is not None:
            asked, bank, reader = probe.test, probe.train, probe.reader
        else:
            asked = bank = source
            reader = Reader.of(config)
        return cls(
            source=asked,
            bank_source=bank,
            queries=spread(asked, QUERIES, config.seed),
            bank=subset(bank, BANK, config.seed),
            reader=reader,
        )

    def neighbours(self, backbone: Backbone) -> Neighbours:
        """The nearest neighbours of each query that can be read, by cosine of the features."""
        asked = extract(backbone, self.source, self.reader, self.queries)
        bank = extract(backbone, self.bank_source, self.reader, self.bank)
        same = self.source.spec == self.bank_source.spec
        return nearest_others(asked, bank, NEIGHBOURS, same)

    def alike(self, rows: Neighbours) -> Tensor | None:
        """(Q, K) whether a neighbour is of its query's class; None without labels."""
        if self.source.labels is None or self.bank_source.labels is None:
            return None
        bank, asked = common_labels(self.bank_source, self.source, "bank", "queries")
        own = torch.from_numpy(asked)[rows.queries]
        return torch.from_numpy(bank)[rows.index] == own[:, None]

    def picture(self, rows: Neighbours) -> Pixels:
        """(H, W, 4), transparent between the images: queries left, then their neighbours."""
        alike = self.alike(rows)
        step = _CELL + 2 * _FRAME + _GAP
        count, width = rows.index.shape
        apart = 3 * _GAP  # the query stands a little off
        size = (count * step - _GAP, (1 + width) * step - _GAP + apart, 4)
        canvas = np.zeros(size, np.uint8)
        for q in range(count):
            cells = [framed(thumbnail(self.source, int(rows.queries[q])), _NEUTRAL)]
            for k in range(width):
                cell = thumbnail(self.bank_source, int(rows.index[q, k]))
                cells.append(judged(cell, None if alike is None else bool(alike[q, k])))
            for k, cell in enumerate(cells):
                top, left = q * step, k * step + (apart if k else 0)
                canvas[top : top + len(cell), left : left + len(cell), :3] = cell
                canvas[top : top + len(cell), left : left + len(cell), 3] = 255
        return canvas

    def caption(self, rows: Neighbours) -> str:
        """What the picture shows, counted."""
        alike = self.alike(rows)
        where = f"among {len(self.bank):,} images of {self.bank_source.spec}"
        said = f"Left a query, then its {rows.index.shape[1]} nearest {where}, nearest first."
        if alike is not None:
            hits = f"{int(alike.sum())} of {alike.numel()}"
            said += f" {hits} are of the query's class (green frame); the others bear a cross."
        return said


def spread(source: Source, count: int, seed: int) -> NDArray[np.int64]:
    """`count` positions fixed by seed, of different classes as far as there are enough."""
    order: NDArray[np.int64] = np.random.default_rng(keyed.seed(seed, count)).permutation(
        len(source)
    )
    if source.labels is None:
        return order[:count]
    _, first = np.unique(source.labels[order], return_index=True)
    chosen = np.sort(first)[:count]
    rest = np.setdiff1d(np.arange(len(order)), chosen)[: count - len(chosen)]
    picked: NDArray[np.int64] = order[np.concatenate([chosen, rest])]
    return picked


def nearest_others(asked: Features, bank: Features, k: int, same: bool) -> Neighbours:
    """The k nearest of the bank for each row of `asked`; never itself where both are the `same`."""
    rows = min(k + same, len(bank.index))
    if len(asked.index) == 0 or rows - same <= 0:
        return Neighbours(asked.index[:0], torch.empty(0, 0, dtype=torch.long))
    (_, near), *more = nearest(bank.values, asked.values, rows)
    found = bank.index[torch.cat([near, *(index for _, index in more)])]  # (Q, rows)
    if same:
        # a query that the bank lacks, or twins that push it out: the farthest one goes instead
        own = found == asked.index[:, None]
        own[~own.any(dim=1), -1] = True
        found = found[~own].view(len(found), rows - 1)
    return Neighbours(asked.index, found)


def views_sheet(config: Pretrain, source: Source) -> Pixels | None:
    """Photographs fixed by seed, each with two draws of its views; None if none can be read."""
    index, photographs = [], []
    for i in subset(source, _ATTEMPTS, config.seed):
        try:
            photographs.append(source.pixels(int(i)))
            index.append(int(i))
        except UnreadableImage:
            continue
        if len(index) == PHOTOGRAPHS:
            break
    blocks = []
    merger = merger_of(config, source)
    for image, i in zip(photographs, index, strict=True):
        behind = merger.one(image, i) if merger else None
        one, size, seed = [image], config.size, config.seed
        blocks.append(sheet(one, config.views, size, draws=2, seed=seed, index=[i], behind=behind))
    if not blocks:
        return None
    beside = 2 if config.views.total <= 3 and len(blocks) > 1 else 1
    rows = [blocks[i : i + beside] for i in range(0, len(blocks), beside)]
    gap = 4 * _GAP
    height = sum(len(row[0]) for row in rows) + gap * (len(rows) - 1)
    width = beside * blocks[0].shape[1] + gap * (beside - 1)
    canvas = np.full((height, width, 3), 255, np.uint8)
    top = 0
    for row in rows:
        left = 0
        for block in row:
            canvas[top : top + len(block), left : left + block.shape[1]] = block
            left += block.shape[1] + gap
        top += len(row[0]) + gap
    if width > _WIDEST:
        canvas = resize(canvas, _WIDEST, round(height * _WIDEST / width))
    return canvas


def thumbnail(source: Source, index: int) -> Pixels:
    """The part of an image that evaluation sees, small."""
    return eval_view(source.pixels(index), _CELL)


def judged(cell: Pixels, alike: bool | None) -> Pixels:
    """A neighbour in the frame of its class: the query's, another (with a cross), or not known."""
    if alike is None or alike:
        return framed(cell, _NEUTRAL if alike is None else _SAME)
    picture = framed(cell, _OTHER)
    side, arm = 20, 5
    picture[:side, -side:] = _OTHER
    x, y = picture.shape[1] - side // 2, side // 2
    for slope in (1, -1):
        start, end = (x - arm, y - slope * arm), (x + arm, y + slope * arm)
        cv2.line(picture, start, end, (255, 255, 255), 2, cv2.LINE_AA)
    return picture


def framed(cell: Pixels, colour: tuple[int, int, int]) -> Pixels:
    """The image in a frame."""
    picture = np.empty((len(cell) + 2 * _FRAME, len(cell) + 2 * _FRAME, 3), np.uint8)
    picture[...] = colour
    picture[_FRAME:-_FRAME, _FRAME:-_FRAME] = cell
    return picture


def write_png(path: Path, pixels: Pixels) -> None:
    """Write RGB or RGBA pixels, whole or not at all."""
    order = cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_RGBA2BGRA
    _, data = cv2.imencode(".png", cv2.cvtColor(pixels, order))

    def write(file: IO[bytes]) -> None:
        file.write(data.tobytes())

    checkpoint.write_atomically(path, write)
