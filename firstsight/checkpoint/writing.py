"""The folder of checkpoints: written whole or not at all, checked when read, thinned out.

A file of torch is a zip, and a zip holds a checksum of each of its parts. torch writes them and
does not look at them when it reads; here they are looked at. So a checkpoint carries its checksums
wherever it is copied, and `python -m zipfile -t checkpoints/last` tells the same.
"""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from firstsight.checkpoint.reading import first_line, read
from firstsight.errors import UserError


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let `write` fill a file that appears under its name only when it is whole on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        part.unlink(missing_ok=True)
        failure = _disk_failure(error)
        if failure is None:
            raise
        raise UserError(f"cannot write {path} ({failure}); make room and run again") from error


def _disk_failure(error: BaseException | None) -> str | None:
    """What the system said, also where torch buried it under an error of its own."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return None if error is None else error.strerror or str(error)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def save(folder: Path, step: int, state: dict[str, Any], keep: int, keep_every: int = 0) -> Path:
    """Write the state after `step` steps, point `last` at it, remove what is not to be kept.

    The `keep` newest stay, and those after a multiple of `keep_every` steps (0: no others).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".*.part"):  # by a process that was killed while it wrote
        left.unlink()
    path = folder / f"step-{step:08d}.pt"
    write_atomically(path, lambda file: torch.save(state, file))
    link = folder / ".last.part"
    link.symlink_to(path.name)
    os.replace(link, folder / "last")
    saved = _all(folder)
    later = [other for other in saved if other.name > path.name]  # damaged: the run went back
    earlier = [other for other in saved if other.name <= path.name][:-keep]
    for old in later + [e for e in earlier if not keep_every or _step(e) % keep_every]:
        old.unlink()
    return path


def _all(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.pt") if path.stem[5:].isdecimal())


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def newest(
    folder: Path, fits: Callable[[dict[str, Any], Path], None] = lambda state, path: None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest whole state, if any, and what had to be passed over for it.

    `fits` raises `UserError` for a state that is whole and another run's. Newest is what has most
    steps: the clock does not count.
    """
    passed: list[str] = []
    for path in reversed(_all(folder)):
        try:
            refuse_damaged(path)
            state = read(path)
            fits(state, path)
            return state, passed
        except UserError as error:
            passed.append(str(error))
    return None, passed


def refuse_damaged(path: Path) -> None:
    """Raise `UserError` where a checkpoint of ours is cut off or a bit of it has changed."""
    try:
        with zipfile.ZipFile(path) as file:
            wrong = file.testzip()
    except Exception as error:  # the parser stumbles in many ways
        raise UserError(f"{path} is not a readable checkpoint ({first_line(error)})") from error
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong} in it does not match its checksum")


def on_host(value: Any) -> Any:
    """A copy of nested tensors in the memory of the host, which training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, on_host(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return type(value)(on_host(each) for each in value)
    return value


class Writer:
    """Writes in a thread of its own while training goes on: never two at a time."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Have `write` called, once what was begun before is done."""
        self.wait()

        def work() -> None:
            try:
                write()
            except Exception as error:
                self._failure = error

        # no daemon: a process that ends finishes what it writes
        self._thread = threading.Thread(target=work, name="writes a checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong since the last look; never waits."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Until all is written; raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
