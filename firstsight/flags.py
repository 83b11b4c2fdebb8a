"""From what was typed to options: class defaults, then `--config FILE`, then flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tyro

from firstsight import settings
from firstsight.errors import UserError

T = TypeVar("T")


def parsed(kind: type[T], args: list[str], prog: str) -> T:
    """The options of a command: class defaults, then `--config FILE`, then flags."""
    values, args = config_file(args)
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    build: Callable[..., T] = kind
    start = settings.merged(build(**dict.fromkeys(required, tyro.MISSING)), values, "--config")
    return flagged(kind, args, prog, kind.__doc__ or "", start)


def flagged(kind: type[T], args: list[str], prog: str, text: str, start: T) -> T:
    """`start` with the flags among `args` put over it; `--help` shows them below `text`."""
    parse: Callable[..., T] = tyro.cli
    text += " --config FILE reads options from YAML, --json FILE writes the result."
    return parse(
        kind,
        args=_switched([_dotted(arg) for arg in args], start),
        prog=f"firstsight {prog}",
        description=text,
        default=start,
        config=(tyro.conf.FlagConversionOff,),
    )


def _dotted(arg: str) -> str:
    """`--a/b v` is `--a.b v`."""
    name, equals, value = arg.partition("=")
    return name.replace("/", ".") + equals + value if arg.startswith("--") else arg


def _switched(args: list[str], options: Any) -> list[str]:
    """Switches told True or False: `--dry-run` alone is on, yes, no, t, f, 1, 0 are understood."""
    switches, spelt, waiting = set(_switches(options, "--")), [], False
    for arg in [*args, ""]:
        told = settings.truth(arg)
        if waiting:
            spelt.append(str(told is not False))
        if not waiting or told is None:
            name, equals, value = arg.partition("=")
            is_switch = name.replace("_", "-") in switches
            told = settings.truth(value) if is_switch and equals else None
            spelt.append(arg if told is None else f"{name}={told}")
            waiting = is_switch and not equals
        else:
            waiting = False
    return spelt[:-1]


def _switches(options: Any, prefix: str) -> Iterator[str]:
    for name, value in settings.shallow(options).items():
        if dataclasses.is_dataclass(value):
            yield from _switches(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            yield prefix + name.replace("_", "-")


def peeked(args: list[str], flag: str) -> str | None:
    """The value of `flag` among the arguments, which stay as they are."""
    for position, arg in enumerate(args):
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
    return None


def taken(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag`, if it is there, and the arguments without it."""
    value = peeked(args, flag)
    if value is None:
        if flag in args:
            raise UserError(f"{flag} needs a file after it")
        return None, args
    if f"{flag}={value}" in args:
        return value, [arg for arg in args if arg != f"{flag}={value}"]
    position = args.index(flag)
    return value, args[:position] + args[position + 2 :]


def config_file(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the file of `--config` says, if there is one, and the arguments without it."""
    path, rest = taken(args, "--config")
    return (settings.read_yaml(Path(path)) if path else {}), rest
