"""Where rows rest that are not in use: in the memory of the host, or in a file.

A row rests as a record: its values, its velocity, and the number of steps that it has taken. A row
that was never written is what `initial` draws for it, so that nothing is done at the start for
each of millions.

A file is changed in place, and yet a run goes on from its checkpoint after a kill at any time:
what a record held at the checkpoint goes into an undo log, and on to the disk, before the record
is overwritten for the first time since. Going back to a checkpoint is writing its log, and those of
later ones, into the file. A new checkpoint is a new log.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from firstsight import keyed
from firstsight.errors import UserError

Index = NDArray[np.int64]
Floats = NDArray[np.float32]
Records = NDArray[np.void]
"""(Q,) of `record`."""

_ENTRY = struct.Struct("<QI")
"""Before each entry of a log: how many records, checksum of what follows (rows, then records)."""
_CHUNK = 1 << 16
"""Rows that are drawn at a time."""


def record(dim: int) -> np.dtype[np.void]:
    """What is kept of a row of `dim` values; `steps`: one more than it has taken; 0: unwritten."""
    parts = [("weight", "<f4", (dim,)), ("velocity", "<f4", (dim,)), ("steps", "<i8")]
    return np.dtype(parts)


def initial(index: Index, dim: int, seed: int, std: float = 0.01) -> Floats:
    """(Q, D) normal numbers for rows `index` (Q,): of each row a function of (seed, row) alone."""
    bits = keyed.hashed(seed, index[:, None], np.arange(-(-dim // 2)))  # (Q, D / 2)
    share = ((bits >> np.uint64(32)) + np.uint64(1)).astype(np.float32) * np.float32(2**-32)
    turn = (bits & np.uint64(0xFFFFFFFF)).astype(np.float32) * np.float32(2 * np.pi * 2**-32)
    length = np.float32(std) * np.sqrt(-2 * np.log(share))  # Box and Muller 1958
    drawn: Floats = np.concatenate([length * np.cos(turn), length * np.sin(turn)], axis=1)
    return drawn[:, :dim]


def all_initial(count: int, dim: int, seed: int) -> Tensor:
    """(N, D): the same for all rows, in one tensor."""
    rows = torch.empty(count, dim, device="cpu")
    for start in range(0, count, _CHUNK):
        index = np.arange(start, min(start + _CHUNK, count))
        rows[start : start + _CHUNK] = torch.from_numpy(initial(index, dim, seed))
    return rows


def _begun(found: Records, index: Index, seed: int) -> Records:
    """Records `found` of rows `index`; those that were never written become as at the start."""
    fresh = found["steps"] == 0
    found["weight"][fresh] = initial(index[fresh], found["weight"].shape[1], seed)
    found["steps"][fresh] = 1
    return found


class Host(nn.Module):
    """Records in host memory, pinned beside a GPU. They travel with the state, all of them."""

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.kind, self.seed = record(dim), 0
        shape, pin = (count, self.kind.itemsize // 8), torch.cuda.is_available()
        # no buffer: those move to the device with the others
        self._words = torch.zeros(shape, dtype=torch.long, pin_memory=pin)

    def get_extra_state(self) -> Tensor:
        """All records, for the checkpoint."""
        return self._words

    def set_extra_state(self, state: Any) -> None:
        """Take up all records."""
        self._words.copy_(state)

    def read(self, index: Index) -> Records:
        """A copy of records `index` (Q,)."""
        return _begun(self._records()[index], index, self.seed)

    def write(self, index: Index, records: Records) -> None:
        """Put records in their places."""
        self._records()[index] = records

    def _records(self) -> Records:
        return self._words.numpy().view(self.kind)[:, 0]


class File:
    """Records in a file that all ranks of a machine map and one of them writes.

    Until `open` it reads as at the start, and what is written is lost: a trial needs no file.
    """

    def __init__(self, count: int, dim: int) -> None:
        self.count, self.kind, self.seed = count, record(dim), 0
        self._mapped: Records | None = None
        self._rows: IO[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._logged = np.zeros(0, bool)

    def read(self, index: Index) -> Records:
        """A copy of records `index` (Q,); of any thread."""
        if self._mapped is None:
            return _begun(np.zeros(len(index), self.kind), index, self.seed)
        return _begun(self._mapped[index], index, self.seed)

    def write(self, index: Index, records: Records) -> None:
        """Overwrite records `index` (Q,), each once, where this process is the writer."""
        if self._rows is None:
            return
        with _told(self._folder):
            if self._log is not None:
                new = index[~self._logged[index]]
                self._append(self._log, new)
                self._logged[new] = True
            self._overwrite(index, records)

    def begin(self, folder: Path) -> None:
        """Start with rows that were never written, as the writer. Nothing is done for each row."""
        self._folder = folder
        with _told(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            size, free = self.count * self.kind.itemsize, shutil.disk_usage(folder).free
            if size > free:
                raise UserError(
                    f"{self.count} prototypes take {size / 1e9:.1f} GB and {folder} has "
                    f"{free / 1e9:.1f} left; make room or use --out on another disk"
                )
            self._rows = open(folder / "rows", "w+b", buffering=0)  # noqa: SIM115
            self._rows.truncate(size)  # sparse: it grows with the rows that are written

    def go_back(self, folder: Path, step: int) -> None:
        """Take all rows back to what they were at the checkpoint after `step`, as the writer.

        Once more does no harm: it may be killed anywhere.
        """
        self._folder = folder
        logs = [path for path in reversed(_logs(folder)) if _step(path) >= step]
        rows, size = folder / "rows", self.count * self.kind.itemsize
        if not logs or _step(logs[-1]) != step or not rows.exists() or rows.stat().st_size != size:
            ways = ", ".join(str(_step(log)) for log in _logs(folder)) or "no step"
            raise UserError(
                f"the prototypes in {folder} cannot be taken back to step {step} (they can to "
                f"{ways}: as far as --keep, not --keep-every); use another --out"
            )
        with _told(folder):
            self._rows = open(rows, "r+b", buffering=0)  # noqa: SIM115
            for log in logs:  # the newest first
                for index, records in self._entries(log):
                    self._overwrite(index, records)
            os.fsync(self._rows.fileno())
            for log in logs[:-1]:
                log.unlink()
            self._start_log(step)

    def commit(self, step: int, keep: int) -> None:
        """Let the rows as they are now be those of the checkpoint after `step`, about to be saved.

        The way back to the `keep` checkpoints before it stays open too, and to one more: it is the
        newest whole one as long as its successor is being written.
        """
        if self._rows is None:
            return
        with _told(self._folder):
            os.fsync(self._rows.fileno())
            self._start_log(step)
            for old in _logs(self._folder)[: -keep - 2]:
                old.unlink()

    def map(self, folder: Path) -> None:
        """Read from the file from now on; on all ranks of a machine, once the writer has begun."""
        with open(folder / "rows", "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mapped, "madvise"):
            mapped.madvise(mmap.MADV_RANDOM)  # a row is not followed by its neighbours
        self._mapped = np.frombuffer(mapped, dtype=self.kind)

    def _start_log(self, step: int) -> None:
        if self._log is not None:
            self._log.close()
        path = self._folder / f"undo-{step:08d}"
        self._log = open(path, "wb", buffering=0)  # noqa: SIM115
        self._logged = np.zeros(self.count, bool)  # pages of it come to be as they are written
        os.fsync(self._log.fileno())
        with contextlib.suppress(OSError):  # no such thing on this platform
            folder = os.open(self._folder, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)

    def _append(self, log: IO[bytes], index: Index) -> None:
        """Log records `index` as they are, on the disk before this returns."""
        if len(index):
            assert self._mapped is not None
            body = index.tobytes() + self._mapped[index].tobytes()
            _write(log, _ENTRY.pack(len(index), zlib.crc32(body)) + body)
            os.fsync(log.fileno())

    def _entries(self, log: Path) -> Iterator[tuple[Index, Records]]:
        """Rows and records of a log. One cut short at its end was never followed by its write."""
        with open(log, "rb") as file:
            while len(head := file.read(_ENTRY.size)) == _ENTRY.size:
                count, checksum = _ENTRY.unpack(head)
                body = file.read(count * (8 + self.kind.itemsize))
                if zlib.crc32(body) != checksum:
                    if file.read(1):
                        raise UserError(f"{log} is damaged; use another --out")
                    return
                yield (
                    np.frombuffer(body, np.int64, count),
                    np.frombuffer(body, self.kind, count, offset=8 * count),
                )

    def _overwrite(self, index: Index, records: Records) -> None:
        """By writing, not through the map: a full disk is then an error, not a signal."""
        assert self._rows is not None
        size, whole = self.kind.itemsize, records.tobytes()
        for position, row in enumerate(index.tolist()):
            self._rows.seek(row * size)
            _write(self._rows, whole[position * size : (position + 1) * size])


def _write(file: IO[bytes], data: bytes) -> None:
    """All of `data`, of which the system may take a part at a time."""
    done = 0
    while done < len(data):
        done += file.write(data[done:])


def _logs(folder: Path) -> list[Path]:
    return sorted(folder.glob("undo-*"))


def _step(log: Path) -> int:
    return int(log.name.removeprefix("undo-"))


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({error.strerror}); make room and run again"
        ) from error
