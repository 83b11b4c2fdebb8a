"""Settings in words: as typed, and in YAML files, which execute nothing and are written whole."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from firstsight.errors import UserError, unknown

T = TypeVar("T")

UNSET = ("unset", "none", "None")
"""What stands for a setting that is not given; shown as the first."""


class _Once(yaml.SafeLoader):
    """Refuses a key that comes twice: one of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [str(key) for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} comes twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, which can execute nothing."""
    try:
        values = yaml.load(path.read_text(), Loader=_Once)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give --config a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not plain YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings (expected lines like `epochs: 100`)")
    return values


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write settings in the format that `--config` reads, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(yaml.safe_dump(values, sort_keys=False))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); use another --out") from None


def merged(settings: T, values: dict[str, Any], where: str) -> T:
    """`settings` with `values` (as read from YAML, keys with - or _) put over it.

    Unknown keys and values of the wrong type are refused; `where` names their file.
    """
    hints = typing.get_type_hints(type(settings))
    names = {f.name for f in dataclasses.fields(settings)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in names:
            raise UserError(f"{where}: {unknown('setting', str(key), sorted(names))}")
        old = getattr(settings, name)
        if dataclasses.is_dataclass(old):
            if not isinstance(value, dict):
                raise UserError(f"{where}: {key} holds settings of its own, not {value!r}")
            changes[name] = merged(old, value, f"{where}: {key}")
        else:
            changes[name] = _read(value, hints[name], f"{where}: {key}")
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def _read(value: Any, kind: Any, where: str) -> Any:
    """`value` as the type `kind`: YAML 1.1 reads 1e-6 as a string, and lists for tuples."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in inner and value in (None, *UNSET):
            return None
        return _read(value, next(k for k in inner if k is not type(None)), where)
    if origin is Literal:
        if True in inner and (told := truth(value)) is not None:
            return told
        if value in inner:
            return value
        raise UserError(f"{where}: {value!r} is none of {', '.join(map(str, inner))}")
    if origin is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) == len(value):
            return tuple(_read(v, k, where) for v, k in zip(value, kinds, strict=True))
    elif kind is bool and (told := truth(value)) is not None:
        return told
    elif kind is float and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    elif kind is int and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return int(value)
        except ValueError:
            pass
    elif isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    raise UserError(f"{where}: {value!r} is not {getattr(kind, '__name__', kind)}")


def truth(value: Any) -> bool | None:
    """What a switch is told: yes, true, t, y, 1 or their opposites in any case; None: neither."""
    word = str(value).lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    return False if word in ("no", "false", "f", "n", "0") else None


def spelt(value: Any) -> str:
    """A setting as it is typed; a list of nothing is typed as nothing."""
    if isinstance(value, list | tuple):
        return " ".join(map(spelt, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return UNSET[0] if value is None else str(value) or "''"
