"""A backbone handed over: read from any known checkpoint, written for another library."""

from __future__ import annotations

from firstsight.convert.hand_over import read, report, run, sidecar, write

__all__ = ["read", "report", "run", "sidecar", "write"]
