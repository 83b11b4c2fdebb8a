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
from firstsight.sources.grounds import ACROSS, DOWN, GROUNDS, SIZE, Field, noise
from firstsight.sources.outlines import SHAPES, Points, regular

VERSION = 7
"""Part of every seed and of the name of the cache: raise it whenever a picture changes."""

COVERAGE = (0.25, 0.60)
"""Share of the frame that the tight box around the shape takes, the same for all classes."""

MATERIALS = 12
"""How many textures the bodies share."""

MAX_TURN = 25.0
"""Degrees by which a shape leans to either side."""

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

    x, y = np.cos(light) * ACROSS, np.sin(light) * DOWN
    picture *= (1 + rng.uniform(0.05, 0.25) * (x + y))[..., None]
    picture *= (1 - rng.uniform(0, 0.3) * (ACROSS**2 + DOWN**2) / 2)[..., None]
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
    return np.asarray(texture(rng).clip(0, 1) * (0.8 + 0.4 * noise(rng, 5, 5)), np.float32)


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


# --- shapes ---------------------------------------------------------------------------------------


def _placed(rng: np.random.Generator, outlines: list[Points]) -> list[Points]:
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
        points = regular(9) * radii[:, None] * (stretch, 1 / stretch)
        bit = _filled([points + rng.uniform(4, SIZE - 4, 2)])
        colours[bit > 0] = _ramp(rng, 0)[1]
        np.maximum(coverage, bit, out=coverage)
    return coverage, colours


def _filled(outlines: list[Points]) -> Field:
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
