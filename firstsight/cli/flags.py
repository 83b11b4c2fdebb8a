"""From what was typed to options: class defaults, then `--config FILE`, then flags."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from firstsight import methods, recipes, settings
from firstsight.cli.spelling import words
from firstsight.errors import UserError
from firstsight.plain_yaml import UNSET

T = TypeVar("T")


def parsed(kind: type[T], args: list[str], prog: str) -> T:
    """The options of a command: class defaults, then `--config FILE`, then flags."""
    values, args = config_file(args)
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    build: Callable[..., T] = kind
    start = settings.merged(build(**dict.fromkeys(required, tyro.MISSING)), values, "--config")
    return flagged(kind, args, prog, kind.__doc__ or "", start)


def pretraining(args: list[str], verb: str) -> tuple[str, settings.Pretrain]:
    """The method and its settings: the paper's, then recipe, `--config FILE`, then flags."""
    name = args[0]
    summary, defaults, own = methods.describe(name)
    values, args = config_file(args[1:])
    if (other := values.pop("name", name)) != name:
        raise UserError(f"--config holds settings of {other}, not of {name}; use pretrain {other}")
    early = {key: peeked(args, f"--{key}") for key in ("size", "epochs", "preset", "recipe")}
    values |= {key: value for key, value in early.items() if value is not None}
    values = recipes.beneath(name, values)
    start = settings.begun(defaults, own, values, "--config or flags")
    config = flagged(settings.Pretrain, args, f"{verb} {name}", summary, start)
    if not config.data:
        raise UserError("which images? use --data SOURCE, for instance --data scenes:train")
    return name, config


def flagged(kind: type[T], args: list[str], prog: str, text: str, start: T) -> T:
    """`start` with the flags among `args` put over it; `--help` shows them below `text`."""
    parse: Callable[..., T] = tyro.cli
    text += " --config FILE reads options from YAML, --json FILE writes the result."
    args = [_dotted(arg) for arg in args]
    _refuse_unknown(args, start, prog)
    heard = io.StringIO()
    try:
        with contextlib.redirect_stderr(heard):
            return parse(
                kind,
                args=_switched(args, start),
                prog=f"firstsight {prog}",
                description=text,
                default=start,
                config=(tyro.conf.FlagConversionOff, tyro.conf.PositionalMetavarFromFieldName),
                registry=words,
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{_sentence(heard.getvalue(), start)}; firstsight {prog} --help") from None


def _refuse_unknown(args: list[str], start: Any, prog: str) -> None:
    """Name the first flag that the command does not have, and the nearest that it has."""
    known = [flag for flag, _ in _options(start, "--")]
    for arg in args:
        flag = arg.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*known, "--help"):
            near = [*_namesakes(flag, known), *difflib.get_close_matches(flag, known, n=1)]
            guess = f"did you mean {near[0]}?" if near else f"firstsight {prog} --help lists all"
            if flag == "--resume":
                guess = "the same command again goes on with an unfinished run"
            raise UserError(f"no option {arg.partition('=')[0]}: {guess}")


_SAME = (
    ("--size", "--input-size", "--image-size", "--img-size", "--short-sides", "--test-side"),
    ("--lr", "--learning-rate"),
    ("--out", "--output", "--output-dir", "--save-dir"),
    ("--workers", "--num-workers"),
)
"""Names of one thing: a command has one of them, and people know the others from elsewhere."""


def _namesakes(flag: str, known: Sequence[str]) -> list[str]:
    """What the command calls the thing that others call `flag`."""
    return [name for names in _SAME if flag in names for name in names if name in known]


def _sentence(box: str, start: Any) -> str:
    """What the parser says in a box of several lines, as one sentence."""
    lines = [line.strip("│ ") for line in box.splitlines()]
    if "Missing from" in box:
        needed = [flag for flag, value in _options(start, "--") if value is tyro.MISSING]
        missing = [flag for flag in needed if any(line.startswith(f"{flag} ") for line in lines)]
        positional = [flag.strip("-").upper() for flag in needed]
        missing = [name for name in positional if name in lines] + missing
        return f"still to be given: {', '.join(missing)}"
    # a rule stands below or beside the title, and another below what is said
    _, first, *_ = [*re.split("[─-]{3,}", " ".join(lines)), ""]
    first = first.strip("╮ ")
    if choice := re.match(r"invalid choice '(.*)' for argument '(.*)'.*one of \((.*)\)", first):
        value, flag, allowed = choice.groups()
        names = ", ".join(re.findall("'(.*?)'", allowed)).removesuffix(", " + ", ".join(UNSET))
        return f"{flag} {value} is none of {names}"
    return first.rstrip(".")


def _dotted(arg: str) -> str:
    """`--a/b v` is `--a.b v`."""
    name, equals, value = arg.partition("=")
    return name.replace("/", ".") + equals + value if arg.startswith("--") else arg


def _switched(args: list[str], options: Any) -> list[str]:
    """Switches told True or False: `--dry-run` alone is on, yes, no, t, f, 1, 0 are understood.

    Some take `auto` too.
    """
    switches = {flag for flag, value in _options(options, "--") if isinstance(value, bool)}
    spelt: list[str] = []
    waiting = False
    for arg in [*args, ""]:
        told = settings.truth(arg)
        if waiting:
            spelt.append(arg if arg == "auto" else str(told is not False))
        if not waiting or (told is None and arg != "auto"):
            name, equals, value = arg.partition("=")
            is_switch = name.replace("_", "-") in switches
            told = settings.truth(value) if is_switch and equals else None
            spelt.append(arg if told is None else f"{name}={told}")
            waiting = is_switch and not equals
        else:
            waiting = False
    return spelt[:-1]


def _options(options: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """(flag, value) of each option, those of nested settings with dots."""
    for name, value in settings.shallow(options).items():
        flag = prefix + name.rstrip("_").replace("_", "-")  # from_: a keyword of Python
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{flag}.")
        else:
            yield flag, value


def peeked(args: list[str], flag: str) -> str | None:
    """The value of `flag` among the arguments, which stay as they are; of several, the last."""
    value = None
    for position, arg in enumerate(args):
        if arg == flag and position + 1 < len(args):
            value = args[position + 1]
        elif arg.startswith(flag + "="):
            value = arg.partition("=")[2]
    return value


def taken(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    """The value of `flag`, if it is there, and the arguments without it; of several, the last."""
    if args[-1:] == [flag]:
        raise UserError(f"{flag} needs a file after it")
    value, rest, waiting = None, [], False
    for arg in args:
        if waiting or arg.startswith(flag + "="):
            value, waiting = arg if waiting else arg.partition("=")[2], False
        elif arg == flag:
            waiting = True
        else:
            rest.append(arg)
    return value, rest


def config_file(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """What the file of `--config` says, if there is one, and the arguments without it."""
    path, rest = taken(args, "--config")
    return (settings.read_yaml(Path(path)) if path else {}), rest
