"""Learn an image backbone from photographs without labels, and say how good it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from firstsight.version import __version__ as __version__

__all__ = ["load_backbone", "open_source", "pretrain"]

if TYPE_CHECKING:
    from pathlib import Path

    from firstsight.backbones import Backbone
    from firstsight.sources import open_source


def load_backbone(checkpoint: str) -> Backbone:
    """The backbone of a CHECKPOINT (a run folder, a file, random:resnet50, ...), ready to use.

    `features(images)` gives pooled features (B, C), `feature_map(images)` the map (B, C, h, w), of
    normalised RGB images (B, 3, H, W).
    """
    from firstsight import checkpoint as checkpoints

    return checkpoints.load_backbone(checkpoint)[0]


def pretrain(method: str, *, data: str, **settings: Any) -> Path:
    """Pretrain `method` on a SOURCE and return the run folder.

    `settings` are those of `config.yaml`, nested ones as dicts: `pretrain("mocov2", data="photos",
    size=64, method={"temperature": 0.1})`. Unknown ones are refused.
    """
    from firstsight import methods, recipes, run
    from firstsight.settings import begun

    _, defaults, own = methods.describe(method)
    values = recipes.beneath(method, {"data": data, **settings})
    return run.pretrain(method, begun(defaults, own, values, "pretrain"))


def __getattr__(name: str) -> Any:
    # found on first use: `firstsight --help` must not wait for torch
    if name == "open_source":
        from firstsight.sources import open_source

        return open_source
    if name in (
        "convert",
        "data",
        "evaluate",
        "geometry",
        "localize",
        "methods",
        "metrics",
        "recipes",
    ):
        import importlib

        return importlib.import_module(f"firstsight.{name}")
    raise AttributeError(f"module 'firstsight' has no attribute {name!r}")
