"""Curves as inline SVG: points in, a `<figure>` out.

The drawing stretches with the page while its text must not, so the lines are SVG (strokes keep
their width) and the labels of the axes are HTML laid over it. Coordinates run from 0 to 1000.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

PERCENT = "\N{NO-BREAK SPACE}%"

COLOURS = 8
"""Colours in the style sheet; a ninth run takes the first colour again, dashed."""

_SIDE = 1000
_MOST = 400
"""Points of a curve that are drawn; a screen shows no more."""

_FEW = 5
"""Points of a curve that is hardly a line: they are marked, or nobody would see them."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve: (step, value) points, rising in step; values that are not finite leave a gap."""

    label: str
    colour: int
    points: Sequence[Point]
    hollow: frozenset[float] = frozenset()
    """Steps whose markers are hollow."""


def chart(
    title: str,
    series: Sequence[Series],
    *,
    unit: str = "",
    note: str = "",
    smooth: bool = False,
    marked: bool = False,
    from_zero: bool = False,
    level: tuple[float, str] | None = None,
    large: bool = False,
    until: float = 0,
    axis: str = "step",
    ends: bool = True,
) -> str:
    """A figure of the series over steps, or another `axis`; empty where no value is finite.

    `smooth` draws the points thin and their trend bold; `marked` puts a marker on each
    point, as curves of a few points have in any case; `level` is a dashed horizontal line and
    what it means; `note` explains the figure;
    `until` is the last step that the axis shows, at least; `over` is what a step is called, and
    `ends` says the last values beside the title.
    """
    drawn = [s for s in series if finite(s.points)]
    if not drawn:
        return ""
    means = {id(s): smoothed(s.points) for s in drawn} if smooth else {}
    low, high, ticks = _y_axis(drawn, means, from_zero, level)
    last = max(until, *(step for s in drawn for step, _ in s.points))
    x_ticks = _steps(last)
    last = last or 1

    def at(point: Point) -> str:
        x, y = point[0] / last * _SIDE, (high - point[1]) / (high - low) * _SIDE
        y = min(max(y, 0), _SIDE)  # a spike that the axis does not follow
        return f"{x:.1f} {y:.1f}"

    parts = [f'<path class="grid" d="M0 {at((0, t)).split()[1]}H{_SIDE}"/>' for t in ticks]
    if level:
        parts.append(f'<path class="level" d="M0 {at((0, level[0])).split()[1]}H{_SIDE}"/>')
    for s in drawn:
        look = f"c{s.colour % COLOURS}" + (" dashed" if s.colour >= COLOURS else "")
        if smooth and len(finite(s.points)) > 2:
            parts.append(_line(decimated(s.points), at, f"raw {look}"))
            parts.append(_line(decimated(means[id(s)]), at, look))
        else:
            parts.append(_line(decimated(s.points), at, look))
    for s in drawn:
        points = finite(s.points)
        if marked or len(points) <= _FEW:
            parts += [_marker(s, point, at, unit, axis) for point in points]
    labels = [
        f'<span class="y" style="top:{(high - t) / (high - low):.2%}">{told(t, ticks)}</span>'
        for t in ticks
    ]
    labels += [_x_label(t, last, x_ticks, large, axis) for t in x_ticks]
    if level:
        top = (high - level[0]) / (high - low)
        labels.append(f'<span class="at" style="top:{top:.2%}">{escape(level[1])}</span>')
    caption = f"<figcaption><h3>{escape(title)}</h3>{_ends(drawn, unit, large, ends)}</figcaption>"
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure class="chart{" large" if large else ""}">{caption}<div class="plot">'
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(_in_words(title, drawn, unit, axis))}">{"".join(parts)}</svg>'
        f"{''.join(labels)}</div>{below}</figure>\n"
    )


