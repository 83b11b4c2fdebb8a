"""Everything that a pretraining run can be told, and how it is read from YAML and flags.

Nothing here imports torch: the command line must answer `--help` at once. Precedence, complete:
class default < the method's paper defaults < `--recipe` < `--config FILE` < flag.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from firstsight.errors import UserError, require_positive, require_share, unknown
from firstsight.plain_yaml import merged as merged
from firstsight.plain_yaml import read_yaml as read_yaml
from firstsight.plain_yaml import truth as truth
from firstsight.plain_yaml import write_yaml as write_yaml
from firstsight.views import PRESETS, Views

SMALL = 64
"""Views of fewer pixels a side take the small-image presets, without blur."""

Kind = Literal["norm", "bias", "vector"]
"""Parameters that decay and LARS may treat apart: of norm layers, biases of others, all vectors."""
Lars = Literal["larc", "barlow", "byol", "simclr", "pixpro", "scrl", "scrl-published", "solo"]
"""Names of the variants of LARS."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every command that computes can be told."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    threads: int = 0
    """CPU threads for arithmetic; 0: one for each core."""
    seed: int = 0
    """Decides everything that is random."""


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What a method's paper trains with; the starting point of its flags."""

    views: str
    epochs: float
    batch_size: int
    base_lr: float
    weight_decay: float
    weight_decay_end: float | None = None
    warmup_epochs: float = 0
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    lars: Lars = "barlow"
    excluded_lr: float = 1.0
    schedule: Literal["cosine", "whole-cosine", "step"] = "cosine"
    undecayed: tuple[Kind, ...] = ()
    lr_start: float = 0.0
    lr_end: float = 0.0
    lr_at: Literal["start", "end", "linspace"] = "start"
    lr_every: Literal["step", "epoch"] = "step"
    clip_param: float = 0.0
    batch_norm: Literal["local", "global"] = "local"
    order: Literal["epochs", "sliding", "random"] = "epochs"


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """Stands where a method's own settings go."""


