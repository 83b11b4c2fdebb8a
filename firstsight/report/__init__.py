"""Run folders -> one HTML page that needs nothing but itself.

It reads files only, and never imports torch: a report is there at once, also of a run in progress.
"""

from __future__ import annotations

import os
from pathlib import Path

from firstsight.errors import UserError
from firstsight.report.page import page
from firstsight.report.read import read_runs


def write_report(runs: list[Path], out: Path) -> Path:
    """Write one self-contained HTML page about these run folders to `out`, whole or not at all.

    A run may still be in progress. Several runs are compared. Raises `UserError` where a folder is
    no run, one of its files is damaged, or `out` cannot be written.
    """
    text = page(read_runs(runs))
    part = out.with_name(f".{out.name}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # a path that is no valid text (from a foreign disk) must not cost the report
        part.write_text(text, encoding="utf-8", errors="replace")
        os.replace(part, out)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {out} ({reason}); use another --out") from None
    return out
