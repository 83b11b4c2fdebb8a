"""Options of the commands that judge a backbone, and their results as tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from firstsight import settings
from firstsight.cli.flags import parsed, taken
from firstsight.cli.shown import show, table, write_json
from firstsight.errors import UserError, require_not_negative, require_positive, unknown
from firstsight.readings import figures
from firstsight.settings import Common


@dataclass(frozen=True, kw_only=True)
class Judging(Common):
    """What every command that looks at a backbone can be told."""

    checkpoint: tyro.conf.Positional[str]
    """CHECKPOINT: a run folder, a file of ours, random:NAME, torchvision:NAME, timm:NAME."""
    size: int = 0
    """Side of the images, pixels; 0: as pretrained."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the backbone."""
    workers: int = 0
    """Processes that decode; 0: this one."""

    def __post_init__(self) -> None:
        if min(self.size, self.workers) < 0:
            raise UserError("--size and --workers must not be below 0")


@dataclass(frozen=True, kw_only=True)
class OverRun(Judging):
    """What every reading that a run can have of each of its snapshots can be told."""

    snapshots: bool = False
    """Read every snapshot of a run, and keep the curve in its folder."""


@dataclass(frozen=True, kw_only=True)
class Reading(OverRun):
    """What every reading of a backbone with labelled images can be told."""

    train: str
    """Labelled SOURCE to learn from: the bank of neighbours, the images of a classifier."""
    test: str
    """Labelled SOURCE to classify."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""


@dataclass(frozen=True, kw_only=True)
class Knn(Reading):
    """k-nearest neighbours, every k in one pass."""

    k: tuple[int, ...] = (1, 5, 20, 200)
    """Numbers of neighbours that vote; of these four, those that there are images for."""
    choose_k: bool = False
    """Name the k that does best on the training images, each classified by the others."""
    temperature: float = 0.07
    """Temperature of softmax weights."""
    weighting: Literal["softmax", "distance", "uniform"] = "softmax"
    """Weights of the votes."""
    metric: Literal["cosine", "euclidean"] = "cosine"
    """What near means."""
    representation: Literal["original", "norm", "shift-norm", "shifted-norm"] | None = None
    """Features as they are; of unit length; or less their mean, then of unit length. Unset: norm
    with cosine, original with euclidean."""
    shift_batch: int = 0
    """Images whose mean is taken from them, drawn by --seed (as ssl-small published shift-norm);
    0: the mean of all training images."""
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
        require_not_negative("--", self, "train_images", "shift_batch")


@dataclass(frozen=True, kw_only=True)
class Linear(Reading):
    """A linear classifier on the frozen backbone; what is not given is as the protocol says."""

    protocol: Literal[
        "cached",
        "moco",
        "pic",
        "byol",
        "scrl",
        "swav",
        "simclr",
        "simsiam",
        "vicreg",
        "ssl-small",
        "dino",
    ] = "cached"
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
    batch_norm: Literal["rest", "batch"] | None = None
    """Batch-norm while the head learns: by running statistics, which rest, or (as PIC's code) by
    those of each batch, which move them in a copy."""
    representation: Literal["original", "norm", "standard"] | None = None
    """Features as they are, of unit length, or each of mean 0 and deviation 1."""
    min_scale: float | None = None
    """Smallest random crop, share of the image area."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the resize."""


@dataclass(frozen=True, kw_only=True)
class Finetune(Reading):
    """Full fine-tuning of backbone and head; what is not given is as the protocol says."""

    labels: str = "100%"
    """Labels to learn from: a share of each class, as 1%, or a number of each class, as 13."""
    protocol: Literal["swav-10", "swav-1", "ssl-small"] = "swav-10"
    """Where all numbers start. swav-10, swav-1: semi-supervised, with 10% or 1% of the labels;
    ssl-small: transfer to CIFAR and Caltech-101."""
    epochs: int | None = None
    """Passes over the training images; drops move along."""
    lr: float | None = None
    """Peak learning rate of the backbone, absolute."""
    head_lr: float | None = None
    """Peak learning rate of the head, absolute."""
    weight_decay: float | None = None
    """Weight decay."""
    batch_size: int | None = None
    """Images a step, over all ranks; fewer labelled images than that are one batch."""
    schedule: Literal["cosine", "step"] | None = None
    """Half a cosine to zero, or times 0.2 at each drop."""
    drops: tuple[float, ...] = ()
    """Where the step schedule drops, as shares of the epochs."""
    representation: Literal["original", "norm"] | None = None
    """Features as they are, or of unit length, before the head."""
    min_scale: float | None = None
    """Smallest random crop, share of the image area."""
    interpolation: Literal["bilinear", "bicubic"] | None = None
    """Filter of the resize."""
    mean_per_class: bool = False
    """Say the accuracy of each class too, as the mean over classes."""
    test_every: int = 1
    """Epochs between readings of the test images; the last epoch is always read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "test_every")


@dataclass(frozen=True, kw_only=True)
class Dense(OverRun):
    """Classes of the cells of feature maps, by k-NN and by a linear classifier on single cells."""

    train: str
    """SOURCE of marked images to learn from."""
    test: str
    """SOURCE of marked images to be right about."""
    train_marks: str = ""
    """What the pixels of --train show: a folder of index masks (PNG, 255 is none), or boxes in any
    file that localize takes; scenes have their own."""
    test_marks: str = ""
    """The same for --test."""
    mixed: Literal["counted", "left-out"] = "counted"
    """Cells that show several classes: counted as the one of most pixels, or left out."""
    stage: int | None = None
    """A map of the backbone: 0 the stem, 1 to 4 the stages of a ResNet. Unset: the last."""
    k: int = 20
    """Neighbours that vote; fewer where there are fewer cells."""
    temperature: float = 0.07
    """Temperature of softmax weights."""
    epochs: int = 20
    """Passes of the linear classifier over the training cells."""
    cells: int = 50000
    """Training cells at most, drawn by --seed; 0: all."""
    batch_size: int = 64
    """Images per forward pass."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "k", "temperature", "epochs", "batch_size")
        require_not_negative("--", self, "cells")


@dataclass(frozen=True, kw_only=True)
class Unlabelled(OverRun):
    """What every reading of two views of each image can be told."""

    data: str
    """SOURCE of the images: a folder of static views, or any, of which views are drawn."""
    preset: str = "mocov2"
    """Views to draw, where they are not static: mocov1, mocov2, simclr, byol, swav, dino."""
    distractors: Literal["published", "full"] = "published"
    """What a view is told from: all other images, or these and the other view of each of them."""
    layer: Literal["backbone", "embedding"] = "backbone"
    """Pooled features, or the projector's output (of a run folder)."""
    batch_size: int = 256
    """Images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "batch_size")


@dataclass(frozen=True, kw_only=True)
class Instance(Unlabelled):
    """Instance discrimination: how often an image's view is nearer to it than all other images."""

    dataset_mode: Literal["normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask", "all"] = (
        "normal"
    )
    """Which views of a folder of static views; all: each in turn, and their mean."""
    topk: int = 5
    """Largest k: the view is among the 1 to k nearest."""
    images: int = 0
    """Images, drawn by --seed; 0: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "topk")
        require_not_negative("--", self, "images")


def evaluate(args: list[str]) -> None:
    """Judge a backbone: firstsight evaluate knn|linear|dense|finetune|... CHECKPOINT ..."""
    if not args or args[0] in ("-h", "--help"):
        asks = dict.fromkeys(READINGS, "--train SOURCE --test SOURCE")
        asks["instance"] = "--data VIEWS"
        lines = [f"  firstsight evaluate {name} CHECKPOINT {more}" for name, more in asks.items()]
        print("usage:\n" + "\n".join(lines))
        return
    if args[0] not in READINGS:
        raise unknown("reading", args[0], READINGS)
    target, args_left = taken(args[1:], "--json")
    READINGS[args[0]](args_left, target)


def evaluate_knn(args: list[str], target: str | None) -> None:
    """Accuracy of k-nearest neighbours."""
    asked = settings.shallow(parsed(Knn, args, "evaluate knn"))

    from firstsight.evaluate import knn

    if (result := taken_of(knn, "knn", asked, target)) is not None:
        rows = [
            [k, f"{figures['top1']:.2f}", f"{figures['top5']:.2f}"]
            for k, figures in result["k"].items()
        ]
        if "chosen" in result:
            chosen = result["chosen"]
            rows.append([f"{chosen['k']}: chosen left out", f"{chosen['top1']:.2f}", ""])
        show("k-NN accuracy, percent", ["k", "top-1", "top-5"], rows, result, target)


def evaluate_linear(args: list[str], target: str | None) -> None:
    """Accuracy of a linear classifier on frozen features."""
    asked = settings.shallow(parsed(Linear, args, "evaluate linear"))

    from firstsight.evaluate import linear

    if (result := taken_of(linear, "linear", asked, target)) is None:
        return
    rows = [["last epoch", f"{result['top1']:.2f}", f"{result['top5']:.2f}"]]
    if abs(result["mean_per_class"] - result["top1"]) > 0.5:  # classes differ much in size
        rows.append(["last epoch, mean per class", f"{result['mean_per_class']:.2f}", ""])
    best = f"epoch {result['best_epoch']}, the best on the test images"
    rows.append([best, f"{result['best_top1']:.2f}", ""])
    if "chosen" in result:
        lr, decay = result["chosen"]["lr"], result["chosen"]["weight_decay"]
        rows.append([f"learning rate {lr:g}, weight decay {decay:g}: chosen held out", "", ""])
    show("linear accuracy, percent", ["", "top-1", "top-5"], rows, result, target)


def evaluate_finetune(args: list[str], target: str | None) -> None:
    """Accuracy after training the whole network on labels."""
    asked = settings.shallow(parsed(Finetune, args, "evaluate finetune"))

    from firstsight.evaluate import finetune

    if (result := taken_of(finetune, "finetune", asked, target)) is None:
        return
    rows = [["last epoch", f"{result['top1']:.2f}", f"{result['top5']:.2f}"]]
    if "mean_per_class" in result:
        rows.append(["last epoch, mean per class", f"{result['mean_per_class']:.2f}", ""])
    best = f"epoch {result['best_epoch']}, the best on the test images"
    rows.append([best, f"{result['best_top1']:.2f}", ""])
    show("fine-tuned accuracy, percent", ["", "top-1", "top-5"], rows, result, target)


def evaluate_dense(args: list[str], target: str | None) -> None:
    """Accuracy and overlap of the classes of cells."""
    asked = settings.shallow(parsed(Dense, args, "evaluate dense"))

    from firstsight.evaluate import dense

    if (result := taken_of(dense, "dense", asked, target)) is None:
        return
    names = {"k-NN": "knn", "linear": "linear", "always the most frequent": "most_frequent"}
    rows = [
        [name, f"{result[key]['accuracy']:.2f}", f"{result[key]['mean_iou']:.2f}"]
        for name, key in names.items()
    ]
    show("classes of cells, percent", ["", "accuracy", "mean IoU"], rows, result, target)


def evaluate_instance(args: list[str], target: str | None) -> None:
    """How often a view is nearest to its own image."""
    asked = settings.shallow(parsed(Instance, args, "evaluate instance"))

    from firstsight.evaluate import instance

    if (result := taken_of(instance, "instance", asked, target)) is None:
        return
    rows = [[k, *(f"{result[pair][k]:.2f}" for pair in ("d-sd", "sd-sd"))] for k in result["d-sd"]]
    columns = ["top", "image to view", "view to view"]
    show("own view found, percent", columns, rows, result, target)


def taken_of(
    reading: Callable[..., dict[str, Any]], name: str, asked: dict[str, Any], target: str | None
) -> dict[str, Any] | None:
    """The reading of one checkpoint; those of all snapshots are shown here, and nothing is left.

    What is taken of a run stays in its folder, for its report.
    """
    from firstsight import evaluate

    spec, over_run = asked.pop("checkpoint"), asked.pop("snapshots")
    if not over_run:
        return evaluate.kept(spec, name, lambda one: reading(one, **asked))
    results = evaluate.over_snapshots(spec, name, lambda one: reading(one, **asked))
    shown = [f for f in figures(name) if any(f.of(one) is not None for one in results)]
    rows = [
        [str(one["step"]), *("" if (v := f.of(one)) is None else f"{v:.2f}" for f in shown)]
        for one in results
    ]
    write_json(target, results)
    table(f"{name} over the run", ["step", *(figure.said for figure in shown)], rows)
    return None


READINGS: dict[str, Callable[[list[str], str | None], None]] = {
    "knn": evaluate_knn,
    "linear": evaluate_linear,
    "finetune": evaluate_finetune,
    "dense": evaluate_dense,
    "instance": evaluate_instance,
}
