"""Published settings as they ship: a YAML file each, its story in the comments at its top.

A recipe lies between a method's defaults and `--config`, and has that file's format: `name` is the
method. Those of detectors are in `detect/`, and their `name` is that. `differs:` lines say what of
the published run it cannot repeat.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firstsight.errors import UserError, unknown
from firstsight.settings import read_yaml

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A published setting."""

    name: str
    method: str
    summary: str
    """One line: what is trained, on what, whose settings."""
    story: dict[str, str]
    """What else its comments say: paper, command, hardware, published, reproduced, differs."""
    values: dict[str, Any]
    """The settings, nested, as from YAML."""
    text: str
    """The file as it ships."""


def names(folder: str = "") -> list[str]:
    """All recipes of pretraining, or those of `detect`."""
    return sorted(path.stem for path in (_HERE / folder).glob("*.yaml"))


def read(name: str) -> Recipe:
    """A recipe by its name."""
    if name not in names() + names("detect"):
        raise unknown("recipe", name, names() + names("detect"), "firstsight recipes")
    path = _HERE / ("detect" if name in names("detect") else "") / f"{name}.yaml"
    text, values = path.read_text(), read_yaml(path)
    told = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("#")]
    story: dict[str, str] = {}
    for key, told_of in (line.split(": ", 1) for line in told[1:]):
        story[key] = f"{story[key]}; {told_of}" if key in story else told_of
    method = str(values.pop("name"))
    return Recipe(name=name, method=method, summary=told[0], story=story, values=values, text=text)


def beneath(method: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values` (nested, as from YAML) over those of the recipe that they name, if they name one.

    Other `epochs` than the recipe's scale its warm-up with them; its drops are shares of the run.
    Another `preset` of views takes the place of the recipe's views, but for what is merged. Raises
    `UserError` for a recipe of another method.
    """
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if not values.get("recipe"):
        return values
    recipe = read(str(values["recipe"]))
    if recipe.method != method:
        others = [name for name in names() if read(name).method == method]
        raise UserError(
            f"{recipe.name} is a recipe of {recipe.method}, not of {method}; "
            f"use --recipe with one of: {', '.join(others) or f'none yet for {method}'}"
        )
    start = dict(recipe.values)
    if "epochs" in values:
        start["warmup_epochs"] *= _share(values["epochs"], start["epochs"])
    if "preset" in values:
        views = start.pop("views", {})
        start |= {"views": {"merge": views["merge"]}} if "merge" in views else {}
    return _over(values, start)


def of_detection(values: dict[str, Any]) -> dict[str, Any]:
    """`values` over those of the recipe of a detector that they name, if they name one.

    Other `epochs` or `steps` than the recipe's scale its warm-up with them; `epochs` take the place
    of its steps. Raises `UserError` for a recipe of pretraining.
    """
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    if not values.get("recipe"):
        return values
    recipe = read(str(values["recipe"]))
    if recipe.method != "detect":
        raise UserError(
            f"{recipe.name} is a recipe of {recipe.method}; use --recipe with one of: "
            f"{', '.join(names('detect'))}"
        )
    start = dict(recipe.values)
    for unit in ("epochs", "steps"):
        if unit in values and start.get(unit):
            share = _share(values[unit], start[unit])
            start["warmup_steps"] = max(1, round(start["warmup_steps"] * share))
    if "epochs" in values and "steps" not in values:
        start.pop("steps", None)
    return _over(values, start)


def _share(epochs: Any, of: float) -> float:
    try:
        return float(epochs) / of
    except (TypeError, ValueError):
        raise UserError(f"--epochs takes a number, not {epochs!r}") from None


def _over(values: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    merged = dict(start)
    for key, value in values.items():
        name, below = str(key).replace("-", "_"), start.get(str(key).replace("-", "_"))
        nested = isinstance(value, dict) and isinstance(below, dict)
        merged[name] = _over(value, below) if nested else value  # type: ignore[arg-type]
    return merged
