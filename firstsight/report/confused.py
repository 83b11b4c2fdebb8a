"""Which classes a run takes for which: the worst of them, and the whole table folded away."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from firstsight.report.read import Run
from firstsight.report.tables import folded, table


def confusions(runs: Sequence[Run]) -> str:
    """Of each run and reading that says so: that of its last snapshot."""
    alone = len(runs) == 1
    return "".join(
        _confusion(name if alone else f"{run.label}, {name}", result)
        for run in runs
        for name, result in run.latest.items()
        if isinstance(result.get("worst_classes"), list)
    )


def _confusion(name: str, result: dict[str, Any]) -> str:
    rows = [
        (
            escape(str(one["class"])),
            [
                f"{one['top1']:.1f}",
                f"{one['images']}",
                f"{escape(str(one['taken_for']))} ({one['times']})" if one["times"] else "",
            ],
        )
        for one in result["worst_classes"]
    ]
    caption = f"Classes found least often, {escape(name)} at step {result['step']:,.0f}"
    heads = ["Class", "Found, %", "Images", "Most often taken for"]
    worst = table(heads, rows, caption=caption)
    return worst + (_whole(name, result["confusion"]) if "confusion" in result else "")


def _whole(name: str, found: dict[str, Any]) -> str:
    classes = [escape(str(one)) for one in found["classes"]]
    rows = [
        (own, [_shaded(value, max(1, sum(counts))) for value in counts])
        for own, counts in zip(classes, found["table"], strict=True)
    ]
    content = table(["Is, found to be", *classes], rows)
    return folded(f"Confusion of {name}: images of each class by the class found", content)


def _shaded(value: int, of: int) -> str:
    """A count, the darker the larger its share of its row."""
    if not value:
        return ""
    share = round(100 * value / of)
    tint = f"color-mix(in srgb, var(--c0) {share}%, transparent)"
    return f'<span style="background:{tint};padding:0 .4em">{value}</span>'
