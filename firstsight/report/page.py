"""The page: what is said about runs, and in which order. All text from files is escaped here."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

from firstsight.report import detection
from firstsight.report.answers import answers
from firstsight.report.curves import Series, brief, chart, swatch
from firstsight.report.read import Run, flat
from firstsight.report.tables import NONE, differences, readings, settings, table, typed, unlike

_KNOWN = ("step", "epoch", "loss", "lr", "images_per_second", "data_wait", "bad_images")
_READINGS = ("knn", "knn_quick")
_PERCENT = "\N{NO-BREAK SPACE}%"

# The browser is told to load nothing and to run nothing, whatever text came out of the files.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(runs: Sequence[Run]) -> str:
    """The whole report as HTML."""
    style = files("firstsight.report").joinpath("style.css").read_text()
    lone = runs[0] if len(runs) == 1 else None
    title = _title(lone) if lone else f"{len(runs)} runs compared"
    body = [
        _header(title, runs),
        _section("In short", _answers([run for run in runs if not run.detects])),
        *(_section(title, content) for title, content in detection.sections(runs)),
        _section("Curves", _curves(runs)),
        *_all_pictures(runs),
        _section("Readings", readings(runs)),
        _section("Settings", settings(lone) if lone else differences(runs)),
        _section("Use it", "".join(_use(run, lone is not None) for run in runs if not run.detects)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · firstsight</title>\n<style>\n{style}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(body)}</main>\n</body>\n</html>\n"
    )


def _answers(runs: Sequence[Run]) -> str:
    parts = [("" if len(runs) == 1 else f"<h3>{escape(r.label)}</h3>\n") + answers(r) for r in runs]
    return "".join(parts)


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{content}</section>\n" if content else ""


def _title(run: Run) -> str:
    data = run.settings.get("data")
    return f"{run.method} on {data}" if data else run.method


# What came out


def _header(title: str, runs: Sequence[Run]) -> str:
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
    start = f'<span class="from">{before:.1f}</span> → ' if before is not None else ""
    return (
        f'<p class="figure">{start}<b>{latest:.1f}{_PERCENT}</b> {gain}</p>\n'
        f'<p class="lead">k-NN accuracy on {_test(run)}, {when} {_protocol_in_words(run)}</p>\n'
    )


def _loss_headline(run: Run) -> str:
    losses = [v for _, v in run.curve("loss") if math.isfinite(v)]
    if not losses:
        return '<p class="lead">Nothing has been logged yet.</p>\n'
    return (
        f'<p class="figure"><span class="from">{brief(losses[0])}</span> → '
        f'<b>{brief(losses[-1])}</b></p>\n<p class="lead">Loss, from the first logged step to '
        "the last. A loss does not say how good the features are: with labels for some images, "
        "<code>--probe-test SOURCE</code> adds k-NN readings.</p>\n"
    )


def _test(run: Run) -> str:
    return escape(str(_part(run, "test").get("source") or "its test images"))


def _part(run: Run, role: str) -> dict[str, Any]:
    part = run.protocol.get(role)
    return part if isinstance(part, dict) else {}


def _gain(points: float) -> str:
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
    chance = f" Guessing would get {run.chance:.3g}{_PERCENT}." if run.chance is not None else ""
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
        ("Backbone", f"{ask.get('backbone', NONE)}"),
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


# How it went


def _curves(runs: Sequence[Run]) -> str:
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
            unit=_PERCENT,
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
        unit=_PERCENT,
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        level=(chance, f"chance {chance:.3g}{_PERCENT}") if chance is not None else None,
        note=f"Filled: all images. Hollow: quick readings on a part of them{least}. "
        "Step 0: untrained.",
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
        unit=_PERCENT,
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
        unit=_PERCENT,
        marked=True,
        large=True,
        until=max(run.steps for run in runs),
        note=f"{'CorLoc .5' if name == 'localize' else 'Top-1'}, as {name}.json in the run's "
        "folder of readings has it with its protocol.",
    )


# What it looks like

_PICTURES = {
    "views": (
        "Views",
        "Photographs with the crops that were drawn from them, and the views that the network "
        "sees in their place. A marked corner: mirrored.",
        "Photographs, each with rectangles where its views were cut out, and the views beside it.",
    ),
    "neighbours-untrained": (
        "Untrained",
        "Each row: a query, then its nearest neighbours by the untrained backbone.",
        "Rows of images: a query and its nearest neighbours before training.",
    ),
    "neighbours-trained": (
        "Trained",
        "Each row: the same query, then its nearest neighbours after pretraining.",
        "Rows of images: a query and its nearest neighbours after training.",
    ),
}


def _all_pictures(runs: Sequence[Run]) -> list[str]:
    shown: set[str] = set()
    parts = []
    for run in runs:
        views = run.pictures.get("views", "")
        parts.append(_pictures(run, len(runs) == 1, views not in shown))
        shown.add(views)  # runs with one seed draw the same views: once is enough
    return parts


def _pictures(run: Run, alone: bool, with_views: bool) -> str:
    views = _picture(run, "views") if with_views else ""
    pair = [_picture(run, f"neighbours-{when}") for when in ("untrained", "trained")]
    name = "" if alone else f" · {escape(run.label)}"
    near = f'<div class="pair">\n{"".join(pair)}</div>\n' if any(pair) else ""
    others = "".join(_picture(run, n) for n in run.pictures if n not in _PICTURES)
    return (
        _section(f"What the network sees{name}", views)
        + _section(f"What it finds alike{name}", near)
        + _section(f"Pictures{name}", others)
    )


def _picture(run: Run, name: str) -> str:
    data = run.pictures.get(name)
    if data is None:
        return ""
    plain_name = name.replace("-", " ").replace("_", " ").capitalize()
    title, caption, alt = _PICTURES.get(name, (plain_name, "", plain_name))
    caption = run.captions.get(name, caption)
    head = f"<h3>{escape(title)}</h3>" if name != "views" else ""
    return (
        f'<figure class="picture {escape(name) if name in _PICTURES else "other"}">'
        f"<figcaption>{head}<p>{escape(caption)}</p></figcaption>"
        f'<div class="scroll" tabindex="0"><img src="{data}" alt="{escape(alt)}"></div></figure>\n'
    )


# What to do with it


def _use(run: Run, alone: bool) -> str:
    head = "" if alone else f"<h3>{escape(run.label)}</h3>\n"
    config = shlex.quote(str(run.path / "config.yaml"))
    again = shlex.quote(f"{run.path}-again")
    command = f"firstsight pretrain {shlex.quote(run.method)} --config {config} --out {again}"
    width, side = run.about.get("width", "C"), run.settings.get("size", "H")
    load = (
        "import firstsight\n"
        f"backbone = firstsight.load_backbone({str(run.path)!r})\n"
        f"features = backbone.features(images)  # (B, {width}) from (B, 3, {side}, {side})"
    )
    norm = ""
    if (mean := run.about.get("mean")) and (std := run.about.get("std")):
        norm = (
            f"<p>Images are RGB with values in 0 to 1, minus mean {escape(typed(mean))}, "
            f"over deviation {escape(typed(std))}.</p>\n"
        )
    return (
        f"{head}<p>Load the backbone:</p>\n"
        f'<pre tabindex="0"><code>{escape(load)}</code></pre>\n{norm}'
        f'<p>Run it again, with the same settings:</p>\n<pre tabindex="0"><code>'
        f"{escape(command)}</code></pre>\n"
    )
