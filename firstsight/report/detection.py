"""What a report says of a detector: its figures, precision over recall, and each class."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from firstsight.report.curves import Series, chart
from firstsight.report.read import Run
from firstsight.report.tables import NONE, table

_KINDS = {"bbox": "boxes", "segm": "masks"}
_MEANING = {
    "AP": "mean over IoU .50 to .95",
    "AP50": "IoU .50",
    "AP75": "IoU .75",
    "APs": "objects below 32² pixels",
    "APm": "objects below 96² pixels",
    "APl": "larger objects",
    "AR1": "recall, 1 detection an image",
    "AR10": "recall, 10 detections an image",
    "AR100": "recall, 100 detections an image",
    "ARs": "recall, objects below 32² pixels",
    "ARm": "recall, objects below 96² pixels",
    "ARl": "recall, larger objects",
}
_PIXELS = {"mIoU": "mean over classes of the IoU of pixels", "accuracy": "pixels that are right"}
_CLASSES = 8
"""Curves of classes in one drawing: those with most objects."""


def headline(run: Run) -> str:
    """The average precision in large figures."""
    if "semantic" in run.figures:
        return (
            f'<p class="figure"><b>{_figure(run.figures["semantic"].get("mIoU"))}</b></p>\n'
            '<p class="lead">Mean IoU on the test images, in percent: the mean over classes of the '
            "pixels that are right over those that are of the class or found to be.</p>\n"
        )
    found = [
        f'{_figure(run.figures[kind].get("AP"))} <span class="from">{name}</span>'
        for kind, name in _KINDS.items()
        if kind in run.figures
    ]
    if not found:
        return (
            '<p class="lead">No figures yet: they are read at the end, from --test-data and '
            "--test-annotations.</p>\n"
        )
    return (
        f'<p class="figure"><b>{" · ".join(found)}</b></p>\n'
        '<p class="lead">Average precision on the test images, in percent: the mean over '
        "classes and over IoU .50 to .95, as COCO has it.</p>\n"
    )


def sections(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """Title and content of the sections on detection; none for runs that have no such figures."""
    judged = [run for run in runs if run.figures]
    if not judged:
        return []
    return [
        ("Figures", "".join(_table(kind, judged) for kind in (*_KINDS, "semantic"))),
        ("Precision over recall", _charts(judged)),
        ("Classes", "".join(_classes(run, len(judged) == 1) for run in judged)),
    ]


def _table(kind: str, runs: Sequence[Run]) -> str:
    there = [run for run in runs if kind in run.figures]
    if not there:
        return ""
    meanings = _PIXELS if kind == "semantic" else _MEANING
    rows = [
        (name, [meaning, *(_figure(run.figures[kind].get(name)) for run in there)])
        for name, meaning in meanings.items()
    ]
    heads = ["Percent"] if len(runs) == 1 else [escape(run.label) for run in there]
    what = f"COCO's figures of {_KINDS[kind]}" if kind in _KINDS else "Segmentation, percent"
    return table(["Figure", "", *heads], rows, left=2, caption=what)


def _figure(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, int | float) else NONE


def _charts(runs: Sequence[Run]) -> str:
    drawn = []
    for kind, name in _KINDS.items():
        for overlap in ("0.50", "0.75"):
            curves = [
                Series(label=run.label, colour=colour, points=_points(means[overlap]))
                for colour, run in enumerate(runs)
                if overlap in (means := _part(run.curves, kind, "means"))
            ]
            drawn.append(_chart(f"Mean over classes, {name}, IoU {overlap[1:]}", curves))
    if len(runs) == 1:
        drawn.append(_of_classes(runs[0]))
    return f'<div class="curves">\n{"".join(drawn)}</div>\n' if any(drawn) else ""


def _of_classes(run: Run) -> str:
    curves = _part(run.curves, "bbox", "classes")
    rows = sorted(_rows(run), key=lambda row: -row.get("objects", 0))
    names = [row["name"] for row in rows if row["name"] in curves][:_CLASSES]
    series = [
        Series(label=name, colour=i, points=_points(curves[name])) for i, name in enumerate(names)
    ]
    few = f"The {len(names)} classes with most objects" if len(curves) > len(names) else "Classes"
    return _chart(f"{few}, boxes, IoU .50", series) if len(names) > 1 else ""


def _chart(title: str, series: Sequence[Series]) -> str:
    return chart(title, series, axis="recall", ends=False, from_zero=True, large=True, until=100)


def _points(values: Sequence[float]) -> list[tuple[float, float]]:
    return [(100 * i / (len(values) - 1), float(value)) for i, value in enumerate(values)]


def _part(curves: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    inner = curves.get(kind)
    part = inner.get(name) if isinstance(inner, dict) else None
    return part if isinstance(part, dict) else {}


def _rows(run: Run) -> list[dict[str, Any]]:
    rows = run.figures.get("per_class")
    return rows if isinstance(rows, list) else []


def _classes(run: Run, alone: bool) -> str:
    rows = _rows(run)
    if "semantic" in run.figures:
        return _pixel_classes(run, rows, alone)
    kinds = [kind for kind in _KINDS if rows and kind in rows[0]]
    names = ["Class", "Objects"]
    names += [f"{name}, {_KINDS[kind]}" for kind in kinds for name in ("AP", "AP50", "AR100")]
    body = [
        (
            escape(str(row["name"])),
            [
                f"{row.get('objects', 0):,}",
                *(_figure(row[k].get(name)) for k in kinds for name in ("AP", "AP50", "AR100")),
            ],
        )
        for row in rows
    ]
    caption = "Each class" if alone else f"Each class, {escape(run.label)}"
    return table(names, body, caption=f"{caption}, percent") if rows else ""


def _pixel_classes(run: Run, rows: Sequence[dict[str, Any]], alone: bool) -> str:
    body = [
        (
            escape(str(row["name"])),
            [f"{row['pixels']:,}", _figure(row.get("IoU")), _figure(row.get("recall"))],
        )
        for row in rows
    ]
    caption = "Each class" if alone else f"Each class, {escape(run.label)}"
    return table(["Class", "Pixels", "IoU", "Found"], body, caption=f"{caption}, percent")
