"""Where figures go: log.jsonl, TensorBoard events, and the terminal."""

from __future__ import annotations

import json
import os
import sys
import time
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
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl, rising in step; a half-written last line is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # not JSON, or not text at all
            break
        if not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


class Log:
    """log.jsonl and TensorBoard events of a run; cut back to the step that the run goes on from."""

    def __init__(self, folder: Path, step: int) -> None:
        path = folder / "log.jsonl"
        kept = [record for record in read_log(path) if record["step"] <= step]
        if path.exists():
            part = path.with_name(".log.part")
            part.write_text("".join(json.dumps(record) + "\n" for record in kept))
            part.replace(path)
        from torch.utils.tensorboard.writer import SummaryWriter

        self.last = kept[-1]["step"] if kept else -1
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  closed in close()
        self._events = SummaryWriter(str(folder / "events"), purge_step=step + 1)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One record; a step is written once."""
        if step <= self.last:
            return
        self.last = step
        try:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"cannot write {self._file.name} ({reason}); make room and run again"
            ) from None
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()
        self._events.close()


def told(figures: dict[str, float]) -> str:
    """The figures that a person watches."""
    text = f"loss {figures['loss']:.3f}, {figures['images_per_second']:.0f} images/s"
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
            self._stream.write(f"{self._what} {done}/{self._total} {text}\n")
            self._stream.flush()

    def __enter__(self) -> Meter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            Meter.live = False


def clock(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3:05, 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
