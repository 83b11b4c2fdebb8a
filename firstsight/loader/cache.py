"""`--cache`: encoded images in memory that all ranks of a machine share.

none: files are read where they lie, each time. shared: all files once, in one segment of shared
memory; images and their order are the same. part: each machine holds its own share and trains on
that alone, so the order is another one (`Shares`): the one exception to "the order does not depend
on where a run runs".
"""

from __future__ import annotations

import contextlib
import mmap
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from firstsight import distributed, keyed
from firstsight.errors import UserError
from firstsight.log import Meter, say
from firstsight.order import Epochs
from firstsight.sources.base import Encoded, Source, UnreadableImage

Cache = Literal["none", "shared", "part"]

MEMORY = Path("/dev/shm")
"""Where files are memory."""

_WORD = 8


class Shares(Epochs):
    """Every machine visits its own images, each once an epoch: image i belongs to machine i mod M.

    All shares are as long as the shortest, so that ranks agree on the number of batches: up to
    M - 1 images are never visited. With one machine it is `Epochs`.
    """

    def __init__(self, images: int, batch_size: int, seed: int, machines: int) -> None:
        if batch_size % machines:
            raise UserError(
                f"--cache part splits a batch of {batch_size} over {machines} machines; use "
                f"--batch-size {max(1, batch_size // machines) * machines}"
            )
        super().__init__(images // machines * machines, batch_size, seed)
        self.machines = machines

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) images of `step`: those of machine 0, then those of machine 1, ..."""
        if (epoch := self.epoch(step)) != self._epoch:
            generator = np.random.default_rng(keyed.seed(self.seed, epoch))
            length = self.images // self.machines
            own = [
                generator.permutation(length) * self.machines + machine
                for machine in range(self.machines)
            ]
            self._epoch, self._order = epoch, np.stack(own)  # (M, length)
        each = self.batch_size // self.machines
        start = (step % self.steps_per_epoch) * each
        return self._order[:, start : start + each].reshape(-1)


@contextlib.contextmanager
def held(source: Source, cache: Cache) -> Iterator[Source]:
    """`source` with its files in memory inside the block, as `cache` says.

    Called on every rank. The segment has no name while it is in use, so that it is gone when the
    last process that has it ends, however that ends. Raises `UserError` where it would not fit.
    """
    if cache == "none":
        yield source
    elif not isinstance(source, Encoded):
        say(f"--cache {cache} holds files; {source.spec} has none: its pixels are at hand already")
        yield source
    else:
        cached = _filled(source, cache)
        try:
            yield cached
        finally:
            cached.close()


class Cached(Encoded):
    """Another source whose files lie in shared memory; those that do not are read there.

    The segment begins with N + 1 offsets, then a byte for each image (1: it is here). A copy made
    by pickling reads the other source itself; forked workers share the segment.
    """

    def __init__(self, source: Encoded, file: BinaryIO) -> None:
        self.source, self.spec = source, source.spec
        self.labels, self.classes = source.labels, source.classes
        self._map: mmap.mmap | None = mmap.mmap(file.fileno(), 0)
        self._flags = (len(source) + 1) * _WORD  # where they begin

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_map": None}

    def identity(self, index: int) -> str:
        """As in the other source."""
        return self.source.identity(index)

    def file_of(self, index: int) -> str | None:
        """As in the other source."""
        return self.source.file_of(index)

    def encoded(self, index: int) -> bytes:
        """The file of image `index`; raises `UnreadableImage`."""
        if self._map is None or not self._map[self._flags + range(len(self))[index]]:
            return self.source.encoded(index)
        start, end = self._place(range(len(self))[index])
        return self._map[start:end]

    def keep(self, index: int) -> None:
        """Read the file of image `index` into the segment, unless that fails or has no place."""
        assert self._map is not None
        start, end = self._place(index)
        with contextlib.suppress(UnreadableImage):  # tried again, and named, when its turn comes
            data = self.source.encoded(index)
            if len(data) == end - start > 0:
                self._map[start:end] = data
                self._map[self._flags + index] = 1

    def close(self) -> None:
        """Let go of the segment."""
        if self._map is not None:
            self._map.close()
            self._map = None

    def _place(self, index: int) -> tuple[int, int]:
        assert self._map is not None
        start, end = np.frombuffer(self._map[index * _WORD : (index + 2) * _WORD], np.int64)
        return int(start), int(end)


def _filled(source: Encoded, cache: Cache) -> Cached:
    """The segment made by the first rank of each machine, filled by all ranks of it."""
    machines = distributed.machines() if cache == "part" else 1
    machine = distributed.machine() if cache == "part" else 0
    chosen = range(machine, len(source), machines)
    token = distributed.share(uuid.uuid4().hex)
    name = MEMORY / f"firstsight-{token}-{distributed.machine()}"
    wrong = ""
    if distributed.local_rank() == 0:
        try:
            _reserve(source, chosen, name, cache)
        except UserError as error:
            wrong = str(error)
    if told := next(filter(None, distributed.collect(wrong)), ""):
        name.unlink(missing_ok=True)
        raise UserError(told)
    try:
        with open(name, "r+b") as file:
            cached = Cached(source, file)
    finally:
        distributed.barrier()
        name.unlink(missing_ok=True)  # from here on nothing is left behind, whatever happens
    mine = chosen[distributed.local_rank() :: distributed.local_world()]
    with Meter("reading into memory", 0, len(mine)) as meter:
        for number, index in enumerate(mine, start=1):
            cached.keep(index)
            meter.show(number)
    distributed.barrier()
    return cached


def _reserve(source: Encoded, chosen: range, name: Path, cache: Cache) -> None:
    """Make the segment, its offsets written; refused where it would not fit."""
    sizes = np.zeros(len(source) + 1, np.int64)
    for index in chosen:
        with contextlib.suppress(UnreadableImage):
            sizes[index + 1] = source.size(index)
    sizes[0] = (len(source) + 1) * _WORD + len(source)
    offsets = sizes.cumsum()
    needed = int(offsets[-1])
    try:
        status = os.statvfs(MEMORY)
        free = status.f_bavail * status.f_frsize
        if needed <= free:
            with open(name, "xb") as file:
                os.posix_fallocate(file.fileno(), 0, needed)  # a plain truncate would promise only
                file.write(offsets.tobytes())
            return
        reason = f"{free / 2**30:.1f} GiB are free"
    except (OSError, AttributeError) as error:
        reason = str(getattr(error, "strerror", None) or "this platform has none")
    other = "" if cache == "part" or distributed.machines() == 1 else "--cache part or "
    raise UserError(
        f"the files of {source.spec} take {needed / 2**30:.1f} GiB of shared memory ({MEMORY}), "
        f"and {reason}; use {other}--cache none"
    )
