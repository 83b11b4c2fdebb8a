"""`--resident`: all images of a source as uint8 on the training device, cut into views there.

On a GPU nothing is left for workers to do: what is drawn is a few numbers for each image, and whole
batches are cropped, resized and coloured at once (`views.batched`). On a CPU workers share the
memory and make the very views that they make without it: one image at a time is faster there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import distributed
from firstsight.batch import Batch
from firstsight.errors import UserError
from firstsight.loader import Steps, colours_of, rescaled
from firstsight.loader.merging import merger_of
from firstsight.loader.windows import Order
from firstsight.log import Meter, say
from firstsight.settings import Pretrain
from firstsight.sources.base import Pixels, Source, UnreadableImage, readable
from firstsight.views.batched import crop_resize
from firstsight.views.draw import draw

_SHARE = 3
"""`--resident auto` takes at most one part in so many of the free memory."""
_SAMPLE = 64
"""Images from whose sizes `--resident auto` guesses those of all."""


class Resident(Source):
    """Another source whose pixels lie on `device`, one image behind the other.

    Raises `UserError` where they take more than half of the memory that is free there.
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.spec = source, source.spec
        self.labels, self.classes = source.labels, source.classes
        self.sizes = np.ones((len(source), 2), np.int64)  # (N, 2) width and height as held
        self.full = np.ones((len(source), 2), np.int64)  # and of the originals
        self.bad: set[int] = set()
        room, parts = _free(device) // 2, []
        with Meter("reading into memory", 0, len(source)) as meter:
            for index in range(len(source)):
                try:
                    pixels = source.pixels(index)
                except UnreadableImage:
                    self.bad.add(index)
                    continue
                self.sizes[index] = pixels.shape[1], pixels.shape[0]
                self.full[index] = source.full_size(index, pixels)
                room -= pixels.nbytes
                if room < 0:
                    raise UserError(
                        f"the images of {source.spec} take more than half of the free memory of "
                        f"{device}; leave out --resident, or make them smaller with "
                        "firstsight data pack --side"
                    )
                parts.append(torch.from_numpy(np.array(pixels)).flatten().to(device))
                meter.show(index + 1)
        self._store = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)
        lengths = np.where(self._readable(), self.sizes.prod(1) * 3, 0)
        self._starts = np.concatenate([[0], lengths.cumsum()])

    def __len__(self) -> int:
        return len(self.source)

    def identity(self, index: int) -> str:
        """As in the other source."""
        return self.source.identity(index)

    def pixels(self, index: int) -> Pixels:
        """Image `index` as it is held; raises `UnreadableImage`."""
        if index in self.bad:
            raise UnreadableImage("could not be decoded")
        if self._store.is_cpu:  # without a tensor for each image, which takes longer than a crop
            width, height = self.sizes[index].tolist()
            first = int(self._starts[index])
            flat = self._store.numpy()[first : first + 3 * width * height]
            return np.asarray(flat.reshape(height, width, 3))
        return np.asarray(self.held(index).cpu().numpy())

    def full_size(self, index: int, pixels: Pixels) -> tuple[int, int]:
        """As in the other source."""
        width, height = self.full[index].tolist()
        return width, height

    def held(self, index: int) -> Tensor:
        """Image `index`, (H, W, 3) uint8, on the device."""
        width, height = self.sizes[index].tolist()
        return self._store[self._starts[index] : self._starts[index + 1]].view(height, width, 3)

    def padded(self, index: NDArray[np.int64]) -> Tensor:
        """Images (B, 3, H, W) uint8 of any sizes, each in the corner of the largest."""
        (width, height), count = self.sizes[index].max(0).tolist(), len(self)
        if (self.sizes == (width, height)).all() and not self.bad:
            where = torch.from_numpy(index).to(self._store.device)
            whole = self._store.view(count, height, width, 3)[where]
        else:
            shape = (len(index), height, width, 3)
            whole = torch.zeros(shape, dtype=torch.uint8, device=self._store.device)
            for b, i in enumerate(index.tolist()):
                image = self.held(i)
                whole[b, : image.shape[0], : image.shape[1]] = image
        return whole.permute(0, 3, 1, 2)

    def _readable(self) -> NDArray[np.bool_]:
        return ~np.isin(np.arange(len(self)), list(self.bad))


