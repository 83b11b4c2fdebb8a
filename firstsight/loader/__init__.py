"""order + source + views -> Batch, for any range of steps.

A batch is a pure function of its step: whichever process makes it, and whatever was made before.
So a run can go on at any step, with any number of workers and ranks, and see the same views.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from firstsight import distributed
from firstsight.batch import Batch, Colours
from firstsight.errors import UserError
from firstsight.loader.merging import Merger
from firstsight.loader.windows import Order
from firstsight.log import say
from firstsight.process import end_with_parent, keep_freed_memory
from firstsight.sources.base import Pixels, Source, UnreadableImage, readable, readable_by
from firstsight.views import Interpolation, Views, many
from firstsight.views.apply import Crop, apply, crop_resize, eval_view
from firstsight.views.batched import coloured
from firstsight.views.draw import Drawn, draw

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Names of memory orders of image tensors."""

ViewsOn = Literal["worker", "device"]
"""Who flips, colours and blurs views: the process that cuts them out, or the training device."""

_Made = TypeVar("_Made")
_Found = tuple[int, Pixels, tuple[int, int], tuple[int, int]]
"""Position of an image, its pixels, size of the original, and size of what the pixels cover."""

_compiles = True
"""Whether compiling colours has not failed yet in this process."""

_LIVES = 10
_CHUNK = 32
"""Decoded images held at a time: enough to draw for many at once, few enough for memory."""
_MANY = 256
"""The same of small ones, after some that were small."""


@dataclass(frozen=True, kw_only=True)
class Steps(Dataset[Any]):
    """Step -> this rank's share of its batch in uint8, or the `UserError` met in making it."""

    source: Source
    views: Views
    size: int
    order: Order
    seed: int
    rank: int
    world: int
    views_on: ViewsOn = "worker"
    merger: Merger | None = None
    by_workers: ClassVar[bool] = True
    """Whether other processes may make the batches."""

    def __getitem__(self, step: int) -> Batch | UserError:
        try:
            return self.batch(step)
        except UserError as error:  # raised again by the loader: workers would wrap it
            return error

    def batch(self, step: int) -> Batch:
        """The batch of one step."""
        index = np.array_split(self.order.indices(step), self.world)[self.rank]
        sizes = self.views.sides(self.size)  # V sides in pixels
        pictures = [np.empty((len(index), side, side, 3), np.uint8) for side in sizes]
        crops = np.empty((len(index), len(sizes), 4), np.float32)
        flips = np.empty((len(index), len(sizes)), bool)
        originals = np.empty((len(index), 2), np.float32)
        bad: list[str] = []
        drawings = []
        chosen = np.empty_like(index)  # other images where some cannot be decoded
        end, ahead = 0, _CHUNK
        while end < len(index):
            start, end = end, end + ahead
            part = slice(start, end)
            found = [self._read(int(i), self.order.epoch(step), bad) for i in index[part]]
            chosen[part], images, full, covered = zip(*found, strict=True)
            held = np.array([(image.shape[1], image.shape[0]) for image in images])
            drawn = draw(
                self.views, full, seed=self.seed, epoch=self.order.epoch(step), index=index[part]
            )
            crops[part], flips[part], originals[part] = drawn.crops, drawn.flips, full
            drawings.append(drawn)
            merges = self.merger.draw(self.order.epoch(step), index[part]) if self.merger else None
            if (held != covered).any():  # smaller pictures stand for the originals
                crops_held = rescaled(drawn.crops, np.array(covered), held)
                drawn = dataclasses.replace(drawn, crops=crops_held)
            if not self.merger and self.views_on == "worker" and many.suits(images, max(sizes)):
                outs = [picture[part] for picture in pictures]
                many.apply(images, drawn, self.views.interpolation, outs, self.views.mean)
                ahead = _MANY
                continue
            for b, image in enumerate(images):
                for v, picture in enumerate(pictures):
                    shown = image
                    if self.merger and merges:
                        at = int(chosen[start + b])
                        shown = self.merger.shown(image, at, merges, b, v, bad)
                    self._make(shown, drawn, b, v, picture[start + b])
        labels = self.source.labels
        return Batch(
            views=tuple(_channels_first(picture) for picture in pictures),
            crops=tuple(torch.from_numpy(crops[:, v].copy()) for v in range(len(sizes))),
            flips=tuple(torch.from_numpy(flips[:, v].copy()) for v in range(len(sizes))),
            index=torch.from_numpy(index.copy()),
            sizes=torch.from_numpy(originals),
            label=None if labels is None else torch.from_numpy(labels[chosen]),
            bad=tuple(bad),
            colours=colours_of(drawings) if self.views_on == "device" else (),
            coming=torch.from_numpy(self.order.indices(step + 1).copy()),
        )

    def _read(self, index: int, epoch: int, bad: list[str]) -> _Found:
        """Image `index`, or what replaces it, as small as its views allow."""
        full = (0, 0)

        def shrink(width: int, height: int) -> int:
            nonlocal full
            full = width, height
            return self._smaller(index, epoch, full)

        def read(chosen: int) -> tuple[Pixels, int]:
            whole = self.merger or not self.views.margin  # backgrounds go into whole images
            source = self.source
            return (source.pixels(chosen), 1) if whole else source.reduced(chosen, shrink)

        chosen, (pixels, by) = readable_by(read, self.source, index, self.seed, bad)
        if by == 1:
            full = self.source.full_size(chosen, pixels)
            return chosen, pixels, full, full
        return chosen, pixels, full, (pixels.shape[1] * by, pixels.shape[0] * by)

    def _smaller(self, index: int, epoch: int, full: tuple[int, int]) -> int:
        """How many times smaller image `index` of this size may be for all of its views."""
        least = self.views.margin * np.array(self.views.sides(self.size))  # (V,)
        if min(full) < 2 * least.max():  # no crop of it could be large enough
            return 1
        drawn = draw(self.views, full, seed=self.seed, epoch=epoch, index=[index])
        shorter = (drawn.crops[0, :, 2:] - drawn.crops[0, :, :2]).min(1)  # (V,)
        return max(by for by in (1, 2, 4, 8) if by == 1 or (shorter >= by * least).all())

    def _make(self, image: Pixels, drawn: Drawn, b: int, v: int, out: Pixels) -> None:
        """View `v` of image `b`, as far as it is made here."""
        filter, side = self.views.interpolation, len(out)
        if self.views_on == "device":
            crop_resize(image, drawn.crops[b, v].tolist(), side, filter, out)
        else:
            apply(image, drawn, b, v, side, filter, out, self.views.mean)


