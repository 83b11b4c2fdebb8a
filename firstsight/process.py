"""What a process asks of its system, where that can be asked; elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes


def keep_freed_memory() -> None:
    """Let this process keep the memory of freed images for the next ones, where glibc is.

    Else each decoded image is given back to the system, and asked for again page by page: a third
    of the time of decoding.
    """
    trim, direct = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim, 1 << 30)
        libc.mallopt(direct, 32 << 20)  # the most that it takes


def end_with_parent() -> None:
    """Have this process killed when its parent is, where that is Linux.

    Else it holds memory, the lock of the run folder and connections to other ranks for seconds.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").prctl(1, 9)  # PR_SET_PDEATHSIG of sys/prctl.h, SIGKILL
