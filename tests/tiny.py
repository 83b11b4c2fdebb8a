"""Small things that tests are made of: a source in memory, a quick configuration."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from firstsight import methods
from firstsight.settings import Pretrain, begun
from firstsight.sources.base import Pixels, Source, UnreadableImage

NETWORK = "timm:test_resnet"  # 0.4 million parameters: steps of milliseconds


class Patches(Source):
    """Coloured noise of several sizes; image i is a function of i. Some may be unreadable."""

    def __init__(self, count: int = 48, unreadable: tuple[int, ...] = ()) -> None:
        self.spec, self.count, self.unreadable = "patches", count, unreadable
        self.labels = np.arange(count) % 3
        self.classes = ("a", "b", "c")

    def __len__(self) -> int:
        return self.count

    def identity(self, index: int) -> str:
        return f"patch-{index}.png"

    def pixels(self, index: int) -> Pixels:
        if index in self.unreadable:
            raise UnreadableImage(self.identity(index))
        generator = np.random.default_rng(index)
        shape = (36 + index % 9, 40 + index % 7, 3)
        return generator.integers(0, 256, shape, dtype=np.uint8)


def config(name: str, out: Path, **values: Any) -> Pretrain:
    """Resolved settings for a run of a few small steps."""
    _, defaults, own = methods.describe(name)
    base: dict[str, Any] = {
        "data": "patches",
        "out": str(out),
        "backbone": NETWORK,
        "size": 32,
        "epochs": 2.0,
        "batch_size": 8,
        "precision": "fp32",
        "layout": "contiguous",
        "workers": 0,
        "save_every": 3,
        "log_every": 1,
        "threads": 1,
        "device": "cpu",
    }
    small: dict[str, Any] = {"queue_size": 20, "hidden": 32, "dim": 16, "prototypes": 24}
    small |= {"min_size": 8, "aligned": True}  # of boxes on a map of one cell
    small |= {"teacher": f"random:{NETWORK}", "teacher_layer": "backbone"}
    known = {f.name for f in dataclasses.fields(own)}
    base["method"] = {k: v for k, v in small.items() if k in known} | values.pop("method", {})
    return begun(defaults, own, base | values, "test")