@dataclass(frozen=True, kw_only=True)
class Pretrain:
    """Pretrain a backbone on unlabelled images."""

    data: str
    """SOURCE of the images: a folder, a .zip, scenes:train, ... Labels are not used."""
    out: str = ""
    """Folder of the run; an unfinished run found there goes on. Empty: runs/METHOD-NNN."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""
    recipe: str = ""
    """Published settings to start from, by name; firstsight recipes lists them."""
    backbone: str = "resnet50"
    """Network: resnet18 to resnet152, or timm:NAME."""
    stem: Literal["standard", "small"] = "standard"
    """First layers of a ResNet: 7x7 stride 2 with max-pool, or 3x3 stride 1 without."""
    size: int = 224
    """Side of the (first) views, pixels."""
    epochs: float = 200
    """Passes over the source; may be a fraction."""
    batch_size: int = 256
    """Images per optimiser step, over all ranks."""
    order: Literal["epochs", "sliding", "random"] = "epochs"
    """Each image once an epoch; or PIC's window, which slides over the images, or, as in its
    released code, holds other images at random."""
    window_size: int = 131_072
    """Images of a window, visited again in each pass; no more than there are."""
    window_stride: int = 16_384
    """Images by which the window moves on after a pass."""
    accumulate: int = 1
    """Chunks that each rank's share of a batch is computed in, to need less memory."""
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"
    """Optimiser: SGD with momentum 0.9, the same with LARS, or AdamW."""
    lars: Lars = "barlow"
    """Whose LARS: barlow is also that of VICReg, DINO and MoCo v3; larc that of SwAV."""
    excluded_lr: float = 1.0
    """Learning rate of what LARS excludes (norms, biases), as a share of that of the rest."""
    lr: float | None = None
    """Peak learning rate, absolute; unset: --base-lr scaled by the batch."""
    base_lr: float = 0.03
    """Peak learning rate per 256 images, used where --lr is not given."""
    weight_decay: float = 1e-4
    """Weight decay; decoupled for adamw."""
    weight_decay_end: float | None = None
    """Weight decay at the end, reached along half a cosine, as DINO does; unset: it stays."""
    undecayed: tuple[Kind, ...] = ()
    """Parameters without weight decay: of norm layers, biases of others, all other vectors."""
    clip_norm: float = 0.0
    """Longest gradient of all parameters together; longer ones are shortened; 0: any."""
    clip_param: float = 0.0
    """Longest gradient of each parameter tensor, as DINO does; 0: any."""
    schedule: Literal["cosine", "whole-cosine", "step"] = "cosine"
    """Learning rate after the warm-up: half a cosine; what the warm-up has left of one over all
    epochs (whole-cosine, as SEED's code); or times 0.1 at each drop."""
    drops: tuple[float, ...] = (0.6, 0.8)
    """Where the step schedule drops, as shares of the run."""
    warmup_epochs: float = 0
    """Epochs in which the learning rate rises linearly."""
    lr_start: float = 0.0
    """Learning rate where the warm-up begins, as a share of the peak."""
    lr_end: float = 0.0
    """Learning rate where the cosine ends, as a share of the peak."""
    lr_at: Literal["start", "end", "linspace"] = "start"
    """Where a step reads the curve of the rate: its start, its end (SCRL), or at the start with
    the last step of the warm-up at the peak (DINO, SwAV)."""
    lr_every: Literal["step", "epoch"] = "step"
    """How long a learning rate is kept; MoCo's and SimSiam's code changes it every epoch."""
    batch_norm: Literal["local", "global"] = "local"
    """Statistics of batch-norm: of each rank, or of all ranks together."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic; auto tries fp32 and bf16 for some steps and says which is faster here; fp16
    scales the loss and skips steps that overflow."""
    layout: Literal["auto", "channels_last", "contiguous"] = "auto"
    """Order of image tensors in memory; auto tries both for some steps."""
    compile: bool = False
    """Let torch compile the backbone: minutes at the start, faster steps; needs a C++ compiler."""
    init: str = ""
    """CHECKPOINT to start from: a run, a file, torchvision:NAME, ...; empty: random weights."""
    init_policy: Literal["backbone", "all"] = "backbone"
    """What --init takes: the backbone, or all networks and queues (of a run of the same method)."""
    seed: int = 0
    """Decides initial weights, order of images and views."""
    preset: str = ""
    """Views to start from: mocov1, mocov2, simclr, byol, ...-small; empty: the method's own."""
    views: Views = field(default_factory=Views)
    """How views are drawn."""
    method: Any = field(default_factory=NoSettings)
    """The method's own settings."""
    probe_train: str = ""
    """Labelled SOURCE for readings to learn from. Empty: the labels of --data, if it has any."""
    probe_test: str = ""
    """Labelled SOURCE for readings: what is classified."""
    probe_readings: int = 5
    """Readings during the run, evenly spread; before and after come on top."""
    probe_images: int = 4000
    """Images of the bank (half as many queries) in readings during the run; the last uses all."""
    probe_k: int = 20
    """Neighbours that vote."""
    probe_temperature: float = 0.07
    """Temperature of the votes."""
    probe: Literal["knn", "linear", "both", "none"] = "knn"
    """What is read on the way, where there are labels: k-NN, linear probes that train along."""
    probe_lrs: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Peak learning rates of the linear probes: one probe for each, all at once."""
    probe_every: int = 20
    """Steps between batches of --probe-train for linear probes; labels of --data: every step."""
    linear: bool = True
    """Train a linear classifier on frozen features after the run, where there are labels."""
    max_bad: float = 0.01
    """Share of undecodable images above which the run refuses to go on."""
    skip_nonfinite: int = 0
    """Steps in a row to leave out where gradients are not finite; more: as where the loss is."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    keep_every: int = 0
    """Steps between checkpoints that are never removed, a multiple of --save-every; 0: none."""
    allow_changed_data: bool = False
    """Go on with a run although --data holds other images than when it stopped."""
    rollbacks: int = 3
    """Times that a run whose loss is not finite goes back to its last checkpoint, with other views,
    before it gives up."""
    timeout: float = 1800
    """Seconds after which a run that takes no step is ended, the rank or loader that hangs named;
    readings do not count."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""
    loggers: tuple[Literal["jsonl", "tensorboard", "csv", "wandb"], ...] = ("jsonl", "tensorboard")
    """Where figures go; log.jsonl is written in any case."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    threads: int = 0
    """CPU threads for arithmetic; 0: one for each core."""
    cache: Literal["none", "shared", "part"] = "none"
    """Files of images in memory: none; all of them, shared by the ranks of a machine; on each of
    several machines only its part, which it trains on alone (another order of images)."""
    resident: Literal[False, True, "auto"] = False
    """Hold all images as pixels on the training device; auto: where a third of its memory does."""
    views_on: Literal["worker", "device"] = "worker"
    """Who flips, colours and blurs views: the processes that cut them out, or the training device,
    for whole batches; the same views but for a level here and there."""
    workers: int = -1
    """Processes that make views, per rank; 0: none, in turn with training; -1: picked by cores."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """On several ranks: whole replicas, or backbones in shards (transformers of timm, with adamw or
    sgd), for those that do not fit on a device; a run may change from one to the other."""
    dry_run: bool = False
    """Only say what the run would take: steps, memory, hours. Nothing is written."""

    def __post_init__(self) -> None:
        require_positive("--", self, "size", "epochs", "save_every", "log_every", "keep")
        require_positive("--", self, "accumulate", "window_size", "timeout", "excluded_lr")
        if self.keep_every % self.save_every:
            raise UserError(
                f"--keep-every {self.keep_every} is no multiple of --save-every {self.save_every}"
            )
        if not 1 <= self.window_stride <= self.window_size:
            raise UserError(
                f"--window-stride must be from 1 to the {self.window_size} of --window-size, "
                f"not {self.window_stride}"
            )
        if self.views.hide and (self.resident is True or self.views_on == "device"):
            raise UserError("--views.hide is done by workers; use --views-on worker, no --resident")
        if self.views.merge.probability > 0 and self.resident is True:
            raise UserError("--views.merge is done by workers; leave out --resident")
        require_positive("--", self, "base_lr", "probe_k", "probe_temperature", "probe_images")
        require_positive("--", self, "probe_every")
        if not self.probe_lrs or not all(0 < lr < math.inf for lr in self.probe_lrs):
            raise UserError(f"--probe-lrs takes numbers above 0, not {self.probe_lrs}")
        require_share("--", self, "max_bad", "lr_start", "lr_end")
        counts = ("threads", "probe_readings", "seed", "keep_every", "rollbacks", "skip_nonfinite")
        for name in ("weight_decay", "warmup_epochs", "clip_norm", "clip_param", *counts):
            if not getattr(self, name) >= 0:
                raise UserError(f"{flag(name)} must not be below 0: {getattr(self, name)}")
        if self.parallel == "fsdp" and (self.optimizer == "lars" or self.compile):
            raise UserError("--parallel fsdp takes --optimizer adamw or sgd, and no --compile")
        if self.parallel == "fsdp" and (self.precision == "fp16" or self.skip_nonfinite):
            told = "knows neither --precision fp16 nor --skip-nonfinite; use --precision bf16"
            raise UserError(f"--parallel fsdp {told}")
        if self.batch_size < 2:
            raise UserError(f"--batch-size must be 2 or more, not {self.batch_size}")
        held = self.lr_every == "epoch" and self.lr_at == "start" and self.lr_start == 0
        if held and self.warmup_epochs > 0:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} with --lr-every epoch holds the rate at 0 "
                "for a whole epoch; use --lr-every step, or an --lr-start above 0"
            )
        if self.weight_decay_end is not None and not (self.weight_decay_end >= 0):
            raise UserError(f"--weight-decay-end must not be below 0: {self.weight_decay_end}")
        if self.weight_decay_end and not self.weight_decay:
            raise UserError("--weight-decay-end needs a start above 0; use --weight-decay 0.001")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr must be above 0, not {self.lr}")
        if self.workers < -1:
            raise UserError(f"--workers must be 0 or more (or -1), not {self.workers}")
        if self.init_policy == "all" and not self.init:
            raise UserError("--init-policy all needs a run to start from; add --init RUN")
        if not math.isfinite(self.epochs):
            raise UserError(f"--epochs must be a finite number, not {self.epochs}")
        if self.warmup_epochs > self.epochs:
            raise UserError(
                f"a warm-up of {self.warmup_epochs:g} epochs does not fit into {self.epochs:g}; "
                f"use --warmup-epochs {self.epochs / 10:g}"
            )

    @property
    def peak_lr(self) -> float:
        """The absolute learning rate at the end of the warm-up."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 256