def rescaled(
    crops: NDArray[np.int64], full: NDArray[np.int64], held: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Crops (B, V, 4) of images of size `full` (B, 2), in pixels of the same of size `held`.

    An edge moves by half a pixel of those at most, and a pixel is left at least.
    """
    scale = np.tile(held / full, 2)[:, None]  # (B, 1, 4)
    edges = np.rint(crops * scale).astype(np.int64)
    first = np.minimum(edges[..., :2], held[:, None] - 1)
    return np.concatenate([first, np.maximum(edges[..., 2:], first + 1)], -1)


def colours_of(drawings: Sequence[Drawn]) -> tuple[Colours, ...]:
    """For each view, what was drawn for all images after their crops."""

    def of(name: str, v: int) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(d, name)[:, v] for d in drawings]))

    names = [field.name for field in dataclasses.fields(Colours)]
    views = drawings[0].flips.shape[1]
    return tuple(Colours(**{name: of(name, v) for name in names}) for v in range(views))


def _channels_first(picture: np.ndarray[Any, Any]) -> Tensor:
    return torch.from_numpy(picture).permute(0, 3, 1, 2)  # channels-last in memory


@dataclass(frozen=True, kw_only=True)
class Labelled(Dataset[Any]):
    """Number -> this rank's share of a batch of images as evaluation sees them, and their labels.

    A pure function of (seed, number), as the batches of training are: a probe that trains on these
    goes on where it stopped.
    """

    source: Source
    size: int
    order: Order
    seed: int
    rank: int
    world: int

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor] | UserError:
        """(B, 3, size, size) uint8 and (B,) labels; unreadable images are replaced."""
        index = np.array_split(self.order.indices(number), self.world)[self.rank]
        try:
            found = [readable(self.source, int(i), self.seed, []) for i in index]
        except UserError as error:  # raised again by the loader, as for `Steps`
            return error
        assert self.source.labels is not None
        labels = self.source.labels[[position for position, _ in found]]
        pictures = np.stack([eval_view(pixels, self.size) for _, pixels in found])
        return _channels_first(pictures), torch.from_numpy(labels)


def batches(steps: Steps, first: int, last: int, workers: int) -> Iterator[Batch]:
    """The batches of steps `first` to `last - 1`, made by `workers` processes (0: this one).

    A worker that is killed is replaced, since a batch depends on its step alone; after `_LIVES` of
    them `UserError` is raised.
    """
    workers = workers if steps.by_workers else 0
    for left in reversed(range(_LIVES)):
        try:
            for batch in _raised(_loader(steps, range(first, last), workers)):
                yield batch
                first += 1
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reason = f"a process that makes views was killed before step {first}"
            if not left:
                raise UserError(
                    f"{reason}, the {_LIVES}th; where memory is short, use fewer --workers"
                ) from error
        say(f"{reason}; others take over")


def labelled(
    images: Labelled, first: int, last: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches `first` to `last - 1` of labelled images; one process at most makes them."""
    return _raised(_loader(images, range(first, last), min(workers, 1)))


def each(dataset: Dataset[Any], numbers: range, workers: int) -> Iterator[Any]:
    """What a dataset makes of each of these numbers, in order."""
    if len(numbers):
        yield from _raised(_loader(dataset, numbers, workers))


def _raised(made: Iterable[_Made | UserError]) -> Iterator[_Made]:
    for one in _begun(made):  # under no name: workers end with it, also where an error is kept
        if isinstance(one, UserError):
            raise one
        yield one


def _loader(dataset: Dataset[Any], sampler: range, workers: int) -> DataLoader[Any]:
    _quiet_worker()
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # an item is a whole batch already
        num_workers=min(workers, len(sampler)),
        worker_init_fn=_single_thread,
        pin_memory=distributed.device().type == "cuda",  # by a thread, which hands on in order
    )


