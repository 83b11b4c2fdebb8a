"""Where the object is, from activations alone: boxes, scores, controls, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstsight.localize.grids import masks
    from firstsight.localize.objects import run

__all__ = ["masks", "run"]


def __getattr__(name: str) -> Any:
    # found on first use: the commands' settings are here too, and their help must not wait
    if name == "run":
        from firstsight.localize.objects import run

        return run
    if name == "masks":
        from firstsight.localize.grids import masks

        return masks
    raise AttributeError(f"module 'firstsight.localize' has no attribute {name!r}")
