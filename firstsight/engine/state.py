"""All that a run needs to go on as if it had never stopped: saved, and found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from firstsight import checkpoint, distributed, keyed, parallel
from firstsight.backbones import Backbone
from firstsight.engine import guards, room
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.methods.base import Method
from firstsight.probe import Online
from firstsight.prototypes import fetched
from firstsight.settings import UNBOUND, Pretrain, flag, plain
from firstsight.sources.base import Source

SNAPSHOTS = 10
"""Backbones kept over a run, evenly spread."""

_LENGTHENED = ("epochs", "warmup_epochs", "cache")
"""Settings that `folders` lets differ in some way."""


@dataclass(kw_only=True)
class State:
    """The parts of a run that training changes, and how far it is.

    As a context it waits at its end for what it writes beside training.
    """

    out: Path
    name: str
    config: Pretrain
    source: Source
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    online: Online | None = None
    salt: int = 0
    """Times that the run went back to a checkpoint because of a fault in its numbers."""
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Spent training, views included and readings not."""
    skipped: int = 0
    """Steps whose gradients were not finite: float16 overflows, and with --skip-nonfinite any."""
    bad: set[str] = field(default_factory=set)
    """Images that could not be decoded."""

    def __post_init__(self) -> None:
        self._fingerprint, self._contents = self.source.fingerprint(), self.source.contents()
        self._folder = self.out / "checkpoints"
        self._writer = checkpoint.Writer()
        self._warned = False
        self._in_a_row = 0

    @property
    def seed(self) -> int:
        """Of what is drawn in a step: another after a roll-back, or the fault would come back."""
        return keyed.seed(self.config.seed, self.salt) if self.salt else self.config.seed

    def resume(self) -> None:
        """Take up the newest whole checkpoint of this run, where there is one."""
        distributed.barrier()  # the writer's own writing is over
        saved, passed = checkpoint.newest(self._folder, self._refuse_others)
        if saved is None and passed:
            raise UserError(f"no checkpoint can be gone on with: {passed[0]}; or use another --out")
        for complaint in passed:
            say(f"{complaint}; taking the one before it")
        self._require_room()
        if saved is None:
            self._open_stores(None)
            return
        self._compare_sources(saved)
        checkpoint.load_state(self.method, saved["method"], self._folder / "last")
        self._open_stores(int(saved["step"]))
        try:
            self.optimizer.load_state_dict(saved["optimizer"])
        except ValueError as error:  # other parameters belong together now
            raise UserError(
                f"{self._folder / 'last'} is of a version that moved parameters in other groups "
                f"({error}); use another --out, and --init {self.out} to begin from its weights"
            ) from None
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.online:
            self.online.load_state_dict(saved.get("probes", {}))
        self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
        self.skipped, self.bad = int(saved.get("skipped", 0)), set(saved["bad"])
        self.salt += int(saved.get("salt", 0))
        say(f"{self.out}: going on from step {self.step}")

    def _refuse_others(self, saved: dict[str, Any], path: Path) -> None:
        """Refuse the checkpoint of another run, whoever put it here."""
        if (name := saved.get("name", self.name)) != self.name:
            raise UserError(f"{path} is a checkpoint of {name}")
        checkpoint.refuse_unlike(self.method, saved["method"], path)
        now = plain(self.config)
        for key, was in saved.get("settings", {}).items():
            if now.get(key, was) != was and key not in (*UNBOUND, *_LENGTHENED):
                raise UserError(f"{path} is of another run, {flag(key)} {was} (here {now[key]})")

    def _compare_sources(self, saved: dict[str, Any]) -> None:
        what = f"{self.source.spec} no longer holds the images that {self.out} was trained on"
        if saved["source"] != self._fingerprint:
            what += f" ({saved.get('images', 'other')} then, {len(self.source)} now)"
        elif saved.get("contents", self._contents) != self._contents:
            what += " (the names are the same, their files are others)"
        else:
            return
        if not self.config.allow_changed_data:
            raise UserError(
                f"{what}; use --allow-changed-data to go on with these, or --out for another run"
            )
        say(f"{what}; going on with these")

    def advance(self, stepped: bool, seconds: float) -> None:
        """Count a step that took so long; `stepped`: the optimiser made it.

        Raises `UserError` where a checkpoint could not be written since the last one, and
        `guards.NonFinite` after more steps in a row without an update than are allowed.
        """
        self.step, self.seconds = self.step + 1, self.seconds + seconds
        self.skipped += not stepped
        self._in_a_row = 0 if stepped else self._in_a_row + 1
        self._writer.check()
        if not stepped and self.config.precision != "fp16":
            self.scaler.update(1.0)  # it halves its scale, which here would never grow again
        if self._in_a_row > self.config.skip_nonfinite > 0:
            what = f"{self._in_a_row} steps in a row, step {self.step} the last, had gradients that"
            what += f" are not finite (--skip-nonfinite {self.config.skip_nonfinite})"
            raise guards.since_last_good(what, self.out)

    def counts(self) -> dict[str, float]:
        """For the log: images that could not be decoded, steps left out where some may be."""
        skipped = {"skipped_steps": float(self.skipped)} if self.scaler.is_enabled() else {}
        return {"bad_images": float(len(self.bad)), **skipped}

    def _open_stores(self, step: int | None) -> None:
        """Have rows that rest outside the checkpoint as they were when it was saved."""
        for name, rows in fetched.inside(self.method).items():
            rows.open(self.out / name, step)

    def save(self) -> None:
        """Copy all to the host and have it written while training goes on; on all ranks."""
        for rows in fetched.inside(self.method).values():
            rows.commit(self.step, self.config.keep)
        values: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "salt": self.salt}
        values |= {"skipped": self.skipped, "bad": sorted(self.bad)}
        values |= {"method": parallel.gathered(self.method.state_dict())}
        values |= {"optimizer": parallel.gathered_optimizer(self.optimizer)}
        values |= {"scaler": self.scaler.state_dict()}
        values |= {"source": self._fingerprint, "images": len(self.source)}
        values |= {"contents": self._contents}
        values |= {"probes": self.online.state_dict() if self.online else {}}
        values |= {"about": about(self.method, self.config)}
        values |= {"name": self.name, "settings": plain(self.config)}
        if distributed.rank() > 0:
            return
        self._warn_of_little_room(_size(values))
        self._writer.wait()
        copy, config = checkpoint.on_host(values), self.config
        write = partial(checkpoint.save, self._folder, self.step, copy)
        self._writer.begin(partial(write, config.keep, config.keep_every))

    def settle(self) -> None:
        """Wait for what is being written: processes must not be forked beside a thread at work."""
        self._writer.wait()

    def __enter__(self) -> State:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._writer.wait()
        except UserError:
            if error is None:  # else what went wrong first is told
                raise

    def _require_room(self) -> None:
        """Refuse a run whose checkpoints and snapshots will not fit, before its first step."""
        self.out.mkdir(parents=True, exist_ok=True)
        weights = sum(p.nbytes for p in self.method.parameters() if p.requires_grad)
        moments = 2 if self.config.optimizer == "adamw" else 1
        whole = _size(self.method.state_dict()) + moments * weights
        needed = (self.config.keep + 1) * whole + SNAPSHOTS * _size(self.method.backbone)
        there = sum(path.stat().st_size for path in self.out.glob("*/step-*"))
        room.require_disk(self.out, needed - there, "checkpoints and snapshots")
        if (left := room.memory()) is not None and left < whole:
            say(
                f"a copy of the state takes {room.told(whole)}, {room.told(left)} of memory is left"
            )

    def _warn_of_little_room(self, size: int) -> None:
        """Say once that the disk is nearly full, while there is still time to do something."""
        left = room.disk(self.out)
        if left < 3 * size and not self._warned:
            self._warned = True
            say(f"{self.out}: {room.told(left)} left, a checkpoint takes {room.told(size)}")

    def snapshot(self) -> None:
        """Keep the backbone as it is now; on all ranks."""
        backbone = self.backbone()
        if distributed.rank() > 0:
            return
        folder = self.out / "snapshots"
        folder.mkdir(exist_ok=True)
        what = {**about(self.method, self.config), "step": self.step}
        path = folder / f"step-{self.step:08d}.safetensors"
        checkpoint.save_backbone(path, backbone, what)

    def backbone(self) -> Backbone:
        """The backbone with all its weights on this rank; on all ranks."""
        return parallel.whole(self.method.backbone, self.config.size)


def _size(value: Any) -> int:
    """Bytes of all tensors in nested values."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return sum(map(_size, value))
    return value.nbytes if isinstance(value, Tensor) else 0


def about(method: Method, config: Pretrain) -> dict[str, Any]:
    """What a reader of the backbone needs to know."""
    return checkpoint.about_backbone(
        method.backbone, config.size, config.views.mean, config.views.std
    )
