"""All that a run needs to go on as if it had never stopped: saved, and found again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from firstsight import checkpoint, distributed, fetched
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.methods.base import Method
from firstsight.probe import Online
from firstsight.settings import Pretrain, plain
from firstsight.sources.base import Source


@dataclass(kw_only=True)
class State:
    """The parts of a run that training changes, and how far it is."""

    out: Path
    name: str
    config: Pretrain
    source: Source
    method: Method
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    online: Online | None = None
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Spent training, views included and readings not."""
    skipped: int = 0
    """Steps whose gradients were not finite: float16 overflows, and with --skip-nonfinite any."""
    bad: set[str] = field(default_factory=set)
    """Images that could not be decoded."""

    def __post_init__(self) -> None:
        self._fingerprint = self.source.fingerprint()
        self._in_a_row = 0

    def count(self, done: int, stepped: bool) -> None:
        """Note that `done` steps are done, the last one left out unless `stepped`."""
        self.step, self.skipped = done, self.skipped + (not stepped)
        self._in_a_row = 0 if stepped else self._in_a_row + 1
        if self._in_a_row > self.config.skip_nonfinite > 0:
            raise UserError(
                f"{self._in_a_row} steps in a row, step {done} the last, had gradients that are "
                f"not finite (--skip-nonfinite {self.config.skip_nonfinite}); start another run "
                f"with a lower --lr, a longer --warmup-epochs or --precision fp32"
            )

    def resume(self) -> None:
        """Take up the newest whole checkpoint, where there is one."""
        saved, damaged = checkpoint.newest(self.out / "checkpoints")
        for complaint in damaged:
            say(f"{complaint}; taking the one before it")
        if saved is None:
            self._open_stores(None)
            return
        if saved["source"] != self._fingerprint:
            raise UserError(
                f"{self.source.spec} no longer holds the images that {self.out} was trained on; "
                f"use --out to start another run"
            )
        checkpoint.load_state(self.method, saved["method"], self.out / "checkpoints" / "last")
        self._open_stores(int(saved["step"]))
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.online:
            self.online.load_state_dict(saved.get("probes", {}))
        self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
        self.skipped, self.bad = int(saved.get("skipped", 0)), set(saved["bad"])

    def _open_stores(self, step: int | None) -> None:
        """Have rows that rest outside the checkpoint as they were when it was saved."""
        for name, rows in fetched.inside(self.method).items():
            rows.open(self.out / name, step)

    def save(self) -> None:
        """Write a checkpoint; to be called on all ranks, of which one writes it."""
        for rows in fetched.inside(self.method).values():
            rows.commit(self.step, self.config.keep)
        if distributed.rank() > 0:
            return
        values: dict[str, Any] = {"step": self.step, "seconds": self.seconds}
        values |= {"skipped": self.skipped, "bad": sorted(self.bad)}
        values |= {"method": self.method.state_dict(), "optimizer": self.optimizer.state_dict()}
        values |= {"scaler": self.scaler.state_dict(), "source": self._fingerprint}
        values |= {"probes": self.online.state_dict() if self.online else {}}
        values |= {"about": about(self.method, self.config)}
        values |= {"name": self.name, "settings": plain(self.config)}
        checkpoint.save(self.out / "checkpoints", self.step, values, self.config.keep)

    def snapshot(self) -> None:
        """Keep the backbone as it is now."""
        folder = self.out / "snapshots"
        folder.mkdir(exist_ok=True)
        what = {**about(self.method, self.config), "step": self.step}
        path = folder / f"step-{self.step:08d}.safetensors"
        checkpoint.save_backbone(path, self.method.backbone, what)


def about(method: Method, config: Pretrain) -> dict[str, Any]:
    """What a reader of the backbone needs to know."""
    return checkpoint.about_backbone(
        method.backbone, config.size, config.views.mean, config.views.std
    )
