"""How runs went: their charts."""

from __future__ import annotations

from collections.abc import Sequence

from firstsight.readings import FIGURES, Figure, figures
from firstsight.report.curves import PERCENT, Point, Series, chart
from firstsight.report.kept import KNN, LINEAR, standing
from firstsight.report.read import Run

_KNOWN = ("step", "epoch", "loss", "lr", "images_per_second", "data_wait", "bad_images")
_READINGS = ("knn", "knn_quick")


def curves(runs: Sequence[Run]) -> str:
    """All charts, the large ones first."""

    def of(name: str, scale: float = 1.0) -> list[Series]:
        return [
            Series(label=r.label, colour=i, points=[(s, v * scale) for s, v in r.curve(name)])
            for i, r in enumerate(runs)
        ]

    until = max(run.steps for run in runs)
    large = [
        chart("Loss", of("loss"), smooth=True, large=True, until=until, note=_LOSS_NOTE),
        _knn_chart(runs),
        _linear_chart(runs),
    ]
    small = [
        chart("Learning rate", of("lr"), from_zero=True, until=until),
        chart("Images a second", of("images_per_second"), smooth=True, from_zero=True, until=until),
        chart(
            "Waiting for data",
            of("data_wait", 100),
            unit=PERCENT,
            smooth=True,
            from_zero=True,
            until=until,
        ),
    ]
    if any(run.bad_images for run in runs):
        small.append(chart("Unreadable images", of("bad_images"), from_zero=True, until=until))
    others = dict.fromkeys(name for run in runs for name in run.scalars)
    small += [
        chart(name.replace("_", " ").capitalize(), of(name), smooth=True, until=until)
        for name in others
        if name not in (*_KNOWN, *_READINGS) and not name.startswith("linear_")
    ]
    taken = dict.fromkeys(name for run in runs for name in run.readings)
    over = [(name, figure) for name in taken for figure in figures(name)]
    large += [_reading_chart(name, figure, runs) for name, figure in over]
    if len(runs) > 1:
        large += [_by_the_clock("k-NN accuracy", PERCENT, [_knn(run) for run in runs], runs)]
        large += [_reading_by_the_clock(name, figure, runs) for name, figure in over]
        large += _against_each_other(runs)
    groups = [("curves", large), ("curves small", small)]
    return "".join(f'<div class="{c}">\n{"".join(g)}</div>\n' for c, g in groups if any(g))


_LOSS_NOTE = "Thin: as logged. Bold: the trend."


def _knn_chart(runs: Sequence[Run]) -> str:
    series = []
    for colour, run in enumerate(runs):
        full, quick = dict(run.curve("knn")), dict(run.curve("knn_quick"))
        points = sorted((quick | full).items())
        hollow = frozenset(quick.keys() - full.keys())
        series.append(Series(label=run.label, colour=colour, points=points, hollow=hollow))
    chances = {run.chance for run in runs if run.chance is not None}
    chance = chances.pop() if len(chances) == 1 else None
    quick_bank = {run.settings.get("probe-images") for run in runs}
    part = next(iter(quick_bank)) if len(quick_bank) == 1 else None
    least = f" (a bank of at most {part:,})" if isinstance(part, int) else ""
    return chart(
        "k-NN accuracy",
        series,
        unit=PERCENT,
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        level=(chance, f"chance {chance:.3g}{PERCENT}") if chance is not None else None,
        note=f"Filled: all images. Hollow: quick readings on a part of them{least}. "
        "Step 0: untrained.",
    )


def _knn(run: Run) -> list[Point]:
    return sorted((dict(run.curve("knn_quick")) | dict(run.curve("knn"))).items())


def _reading_by_the_clock(name: str, figure: Figure, runs: Sequence[Run]) -> str:
    known = [run.over(name, figure) for run in runs]
    return _by_the_clock(_capital(figure.said), _unit(figure), known, runs)


