"""How runs went: their charts."""

from __future__ import annotations

from collections.abc import Sequence

from firstsight.report.curves import PERCENT, Series, chart
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
    large += [_reading_chart(name, runs) for name in taken]
    large += [_against_time(runs), _against_each_other(runs)]
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


def _against_time(runs: Sequence[Run]) -> str:
    """k-NN of several runs by the clock: of equally good ones the quicker is to be had sooner."""
    if len(runs) < 2:
        return ""
    timed = []
    for colour, run in enumerate(runs):
        known = sorted((dict(run.curve("knn_quick")) | dict(run.curve("knn"))).items())
        points = [(run.seconds(step), value) for step, value in known]
        drawn = [(when, value) for when, value in points if when is not None]
        timed.append(Series(label=run.label, colour=colour, points=drawn))
    last = max((when for one in timed for when, _ in one.points), default=0.0)
    name, unit = ("second", 1) if last < _MINUTES else ("minute", 60)
    series = [
        Series(label=s.label, colour=s.colour, points=[(x / unit, y) for x, y in s.points])
        for s in timed
    ]
    return chart(
        "k-NN accuracy by the clock",
        series,
        unit=PERCENT,
        marked=True,
        large=True,
        axis=name,
        note="Time of training alone, at the rate of the whole run.",
    )


_MINUTES = 300
"""Seconds from which the clock shows minutes."""


def _against_each_other(runs: Sequence[Run]) -> str:
    """A dot for each run: do its readings agree?"""
    series = [
        Series(label=run.label, colour=colour, points=[(run.trained, run.linear)])
        for colour, run in enumerate(runs)
        if run.trained is not None and run.linear is not None
    ]
    if len(series) < 2:
        return ""
    return chart(
        "Linear classifier against k-NN",
        series,
        unit=PERCENT,
        marked=True,
        large=True,
        axis="k-NN percent",
        note="After training, across: k-NN, up: linear. Runs whose order differs between the two "
        "are not told apart by one reading.",
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


def _reading_chart(name: str, runs: Sequence[Run]) -> str:
    series = [
        Series(label=run.label, colour=colour, points=run.readings.get(name, []))
        for colour, run in enumerate(runs)
    ]
    return chart(
        f"{name} of the snapshots",
        series,
        unit=PERCENT,
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        note=f"{'CorLoc .5' if name == 'localize' else 'Top-1'}, as {name}.json in the run's "
        "folder of readings has it with its protocol.",
    )
