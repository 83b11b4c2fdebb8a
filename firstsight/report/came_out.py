"""The head of a report: what came out, in large figures or in a table of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from firstsight.report import detection
from firstsight.report.curves import PERCENT, brief, swatch
from firstsight.report.read import Run, flat
from firstsight.report.tables import NONE, table, unlike


def header(title: str, runs: Sequence[Run]) -> str:
    """Title, the figure that matters, and facts; of several runs one table."""
    kind = "detection" if all(run.detects for run in runs) else "pretraining"
    parts = [f'<p class="eyebrow">firstsight · {kind}</p>\n<h1>{escape(title)}</h1>\n']
    if len(runs) == 1:
        parts += [_state(runs[0]), _headline(runs[0]), _facts(runs[0])]
    else:
        parts.append(_comparison(runs))
    return f"<header>\n{''.join(parts)}</header>\n"


def _state(run: Run) -> str:
    if run.summary:
        return ""
    wanted = run.steps_wanted
    done = f"step {run.steps:,}" + (f" of {wanted:,}" if wanted else "")
    return f'<p class="state">Not finished: {done}. The figures below are those so far.</p>\n'


def _headline(run: Run) -> str:
    """The reading that matters, in large figures, and in words how it was taken."""
    if run.detects:
        return detection.headline(run)
    before, after, quick = run.untrained, run.trained, run.last("knn_quick")
    if before is None and after is None and quick is None:
        return _loss_headline(run)
    latest = after
    if after is not None:
        when = "before and after pretraining." if before is not None else "after pretraining."
    elif quick is not None:
        latest, when = quick, "so far: the last figure is a quick reading, on a part of the images."
    else:
        before, latest, when = None, before, "before pretraining; there is no other reading yet."
    gain = _gain(after - before) if before is not None and after is not None else ""
    start = _start(None if before is None else f"{before:.1f}", f"{latest:.1f}")
    return (
        f'<p class="figure">{start}<b>{latest:.1f}{PERCENT}</b> {gain}</p>\n'
        f'<p class="lead">k-NN accuracy on {_test(run)}, {when} {_protocol_in_words(run)}</p>\n'
    )


def _loss_headline(run: Run) -> str:
    losses = [v for _, v in run.curve("loss") if math.isfinite(v)]
    if not losses:
        return '<p class="lead">Nothing has been logged yet.</p>\n'
    first, last = brief(losses[0]), brief(losses[-1])
    when = "from the first logged step to the last" if len(losses) > 1 else "logged once so far"
    return (
        f'<p class="figure">{_start(first, last)}<b>{last}</b></p>\n<p class="lead">Loss, {when}. '
        "A loss does not say how good the features are: with labels for some images, "
        "<code>--probe-test SOURCE</code> adds k-NN readings.</p>\n"
    )


def _start(first: str | None, last: str) -> str:
    """Where a figure comes from; nothing where it did not move."""
    return "" if first in (None, last) else f'<span class="from">{first}</span> → '


def _test(run: Run) -> str:
    return escape(str(_part(run, "test").get("source") or "its test images"))


def _part(run: Run, role: str) -> dict[str, Any]:
    part = run.protocol.get(role)
    return part if isinstance(part, dict) else {}


def _gain(points: float) -> str:
    if f"{abs(points):.1f}" == "0.0":
        return '<span class="gain">no change</span>'
    sign = "+" if points >= 0 else "\N{MINUS SIGN}"
    look = "gain" if points >= 0 else "gain loss"
    return f'<span class="{look}">{sign}{abs(points):.1f} points</span>'


def _protocol_in_words(run: Run) -> str:
    protocol, train = run.protocol, _part(run, "train")
    queries = f"Each of its {_count(_part(run, 'test').get('images'))}images"
    bank = f"{_count(train.get('images'))}labelled images"
    bank += f" of {escape(str(train['source']))}" if train.get("source") else ""
    votes = _count(protocol.get("k"))
    weights = ""
    if (
        protocol.get("temperature") is not None
        and protocol.get("weighting", "softmax") == "softmax"
    ):
        weights = f", votes weighted by exp(cosine / {escape(str(protocol['temperature']))})"
    chance = f" Guessing would get {run.chance:.3g}{PERCENT}." if run.chance is not None else ""
    return (
        f"{queries} is given the class that its {votes}nearest "
        f"neighbours among {bank} vote for: nearest by the cosine of the frozen backbone's "
        f"features{weights}. Pretraining itself saw no label.{chance}"
    )


def _count(value: Any) -> str:
    return f"{value:,} " if isinstance(value, int) else ""


def _facts(run: Run) -> str:
    ask = run.settings
    side = ask.get("size")
    facts = [
        ("Images seen", f"{run.images:,}"),
        ("Steps", f"{run.steps:,}"),
        ("Time", duration(run.summary.get("seconds"))),
        ("Images a second", brief(run.rate) if run.rate else NONE),
        ("Unreadable", f"{run.bad_images:,}"),
        ("Backbone", f"{ask.get('backbone', ask.get('checkpoint', NONE))}"),
        ("View size", f"{side} px" if side else NONE),
        ("Batch", f"{ask.get('batch-size', NONE)}"),
    ]
    items = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>\n" for k, v in facts)
    return f'<dl class="facts">\n{items}</dl>\n'


def duration(seconds: Any) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 1 h 2 min; a dash where they are not known."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NONE
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _comparison(runs: Sequence[Run]) -> str:
    read = any(run.untrained is not None or run.trained is not None for run in runs)
    names = ["Run", "Method", "Backbone"]
    names += ["Untrained, %", "Trained, %", "Gain"] if read else []
    linear = any(run.linear is not None for run in runs)
    names += ["Linear, %"] if linear else []
    names += ["Images seen", "Time", "Images/s"]
    bad = any(run.bad_images for run in runs)
    names += ["Unreadable"] if bad else []
    best = max((run.trained for run in runs if run.trained is not None), default=None)
    rows = []
    for colour, run in enumerate(runs):
        wanted = run.steps_wanted
        state = "" if run.summary else f"step {run.steps:,}" + (f" of {wanted:,}" if wanted else "")
        head = f"{swatch(colour)}{escape(run.label)}" + (
            f" <small>{state}</small>" if state else ""
        )
        cells = [escape(run.method), escape(str(run.settings.get("backbone", NONE)))]
        if read:
            before, after = run.untrained, run.trained
            trained = _percent(after)
            gain = NONE if before is None or after is None else f"{after - before:+.1f}"
            cells += [
                _percent(before),
                f"<strong>{trained}</strong>" if after is not None and after == best else trained,
                gain.replace("-", "\N{MINUS SIGN}"),
            ]
        cells += [_percent(run.linear)] if linear else []
        cells += [f"{run.images:,}", duration(run.summary.get("seconds"))]
        cells += [brief(run.rate) if run.rate else NONE]
        cells += [f"{run.bad_images:,}"] if bad else []
        rows.append((head, cells))
    return (_lead(runs) if read else "") + table(names, rows, left=3)


def _lead(runs: Sequence[Run]) -> str:
    """The protocol in words; a warning where the runs were not read alike."""
    trained = [run for run in runs if run.trained is not None]
    differing = ", ".join(unlike([flat(run.protocol) for run in trained]))
    first = trained[0] if trained else runs[0]
    said = f"k-NN accuracy on {_test(first)}, before and after. {_protocol_in_words(first)}"
    if differing:
        said = (
            "k-NN accuracy before and after. <strong>The protocols differ "
            f"({escape(differing)}), so the figures do not compare directly.</strong>"
        )
    return f'<p class="lead">{said}</p>\n'


def _percent(value: float | None) -> str:
    return NONE if value is None or not math.isfinite(value) else f"{value:.1f}"
