"""Three questions about a run, each answered in a sentence with its evidence."""

from __future__ import annotations

import math
from html import escape

from firstsight.report.read import Run

ALIKE = 0.02
"""Spread of embeddings below which they count as one point, as `firstsight diagnose` has it."""

_ERRORS = 2
"""Standard errors of an accuracy that a difference must exceed to count."""


def answers(run: Run) -> str:
    """Is it learning, has it collapsed, which checkpoint should I take: as HTML."""
    told = (
        ("Is it learning?", learning(run)),
        ("Has it collapsed?", collapsed(run)),
        ("Which checkpoint should I take?", checkpoint(run)),
    )
    items = "".join(
        f"<dt>{question}</dt>\n<dd>{escape(sentence)}</dd>\n" for question, sentence in told
    )
    return f"<dl>\n{items}</dl>\n"


def learning(run: Run) -> str:
    """Whether k-NN rose from the untrained network on by more than chance explains."""
    now = _latest(run)
    if run.untrained is None or now is None:
        return (
            "Not measured: a loss does not say how good features are. Readings of labelled "
            "images do: --probe-test SOURCE."
        )
    gain = now - run.untrained
    said = f"k-NN went from {run.untrained:.1f} % untrained to {now:.1f} %"
    if abs(gain) <= _margin(run, now):
        return f"Not visibly: {said}, within {_margin(run, now):.1f} points of chance."
    return f"{'Yes' if gain > 0 else 'No, it unlearns'}: {said}."


def collapsed(run: Run) -> str:
    """Whether embeddings are one point, or k-NN does no better than guessing."""
    spread, now = run.last("embedding_spread"), _latest(run)
    if spread is not None and spread < ALIKE:
        return f"Yes: all embeddings look alike (spread {spread:.2g}, where 1 is an even cloud)."
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
    """The last one, unless the readings of the snapshots have a better one beyond chance."""
    for name, points in run.readings.items():
        found = [(step, top1) for step, top1 in points if math.isfinite(top1)]
        if not found:
            continue
        (last_step, last), (step, best) = found[-1], max(found, key=lambda point: point[1])
        if best - last > _margin(run, last):
            return (
                f"The snapshot of step {step:,.0f}: its {name} is {best:.1f} %, that of step "
                f"{last_step:,.0f} {last:.1f} %. The test images chose it, so its figure flatters."
            )
        return (
            f"The last: none of {len(found)} snapshots has a {name} beyond chance above its "
            f"{last:.1f} %."
        )
    return (
        "The last, for want of other evidence: firstsight evaluate knn RUN --snapshots reads all "
        "that were kept."
    )


def _latest(run: Run) -> float | None:
    return run.trained if run.trained is not None else run.last("knn_quick")


def _margin(run: Run, percent: float) -> float:
    """What two accuracies may differ by through the choice of test images alone, in points."""
    test = run.protocol.get("test")
    images = test.get("images") if isinstance(test, dict) else None
    if run.trained is None or not isinstance(images, int):
        images = run.settings.get("probe-images")
        images = images // 2 if isinstance(images, int) else None
    share = min(max(percent / 100, 0.0), 1.0)
    return _ERRORS * 100 * math.sqrt(share * (1 - share) / max(1, images or 1000))
