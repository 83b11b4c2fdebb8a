"""Precision over recall, kept in a file beside the figures: a page draws it, nobody reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from firstsight import checkpoint

FILE = "curves.json"
"""Its name in a run's folder."""


def kept_apart(out: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Write the curves of `figures` into the run's folder, and give the figures without them."""
    if "curves" in result:
        checkpoint.write_json(out / FILE, result["curves"])
    return {name: value for name, value in result.items() if name != "curves"}
