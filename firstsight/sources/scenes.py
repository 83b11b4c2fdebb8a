"""A generated world: ten shapes in front of sixteen grounds, embedded, so that nothing need be
downloaded to see the whole road, and small enough to walk it in minutes on a CPU."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.errors import unknown
from firstsight.sources.base import Pixels, Source
from firstsight.sources.grounds import SIZE
from firstsight.sources.outlines import CLASSES
from firstsight.sources.painting import VERSION, paint
from firstsight.sources.paths import cache_folder

COUNTS = {"train": 4000, "test": 1000}
"""How many pictures each split has, unless told."""

_SPLITS = {"train": 1, "test": 2}  # part of every seed: the splits share none
_ROW = np.dtype(
    [
        ("pixels", np.uint8, (SIZE, SIZE, 3)),
        ("mask", np.uint8, (SIZE * SIZE // 8,)),
        ("box", np.float32, (4,)),
    ]
)
_ALONE = 64  # fewer pictures than this are painted before a second process has started


class Scenes(Source):
    """`count` pictures of the split "train" or "test", 96 x 96, each showing one of ten shapes.

    Picture i is the same whatever `count` is. Of each ten that follow one another, every class has
    one. They are painted once, in some seconds, and cached as one file in the folder that
    FIRSTSIGHT_CACHE names, else `firstsight` in XDG_CACHE_HOME, else in `~/.cache`; where that
    cannot be written they stay in memory.

    Raises `UserError` for any other split.
    """

    classes: tuple[str, ...] = CLASSES
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    """(N, 4): x1, y1, x2, y2 of the tight box around each shape, half-open pixels."""

    def __init__(self, split: str, count: int | None = None) -> None:
        if split not in _SPLITS:
            raise unknown("split of scenes", split, _SPLITS)
        self.split = split
        self.spec = f"scenes:{split}" + ("" if count is None else f"@{count}")
        self._count = COUNTS[split] if count is None else count
        self.labels = _labels(split, self._count)
        self._rows: NDArray[np.void] | None = _load_or_paint(split, self._count)
        self.boxes = np.array(self._rows["box"])

    def __len__(self) -> int:
        return self._count

    def __getstate__(self) -> dict[str, object]:
        # Workers map the file themselves. Only what could not be cached has to travel.
        cached = isinstance(self._rows, np.memmap)
        return {**self.__dict__, "_rows": None if cached else self._rows}

    def identity(self, index: int) -> str:
        """Split, number and version: what the picture is a function of."""
        return f"scenes-v{VERSION}/{self.split}/{range(self._count)[index]:06}"

    def pixels(self, index: int) -> Pixels:
        """Picture `index`, RGB, (96, 96, 3) uint8, a copy."""
        return np.array(self._row(index)["pixels"])

    def mask(self, index: int) -> NDArray[np.bool_]:
        """Which pixels of picture `index` the shape covers, (96, 96)."""
        return np.unpackbits(self._row(index)["mask"]).reshape(SIZE, SIZE).astype(np.bool_)

    def _row(self, index: int) -> np.void:
        if self._rows is None:
            self._rows = _load_or_paint(self.split, self._count)
        row: np.void = self._rows[index]
        return row


def _labels(split: str, count: int) -> NDArray[np.int64]:
    """Each ten in their own order: balanced, and label i does not depend on `count`."""
    tens = -(-count // len(CLASSES))
    draws = keyed.uniform(
        VERSION, _SPLITS[split], 1 << 40, np.arange(tens)[:, None], np.arange(len(CLASSES))
    )
    return np.argsort(draws, axis=1).reshape(-1)[:count].astype(np.int64)


def _load_or_paint(split: str, count: int) -> NDArray[np.void]:
    file = cache_folder() / f"scenes-v{VERSION}-{split}-{count}.npy"
    rows = _load(file, count)
    if rows is None:
        if count > 500:  # noticeable: some 2 ms each on two cores
            sys.stderr.write(f"painting {count} scenes, once; they are kept in {file.parent}\n")
        painted = _paint_all(split, count)
        _save(file, painted)
        rows = _load(file, count)
        if rows is None:
            return painted
    return rows


def _load(file: Path, count: int) -> NDArray[np.void] | None:
    """The mapped rows, or None where the file is not there or not as it was written."""
    try:
        rows: NDArray[np.void] = np.load(file, mmap_mode="r")
        with open(file, "rb") as opened:
            opened.seek(-4, os.SEEK_END)
            checksum = int.from_bytes(opened.read(), "little")
    except (OSError, ValueError, EOFError):
        return None
    if rows.dtype != _ROW or rows.shape != (count,) or _checksum(rows) != checksum:
        return None
    return rows


def _save(file: Path, rows: NDArray[np.void]) -> None:
    """Writes the rows and, behind them, their checksum; at once or not at all."""
    # Not by `tempfile`, whose files nobody else may read: users of one machine can share a cache.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as opened:
            np.save(opened, rows)
            opened.write(_checksum(rows).to_bytes(4, "little"))
        os.replace(temporary, file)
    except OSError:  # not writable, or full: no cache then
        with contextlib.suppress(OSError):
            temporary.unlink()


def _checksum(rows: NDArray[np.void]) -> int:
    return zlib.crc32(rows.view(np.uint8).data)


def _paint_all(split: str, count: int) -> NDArray[np.void]:
    """All rows, painted on all cores.

    By fresh interpreters, not by `multiprocessing`: that would fork threads of torch, or spawn and
    so run the user's script again where it lacks a `__main__` guard.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    parts = min(cores, 16, count // _ALONE)
    if parts < 2 or not sys.executable:
        return _paint_some(split, 0, count)
    edges = [count * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        return np.concatenate(
            list(pool.map(_paint_elsewhere, [split] * parts, edges[:-1], edges[1:]))
        )


def _paint_elsewhere(split: str, start: int, stop: int) -> NDArray[np.void]:
    one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    search = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", __name__, split, str(start), str(stop)],
        env={**os.environ, **one_thread, "PYTHONPATH": search},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode or len(done.stdout) != (stop - start) * _ROW.itemsize:
        return _paint_some(split, start, stop)  # slower, and its error can be seen
    return np.frombuffer(done.stdout, _ROW)


def _paint_some(split: str, start: int, stop: int) -> NDArray[np.void]:
    labels = _labels(split, stop)
    rows = np.empty(stop - start, _ROW)
    for row, index in zip(rows, range(start, stop), strict=True):
        row["pixels"], mask = paint(_SPLITS[split], index, int(labels[index]))
        row["mask"] = np.packbits(mask)
        across, down = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        row["box"] = across[0], down[0], across[-1] + 1, down[-1] + 1
    return rows


if __name__ == "__main__":
    import cv2

    cv2.setNumThreads(1)
    sys.stdout.buffer.write(_paint_some(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])).tobytes())
