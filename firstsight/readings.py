"""What stands for a whole reading: the figures that a curve, a table or a chart shows of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One number of a reading's result."""

    said: str
    """What it is called."""
    path: tuple[str, ...]
    """Where it stands in the result."""
    percent: bool = True
    """Whether it is a share of 100 of which more is better; else a measure of its own."""

    def of(self, result: dict[str, Any]) -> float | None:
        """The number; None where the result has none, or none that is finite."""
        value: Any = result
        for key in self.path:
            value = value.get(key) if isinstance(value, dict) else None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and math.isfinite(value) else None


FIGURES: dict[str, tuple[Figure, ...]] = {
    "knn": (Figure(said="k-NN at its best k", path=("top1",)),),
    "linear": (Figure(said="linear by evaluate", path=("top1",)),),
    "finetune": (Figure(said="fine-tuned", path=("top1",)),),
    "dense": (
        Figure(said="mean IoU of cells, linear", path=("linear", "mean_iou")),
        Figure(said="mean IoU of cells, k-NN", path=("knn", "mean_iou")),
    ),
    "instance": (
        Figure(said="own view found by an image", path=("d-sd", "1")),
        Figure(said="own view found by a view", path=("sd-sd", "1")),
    ),
    "diagnose": (
        Figure(said="effective rank", path=("effective_rank",), percent=False),
        Figure(said="uniformity", path=("uniformity", "d"), percent=False),
        Figure(said="alignment", path=("alignment", "d-sd"), percent=False),
    ),
    "localize": (Figure(said="CorLoc .5", path=("corloc", "0.5")),),
}
"""Of each reading, the one that matters most first."""


def figures(name: str) -> tuple[Figure, ...]:
    """Those of the reading called `name`; of an unknown one its accuracy."""
    return FIGURES.get(name, (Figure(said=name, path=("top1",)),))


def of_run(result: dict[str, Any], step: int) -> dict[str, Any]:
    """A result as a run's folder keeps it: with its step and, of accuracies, the `top1`."""
    best = {"top1": result["best"]["top1"]} if "best" in result else {}
    return {**result, **best, "step": step}