@dataclass(frozen=True, kw_only=True)
class ResidentSteps(Steps):
    """Step -> its batch, cut out on the device where the source lies; for the main process only."""

    source: Resident
    by_workers: ClassVar[bool] = False

    def batch(self, step: int) -> Batch:
        """The batch of one step, uint8 on the device, colours still to come."""
        index = np.array_split(self.order.indices(step), self.world)[self.rank]
        bad: list[str] = []
        chosen = index.copy()
        for b, i in enumerate(index.tolist()):
            if i in self.source.bad:
                chosen[b] = readable(self.source, i, self.seed, bad)[0]
        full, held = self.source.full[chosen], self.source.sizes[chosen]
        drawn = draw(self.views, full, seed=self.seed, epoch=self.order.epoch(step), index=index)
        boxes = torch.from_numpy(rescaled(drawn.crops, full, held))
        images, filter = self.source.padded(chosen), self.views.interpolation
        labels = self.source.labels
        sides = self.views.sides(self.size)
        crops = torch.from_numpy(drawn.crops.astype(np.float32))
        return Batch(
            views=tuple(
                crop_resize(images, boxes[:, v], side, filter) for v, side in enumerate(sides)
            ),
            crops=tuple(crops[:, v].contiguous() for v in range(len(sides))),
            flips=tuple(torch.from_numpy(drawn.flips[:, v].copy()) for v in range(len(sides))),
            index=torch.from_numpy(index.copy()),
            sizes=torch.from_numpy(full.astype(np.float32)),
            label=None if labels is None else torch.from_numpy(labels[chosen]),
            bad=tuple(bad),
            colours=colours_of([drawn]),
            coming=torch.from_numpy(self.order.indices(step + 1).copy()),
        )


def maker_of(
    config: Pretrain, source: Source, order: Order, device: torch.device, seed: int
) -> Steps:
    """What makes this rank's batches of a run: from the source, or from a copy on the device.

    `seed` is that of views; the order has its own.
    """
    there = config.resident and device.type != "cpu"
    kind: type[Steps] = ResidentSteps if there else Steps
    held = Resident(source, device) if config.resident else source
    return kind(
        source=held,
        views=config.views,
        size=config.size,
        order=order,
        seed=seed,
        rank=distributed.rank(),
        world=distributed.world(),
        views_on=config.views_on,
        merger=merger_of(config, source, seed),
    )


def settled(config: Pretrain, source: Source) -> Pretrain:
    """`config` with `--resident auto` decided by the first rank, and said; else as it is."""
    if config.resident != "auto":
        return config
    device = distributed.device()
    bytes_, room = _guessed(source), _free(device) // _SHARE
    fits = distributed.share(bytes_ <= room)
    sizes = f"about {bytes_ / 2**30:.2g} GiB of pixels, {room / 2**30:.2g} GiB of {device} for them"
    if fits and (config.views.hide or config.views.merge.probability > 0):
        fits, sizes = False, "workers hide and merge"
    say(f"--resident auto: {'held in memory' if fits else 'not held'} ({sizes})")
    return dataclasses.replace(config, resident=fits)


def _guessed(source: Source) -> int:
    """Bytes of all pixels, from some images over the whole of the source."""
    found = []
    for index in np.linspace(0, len(source) - 1, min(len(source), _SAMPLE)).astype(int).tolist():
        with contextlib.suppress(UnreadableImage):
            found.append(source.pixels(index).nbytes)
    return round(sum(found) / max(1, len(found)) * len(source))


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return free // distributed.local_world()  # each rank holds its own
    except (AttributeError, ValueError, OSError):  # not told on this platform
        return 8 << 30
