"""Where figures go: log.jsonl and what else `--loggers` names, and the terminal."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import math
import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from firstsight.errors import UserError


def is_first() -> bool:
    """Whether this process speaks for all: alone, or the first that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """One plain line for the user, apart from results; on the first of several ranks."""
    if not is_first():
        return
    _speak(sys.stderr, printable(text))


def _speak(stream: TextIO, text: str) -> None:
    """A line for whoever still listens: a run goes on when its terminal is gone."""
    with contextlib.suppress(OSError, ValueError):
        stream.write(text + "\n")
        stream.flush()


def printable(text: str) -> str:
    """`text` with bytes that are no UTF-8 (in names of files) spelt out, and in one line."""
    whole = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return whole.replace("\n", "\\n").replace("\r", "\\r")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, rising in step; damaged and half-written lines are left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not text at all
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Writer(ABC):
    """A place for figures: what `--loggers` names."""

    @abstractmethod
    def __init__(
        self, folder: Path, step: int, kept: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        """Go on after `step` in a run folder whose records until then are `kept`."""

    @abstractmethod
    def write(self, step: int, figures: dict[str, float]) -> None:
        """Put down the figures of a step; steps rise."""

    @abstractmethod
    def close(self) -> None:
        """Write out what is buffered."""


class _Lines(Writer):
    """log.jsonl: an object a line; what is no number is null, since JSON knows no other word."""

    def __init__(
        self, folder: Path, step: int, kept: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        path = folder / "log.jsonl"
        if path.exists():
            part = path.with_name(".log.part")
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
            part.replace(path)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  closed in close()

    def write(self, step: int, figures: dict[str, float]) -> None:
        told = {name: value if math.isfinite(value) else None for name, value in figures.items()}
        self._file.write(json.dumps({"step": step, **told}, allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _Table(Writer):
    """log.csv: a row a step, a column for each figure that ever came; empty where it did not."""

    def __init__(
        self, folder: Path, step: int, kept: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        self._path = folder / "log.csv"
        self._start(kept)

    def _start(self, rows: list[dict[str, Any]]) -> None:
        """The whole file anew: only then can it get another column."""
        self._columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        part = self._path.with_name(".log.csv.part")
        with open(part, "w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
        part.replace(self._path)
        self._file = open(self._path, "a", buffering=1, newline="")  # noqa: SIM115  close()
        self._writer = csv.DictWriter(self._file, self._columns)

    def write(self, step: int, figures: dict[str, float]) -> None:
        row = {"step": step, **figures}
        if row.keys() <= set(self._columns):
            self._writer.writerow(row)
        else:
            self._file.close()
            self._start(read_log(self._path.with_suffix(".jsonl")))  # this one is in it already

    def close(self) -> None:
        self._file.close()


class _Events(Writer):
    """TensorBoard events, in `events/`."""

    def __init__(
        self, folder: Path, step: int, kept: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()


class _Wandb(Writer):
    """Weights & Biases, as the run whose id lies in wandb.txt; steps it has seen it passes over."""

    def __init__(
        self, folder: Path, step: int, kept: list[dict[str, Any]], settings: dict[str, Any]
    ) -> None:
        import wandb

        note = folder / "wandb.txt"
        if not note.exists():
            note.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project="firstsight",
            name=folder.name,
            id=note.read_text(),
            resume="allow",
            dir=str(folder),
            config=settings,
        )

    def write(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures, step=step)

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, type[Writer]] = {
    "jsonl": _Lines,
    "tensorboard": _Events,
    "csv": _Table,
    "wandb": _Wandb,
}
"""What `--loggers` can name."""


def require(loggers: Sequence[str]) -> None:
    """Refuse loggers whose package is missing."""
    if "wandb" in loggers and importlib.util.find_spec("wandb") is None:
        raise UserError("--loggers wandb needs a package; pip install 'firstsight[wandb]'")


class Log:
    """The figures of a run, to all its writers; cut back to the step that the run goes on from.

    log.jsonl is always among them: the summary, the report and resuming read it.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        loggers: Sequence[str] = ("tensorboard",),
        settings: dict[str, Any] | None = None,
    ) -> None:
        kept = [record for record in read_log(folder / "log.jsonl") if record["step"] <= step]
        self.last = kept[-1]["step"] if kept else -1
        self._folder = folder
        names = dict.fromkeys(["jsonl", *loggers])
        self._writers = [WRITERS[name](folder, step, kept, settings or {}) for name in names]

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One record; a step is written once."""
        if step <= self.last:
            return
        self.last = step
        try:
            for writer in self._writers:
                writer.write(step, figures)
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"cannot write the log of {self._folder} ({reason}); make room and run again"
            ) from None

    def close(self) -> None:
        """Write out what is buffered."""
        for writer in self._writers:
            writer.close()


def told(figures: dict[str, float]) -> str:
    """The figures that a person watches."""
    rate = figures["images_per_second"]
    text = f"loss {figures['loss']:.3f}, {rate:.{0 if rate >= 10 else 1}f} images/s"
    text += f", waited {figures['data_wait']:.0%}"
    readings = [f"k-NN {v:.1f} %" for k, v in figures.items() if k.startswith("knn")]
    if linear := [v for k, v in figures.items() if k.startswith("linear")]:
        readings.append(f"linear up to {max(linear):.1f} %")
    return ", ".join([text, *readings])


class Meter:
    """Progress for people: a bar on a terminal, a plain line now and then elsewhere."""

    live = False
    """Whether a bar is on the terminal: it has room for one."""

    def __init__(self, what: str, start: int, total: int, stream: TextIO | None = None) -> None:
        self._what, self._start, self._total = what, start, total
        self._stream = stream if stream is not None else sys.stderr
        self._began = self._spoke = time.monotonic()
        self._bar: Progress | None = None
        self._silent = not is_first() or Meter.live
        if self._stream.isatty() and not self._silent:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[text]}"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(what, total=total, completed=start, text="")
            self._bar.start()
            Meter.live = True

    def show(self, done: int, text: str = "") -> None:
        """Report that `done` of the total are done; `text` is what else to say."""
        elapsed = time.monotonic() - self._began
        left = elapsed / max(done - self._start, 1) * (self._total - done)
        text = f"{text}, {clock(left)} left" if text else f"{clock(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif not self._silent and time.monotonic() - self._spoke > 10:
            self._spoke = time.monotonic()
            _speak(self._stream, f"{self._what} {done}/{self._total} {text}")

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            with contextlib.suppress(OSError, SystemExit):  # what rich makes of a broken pipe
                self._bar.stop()
            Meter.live = False


def clock(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