def _by_the_clock(
    what: str, unit: str, known: Sequence[Sequence[Point]], runs: Sequence[Run]
) -> str:
    """(step, value) of several runs by time: of equally good ones the quicker is to be had sooner.

    Where one run alone has them there is nothing to compare.
    """
    if sum(bool(points) for points in known) < 2:
        return ""
    timed = []
    for colour, (run, values) in enumerate(zip(runs, known, strict=True)):
        points = [(run.seconds(step), value) for step, value in values]
        drawn = [(when, value) for when, value in points if when is not None]
        timed.append(Series(label=run.label, colour=colour, points=drawn))
    last = max((when for one in timed for when, _ in one.points), default=0.0)
    name, seconds = ("second", 1) if last < _MINUTES else ("minute", 60)
    series = [
        Series(label=s.label, colour=s.colour, points=[(x / seconds, y) for x, y in s.points])
        for s in timed
    ]
    return chart(
        f"{what} by the clock",
        series,
        unit=unit,
        marked=True,
        large=True,
        axis=name,
        note="Time of training alone, at the rate of the whole run.",
    )


_MINUTES = 300
"""Seconds from which the clock shows minutes."""


def _against_each_other(runs: Sequence[Run]) -> list[str]:
    """A dot for each run: do its readings agree with the first that most runs have?"""
    values = [standing(run) for run in runs]
    shared = [name for name, count in _counted(values).items() if count > 1]
    if not shared or shared[0] not in _shares():
        return []
    base, *others = shared
    return [_dots(base, other, values, runs) for other in others]


def _counted(values: Sequence[dict[str, float]]) -> dict[str, int]:
    """In how many runs each figure is, those that are in all of them first."""
    names = dict.fromkeys(name for one in values for name in one)
    counts = {name: sum(name in one for one in values) for name in names}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _shares() -> set[str]:
    return {KNN, LINEAR} | {f.said for every in FIGURES.values() for f in every if f.percent}


def _dots(base: str, other: str, values: Sequence[dict[str, float]], runs: Sequence[Run]) -> str:
    series = [
        Series(label=run.label, colour=colour, points=[(one[base], one[other])])
        for colour, (run, one) in enumerate(zip(runs, values, strict=True))
        if base in one and other in one
    ]
    if len(series) < 2:
        return ""
    return chart(
        f"{_capital(other)} against {base}",
        series,
        unit=PERCENT if other in _shares() else "",
        marked=True,
        large=True,
        axis=f"{base} percent",
        note=f"Across: {base}, up: {other}, as they are now. Runs whose order differs between the "
        "two are not told apart by one reading.",
    )


def _linear_chart(runs: Sequence[Run]) -> str:
    """The linear probes: one run by learning rate, several runs each by its best in the end."""
    series = []
    for colour, run in enumerate(runs):
        curves: dict[str, list[tuple[float, float]]] = {}
        for name in (n for n in run.scalars if n.startswith("linear_")):
            lr = name.rpartition("_")[2]
            curves[lr] = sorted(curves.get(lr, []) + run.curve(name))
        if len(runs) > 1 and curves:
            best = max(curves, key=lambda lr: curves[lr][-1][1])
            curves = {f"{run.label}, {best}": curves[best]}
        for place, (lr, points) in enumerate(curves.items()):
            colours = colour if len(runs) > 1 else place
            series.append(Series(label=lr, colour=colours, points=points))
    return chart(
        "Linear probes, by learning rate",
        series,
        unit=PERCENT,
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        note="Accuracy on a part of the test images, at the end on all of them. Of several runs, "
        "the probe that ends best.",
    )


def _reading_chart(name: str, figure: Figure, runs: Sequence[Run]) -> str:
    series = [
        Series(label=run.label, colour=colour, points=run.over(name, figure))
        for colour, run in enumerate(runs)
    ]
    return chart(
        f"{_capital(figure.said)}, of the snapshots",
        series,
        unit=_unit(figure),
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        note=f"As {name}.json in the run's folder of readings has it, with its protocol.",
    )


def _unit(figure: Figure) -> str:
    return PERCENT if figure.percent else ""


def _capital(text: str) -> str:
    return text if text.startswith("k-NN") else text[0].upper() + text[1:]
