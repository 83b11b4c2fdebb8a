"""When things happen: the learning rate of each step, evenly spread moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from firstsight.optim import cosine
from firstsight.settings import Pretrain


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate of every step of a run."""

    steps: int
    peak: float
    warmup: int = 0
    """Steps in which the rate rises linearly."""
    shape: Literal["cosine", "whole-cosine", "step"] = "cosine"
    drops: Sequence[float] = ()
    start: float = 0.0
    """Where the warm-up begins and the cosine ends, as shares of the peak."""
    end: float = 0.0
    at: Literal["start", "end", "linspace"] = "start"
    hold: float = 1
    """Steps for which a rate is kept."""

    @classmethod
    def of(cls, config: Pretrain, steps: int, steps_per_epoch: float) -> Schedule:
        """The schedule of a run."""
        return cls(
            steps=steps,
            peak=config.peak_lr,
            warmup=round(config.warmup_epochs * steps_per_epoch),
            shape=config.schedule,
            drops=config.drops,
            start=config.lr_start,
            end=config.lr_end,
            at=config.lr_at,
            hold=steps_per_epoch if config.lr_every == "epoch" else 1,
        )

    def rate(self, step: int) -> float:
        """The learning rate of `step` (from 0).

        The curve rises over `warmup`, then falls along half a cosine, or along what the warm-up
        has left of one over all steps (whole-cosine: a drop at its end, as SEED's code has it), or
        by a factor of 10 at each of `drops` (shares of the run). A step reads it at its own start
        or end; with `linspace` the last step of the warm-up already has the peak.
        """
        now = step - step % self.hold + (self.hold if self.at == "end" else 0)
        now = min(now, self.steps)
        if now < self.warmup:
            risen = now / max(1, self.warmup - (self.at == "linspace"))
            return self.peak * (self.start + (1 - self.start) * risen)
        if self.shape == "step":
            return float(self.peak * 0.1 ** sum(now >= drop * self.steps for drop in self.drops))
        begin = self.warmup if self.shape == "cosine" else 0
        progress = (now - begin) / max(1, self.steps - begin)
        return cosine(min(1.0, progress), self.peak, self.end * self.peak)


def due(done: int, steps: int, times: int) -> bool:
    """Whether one of `times` evenly spread moments of a run falls on this step; the end is one."""
    return times > 0 and (done * times) // steps > ((done - 1) * times) // steps
