"""The sixteen textures of `scenes`: each a field of values 0 to 1, drawn anew by each call."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight import keyed

SIZE = 96
"""Pixels on a side of a picture."""

Field = NDArray[np.float32]

_AXIS = np.linspace(-1, 1, SIZE, dtype=np.float32)
DOWN, ACROSS = np.meshgrid(_AXIS, _AXIS, indexing="ij")
"""(SIZE, SIZE): where a pixel lies, -1 to 1 from top to bottom and from left to right."""


def noise(rng: np.random.Generator, down: int, across: int) -> Field:
    """Smooth noise with so many knots along each side, 0 to 1."""
    knots = rng.random((down, across), dtype=np.float32)
    return np.asarray(
        cv2.resize(knots, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC).clip(0, 1), np.float32
    )


def _octaves(rng: np.random.Generator, knots: int) -> Field:
    """Noise of three scales, the finer the fainter."""
    total = sum(0.5**k * noise(rng, knots << k, knots << k) for k in range(3))
    return np.asarray(total / 1.75, np.float32)


def _slanted(rng: np.random.Generator, low: float, high: float) -> tuple[Field, Field]:
    """Coordinates with `low` to `high` units across the frame, turned and shifted at random."""
    angle, scale = rng.uniform(0, np.pi), rng.uniform(low, high) / 2
    cos, sin = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    du, dv = rng.random(2, dtype=np.float32)
    return cos * ACROSS + sin * DOWN + du, cos * DOWN - sin * ACROSS + dv


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
    grain = _wave(1.5 * u + 2 * noise(rng, 3, 14) + np.floor(v) * 0.37)
    joint = np.minimum(_sawtooth(v), 1 - _sawtooth(v))
    return np.asarray(_step(joint, 0.03, 0.05) * (0.4 + 0.5 * grain), np.float32)


def _grass(rng: np.random.Generator) -> Field:
    return np.asarray(0.6 * noise(rng, 12, 48) + 0.4 * noise(rng, 6, 24), np.float32)


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
    return np.asarray(0.5 * noise(rng, 60, 60) + 0.5 * noise(rng, 4, 9), np.float32)


def _cells(rng: np.random.Generator) -> Field:
    sites = rng.uniform(-1.1, 1.1, (int(rng.integers(10, 22)), 2, 1, 1)).astype(np.float32)
    distances = (ACROSS - sites[:, 0]) ** 2 + (DOWN - sites[:, 1]) ** 2
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
