"""The same work on many images: by threads, in order, with bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from firstsight.log import Meter

T = TypeVar("T")

_AT_A_TIME = 16  # results a thread may be ahead of what is taken


def each(work: Callable[[int], T], count: int, what: str, workers: int = 0) -> Iterator[T]:
    """`work(0)` to `work(count - 1)` in order, by `workers` threads (0: one for each core).

    Decoders let go of Python's lock, so threads are enough.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # not on every platform
    threads = workers or (len(allowed(0)) if allowed is not None else os.cpu_count() or 1)
    with Meter(what, 0, count) as meter, ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, _AT_A_TIME * threads):
            part = range(start, min(count, start + _AT_A_TIME * threads))
            yield from pool.map(work, part)
            meter.show(part[-1] + 1)
