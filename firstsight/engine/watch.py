"""What watches a run from beside its loop: that it moves, that all ranks live, that memory lasts.

Each rank has a thread that writes a heartbeat into the run folder (`watch/rank-0000.json`: what it
does, at which step) and reads those of the others when it has to wait for them. Nothing here looks
at a clock: what counts is how often a heartbeat was looked at without being another. So a clock
that is set back, clocks of machines that differ, and a computer that sleeps change nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from firstsight import distributed
from firstsight.batch import Batch
from firstsight.engine import room
from firstsight.errors import UserError
from firstsight.log import say

_BEATS = 2.0
"""Seconds between heartbeats, at most."""
_SILENT = 10
"""Looks at a heartbeat that has not changed, after which its process is gone where more says so:
the system, or a broken connection. One that is merely slow has as long as a step may take."""
_FAILED = 2
"""The same for one that said that it failed: others may be about to say so too."""
_ALIKE = 0.01
"""Spread of features below which they tell images apart no more; untrained ones have above .05."""
_IN_A_ROW = 3
"""Lines of the log that must say so."""
_PATIENCE = 20.0
"""Seconds that a checkpoint gets to be written before a run that hangs is ended."""
_SCARCE = 256 << 20
"""Bytes of memory left that are worth a word."""

_WAITING, _TRAINING, _READING, _ENDED = (
    "waits for the loader",
    "trains",
    "reads the backbone",
    "has ended",
)


class Watch:
    """Beside the loop of a run: names the rank or loader that hangs, and ends the run then.

    A context; `over` goes round the batches. `timeout` is in seconds without a step, readings left
    out. Stacks of all threads, of the loader's processes too, go to `watch/rank-0000.stacks`; there
    `kill -USR2 PID` writes those of a run that goes on.
    """

    def __init__(self, out: Path, timeout: float) -> None:
        self._folder, self._timeout = out / "watch", timeout
        self._every = min(_BEATS, timeout / 3 / _SILENT)
        self._ranks = range(distributed.world())
        self._rank = distributed.rank()
        self._step, self._doing, self._moves = 0, _TRAINING, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watches", daemon=True)
        self._beats = dict.fromkeys(self._ranks, (-1, 0))  # of each rank: the last, looks since
        self._count = self._still = 0
        self._seen, self._leaving, self._broken = -1, False, False
        self._asked = self._waited = self._since = 0.0
        self._images = self._alike = 0
        self._scarce = self._tiny = False

    # --- what the loop calls

    def over(self, stream: Iterator[Batch], first: int) -> Iterator[tuple[int, Batch]]:
        """Steps from `first` on, each with its batch; waiting is told from training."""
        step = first
        while True:
            self._asked = time.perf_counter()
            self._move(step, _WAITING)
            batch = next(stream, None)
            if batch is None:
                return
            self._waited += time.perf_counter() - self._asked
            self._move(step, _TRAINING)
            yield step, batch
            step += 1

    def step_took(self, images: int) -> float:
        """Seconds since the last batch was asked for, of a step with so many images."""
        took = time.perf_counter() - self._asked
        self._since, self._images = self._since + took, self._images + images
        return took

    def pace(self) -> dict[str, float]:
        """Figures of the steps since they were asked for last."""
        said = {
            "images_per_second": self._images / self._since,
            "data_wait": self._waited / self._since,
        }
        self._waited, self._since, self._images = 0.0, 0.0, 0
        return said

    def reads(self) -> None:
        """A reading begins, which may take longer than any step."""
        self._move(self._step, _READING)

    def note(self, figures: dict[str, float]) -> None:
        """Say once where features or embeddings have become alike, or float16 has no range left."""
        alike = {k: v for k, v in figures.items() if k.endswith("spread") and not v >= _ALIKE}
        self._alike = self._alike + 1 if alike else 0
        if self._alike == _IN_A_ROW:
            told = ", ".join(f"{name} {value:.4f}" for name, value in alike.items())
            say(
                f"collapse: {told} at step {self._step} (0: the same for all images); a lower --lr "
                "or a longer --warmup-epochs may help, and diagnose tells more"
            )

        if figures.get("loss_scale", 1.0) < 1 and not self._tiny:
            self._tiny = True
            say(
                f"float16 overflows again and again: its scale is {figures['loss_scale']:g} at "
                f"step {self._step}, and small gradients vanish; use --precision bf16 or fp32"
            )

    def __enter__(self) -> Watch:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(self._path("stacks"), "w")
        if hasattr(faulthandler, "register"):
            # forked workers of the loader inherit it, and the file
            faulthandler.register(signal.SIGUSR2, file=self._stacks)
        self._write()
        distributed.barrier()  # from here on there is a heartbeat of every rank
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leaving = True
        self._broken = distributed.broken(error)
        said = self._who_is_gone() if self._broken else ""
        self._stop.set()
        self._thread.join()
        self._doing = _ENDED if error is None else f"{_ENDED}: {said or _line(error)}"
        if said:
            faulthandler.dump_traceback(self._stacks)
        self._write()
        faulthandler.cancel_dump_traceback_later()
        if hasattr(faulthandler, "unregister"):
            faulthandler.unregister(signal.SIGUSR2)
        self._stacks.close()
        if said:
            raise UserError(said) from error

    # --- what the thread does

    def _run(self) -> None:
        while not self._stop.wait(self._every):
            # should this thread not come to run, because a library keeps Python's lock
            faulthandler.dump_traceback_later(2 * self._timeout, file=self._stacks)
            self._look()

    def _look(self) -> None:
        moves = self._moves
        self._still, self._seen = self._still + 1 if moves == self._seen else 0, moves
        self._write()
        self._watch_memory()
        if len(self._ranks) > 1 and self._still:
            self._listen()
        hung = self._still * self._every > self._timeout and self._doing != _READING
        if (hung or self._gone()) and not self._leaving:
            self._end(self._verdict())

    def _who_is_gone(self) -> str:
        """A connection broke: whose, a heartbeat tells that stands still. Empty: all go on."""
        for _ in range(2 * _SILENT):
            if self._gone():
                return self._verdict()
            time.sleep(self._every)
        return ""

    def _end(self, verdict: str) -> None:
        """End this process from outside the main thread, which may never come back."""
        self._doing = f"{_ENDED}: {verdict}"
        self._write()
        faulthandler.dump_traceback(self._stacks)
        for worker in multiprocessing.active_children():
            if worker.pid and hasattr(signal, "SIGUSR2"):
                os.kill(worker.pid, signal.SIGUSR2)
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join(_PATIENCE)  # it writes a checkpoint
        time.sleep(0.2)  # the workers write their stacks
        sys.stderr.write(f"firstsight: {verdict}\n")
        sys.stderr.flush()
        os._exit(2)

    def _move(self, step: int, doing: str) -> None:
        self._step, self._doing, self._moves = step, doing, self._moves + 1

    def _write(self) -> None:
        self._count += 1
        said = {"rank": self._rank, "step": self._step, "doing": self._doing, "beat": self._count}
        said |= {"host": socket.gethostname(), "pid": os.getpid()}
        part = self._path("part")
        with contextlib.suppress(OSError):  # a full disk is told by those who need it
            part.write_text(json.dumps(said) + "\n")
            part.replace(self._path("json"))  # nobody reads half of it

    def _listen(self) -> None:
        for rank in {*self._ranks} - {self._rank}:
            beat, looks = self._beats[rank]
            now = self._said(rank).get("beat", beat)  # unreadable for once: as before
            self._beats[rank] = (now, 0 if now != beat else looks + 1)

    def _said(self, rank: int) -> dict[str, Any]:
        try:
            return dict(json.loads(self._path("json", rank).read_text()))
        except (OSError, ValueError):
            return {}

    def _gone(self) -> list[int]:
        """Ranks that write no heartbeat any more, or ended as they should not."""
        found = []
        for rank in self._ranks:
            looks, said = self._beats[rank][1], self._said(rank)
            doing = str(said.get("doing"))
            if doing.startswith(f"{_ENDED}:"):
                enough = looks >= _FAILED
            elif self._lost(said):
                enough = looks >= _SILENT
            else:
                enough = looks * self._every > self._timeout
            if enough and doing != _ENDED:
                found.append(rank)
        return found

    def _lost(self, said: dict[str, Any]) -> bool:
        """Whether more than its silence says that a rank is gone."""
        return self._broken or _is_dead(said)

    def _verdict(self) -> str:
        """Which rank it is, in a sentence: one that is gone, or the one furthest behind."""
        said = {rank: self._said(rank) for rank in self._ranks}
        for rank in self._gone():
            doing = str(said[rank].get("doing"))
            if doing.startswith(f"{_ENDED}: rank"):  # it names another one
                return doing.removeprefix(f"{_ENDED}: ")
            if doing.startswith(_ENDED):
                return self._told(rank, said[rank], doing)
            if self._lost(said[rank]):
                return self._told(rank, said[rank], f"is gone (it {doing}, then fell silent)")
        silent = [rank for rank in self._ranks if self._beats[rank][1] >= _SILENT]
        behind = min(
            silent or self._ranks,
            key=lambda r: (said[r].get("step", 0), said[r].get("doing") != _WAITING),
        )
        seconds = max(self._still, self._beats[behind][1]) * self._every
        what = f"hangs: it {said[behind].get('doing')} for {seconds:.0f} s"
        what += ", its heartbeat stands still" if silent else ""
        return self._told(behind, said[behind], what)

    def _told(self, rank: int, said: dict[str, Any], what: str) -> str:
        who = f"rank {rank} of {len(self._ranks)}" if len(self._ranks) > 1 else "the run"
        return (
            f"{who} {what}, at step {said.get('step')}, process {said.get('pid')} on "
            f"{said.get('host')}; stacks in {self._folder}; the same command goes on from the last "
            "checkpoint"
        )

    def _watch_memory(self) -> None:
        if self._scarce or (left := room.memory()) is None or left > _SCARCE:
            return
        self._scarce = True
        say(f"{room.told(left)} of memory are left on this machine; use fewer --workers")

    def _path(self, kind: str, rank: int | None = None) -> Path:
        return self._folder / f"rank-{self._rank if rank is None else rank:04d}.{kind}"


def _is_dead(said: dict[str, Any]) -> bool:
    """Whether a process is known to have died: of one on another machine nobody here knows."""
    if said.get("host") != socket.gethostname() or not hasattr(signal, "SIGKILL"):
        return False
    try:
        os.kill(int(said["pid"]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and is another user's
        pass
    return False


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