def finite(points: Iterable[Point]) -> list[Point]:
    """The points whose value is a finite number."""
    return [point for point in points if math.isfinite(point[1])]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The trend of the values: at each point a straight line fitted to a fifteenth of the curve.

    A line, not a mean, so that the ends of a falling curve are not bent. Gaps stay gaps; a long
    log is averaged in stretches first.
    """
    stride = max(1, len(points) // _MOST)
    if stride > 1:
        points = [_mean(points[i : i + stride]) for i in range(0, len(points), stride)]
    reach = max(1, len(points) // 30)
    trend = []
    for i, (step, value) in enumerate(points):
        near = finite(points[max(0, i - reach) : i + reach + 1])
        trend.append((step, _on_line(near, step) if math.isfinite(value) else value))
    return trend


def _mean(points: Sequence[Point]) -> Point:
    known = finite(points) or points
    return sum(x for x, _ in known) / len(known), sum(y for _, y in known) / len(known)


def _on_line(points: Sequence[Point], at: float) -> float:
    """The value at a step of the straight line that fits best (least squares)."""
    x_mean, y_mean = _mean(points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0.0
    return y_mean + slope * (at - x_mean)


def decimated(points: Sequence[Point], most: int = _MOST) -> list[Point]:
    """At most about `most` points that look the same: the lowest and highest of each stretch."""
    if len(points) <= most:
        return list(points)
    stride = math.ceil(2 * len(points) / (most - 2))
    kept = [points[0]]
    for start in range(1, len(points) - 1, stride):
        stretch = points[start : min(start + stride, len(points) - 1)]
        known = finite(stretch)
        ends = [min(known, key=_value), max(known, key=_value)] if known else []
        ends += [p for p in stretch if not math.isfinite(p[1])][:1]
        kept += [p for p in stretch if p in ends]
    return [*kept, points[-1]]


def _value(point: Point) -> float:
    return point[1]


def round_ticks(low: float, high: float, about: int = 4) -> list[float]:
    """About that many round numbers, evenly spaced, that enclose low and high."""
    if high <= low:
        room = abs(low) * 0.1 or 1.0
        low, high = low - room, high + room
    step = _round_step((high - low) / about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _round_step(rough: float) -> float:
    size = 10.0 ** math.floor(math.log10(rough))
    return next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= rough * (1 - 1e-9))


def _steps(last: float) -> list[float]:
    step = max(1.0, _round_step(max(last, 1) / 5))
    step = 3.0 if step == 2.5 else step  # steps are whole
    return [i * step for i in range(int(last / step + 1e-9) + 1)]


def told(value: float, ticks: Sequence[float]) -> str:
    """A tick as people read it, with as many decimals as its neighbours need."""
    most = max(abs(t) for t in ticks)
    if value == 0:
        return "0"
    if most >= 1e6:
        return f"{value / 1e6:g}M"
    if most >= 1e4:
        return f"{value / 1e3:g}k"
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if 0 < step < 1e-3:
        return f"{value:g}".replace("e-0", "e-")
    places = next((p for p in range(4) if abs(step * 10**p - round(step * 10**p)) < 1e-6), 4)
    return f"{value:.{places}f}".replace("-", "\N{MINUS SIGN}")


def brief(value: float) -> str:
    """A figure in four digits or so."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else f"{value}"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}".replace("e-0", "e-")
    places = max(0, 3 - max(0, math.floor(math.log10(abs(value))) + 1)) if value else 0
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def _y_axis(
    series: Sequence[Series],
    means: dict[int, list[Point]],
    from_zero: bool,
    level: tuple[float, str] | None,
) -> tuple[float, float, list[float]]:
    values: list[float] = []
    for s in series:
        raw = sorted(value for _, value in finite(s.points))
        cut = len(raw) // 50 if id(s) in means else 0
        if raw[-1] - raw[0] < 2 * (raw[-1 - cut] - raw[cut]):
            cut = 0  # only what would flatten the whole curve is let go
        values += [raw[cut], raw[-1 - cut]]
        values += [value for _, value in finite(means.get(id(s), ()))]
    values += [0.0] if from_zero else []
    values += [level[0]] if level else []
    ticks = round_ticks(min(values), max(values))
    return ticks[0], ticks[-1], ticks


def _line(points: Sequence[Point], at: Callable[[Point], str], look: str) -> str:
    path, pen_down = [], False
    for point in points:
        if math.isfinite(point[1]):
            path.append(f"{'L' if pen_down else 'M'}{at(point)}")
            pen_down = True
        else:
            pen_down = False
    # a lone point draws nothing but its round cap
    ends = "h0" if len(path) == 1 else ""
    return f'<path class="line {look}" d="{"".join(path)}{ends}"/>'


def _marker(s: Series, point: Point, at: Callable[[Point], str], unit: str, axis: str) -> str:
    # dots are strokes of no length with round caps: circles would stretch with the drawing
    look = f"c{s.colour % COLOURS}"
    said = f"{s.label}, {axis} {point[0]:,.0f}: {brief(point[1])}{unit}"
    said += ", quick" if point[0] in s.hollow else ""
    inner = f'<path class="hole" d="M{at(point)}h0"/>' if point[0] in s.hollow else ""
    return (
        f'<g><title>{escape(said)}</title><path class="dot {look}" d="M{at(point)}h0"/>{inner}</g>'
    )


def _x_label(tick: float, last: float, ticks: Sequence[float], large: bool, axis: str) -> str:
    place = tick / last
    text = f"{tick:,.0f}" if ticks[-1] < 1e5 else told(tick, ticks)
    if large and tick == 0:
        return f'<span class="x first" style="left:0">{escape(axis)} 0</span>'
    return (
        f'<span class="x{" last" if place > 0.97 else ""}" style="left:{place:.2%}">{text}</span>'
    )


def _ends(series: Sequence[Series], unit: str, large: bool, valued: bool) -> str:
    """First and last value of a lone curve; the last ones of several, in their colours.

    Without values the names alone, and of a lone curve nothing.
    """
    said = []
    for s in series:
        points = finite(s.points)
        value = f"<b>{brief(points[-1][1])}{unit}</b>" if valued else ""
        if len(series) == 1 and s.colour == 0 and not valued:
            return ""
        if len(series) == 1 and s.colour == 0:
            first = brief(points[0][1])
            start = "" if first == brief(points[-1][1]) else f"{first} → "
            return f'<p class="ends">{start}{value}</p>'
        name = escape(s.label) if large else ""
        hidden = "" if large else f'<span class="unseen">{escape(s.label)}</span>'
        said.append(f"<li>{swatch(s.colour)}{name}{hidden} {value}</li>")
    return f'<ul class="ends">{"".join(said)}</ul>'


def swatch(colour: int) -> str:
    """The mark of a run's colour."""
    dashed = " dashed" if colour >= COLOURS else ""
    return f'<i class="swatch c{colour % COLOURS}{dashed}"></i>'


def _in_words(title: str, series: Sequence[Series], unit: str, axis: str) -> str:
    said = []
    for s in series:
        (start, first), (end, last) = finite(s.points)[0], finite(s.points)[-1]
        said.append(
            f"{s.label}: {brief(first)}{unit} at {axis} {start:,.0f}, "
            f"{brief(last)}{unit} at {axis} {end:,.0f}"
        )
    return f"{title} over {axis}s. {'; '.join(said)}."
