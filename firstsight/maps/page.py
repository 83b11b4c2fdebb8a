"""A map as HTML that needs nothing but itself: hover over a point to see its photograph.

Points and triangles are there without a script; the script (`map.js`) only shows the picture of the
point under the pointer, and is allowed by its hash alone.
"""

from __future__ import annotations

import base64
import hashlib
import json
from html import escape
from importlib.resources import files
from typing import Any

_SIDE = 1000
_MARGIN = 20
_LISTED = 40
"""Classes that the legend names."""

HOW = {
    "pca": "principal components: what lies apart here is apart",
    "tsne": "t-SNE: neighbours are kept, distances between groups mean nothing",
    "umap": "UMAP: neighbours are kept, distances between groups mean nothing",
}


def script() -> str:
    """What shows the picture of a point."""
    return files("firstsight.maps").joinpath("map.js").read_text()


def script_policy() -> str:
    """The source expression of a Content-Security-Policy that lets `script` run, and no other."""
    digest = hashlib.sha256(script().encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def style() -> str:
    """The look of maps."""
    return files("firstsight.maps").joinpath("map.css").read_text()


def page(drawn: dict[str, Any], title: str, said: str) -> str:
    """A whole page with one map, from what `place.drawn` made; `said` is its protocol."""
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src "
    policy += script_policy()
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)} · firstsight</title>\n"
        f"<style>\nbody {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem; }}\n{style()}"
        f"</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n{figure(drawn)}"
        f"<p><small>{escape(said)}</small></p>\n<script>{script()}</script>\n</body>\n</html>\n"
    )


def figure(drawn: dict[str, Any]) -> str:
    """The map itself: large dots are images, faint ones their views, triangles hold the three."""
    count, points = drawn["images"], drawn["points"]
    labels, classes = drawn["labels"] or [0] * count, drawn["classes"]
    at = [(_across(x), _across(-y)) for x, y in points]
    triangles = "".join(
        f'<path d="M{at[i][0]} {at[i][1]}L{at[i + count][0]} {at[i + count][1]}'
        f'L{at[i + 2 * count][0]} {at[i + 2 * count][1]}Z"/>'
        for i in range(count)
    )
    dots = []
    for place in reversed(range(len(at))):  # views first, so that images lie over them
        image, view = place % count, place // count
        what = drawn["names"][image] + (f", view {view}" if view else "")
        if drawn["labels"] is not None:
            what += f": {_class(classes, labels[image])}"
        look = ' class="view"' if view else ""
        colour = _colour(labels[image], max(len(classes), max(labels, default=0) + 1))
        dots.append(
            f'<circle data-n="{place}"{look} cx="{at[place][0]}" cy="{at[place][1]}" '
            f'r="{4 if view else 6}" fill="{colour}"><title>{escape(what)}</title></circle>'
        )
    return (
        f'<figure><div class="map"><svg viewBox="0 0 {_SIDE} {_SIDE}" role="img" '
        f'aria-label="Map of {count} images and their views">{triangles}{"".join(dots)}</svg>\n'
        f'<div><img alt="The photograph under the pointer" src="{escape(drawn["thumbnails"][0])}">'
        f"<output>{escape(drawn['names'][0])}</output>"
        '<label><input type="checkbox"> all triangles</label>'
        f"{_legend(drawn)}</div>\n"
        f'<script type="application/json">{_data(drawn["thumbnails"])}</script></div>\n'
        f"<figcaption><p>{count} images (dots), two views of each (faint dots), each image joined "
        f"with its views in a triangle, by {escape(HOW[drawn['how']])}. Small triangles: views of "
        "an image lie together.</p></figcaption></figure>\n"
    )


def _across(value: float) -> float:
    return round(_MARGIN + (value + 1) / 2 * (_SIDE - 2 * _MARGIN), 1)


def _class(classes: list[str], label: int) -> str:
    return classes[label] if label < len(classes) else str(label)


def _colour(label: int, count: int) -> str:
    return f"hsl({360 * label / max(1, count):.0f} 65% 45%)"


def _legend(drawn: dict[str, Any]) -> str:
    if drawn["labels"] is None:
        return ""
    there, classes = sorted(set(drawn["labels"])), drawn["classes"]
    count = max(len(classes), there[-1] + 1)
    items = "".join(
        f'<li style="--dot:{_colour(label, count)}">{escape(_class(classes, label))}</li>'
        for label in there[:_LISTED]
    )
    return f"<ul>{items}</ul>"


def _data(value: Any) -> str:
    # nothing in it may end the element that it stands in
    return json.dumps(value).replace("<", "\\u003c")
