"""Three questions about a run, each answered in a sentence with its evidence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from firstsight.readings import Figure, figures
from firstsight.report.read import Run

ALIKE = 0.02
"""Spread of embeddings below which they count as one point, as `firstsight diagnose` has it."""

RICHER = 1.1
"""How many times the effective rank of the last snapshot another must have to be worth a try."""

LABELLED = ("knn", "linear", "finetune", "dense", "localize")
"""Readings that somebody's marks judge, those first that are asked first."""

_ERRORS = 2
"""Standard errors of an accuracy that a difference must exceed to count."""


def answers(runs: Sequence[Run]) -> str:
    """Is it learning, has it collapsed, which checkpoint should I take: as HTML.

    What holds for several runs is said once, and of whom where it does not hold for all.
    """
    if not runs:
        return ""
    items = ""
    for question, answer in (
        ("Is it learning?", learning),
        ("Has it collapsed?", collapsed),
        ("Which checkpoint should I take?", checkpoint),
    ):
        said: dict[str, list[str]] = {}
        for run in runs:
            said.setdefault(answer(run), []).append(run.label)
        items += f"<dt>{question}</dt>\n"
        for sentence, labels in said.items():
            whose = f"<b>{escape(', '.join(labels))}</b>: " if len(said) > 1 else ""
            items += f"<dd>{whose}{escape(sentence)}</dd>\n"
    return f"<dl>\n{items}</dl>\n"


def learning(run: Run) -> str:
    """Whether an accuracy rose by more than chance explains, from the untrained network on.

    That of k-NN beside the run or, where there is none, the first that snapshots were read for.
    """
    now, before = _latest(run), run.untrained
    if before is not None and now is not None:
        said = f"k-NN {_moved(f'{before:.1f} %', f'{now:.1f} %', 'untrained')}"
        return _gained(said, now - before, _margin(run, now))
    for name, figure, points in _accuracies(run):
        (start, before), (end, now) = points[0], points[-1]
        if start < end:
            said = f"{figure.said}{_on(run.readings[name][-1])} "
            said += _moved(f"{before:.1f} %", f"{now:.1f} %", f"at step {start:,.0f}")
            return _gained(said, now - before, _error(now, _asked(run.readings[name][-1])))
    return (
        "Not measured: a loss does not say how good features are. Readings of labelled images do: "
        "--probe-test SOURCE, or firstsight evaluate knn RUN --snapshots."
    )


def _moved(before: str, now: str, when: str) -> str:
    return f"went from {before} {when} to {now}" if before != now else f"stayed at {now}"


def _gained(said: str, gain: float, margin: float) -> str:
    if abs(gain) <= margin:
        return f"Not visibly: {said}, within {margin:.1f} points of chance."
    return f"{'Yes' if gain > 0 else 'No, it unlearns'}: {said}."


def collapsed(run: Run) -> str:
    """Whether embeddings are one point, images look alike, or k-NN does no better than guessing."""
    spread, now = run.last("embedding_spread"), _latest(run)
    if spread is not None and spread < ALIKE:
        return f"Yes: all embeddings look alike (spread {spread:.2g}, where 1 is an even cloud)."
    found = run.latest.get("diagnose", {})
    if isinstance(found.get("collapse"), str):
        at = f"as firstsight diagnose found at step {found['step']:,.0f}"
        if found["collapse"] != "none":
            return f"Yes, {found['collapse']}, {at}."
        rank, width = found.get("effective_rank", math.nan), len(found.get("spectrum", ()))
        return f"No: images differ, in about {rank:.1f} of {width} dimensions, {at}."
    if now is not None and run.chance is not None and now <= run.chance + _margin(run, now):
        return (
            f"Perhaps: k-NN, {now:.1f} %, does no better than guessing ({run.chance:.3g} %); "
            "firstsight diagnose looks closer."
        )
    if spread is not None:
        return f"No: embeddings differ (spread {spread:.2g}, where 0 is one point)."
    if now is not None and run.chance is not None:
        return f"No: k-NN, {now:.1f} %, does better than guessing ({run.chance:.3g} %)."
    return "Not measured: firstsight diagnose tells, without labels."


def checkpoint(run: Run) -> str:
    """The last one, unless the readings of the snapshots have a better one beyond chance.

    Where none is of labelled images, the effective rank may speak for an earlier one.
    """
    for name, figure, points in _accuracies(run):
        what = figure.said + _on(run.readings[name][-1])
        (last_step, last), (step, best) = points[-1], max(points, key=lambda point: point[1])
        if best - last > _error(last, _asked(run.readings[name][-1])):
            return (
                f"The snapshot of step {step:,.0f}: {what} is {best:.1f} % there, and "
                f"{last:.1f} % at step {last_step:,.0f}. The test images chose it, so its figure "
                "flatters."
            )
        return (
            f"The last: none of {len(points)} snapshots has {what} beyond chance above its "
            f"{last:.1f} %."
        )
    rank = figures("diagnose")[0]
    if ranks := run.over("diagnose", rank):
        step, best = max(ranks, key=lambda point: point[1])
        if best > RICHER * ranks[-1][1]:
            return (
                f"Perhaps the snapshot of step {step:,.0f}: its effective rank is {best:.1f}, that "
                f"of the last {ranks[-1][1]:.1f}. Labelled images would tell for certain."
            )
        return f"The last: no snapshot has a clearly higher effective rank ({ranks[-1][1]:.1f})."
    return (
        "The last, for want of other evidence: firstsight evaluate knn RUN --snapshots reads all "
        "that were kept."
    )


def _accuracies(run: Run) -> list[tuple[str, Figure, list[tuple[float, float]]]]:
    """Readings of snapshots: name, what matters most of it, and its curve."""
    found = [(name, figures(name)[0]) for name in LABELLED if name in run.readings]
    curves = [(name, figure, run.over(name, figure)) for name, figure in found]
    return [one for one in curves if one[2]]


def _on(result: dict[str, Any]) -> str:
    """Which images a reading asked about, where it says so."""
    protocol = result.get("protocol")
    found = protocol.get("test", protocol.get("data")) if isinstance(protocol, dict) else None
    return f" on {found}" if isinstance(found, str) else ""


def _asked(result: dict[str, Any]) -> int | None:
    """How many test images a reading counted."""
    images = result.get("images")
    count = images.get("test") if isinstance(images, dict) else images
    return count if isinstance(count, int) else None


def _latest(run: Run) -> float | None:
    return run.trained if run.trained is not None else run.last("knn_quick")


def _margin(run: Run, percent: float) -> float:
    """What two accuracies may differ by through the choice of test images alone, in points."""
    test = run.protocol.get("test")
    images = test.get("images") if isinstance(test, dict) else None
    if run.trained is None or not isinstance(images, int):
        images = run.settings.get("probe-images")
        images = images // 2 if isinstance(images, int) else None
    return _error(percent, images)


def _error(percent: float, images: int | None) -> float:
    share = min(max(percent / 100, 0.0), 1.0)
    return _ERRORS * 100 * math.sqrt(share * (1 - share) / max(1, images or 1000))