def _begun(made: Iterable[_Made]) -> Iterator[_Made]:
    """The iterator; a dead worker is found where its batch is due.

    torch sets a signal handler that raises wherever the main thread is: amid an update too.
    """
    before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    iterator = iter(made)
    if before is not None:
        with contextlib.suppress(ValueError):  # not the main thread: torch could set none either
            signal.signal(signal.SIGCHLD, before)
    return iterator


def _quiet_worker() -> None:
    import cv2

    cv2.setNumThreads(0)  # the parallelism is over images


def _single_thread(worker: int) -> None:
    keep_freed_memory()
    end_with_parent()
    # what asks a run to stop reaches the whole process group; the main process ends its workers
    # itself, after the step that it is in
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    torch.set_num_threads(1)
    _quiet_worker()


def normalised(
    views: Tensor, mean: tuple[float, ...], std: tuple[float, ...], layout: torch.memory_format
) -> Tensor:
    """Float views, (value / 255 - mean) / std for each channel, from uint8 ones (B, 3, H, W)."""
    scale = 1 / (255 * torch.tensor(std, device=views.device))
    shift = torch.tensor(mean, device=views.device) / torch.tensor(std, device=views.device)
    floats = views.to(torch.float32, memory_format=layout)
    return floats.mul_(scale.view(3, 1, 1)).sub_(shift.view(3, 1, 1))


def on_device(
    batch: Batch,
    views: Views,
    device: torch.device,
    layout: torch.memory_format,
    compiled: bool = False,
) -> Batch:
    """The batch as a method sees it: on the device, coloured there if so, normalised floats.

    `compiled`, the colours are fused, where a compiler can do that. Not to be called in autocast:
    blurred in bfloat16, levels would have 8 bits with their sign.
    """
    batch = batch.to(device)
    if batch.colours:
        drawn = zip(batch.views, batch.flips, batch.colours, strict=True)
        views_made = tuple(_coloured(*each, compiled) for each in drawn)
        batch = dataclasses.replace(batch, views=views_made)
    floats = tuple(normalised(view, views.mean, views.std, layout) for view in batch.views)
    return dataclasses.replace(batch, views=floats)


def _coloured(view: Tensor, flips: Tensor, colours: Colours, compiled: bool) -> Tensor:
    """`coloured`; one after the other, and said once, where compiling fails."""
    global _compiles
    if compiled and _compiles:
        try:
            return coloured(view, flips, colours, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # each compiler has its own, from a missing Triton to a bug
            _compiles = False
            reason = str(error).strip().partition("\n")[0]
            say(f"--compile leaves the colours of views as they are, which takes longer ({reason})")
    return coloured(view, flips, colours)


@dataclass(frozen=True, kw_only=True)
class Chunks(Dataset[Any]):
    """Images of a source as evaluation sees them, without any randomness, some at a time."""

    source: Source
    index: np.ndarray[Any, np.dtype[np.int64]]
    size: int
    batch_size: int
    interpolation: Interpolation = "bilinear"
    crop: Crop = "centre"

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor] | UserError:
        """(B', 3, size, size) uint8 and the positions (B',) of those images that could be read."""
        index = self.index[chunk * self.batch_size : (chunk + 1) * self.batch_size]
        found, pictures = [], []
        for i in index:
            try:
                pixels = self.source.pixels(int(i))
                pictures.append(eval_view(pixels, self.size, self.interpolation, self.crop))
                found.append(int(i))
            except UnreadableImage:
                continue
            except UserError as error:  # raised again by the loader, as for `Steps`
                return error
        stack = np.stack(pictures) if pictures else np.empty((0, self.size, self.size, 3), np.uint8)
        return _channels_first(stack), torch.tensor(found, dtype=torch.long)


def chunks(dataset: Chunks, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """All chunks of this rank in order: every W-th, so that each image is visited once."""
    count = -(-len(dataset.index) // dataset.batch_size)
    mine = range(distributed.rank(), count, distributed.world())
    yield from each(dataset, mine, workers)
