"""Results as people read them, and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from firstsight.errors import UserError
from firstsight.log import printable


def show(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    result: dict[str, Any],
    target: str | None,
) -> None:
    """Print a result as a table with its protocol, and write it as JSON where asked."""
    write_json(target, result)  # first: who prints into `head` has it all the same
    table(title, columns, rows)
    protocol(result)


def protocol(result: dict[str, Any]) -> None:
    """Print what a result depends on."""
    said = ", ".join(f"{key} {_worded(value)}" for key, value in result["protocol"].items())
    Console().print(f"protocol: {said}", markup=False, highlight=False)


def _worded(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_worded(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list | tuple):
        return " ".join(map(_worded, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print rows of text below their columns."""
    made = Table(title=Text(printable(title)), title_justify="left", show_header=any(columns))
    for column in columns:
        made.add_column(column, justify="right")
    for row in rows:
        made.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(made)


def write_json(target: str | None, result: dict[str, Any] | list[dict[str, Any]]) -> None:
    """Write a result where `--json` asks for it."""
    if target is not None:
        try:
            Path(target).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            reason = error.strerror
            raise UserError(f"cannot write {target} ({reason}); use another --json") from None
