"""The tables of a report: readings with their protocols, and settings. All text is escaped here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from firstsight.report.curves import swatch
from firstsight.report.read import Run, flat
from firstsight.settings import UNBOUND

NONE = "\N{EN DASH}"
"""Stands where there is no figure."""

_KINDS = {
    "knn": "k-NN",
    "linear": "Linear classifier on frozen features",
    "linear_online": "Linear probes during the run",
}

_AT_A_GLANCE = 16
"""Rows of a table that is not folded away."""

_ELSEWHERE = {*UNBOUND, "out"}
"""Settings that change no result; they are not shown as differences."""


def table(
    names: Sequence[str],
    rows: Iterable[tuple[str, Sequence[str]]],
    *,
    left: int = 1,
    caption: str = "",
) -> str:
    """A table that scrolls by itself; cells are HTML, the first `left` columns are text."""
    sides = ["" if i < left else ' class="n"' for i in range(len(names))]
    head = "".join(f'<th scope="col"{s}>{n}</th>' for n, s in zip(names, sides, strict=True))
    body = []
    for name, cells in rows:
        inner = "".join(f"<td{s}>{c}</td>" for c, s in zip(cells, sides[1:], strict=True))
        body.append(f'<tr><th scope="row">{name}</th>{inner}</tr>\n')
    said = f"<caption>{caption}</caption>" if caption else ""
    # what scrolls must be reachable by keyboard
    return (
        f'<div class="scroll" tabindex="0"><table>{said}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{''.join(body)}</tbody></table></div>\n"
    )


def section(title: str, content: str) -> str:
    """A part of the page under its title; nothing where there is nothing."""
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def readings(runs: Sequence[Run]) -> str:
    """For each kind of reading its figures, and everything that they depend on."""
    kinds = dict.fromkeys(
        name for run in runs for name, value in run.summary.items() if "protocol" in _inner(value)
    )
    found = "".join(_reading(kind, runs) for kind in kinds)
    return found if "knn" in kinds else found + _by_step(runs)


def _reading(kind: str, runs: Sequence[Run]) -> str:
    found = [_inner(run.summary.get(kind)) for run in runs]
    name = escape(_KINDS.get(kind, _worded(kind)))
    steps = _by_step(runs) if kind == "knn" else ""
    return _sided(name, f"{name}, accuracy in percent", found, runs, steps)


def compared(name: str, found: Sequence[dict[str, Any]], runs: Sequence[Run]) -> str:
    """The figures of a result of each run, and how they were read, folded away."""
    return folded(f"All of {name}", _sided(escape(name), escape(name), found, runs))


def _sided(
    name: str, caption: str, found: Sequence[dict[str, Any]], runs: Sequence[Run], below: str = ""
) -> str:
    figures = [flat({k: v for k, v in reading.items() if k != "protocol"}) for reading in found]
    protocols = [flat(_inner(reading.get("protocol"))) for reading in found]
    differing = unlike([protocol for protocol in protocols if protocol])
    own = ["Value"] if len(runs) == 1 else heads(runs)
    came_out = table(
        ["Figure", *own],
        [(escape(_worded(n)), [_exact(f.get(n)) for f in figures]) for n in _union(figures)],
        caption=caption,
    )
    caption = f"How {name} was read"
    depends_on = ""
    if differing:
        rows = [
            (escape(_worded(n)) + MARK, [escape(typed(p.get(n, NONE))) for p in protocols])
            for n in differing
        ]
        where = f"{caption}, where the runs differ"
        depends_on = table(["Protocol", *own], rows, left=1 + len(runs), caption=where)
    common = {n: v for p in protocols for n, v in p.items() if n not in differing}
    alike = [(escape(_worded(n)), [escape(typed(v))]) for n, v in common.items()]
    whose = [head for head, protocol in zip(own, protocols, strict=True) if protocol]
    shared = "All runs" if 1 < len(whose) == len(runs) else ", ".join(whose)
    depends_on += table(["Protocol", shared], alike, left=2, caption=caption)
    return (
        f'<div class="pair tables">\n<div>\n{came_out}{below}</div>\n'
        f"<div>\n{depends_on}</div>\n</div>\n"
    )


def _by_step(runs: Sequence[Run]) -> str:
    rows = [
        (step, run.label, kind, value)
        for run in runs
        for name, kind in (("knn", "all"), ("knn_quick", "a part"))
        for step, value in run.curve(name)
    ]
    rows.sort(key=lambda row: row[:2])
    several = len(runs) > 1
    shown = table(
        ["Step", *(["Run"] if several else []), "Images", "k-NN, %"],
        [
            (f"{step:,.0f}", [*([escape(label)] if several else []), kind, _exact(value)])
            for step, label, kind, value in rows
        ],
        left=3 if several else 2,
    )
    opened = " open" if len(rows) <= _AT_A_GLANCE else ""
    return folded("All k-NN readings, step by step", shown, opened) if rows else ""


def settings(run: Run) -> str:
    """What differs from the method's defaults; all the rest folded away."""
    changed = _changed(run)
    rows = [
        (f"<code>{escape(n)}</code>", [_code(run.settings[n]), _code(run.defaults.get(n, NONE))])
        for n in changed
    ]
    names = ["Setting", "This run", f"Default of {escape(run.method)}"]
    top = table(names, rows, left=3) if rows else "<p>All settings are the method's defaults.</p>\n"
    if not run.defaults:
        top = f"<p>The defaults of {escape(run.method)} are not known here.</p>\n"
    return top + _all_settings(run, "All settings")


