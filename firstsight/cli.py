"""`firstsight VERB ...`: verb -> function. No logic, and no torch before a verb is at work."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import tyro
from rich.console import Console
from rich.table import Table

from firstsight import methods, settings
from firstsight.errors import UserError, unknown

T = TypeVar("T")


def pretrain(args: list[str]) -> None:
    """Pretrain a backbone on unlabelled images: firstsight pretrain METHOD --data SOURCE."""
    names = methods.names()
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {methods.describe(name)[0]}" for name in names]
        usage = "usage: firstsight pretrain METHOD --data SOURCE [OPTIONS]\n\nmethods:\n"
        print(usage + "\n".join(lines) + "\n\nfirstsight pretrain METHOD --help lists its options")
        return
    name = args[0]
    summary, defaults, own = methods.describe(name)
    values, args = _config_file(args[1:])
    values.pop("name", None)
    size = _number("--size", _peeked(args, "--size") or values.get("size"), int)
    epochs = _number("--epochs", _peeked(args, "--epochs") or values.get("epochs"), float)
    start = settings.starting_point(defaults, own, size or settings.Pretrain.size, epochs)
    start = settings.merged(start, values, "--config")
    config = _parsed(settings.Pretrain, args, f"pretrain {name}", summary, start)
    if not config.data:
        raise UserError("which images? use --data SOURCE, for instance --data scenes:train")

    from firstsight import run

    run.pretrain(name, config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn:
    """k-nearest neighbours, every k in one pass."""

    checkpoint: tyro.conf.Positional[str]
    """CHECKPOINT: a run folder, a file of ours, random:NAME, torchvision:NAME, timm:NAME."""
    train: str
    """Labelled SOURCE of the bank."""
    test: str
    """Labelled SOURCE to classify."""
    k: tuple[int, ...] = (1, 5, 20, 200)
    """Numbers of neighbours that vote."""
    temperature: float = 0.07
    """Temperature of softmax weights."""
    weighting: Literal["softmax", "distance", "uniform"] = "softmax"
    """Weights of the votes."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """What near means."""
    layer: Literal["backbone", "embedding"] = "backbone"
    """Pooled features, or the projector's output (of a run folder)."""
    size: int = 0
    """Side of the images, pixels; 0: as pretrained."""
    train_images: int = 0
    """Images of the bank, drawn by --seed; 0: all."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the backbone."""
    batch_size: int = 256
    """Images per forward pass."""
    workers: int = 0
    """Processes that decode; 0: this one."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the backbone runs."""
    seed: int = 0
    """Decides which images --train-images takes."""


def evaluate(args: list[str]) -> None:
    """Judge a backbone: firstsight evaluate knn CHECKPOINT --train SOURCE --test SOURCE."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: firstsight evaluate knn CHECKPOINT --train SOURCE --test SOURCE [OPTIONS]")
        return
    if args[0] != "knn":
        raise unknown("reading", args[0], ["knn"])
    target, args = _json_file(args[1:])
    options = _parsed(Knn, args, "evaluate knn")

    from firstsight.evaluate import knn

    asked = settings.shallow(options)
    result = knn(asked.pop("checkpoint"), **asked)
    rows = [
        [k, f"{figures['top1']:.2f}", f"{figures['top5']:.2f}"]
        for k, figures in result["k"].items()
    ]
    _show("k-NN accuracy, percent", ["k", "top-1", "top-5"], rows, result, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained page about runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    out: str = "report.html"
    """The page to write."""


def report(args: list[str]) -> None:
    """Curves, pictures, readings of runs in one page: firstsight report RUN... --out FILE.html."""
    options = _parsed(Report, args, "report")

    from firstsight.report import write_report

    print(write_report([Path(run) for run in options.runs], Path(options.out)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole road on generated scenes, in minutes: pretrain, k-NN before and after, report."""

    out: str = "runs/demo"
    """Folder of the run."""
    seed: int = 0
    """Decides initial weights, order of images and views."""
    epochs: float = 0
    """Passes over the scenes; 0: as many as fill about two minutes on two cores."""


def demo(args: list[str]) -> None:
    """The whole road on generated scenes, in minutes: pretrain, k-NN before and after, report."""
    options = _parsed(Demo, args, "demo")

    from firstsight import run

    run.demo(options.out, options.seed, options.epochs)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "report": report,
}


def main(argv: list[str] | None = None) -> None:
    """Run one verb; exit code 0 done, 2 for what the user can mend, 1 for a bug."""
    args = sys.argv[1:] if argv is None else argv
    try:
        if not args or args[0] in ("-h", "--help"):
            print(_overview())
        elif args[0] == "--version":
            from firstsight import __version__

            print(__version__)
        elif args[0] not in VERBS:
            raise unknown("command", args[0], VERBS)
        else:
            VERBS[args[0]](args[1:])
    except UserError as error:
        print(f"firstsight: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _overview() -> str:
    lines = [f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return (
        "usage: firstsight COMMAND ...\n\n"
        "Learn an image backbone from photographs without labels, and say how good it is.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "SOURCE is a folder of images (with or without class folders), a .zip of one,\n"
        "scenes:train or scenes:test. firstsight COMMAND --help lists all options."
    )


def _parsed(
    kind: type[T], args: list[str], prog: str, text: str | None = None, start: T | None = None
) -> T:
    parse: Callable[..., T] = tyro.cli
    begin = {} if start is None else {"default": start}
    args = [_dotted(arg) for arg in args]
    explicit = (tyro.conf.FlagConversionOff,)
    return parse(
        kind, args=args, prog=f"firstsight {prog}", description=text, config=explicit, **begin
    )


def _dotted(arg: str) -> str:
    """`--a/b v` is `--a.b v`."""
    name, equals, value = arg.partition("=")
    return name.replace("/", ".") + equals + value if arg.startswith("--") else arg


def _peeked(args: list[str], flag: str) -> str | None:
    """The value of `flag` among the arguments, which stay as they are."""
    for position, arg in enumerate(args):
        if arg == flag and position + 1 < len(args):
            return args[position + 1]
        if arg.startswith(flag + "="):
            return arg.partition("=")[2]
    return None


def _taken(args: list[str], flag: str) -> tuple[str | None, list[str]]:
    value = _peeked(args, flag)
    if value is None:
        if flag in args:
            raise UserError(f"{flag} needs a file after it")
        return None, args
    if f"{flag}={value}" in args:
        return value, [arg for arg in args if arg != f"{flag}={value}"]
    position = args.index(flag)
    return value, args[:position] + args[position + 2 :]


def _config_file(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    path, rest = _taken(args, "--config")
    return (settings.read_yaml(Path(path)) if path else {}), rest


def _json_file(args: list[str]) -> tuple[str | None, list[str]]:
    return _taken(args, "--json")


def _number(flag: str, value: Any, kind: type[T]) -> T | None:
    try:
        return None if value is None else kind(value)  # type: ignore[call-arg]
    except (TypeError, ValueError):
        raise UserError(f"{flag} {value} is not a number ({kind.__name__})") from None


def _show(
    title: str,
    columns: list[str],
    rows: list[list[str]],
    result: dict[str, Any],
    target: str | None,
) -> None:
    """Print a result as a table with its protocol, and write it as JSON where asked."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.print(table)
    protocol = ", ".join(f"{key} {value}" for key, value in result["protocol"].items())
    console.print(f"protocol: {protocol}", markup=False, highlight=False)
    if target is not None:
        try:
            Path(target).write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write {target} ({error.strerror}); use another --json"
            ) from None
