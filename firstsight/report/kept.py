"""All readings of runs side by side: those of training itself, and those taken of it since."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from firstsight.readings import figures
from firstsight.report.curves import brief
from firstsight.report.read import Run, flat
from firstsight.report.tables import MARK, NONE, compared, heads, table, unlike

KNN, LINEAR = "k-NN", "linear classifier"
"""What a run reads of itself, when it ends."""


def standing(run: Run) -> dict[str, float]:
    """Each figure of the run as it is now; those that are shares of 100 come first."""
    found = {KNN: run.trained, LINEAR: run.linear}
    named = [(f, result) for name, result in run.latest.items() for f in figures(name)]
    for figure, result in sorted(named, key=lambda pair: not pair[0].percent):
        found[figure.said] = figure.of(result)
    return {said: value for said, value in found.items() if value is not None}


def together(runs: Sequence[Run]) -> str:
    """One table: a row for each figure, a column for each run."""
    values = [standing(run) for run in runs]
    unequal = {
        figure.said
        for name in dict.fromkeys(name for run in runs for name in run.latest)
        for figure in figures(name)
        if _read_differently(name, runs)
    }
    rows = [
        (
            escape(said) + (MARK if said in unequal else ""),
            [brief(one[said]) if said in one else NONE for one in values],
        )
        for said in dict.fromkeys(said for one in values for said in one)
    ]
    if not any(run.latest for run in runs):
        return ""
    caption = "All readings, as they are now; what is read differently in the runs is marked"
    own = ["Now"] if len(runs) == 1 else heads(runs)
    made = table(["Figure", *own], rows, caption=caption if len(runs) > 1 else "All readings")
    return f'<div class="all">\n{made}</div>\n'


def _read_differently(name: str, runs: Sequence[Run]) -> bool:
    protocols = [flat(run.latest[name].get("protocol", {})) for run in runs if name in run.latest]
    return bool(set(unlike(protocols)) - {"checkpoint"})


def each(runs: Sequence[Run]) -> str:
    """Of each reading that was taken since all figures, and all that they depend on, folded."""
    parts = []
    for name in dict.fromkeys(name for run in runs for name in run.latest):
        results = [dict(run.latest.get(name, {})) for run in runs]
        protocols = [result.pop("protocol", {}) for result in results]
        numbers = [
            {key: value for key, value in flat(result).items() if not isinstance(value, list)}
            for result in results
        ]
        found = [n | {"protocol": p} for n, p in zip(numbers, protocols, strict=True)]
        parts.append(compared(name, found, runs))
    return "".join(parts)