def differences(runs: Sequence[Run]) -> str:
    """What differs between the runs; all settings of each folded away."""
    every = [{"method": run.method, **run.settings} for run in runs]
    rows = [
        (f"<code>{escape(name)}</code>", [_code(values.get(name, NONE)) for values in every])
        for name in unlike(every)
        if name not in _ELSEWHERE
    ]
    top = "<p>The runs have the same settings.</p>\n"
    if rows:
        caption = "Settings that differ between the runs"
        top = table(["Setting", *heads(runs)], rows, left=1 + len(runs), caption=caption)
    return top + "".join(_all_settings(run, f"All settings of {run.label}") for run in runs)


def _all_settings(run: Run, title: str) -> str:
    changed = _changed(run)
    rows = [
        (f"<code>{escape(n)}</code>" + (MARK if n in changed else ""), [_code(v)])
        for n, v in run.settings.items()
    ]
    return folded(title, table(["Setting", "Value"], rows, left=2))


def _changed(run: Run) -> list[str]:
    """Settings that change results and are not the method's defaults."""
    own = run.settings
    return [
        name
        for name in own
        if run.defaults and name not in _ELSEWHERE and own[name] != run.defaults.get(name)
    ]


MARK = ' <span class="mark">differs</span>'
"""Stands behind what the runs of a table do not share."""


def folded(title: str, content: str, opened: str = "") -> str:
    """What is there for those who open it; `content` is HTML."""
    return f"<details{opened}><summary>{escape(title)}</summary>\n{content}</details>\n"


def heads(runs: Sequence[Run]) -> list[str]:
    """A column for each run, in its colour."""
    return [f"{swatch(i)}{escape(run.label)}" for i, run in enumerate(runs)]


def _inner(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _worded(name: str) -> str:
    return re.sub(r"\.(?!\d)", ", ", name).replace("-", " ").replace("_", " ")  # 0.1 stays


def _exact(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if math.isfinite(value) else "not a number"
    return escape(NONE if value is None else typed(value))


def _code(value: Any) -> str:
    return f"<code>{escape(typed(value))}</code>"


def unlike(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Names whose values are not the same in all tables."""
    return [
        name for name in _union(tables) if any(t.get(name) != tables[0].get(name) for t in tables)
    ]


def _union(tables: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for table in tables for name in table))


def typed(value: Any) -> str:
    """A setting as it would be typed."""
    if isinstance(value, list):
        return " ".join(typed(item) for item in value) if value else "none"
    if isinstance(value, str):
        return value or "none"
    return "none" if value is None else json.dumps(value, default=str)
