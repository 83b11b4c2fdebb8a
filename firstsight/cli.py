"""`firstsight VERB ...`: verb -> function. No logic, and no torch before a verb is at work."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import tyro

from firstsight import methods, recipes, settings
from firstsight.cli_convert import convert
from firstsight.cli_data import data
from firstsight.cli_localize import localize, masks
from firstsight.errors import UserError, require_positive, unknown
from firstsight.flags import config_file, flagged, parsed, peeked, taken
from firstsight.log import is_first
from firstsight.settings import Common
from firstsight.shown import show, table, write_json


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
    target, args = taken(args[1:], "--json")
    values, args = config_file(args)
    if values.pop("name", name) != name:
        raise UserError(f"--config holds settings of another method than {name}")
    early = {key: peeked(args, f"--{key}") for key in ("size", "epochs", "preset", "recipe")}
    values |= {key: value for key, value in early.items() if value is not None}
    values = recipes.beneath(name, values)
    start = settings.begun(defaults, own, values, "--config or flags")
    config = flagged(settings.Pretrain, args, f"pretrain {name}", summary, start)
    if not config.data:
        raise UserError("which images? use --data SOURCE, for instance --data scenes:train")

    from firstsight import run

    if config.dry_run:
        _show_dry_run(run.dry_run(name, config), target)
    else:
        _show_run(run.pretrain(name, config), target)


def show_recipes(args: list[str]) -> None:
    """Published settings for pretrain --recipe: firstsight recipes, or firstsight recipes NAME."""
    if args[:1] in (["-h"], ["--help"]):
        print("usage: firstsight recipes [NAME] [--json FILE]")
        return
    target, args = taken(args, "--json")
    shown = [recipes.read(name) for name in args or recipes.names()]
    for recipe in shown:
        about = f"{recipe.name:<25} {recipe.summary}\n{recipe.method:>24}  {recipe.story['paper']}"
        print(recipe.text if args else about)
    write_json(target, {r.name: {"method": r.method, **r.story, **r.values} for r in shown})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading(Common):
    """What every reading of a backbone with labelled images can be told."""

    checkpoint: tyro.conf.Positional[str]
    """CHECKPOINT: a run folder, a file of ours or of another library, random:NAME,
    torchvision:NAME, timm:NAME."""
    train: str
    """Labelled SOURCE to learn from: the bank of neighbours, the images of a classifier."""
    test: str
    """Labelled SOURCE to classify."""
    snapshots: bool = False
    """Read every snapshot of a run, and keep the curve in its folder."""
    size: int = 0
    """Side of the images, pixels; 0: as pretrained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the backbone."""
    workers: int = 0
    """Processes that decode; 0: this one."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""

    def __post_init__(self) -> None:
        if min(self.size, self.workers) < 0:
            raise UserError("--size and --workers must not be below 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knn(Reading):
    """k-nearest neighbours, every k in one pass."""

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
    train_images: int = 0
    """Images of the bank, drawn by --seed; 0: all."""
    batch_size: int = 256
    """Images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "temperature", "batch_size")
        if not self.k or min(self.k) < 1:
            raise UserError(f"--k takes numbers of 1 or more, not {self.k}")
        if self.train_images < 0:
            raise UserError("--train-images must not be below 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Reading):
    """A linear classifier on the frozen backbone; what is not given is as the protocol says."""

    protocol: Literal["cached", "moco", "pic", "byol", "scrl", "swav", "dino"] = "cached"
    """Where all numbers start. cached: on features extracted once, the best of 12 settings by a
    held-out tenth of --train. The others: as published, on random crops; slow, as they decode and
    encode each image in every epoch."""
    epochs: int | None = None
    """Passes over the training images; warm-up and drops scale along."""
    lr: tuple[float, ...] = ()
    """Peak learning rate, absolute; several (with cached) are compared."""
    base_lr: float | None = None
    """Peak learning rate per 256 images of a batch, in place of --lr."""
    weight_decay: tuple[float, ...] = ()
    """Weight decay; several (with cached) are compared."""
    optimizer: Literal["sgd", "lars"] | None = None
    """SGD with momentum, or LARS around it."""
    momentum: float | None = None
    """Momentum of SGD."""
    nesterov: bool | None = None
    """Nesterov's momentum."""
    batch_size: int | None = None
    """Images a step, over all ranks."""
    warmup_epochs: float | None = None
    """Epochs in which the learning rate rises from zero."""
    schedule: Literal["cosine", "step"] | None = None
    """Half a cosine to zero, or times 0.1 at each drop."""
    drops: tuple[float, ...] = ()
    """Where the step schedule drops, as shares of the epochs."""
    once_an_epoch: bool | None = None
    """The learning rate changes between epochs only."""
    init_std: float | None = None
    """Standard deviation of the first weights; 0: as torch draws a linear layer."""
    representation: Literal["original", "norm", "standard"] | None = None
    """Features as they are, of unit length, or each of mean 0 and deviation 1."""
    min_scale: float | None = None
    """Smallest random crop, share of the image area."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the resize."""


def evaluate(args: list[str]) -> None:
    """Judge a backbone: firstsight evaluate knn|linear CHECKPOINT --train SOURCE --test SOURCE."""
    if not args or args[0] in ("-h", "--help"):
        readings = "|".join(READINGS)
        print(f"usage: firstsight evaluate {readings} CHECKPOINT --train SOURCE --test SOURCE ...")
        return
    if args[0] not in READINGS:
        raise unknown("reading", args[0], READINGS)
    target, args_left = taken(args[1:], "--json")
    READINGS[args[0]](args_left, target)


def evaluate_knn(args: list[str], target: str | None) -> None:
    """Accuracy of k-nearest neighbours."""
    asked = settings.shallow(parsed(Knn, args, "evaluate knn"))

    from firstsight.evaluate import knn

    if (result := _read(knn, "knn", asked, target)) is not None:
        rows = [
            [k, f"{figures['top1']:.2f}", f"{figures['top5']:.2f}"]
            for k, figures in result["k"].items()
        ]
        show("k-NN accuracy, percent", ["k", "top-1", "top-5"], rows, result, target)


def evaluate_linear(args: list[str], target: str | None) -> None:
    """Accuracy of a linear classifier on frozen features."""
    asked = settings.shallow(parsed(Linear, args, "evaluate linear"))

    from firstsight.evaluate import linear

    if (result := _read(linear, "linear", asked, target)) is None:
        return
    rows = [["last epoch", f"{result['top1']:.2f}", f"{result['top5']:.2f}"]]
    best = f"epoch {result['best_epoch']}, the best on the test images"
    rows.append([best, f"{result['best_top1']:.2f}", ""])
    if "chosen" in result:
        lr, decay = result["chosen"]["lr"], result["chosen"]["weight_decay"]
        rows.append([f"learning rate {lr:g}, weight decay {decay:g}: chosen held out", "", ""])
    show("linear accuracy, percent", ["", "top-1", "top-5"], rows, result, target)


def _read(
    reading: Callable[..., dict[str, Any]], name: str, asked: dict[str, Any], target: str | None
) -> dict[str, Any] | None:
    """The reading of one checkpoint; those of all snapshots are shown here, and nothing is left."""
    spec, over_run = asked.pop("checkpoint"), asked.pop("snapshots")
    if not over_run:
        return reading(spec, **asked)

    from firstsight.evaluate import over_snapshots

    results = over_snapshots(spec, name, lambda snapshot: reading(snapshot, **asked))
    steps = [[str(one["step"]), f"{one['top1']:.2f}"] for one in results]
    what = {"knn": "k-NN at its best k", "linear": "linear"}[name]
    table(f"{what} over the run, percent", ["step", "top-1"], steps)
    write_json(target, results)
    return None


READINGS: dict[str, Callable[[list[str], str | None], None]] = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
}


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
    "data": data,
    "convert": convert,
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
        ["parameters of the backbone", f"{result['parameters']}"],
        ["memory", f"{result['memory_gib']} GiB"],
        ["a step", per_step + f"{result['seconds_views']} s for its views in one process)"],
        ["in all, without readings", f"{result['time']} ({result['hours']} hours)"],
    ]
    table(f"{result['method']}, nothing written", ["", ""], rows)
    write_json(target, result)
