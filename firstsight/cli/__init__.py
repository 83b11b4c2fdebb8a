"""`firstsight VERB ...`: verb -> function. No logic, and no torch before a verb is at work."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from firstsight import methods, recipes, settings
from firstsight.cli.bench import bench
from firstsight.cli.convert import convert
from firstsight.cli.data import data
from firstsight.cli.detect import detect
from firstsight.cli.flags import parsed, pretraining, taken
from firstsight.cli.health import diagnose, embed
from firstsight.cli.judge import evaluate
from firstsight.cli.launch import launch
from firstsight.cli.localize import localize, masks
from firstsight.cli.shown import table, write_json
from firstsight.errors import UserError, unknown
from firstsight.log import is_first
from firstsight.settings import Common


def pretrain(args: list[str]) -> None:
    """Pretrain a backbone on unlabelled images: firstsight pretrain METHOD --data SOURCE."""
    names = methods.names()
    if not args or args[0] in ("-h", "--help"):
        lines = [f"  {name:<10} {methods.describe(name)[0]}" for name in names]
        usage = "usage: firstsight pretrain METHOD --data SOURCE [OPTIONS]\n\nmethods:\n"
        print(usage + "\n".join(lines) + "\n\nfirstsight pretrain METHOD --help lists its options")
        return
    target, args = taken(args, "--json")
    name, config = pretraining(args, "pretrain")

    from firstsight import run

    if config.dry_run:
        _show_dry_run(run.dry_run(name, config), target)
    else:
        _show_run(run.pretrain(name, config), target)


def show_recipes(args: list[str]) -> None:
    """Published settings for --recipe: firstsight recipes, or firstsight recipes NAME."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: firstsight recipes [NAME] [--json FILE]")
        return
    target, args = taken(args, "--json")
    shown = [recipes.read(name) for name in args or [*recipes.names(), *recipes.names("detect")]]
    for recipe in shown:
        about = f"{recipe.name:<25} {recipe.summary}\n{recipe.method:>24}  {recipe.story['paper']}"
        print(recipe.text if args else about)
    write_json(target, {r.name: {"method": r.method, **r.story, **r.values} for r in shown})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """One self-contained page about runs."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Run folders."""
    out: str = "report.html"
    """The page to write."""


def report(args: list[str]) -> None:
    """Curves, pictures, readings of runs in one page: firstsight report RUN... --out FILE.html."""
    options = parsed(Report, args, "report")

    from firstsight.report import write_report

    print(write_report([Path(run) for run in options.runs], Path(options.out)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """The whole road on generated scenes, in minutes: pretrain, k-NN before and after, report."""

    out: str = "runs/demo"
    """Folder of the run."""
    epochs: float = 0
    """Passes over the scenes; 0: as many as fill about two minutes on two cores."""


def demo(args: list[str]) -> None:
    """The whole road on generated scenes, in minutes: pretrain, k-NN before and after, report."""
    target, args = taken(args, "--json")
    options = parsed(Demo, args, "demo")

    from firstsight import run

    _show_run(run.demo(**settings.shallow(options)), target)


VERBS: dict[str, Callable[[list[str]], None]] = {
    "demo": demo,
    "pretrain": pretrain,
    "recipes": show_recipes,
    "evaluate": evaluate,
    "localize": localize,
    "masks": masks,
    "detect": detect,
    "diagnose": diagnose,
    "embed": embed,
    "data": data,
    "convert": convert,
    "report": report,
    "launch": launch,
    "bench": bench,
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
    except BrokenPipeError:  # `firstsight recipes | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        if "torch" in sys.modules:
            from firstsight import distributed

            distributed.stop()


def _overview() -> str:
    lines = [f"  {name:<9} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return (
        "usage: firstsight COMMAND ...\n\n"
        "Learn an image backbone from photographs without labels, and say how good it is.\n\n"
        "commands:\n" + "\n".join(lines) + "\n\n"
        "SOURCE is a folder of images (with or without class folders), a .zip of one, a list\n"
        "(.txt, .csv, .parquet), a .tar or a folder of them, scenes:train, scenes:test, or\n"
        "what others know: cifar10:train, stl10:unlabeled, imagenet:train@ROOT, hf:NAME:SPLIT.\n"
        "firstsight COMMAND --help lists all options."
    )


def _show_run(out: Path, target: str | None) -> None:
    """The summary of a finished run, from the process that wrote it."""
    if not is_first():
        return
    summary = json.loads((out / "summary.json").read_text())
    rows = [[key, f"{summary[key]}"] for key in ("images", "seconds", "images_per_second")]
    for name, reading in summary.items():
        if isinstance(reading, dict) and "protocol" in reading:
            rows += [
                [f"{name} {what}", f"{value:.1f} %" if isinstance(value, float) else f"{value}"]
                for what, value in reading.items()
                if what != "protocol"
            ]
    table(f"{summary['method']}, {out}", ["", ""], rows)
    write_json(target, summary)


def _show_dry_run(result: dict[str, Any], target: str | None) -> None:
    """What a run would take."""
    if not is_first():
        return
    per_step = f"{result['seconds_per_step']} s ({result['seconds_network']} s for the network, "
    rows = [
        ["steps", f"{result['steps']}"],
        ["images", f"{result['images']}"],
        ["parameters of the backbone", f"{result['parameters']:,}"],
        ["memory", f"{result['memory_gib']} GiB"],
        ["a step", per_step + f"{result['seconds_views']} s for its views in one process)"],
        ["in all, without readings", f"{result['time']} ({result['hours']} hours)"],
    ]
    table(f"{result['method']}, nothing written", ["", ""], rows)
    write_json(target, result)
