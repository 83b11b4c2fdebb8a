"""How options read in `--help`: in words, not in Python's types."""

from __future__ import annotations

from collections.abc import Callable
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from firstsight.plain_yaml import UNSET, spelt, truth

Spec = PrimitiveConstructorSpec[Any]
words = ConstructorRegistry()
"""The rules below, for the parser."""


def _shown(value: Any) -> list[str]:
    """A default in help."""
    return ["empty"] if value in ("", ()) else spelt(value).split(" ")


@words.primitive_rule
def _text(info: PrimitiveTypeInfo) -> Spec | None:
    if info.type is not str:
        return None
    return _spec("TEXT", str)


@words.primitive_rule
def _switch(info: PrimitiveTypeInfo) -> Spec | None:
    """yes and no, and the words beside them in a choice such as False | True | "auto"."""
    kind: Any = info.type
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    if kind is not bool and not any(isinstance(one, bool) for one in choices):
        return None
    others = [one for one in choices if not isinstance(one, bool)]
    known = "{" + ",".join(["yes", "no", *others]) + "}"

    def read(word: str) -> Any:
        told = word if word in others else truth(word)
        if told is None:
            raise ValueError(f"{word!r} is not {known}")
        return told

    return _spec(known, read)


@words.primitive_rule
def _optional(info: PrimitiveTypeInfo) -> Spec | None:
    """What may be left unset: read as what it is otherwise."""
    inner = [kind for kind in get_args(info.type) if kind is not type(None)]
    if info.type_origin not in (Union, UnionType) or len(inner) != 1:
        return None
    one = _of(inner[0], info)
    return _spec(
        one.metavar,
        lambda word: None if word in UNSET else one.instance_from_str([word]),
        choices=one.choices and (*one.choices, *UNSET),
    )


@words.primitive_rule
def _several(info: PrimitiveTypeInfo) -> Spec | None:
    if info.type_origin is not tuple or get_args(info.type)[-1] is not Ellipsis:
        return None
    one = _of(get_args(info.type)[0], info)
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"{one.metavar} ...",
        instance_from_str=lambda args: tuple(one.instance_from_str([arg]) for arg in args),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=_shown,
        choices=one.choices,
    )


def _of(kind: Any, whole: PrimitiveTypeInfo) -> Spec:
    """How a part of a type is read."""
    spec = words.get_primitive_spec(PrimitiveTypeInfo.make(kind, whole.markers))
    assert isinstance(spec, PrimitiveConstructorSpec)
    return spec


def _spec(metavar: str, read: Callable[[str], Any], choices: tuple[str, ...] | None = None) -> Spec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda args: read(args[0]),
        is_instance=lambda value: True,  # asked only of unions, which are read above
        str_from_instance=_shown,
        choices=choices,
    )
