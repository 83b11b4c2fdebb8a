"""What runs look like: the pictures in their folders, and the map of what they learnt."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from firstsight.maps import page as maps
from firstsight.report.read import Run
from firstsight.report.tables import section

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


def all_pictures(runs: Sequence[Run]) -> list[str]:
    """The parts of the page that show pictures, run by run."""
    shown: set[str] = set()
    parts = []
    for run in runs:
        views = run.pictures.get("views", "")
        parts.append(_map(run, len(runs) == 1))
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
        section(f"What the network sees{name}", views)
        + section(f"What it finds alike{name}", near)
        + section(f"Pictures{name}", others)
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


def _map(run: Run, alone: bool) -> str:
    """Where its images lie, as `firstsight diagnose --map` drew it."""
    name = "" if alone else f" · {escape(run.label)}"
    return section(f"Map{name}", maps.figure(run.map)) if run.map else ""


def script(runs: Sequence[Run]) -> tuple[str, str, str]:
    """What maps need, where a run has one: a policy that allows their script, style, and script."""
    if not any(run.map for run in runs):
        return "", "", ""
    tag = f"<script>{maps.script()}</script>\n"
    return f"; script-src {maps.script_policy()}", maps.style(), tag
