"""The little world behind `scenes`: one shape in front of one of sixteen grounds, under some light.

What makes the class is the outline alone. Ground, texture, colours, place, size, slant, clutter and
light are drawn in the same way for every class, so neither colour nor texture gives it away.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.sources.base import Pixels

VERSION = 7
"""Part of every seed and of the name of the cache: raise it whenever a picture changes."""

SIZE = 96
"""Pixels on a side."""

COVERAGE = (0.25, 0.60)
"""Share of the frame that the tight box around the shape takes, the same for all classes."""

MATERIALS = 12
"""How many textures the bodies share."""

MAX_TURN = 25.0
"""Degrees by which a shape leans to either side."""

Field = NDArray[np.float32]
_Points = NDArray[np.float64]

_FINE = 4  # outlines are filled on a grid this much finer, for soft and exact edges
_MARGIN = 3  # pixels between a shape and the frame


def paint(split: int, index: int, label: int) -> tuple[Pixels, NDArray[np.bool_]]:
    """Picture (SIZE, SIZE, 3) and mask (SIZE, SIZE) of image `index`, showing the shape `label`.

    A pure function of its arguments and `VERSION`.
    """
    rng = np.random.Generator(np.random.Philox(key=keyed.seed(VERSION, split, index)))
    light = rng.uniform(0, 2 * np.pi)
    ground_colours, body_colours = _two_ramps(rng)
    picture = _coloured(_mirrored(rng, _ground(int(rng.integers(len(GROUNDS))))), ground_colours)
    body = _coloured(_mirrored(rng, _material(int(rng.integers(MATERIALS)))), body_colours)
    picture = _blurred(picture, rng.uniform(0.3, 1.3))  # the eye is on the object
    _drop(picture, *_clutter(rng), light, height=1.5)

    coverage = _filled(_placed(rng, SHAPES[label](rng)))
    _drop(picture, coverage, body, light, height=rng.uniform(3, 7))

    x, y = np.cos(light) * _ACROSS, np.sin(light) * _DOWN
    picture *= (1 + rng.uniform(0.05, 0.25) * (x + y))[..., None]
    picture *= (1 - rng.uniform(0, 0.3) * (_ACROSS**2 + _DOWN**2) / 2)[..., None]
    picture += rng.normal(0, rng.uniform(0.004, 0.015), picture.shape).astype(np.float32)
    return np.asarray(np.rint(picture.clip(0, 1) * 255), np.uint8), coverage >= 0.5


# --- colour ---------------------------------------------------------------------------------------


# Textures are few and shared by all pictures: were they drawn anew for each, they would tell one
# picture from another better than its shape does, and instance discrimination would learn them and
# nothing else. Colours are drawn anew for each: views change colours anyway, and colours that
# pictures share would let a histogram know the size of a body, and so something of its shape.


@cache
def _ground(number: int) -> Field:
    """One of the shared grounds, values (SIZE, SIZE); not to be written to."""
    rng = np.random.Generator(np.random.Philox(key=keyed.seed(VERSION, 1 << 20, number)))
    return _uneven(rng, GROUNDS[number])


@cache
def _material(number: int) -> Field:
    """One of the textures that bodies are made of, values (SIZE, SIZE); not to be written to."""
    rng = np.random.Generator(np.random.Philox(key=keyed.seed(VERSION, 1 << 21, number)))
    return _uneven(rng, GROUNDS[(5 * number) % len(GROUNDS)])


def _two_ramps(rng: np.random.Generator) -> tuple[Field, Field]:
    """Colours of a ground and of a body that the eye can tell from it."""
    ground = _ramp(rng, rng.uniform(0.06, 0.14))
    while True:
        body = _ramp(rng, rng.uniform(0.04, 0.1))
        if np.linalg.norm(body[1] - ground[1]) > 0.5:
            return ground, body


def _mirrored(rng: np.random.Generator, field: Field) -> Field:
    """The field in one of its four mirror images."""
    down, across = rng.integers(2, size=2) * 2 - 1
    return np.ascontiguousarray(field[::down, ::across])


def _ramp(rng: np.random.Generator, contrast: float) -> Field:
    """Three colours (3, 3) from dark to light, of neighbouring hues."""
    hue, saturation = rng.random(), rng.beta(2, 2.6)
    middle = rng.uniform(0.25, 0.9)
    turn = rng.uniform(-0.08, 0.08)
    colours = [
        colorsys.hsv_to_rgb(
            (hue + step * turn) % 1,
            float(np.clip(saturation - step * 0.1, 0.05, 0.9)),
            float(np.clip(middle + step * contrast, 0.06, 1)),
        )
        for step in (-1, 0, 1)
    ]
    return np.array(colours, np.float32)


def _uneven(rng: np.random.Generator, texture: Callable[[np.random.Generator], Field]) -> Field:
    """Values (SIZE, SIZE) of a texture, worn a little more in some places than in others."""
    return np.asarray(texture(rng).clip(0, 1) * (0.8 + 0.4 * _noise(rng, 5, 5)), np.float32)


def _coloured(values: Field, colours: Field) -> Field:
    """(SIZE, SIZE, 3): the values looked up in a ramp of colours."""
    value = values.clip(0, 1)[..., None]
    low, middle, high = colours
    return np.asarray(
        np.where(
            value < 0.5,
            low + (middle - low) * 2 * value,
            middle + (high - middle) * (2 * value - 1),
        ),
        np.float32,
    )


# --- grounds: a field of values 0 to 1 each -------------------------------------------------------

_AXIS = np.linspace(-1, 1, SIZE, dtype=np.float32)
_DOWN, _ACROSS = np.meshgrid(_AXIS, _AXIS, indexing="ij")


def _noise(rng: np.random.Generator, down: int, across: int) -> Field:
    """Smooth noise with so many knots along each side, 0 to 1."""
    knots = rng.random((down, across), dtype=np.float32)
    return np.asarray(
        cv2.resize(knots, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC).clip(0, 1), np.float32
    )


def _octaves(rng: np.random.Generator, knots: int) -> Field:
    """Noise of three scales, the finer the fainter."""
    total = sum(0.5**k * _noise(rng, knots << k, knots << k) for k in range(3))
    return np.asarray(total / 1.75, np.float32)


def _slanted(rng: np.random.Generator, low: float, high: float) -> tuple[Field, Field]:
    """Coordinates with `low` to `high` units across the frame, turned and shifted at random."""
    angle, scale = rng.uniform(0, np.pi), rng.uniform(low, high) / 2
    cos, sin = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    du, dv = rng.random(2, dtype=np.float32)
    return cos * _ACROSS + sin * _DOWN + du, cos * _DOWN - sin * _ACROSS + dv


def _wave(u: NDArray[np.floating]) -> Field:
    return np.asarray(0.5 + 0.5 * np.sin(2 * np.pi * u), np.float32)


def _step(value: NDArray[np.floating], at: float, softness: float) -> Field:
    return np.asarray(((value - at) / softness + 0.5).clip(0, 1), np.float32)


def _sawtooth(u: NDArray[np.floating]) -> Field:
    return np.asarray(u - np.floor(u), np.float32)


def _clouds(rng: np.random.Generator) -> Field:
    return _step(_octaves(rng, 3), 0.5, 0.6)


def _marble(rng: np.random.Generator) -> Field:
    u, _ = _slanted(rng, 2, 4)
    return _wave(u + 1.5 * _octaves(rng, 4)) ** 2


def _stripes(rng: np.random.Generator) -> Field:
    u, _ = _slanted(rng, 3, 8)
    return _step(_wave(u), 0.5, 0.5)


def _checker(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 2, 4)
    return _step(np.sin(2 * np.pi * u) * np.sin(2 * np.pi * v), 0, 0.4)


def _bricks(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 6, 10)
    row = np.floor(v)
    across = _sawtooth(u / 2 + 0.5 * (row % 2))
    joint = np.minimum(np.minimum(across, 1 - across) * 2, np.minimum(v - row, row + 1 - v))
    brick = keyed.uniform(np.floor(u / 2 + 0.5 * (row % 2)) + 99, row + 99, rng.integers(1 << 30))
    return np.asarray(_step(joint, 0.08, 0.1) * (0.45 + 0.45 * brick), np.float32)


def _planks(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 3, 5)
    grain = _wave(1.5 * u + 2 * _noise(rng, 3, 14) + np.floor(v) * 0.37)
    joint = np.minimum(_sawtooth(v), 1 - _sawtooth(v))
    return np.asarray(_step(joint, 0.03, 0.05) * (0.4 + 0.5 * grain), np.float32)


def _grass(rng: np.random.Generator) -> Field:
    return np.asarray(0.6 * _noise(rng, 12, 48) + 0.4 * _noise(rng, 6, 24), np.float32)


def _dusk(rng: np.random.Generator) -> Field:
    u, _ = _slanted(rng, 0.9, 1.1)
    return np.asarray(u - u.min(), np.float32)


def _dots(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 4, 8)
    distance = np.hypot(_sawtooth(u) - 0.5, _sawtooth(v + 0.5 * (np.floor(u) % 2)) - 0.5)
    return _step(-distance, -0.28, 0.15)


def _ripples(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 3, 7)
    return _wave(u + 0.25 * np.sin(4 * v).astype(np.float32))


def _sand(rng: np.random.Generator) -> Field:
    return np.asarray(0.5 * _noise(rng, 60, 60) + 0.5 * _noise(rng, 4, 9), np.float32)


def _cells(rng: np.random.Generator) -> Field:
    sites = rng.uniform(-1.1, 1.1, (int(rng.integers(10, 22)), 2, 1, 1)).astype(np.float32)
    distances = (_ACROSS - sites[:, 0]) ** 2 + (_DOWN - sites[:, 1]) ** 2
    return np.asarray(np.sqrt(distances.min(0)) * 2, np.float32)


def _tiles(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 3, 6)
    joint = np.minimum(np.abs(_sawtooth(u) - 0.5), np.abs(_sawtooth(v) - 0.5))
    return np.asarray(_step(joint, 0.05, 0.06) * (0.4 + 0.5 * _octaves(rng, 4)), np.float32)


def _weave(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 7, 11)
    over = (np.floor(u) + np.floor(v)) % 2
    return np.asarray(np.where(over > 0, _wave(u / 2), 0.8 * _wave(v / 2)), np.float32)


def _tartan(rng: np.random.Generator) -> Field:
    u, v = _slanted(rng, 2, 4)
    bands = _step(_wave(u), 0.6, 0.3) + _step(_wave(v), 0.6, 0.3)
    lines = _step(_wave(u + 0.5), 0.97, 0.04) + _step(_wave(v + 0.5), 0.97, 0.04)
    return np.asarray(0.4 * bands + 0.2 * lines, np.float32)


def _camouflage(rng: np.random.Generator) -> Field:
    value = _octaves(rng, 5)
    return 0.5 * _step(value, 0.45, 0.03) + 0.5 * _step(value, 0.56, 0.03)


GROUNDS: tuple[Callable[[np.random.Generator], Field], ...] = (
    _clouds,
    _marble,
    _stripes,
    _checker,
    _bricks,
    _planks,
    _grass,
    _dusk,
    _dots,
    _ripples,
    _sand,
    _cells,
    _tiles,
    _weave,
    _tartan,
    _camouflage,
)
"""Sixteen textures of grounds; bodies wear some of them, drawn anew."""

# --- shapes: outlines (n, 2) about the origin, y down; a second outline is a hole -----------------


def _round(count: int, radius: float = 1.0) -> _Points:
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False) - np.pi / 2
    return radius * np.stack((np.cos(angle), np.sin(angle)), -1)


def _disc(rng: np.random.Generator) -> list[_Points]:
    return [_round(64)]


def _square(rng: np.random.Generator) -> list[_Points]:
    return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64)]


def _triangle(rng: np.random.Generator) -> list[_Points]:
    return [_round(3)]


def _star(rng: np.random.Generator) -> list[_Points]:
    points = _round(10)
    points[1::2] *= rng.uniform(0.42, 0.52)
    return [points]


def _ring(rng: np.random.Generator) -> list[_Points]:
    return [_round(64), _round(64, rng.uniform(0.5, 0.62))]


def _cross(rng: np.random.Generator) -> list[_Points]:
    a = rng.uniform(0.3, 0.42)
    arm = np.array([(-a, -a), (-a, -1), (a, -1)], np.float64)
    quarter = np.array([(0, 1), (-1, 0)], np.float64)  # turns (x, y) to (-y, x)
    turns = [np.linalg.matrix_power(quarter, k) for k in range(4)]
    return [np.concatenate([arm @ turn for turn in turns])]


def _heart(rng: np.random.Generator) -> list[_Points]:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack((x, -y), -1)]


def _crescent(rng: np.random.Generator) -> list[_Points]:
    # From horn to horn along the outer circle, and back along a circle that is shifted right.
    horn, shift = rng.uniform(0.75, 0.95), rng.uniform(0.45, 0.6)
    outer = np.linspace(horn, 2 * np.pi - horn, 48)
    inner_x, height = np.cos(horn) - shift, np.sin(horn)
    radius, half = np.hypot(inner_x, height), np.arctan2(height, inner_x)
    inner = np.linspace(2 * np.pi - half, half, 40)
    mirrored = rng.choice((-1, 1))
    points = np.concatenate(
        (
            np.stack((np.cos(outer), np.sin(outer)), -1),
            np.stack((radius * np.cos(inner) + shift, radius * np.sin(inner)), -1),
        )
    )
    return [points * (mirrored, 1)]


def _gear(rng: np.random.Generator) -> list[_Points]:
    teeth = int(rng.integers(7, 10))
    angle = np.arange(teeth * 4) * (2 * np.pi / (teeth * 4))
    radius = np.tile((1.0, 1.0, 0.72, 0.72), teeth)
    outline = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return [outline, _round(24, rng.uniform(0.2, 0.28))]


def _arrow(rng: np.random.Generator) -> list[_Points]:
    shaft, neck = rng.uniform(0.28, 0.4), rng.uniform(-0.2, 0.1)
    right = [(0, -1.1), (1, neck), (shaft, neck), (shaft, 1)]
    return [np.array(right + [(-x, y) for x, y in reversed(right[1:])], np.float64)]


SHAPES: dict[int, Callable[[np.random.Generator], list[_Points]]] = dict(
    enumerate((_arrow, _crescent, _cross, _disc, _gear, _heart, _ring, _square, _star, _triangle))
)
CLASSES = tuple(shape.__name__.removeprefix("_") for shape in SHAPES.values())
"""Names of the shapes, in the order of the labels."""


def _placed(rng: np.random.Generator, outlines: list[_Points]) -> list[_Points]:
    """The outlines leaning, stretched, of the drawn size, and somewhere in the frame, in pixels."""
    angle = np.deg2rad(rng.uniform(-MAX_TURN, MAX_TURN))
    turn = np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])
    stretch = np.exp(rng.uniform(-0.13, 0.13))
    turned = [points * (stretch, 1 / stretch) @ turn for points in outlines]

    low, high = turned[0].min(0), turned[0].max(0)
    room = SIZE - 2 * _MARGIN
    # Size by the box, not by the area: the share of the frame must not tell the class.
    # A pixel off on each side moves the share by .01.
    share = rng.uniform(COVERAGE[0] + 0.015, COVERAGE[1] - 0.015)
    scale = np.sqrt(share * SIZE**2 / np.prod(high - low))
    scale = min(scale, room / (high - low).max())
    corner = _MARGIN + rng.random(2) * (room - scale * (high - low))
    return [(points - low) * scale + corner for points in turned]


def _clutter(rng: np.random.Generator) -> tuple[Field, Field]:
    """Coverage and colours of a few small irregular bits that look like none of the shapes."""
    coverage = np.zeros((SIZE, SIZE), np.float32)
    colours = np.zeros((SIZE, SIZE, 3), np.float32)
    for _ in range(rng.integers(1, 5)):
        radii = rng.uniform(2, 5) * rng.uniform(0.6, 1.2, 9)
        stretch = np.exp(rng.uniform(-0.5, 0.5))
        points = _round(9) * radii[:, None] * (stretch, 1 / stretch)
        bit = _filled([points + rng.uniform(4, SIZE - 4, 2)])
        colours[bit > 0] = _ramp(rng, 0)[1]
        np.maximum(coverage, bit, out=coverage)
    return coverage, colours


def _filled(outlines: list[_Points]) -> Field:
    """How much of each pixel lies inside (even-odd), 0 to 1, (SIZE, SIZE)."""
    fine = np.zeros((SIZE * _FINE, SIZE * _FINE), np.uint8)
    corners = [np.rint(points * _FINE - 0.5).astype(np.int32) for points in outlines]
    cv2.fillPoly(fine, corners, 255)
    cells = cv2.resize(fine, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return np.asarray(cells / np.float32(255), np.float32)


# --- light ----------------------------------------------------------------------------------------


def _blurred(field: Field, sigma: float) -> Field:
    return np.asarray(cv2.GaussianBlur(field, (0, 0), sigma), np.float32)


def _drop(picture: Field, coverage: Field, body: Field, light: float, height: float) -> None:
    """Lays a rounded `body` of this height (pixels) on `picture`, with its shade and its shadow."""
    towards = np.array((np.cos(light), np.sin(light)))
    move = np.array([(1, 0, -towards[0] * height), (0, 1, -towards[1] * height)], np.float32)
    shadow = cv2.warpAffine(_blurred(coverage, height / 2), move, (SIZE, SIZE))
    picture *= (1 - 0.55 * shadow)[..., None]

    inside = cv2.distanceTransform((coverage >= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    dome = _blurred(1 - np.exp(-inside / height), 1.0) * height
    slope_down, slope_across = np.gradient(dome)
    lit = -(slope_across * towards[0] + slope_down * towards[1])
    shade = (0.95 + 0.75 * lit).clip(0.35, 1.5)[..., None]
    gloss = 0.5 * (lit - 0.35).clip(0, None)[..., None]
    alpha = coverage[..., None]
    picture *= 1 - alpha
    picture += alpha * (body * shade + gloss)
