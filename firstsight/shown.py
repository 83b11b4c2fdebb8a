"""Results as people read them, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firstsight.errors import UserError


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text below their columns."""
    made = Table(title=Text(title), title_justify="left", show_header=any(columns))
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    Console().print(made)


def write_json(target: str | None, result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a result where `--json` asks for it."""
    if target is not None:
        try:
            Path(target).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            reason = error.strerror
            raise UserError(f"cannot write {target} ({reason}); use another --json") from None
