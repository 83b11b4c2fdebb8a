"""Files as sources read them: whole ones, and parts of archives."""

from __future__ import annotations

import os
from abc import abstractmethod
from typing import BinaryIO

from firstsight.errors import UserError
from firstsight.sources.base import Encoded, UnreadableImage


class Files(Encoded):
    """A source whose images are files of their own."""

    @abstractmethod
    def file_of(self, index: int) -> str:
        """The file of image `index`."""

    def size(self, index: int) -> int:
        """Bytes of the file of image `index`; raises `UnreadableImage`."""
        try:
            return os.stat(self.file_of(index)).st_size
        except (OSError, ValueError) as error:
            raise UnreadableImage(str(error)) from error

    def encoded(self, index: int) -> bytes:
        """The file of image `index`; raises `UnreadableImage`."""
        try:
            with open(self.file_of(index), "rb") as file:
                return file.read()
        except (OSError, ValueError) as error:  # ValueError: a path that no system allows
            raise UnreadableImage(str(error)) from error


class Opened:
    """A file that is read in parts by many threads and processes at once.

    `pread` moves no file position, so threads share a handle without a lock; each process opens its
    own. What was indexed must stay as it was: a file that changes under its readers is refused.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle: tuple[int, BinaryIO] | None = None
        self._stamp = stamp(path)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}

    def read(self, size: int, offset: int) -> bytes:
        """`size` bytes from `offset`, fewer at the end; raises `UserError` where it has changed."""
        file = self.opened()
        if stamp(file.fileno()) != self._stamp:
            raise UserError(
                f"{self.path!r} has changed since it was opened; let it rest, and run again"
            )
        return os.pread(file.fileno(), size, offset)

    def opened(self) -> BinaryIO:
        """The handle of this process."""
        # Two threads may both open it; the loser's file lives as long as its thread still reads.
        if self._handle is None or self._handle[0] != os.getpid():
            file = open(self.path, "rb")  # noqa: SIM115
            self._handle = (os.getpid(), file)
            return file
        return self._handle[1]


def stamp(file: str | int) -> tuple[int, int]:
    """Bytes and time of change (ns) of a file or handle: other numbers tell that it changed."""
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
