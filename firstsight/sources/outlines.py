"""The ten shapes of `scenes`: outlines (n, 2) about the origin, y down; a second one is a hole."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def regular(count: int, radius: float = 1.0) -> Points:
    """The corners of a regular polygon, the first at the top."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False) - np.pi / 2
    return radius * np.stack((np.cos(angle), np.sin(angle)), -1)


def _disc(rng: np.random.Generator) -> list[Points]:
    return [regular(64)]


def _square(rng: np.random.Generator) -> list[Points]:
    return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], np.float64)]


def _triangle(rng: np.random.Generator) -> list[Points]:
    return [regular(3)]


def _star(rng: np.random.Generator) -> list[Points]:
    points = regular(10)
    points[1::2] *= rng.uniform(0.42, 0.52)
    return [points]


def _ring(rng: np.random.Generator) -> list[Points]:
    return [regular(64), regular(64, rng.uniform(0.5, 0.62))]


def _cross(rng: np.random.Generator) -> list[Points]:
    a = rng.uniform(0.3, 0.42)
    arm = np.array([(-a, -a), (-a, -1), (a, -1)], np.float64)
    quarter = np.array([(0, 1), (-1, 0)], np.float64)  # turns (x, y) to (-y, x)
    turns = [np.linalg.matrix_power(quarter, k) for k in range(4)]
    return [np.concatenate([arm @ turn for turn in turns])]


def _heart(rng: np.random.Generator) -> list[Points]:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [np.stack((x, -y), -1)]


def _crescent(rng: np.random.Generator) -> list[Points]:
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


def _gear(rng: np.random.Generator) -> list[Points]:
    teeth = int(rng.integers(7, 10))
    angle = np.arange(teeth * 4) * (2 * np.pi / (teeth * 4))
    radius = np.tile((1.0, 1.0, 0.72, 0.72), teeth)
    outline = np.stack((radius * np.cos(angle), radius * np.sin(angle)), -1)
    return [outline, regular(24, rng.uniform(0.2, 0.28))]


def _arrow(rng: np.random.Generator) -> list[Points]:
    shaft, neck = rng.uniform(0.28, 0.4), rng.uniform(-0.2, 0.1)
    right = [(0, -1.1), (1, neck), (shaft, neck), (shaft, 1)]
    return [np.array(right + [(-x, y) for x, y in reversed(right[1:])], np.float64)]


SHAPES: dict[int, Callable[[np.random.Generator], list[Points]]] = dict(
    enumerate((_arrow, _crescent, _cross, _disc, _gear, _heart, _ring, _square, _star, _triangle))
)
CLASSES = tuple(shape.__name__.removeprefix("_") for shape in SHAPES.values())
"""Names of the shapes, in the order of the labels."""