UNBOUND = (
    *("out", "recipe", "download", "device", "threads", "workers", "max_bad", "dry_run"),
    *("log_every", "loggers", "save_every", "keep", "keep_every", "skip_nonfinite"),
    *("allow_changed_data", "rollbacks", "timeout", "parallel"),
)
"""Settings that may differ when a run goes on: they do not change what is computed."""


def flag(name: str) -> str:
    """The flag to type for a field."""
    return "--" + name.replace("_", "-")


def plain(settings: Any) -> dict[str, Any]:
    """A (nested) dataclass as plain YAML values: dicts, lists, numbers, strings."""

    def simple(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: simple(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [simple(item) for item in value] if isinstance(value, tuple) else value

    return typing.cast("dict[str, Any]", simple(settings))


def preset_views(name: str, size: int) -> Views:
    """The views of a preset; below SMALL pixels its small-image version, if it has one.

    Of a preset that names sizes, the first gives way to `size`, and the others keep their share of
    it, rounded to a multiple of 16: patches of transformers must divide it.
    """
    if name not in PRESETS:
        raise unknown("preset of views", name, sorted(PRESETS))
    small = f"{name}-small"
    views = PRESETS[small] if size < SMALL and small in PRESETS else PRESETS[name]
    if not views.sizes:
        return views
    others = (max(1, round(side * size / views.sizes[0] / 16)) * 16 for side in views.sizes[1:])
    return dataclasses.replace(views, sizes=(size, *others))


def begun(defaults: Defaults, method_settings: Any, values: dict[str, Any], where: str) -> Pretrain:
    """The paper's settings of a method with `values` (nested, as from YAML) put over them.

    Some values decide what others start from: `preset` and `size` the views (below SMALL pixels
    the small-image version), and fewer `epochs` than the paper's shorten the warm-up with them.
    """
    settled = {k: v for k, v in values.items() if k in ("size", "epochs", "preset")}
    start = shallow(defaults) | {"views": Views(), "warmup_epochs": 0.0}
    first = merged(Pretrain(data="", method=method_settings, **start), settled, where)
    warmup = defaults.warmup_epochs * min(1.0, first.epochs / defaults.epochs)
    views = preset_views(first.preset or defaults.views, first.size)
    return merged(dataclasses.replace(first, warmup_epochs=warmup, views=views), values, where)


def shallow(options: Any) -> dict[str, Any]:
    """The fields of a dataclass by name, values untouched."""
    return {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
