"""What `firstsight detect` can be told. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import tyro

from firstsight.errors import (
    UserError,
    require_not_negative,
    require_positive,
    require_share,
)
from firstsight.settings import Common, Kind

HEADLINES = {
    **dict.fromkeys(("bbox", "segm"), ("AP", "AP50", "AP75")),
    "semantic": ("mIoU", "accuracy"),
}
"""Kinds of figures, and those of each that logs and comparisons show."""

Norm = Literal["sync", "batch", "split", "group", "frozen"]


@dataclass(frozen=True, kw_only=True)
class Data(Common):
    """Which images are judged, and how."""

    data: str = ""
    """Folder of the images to train on (of `detect eval`: to judge by; as in training if empty)."""
    annotations: str = ""
    """What is in them: COCO's JSON, a folder or list of VOC's XML, YOLO's text, boxes.csv; index
    masks for segmentation: a folder of them, or a list of VOC's ImageSets/Segmentation."""
    official: bool = False
    """Compute COCO's figures with pycocotools."""
    workers: int = 0
    """Processes that decode; 0: this one."""
    max_bad: float = 0.01
    """Share of images, and of objects, that may be faulty."""

    def __post_init__(self) -> None:
        require_not_negative("--", self, "workers", "threads", "seed")
        require_share("--", self, "max_bad")


@dataclass(frozen=True, kw_only=True)
class Training(Data):
    """A detector on a backbone, and its training; the defaults match detectron2's."""

    test_data: str = ""
    """Folder of the images to judge by; empty: nothing is judged."""
    test_annotations: str = ""
    """What is in them."""
    recipe: str = ""
    """Published settings to start from; firstsight recipes lists them."""

    categories: tuple[str, ...] = ()
    """Of index masks, names of classes 0, 1, ...; empty: lines of classes.txt beside the masks."""

    detector: Literal["faster-rcnn", "mask-rcnn", "retinanet", "fcn", "deeplab"] = "faster-rcnn"
    """Two stages with boxes, two stages with boxes and masks, one stage with boxes; or a class for
    each pixel (semantic segmentation) by a head of FCN or of DeepLab v3."""
    neck: Literal["fpn", "c4"] = "fpn"
    """A pyramid over strides 4 to 32, or the map of stride 16 alone with the last stage of the
    ResNet in the box head."""
    channels: int = 256
    """Width of the pyramid and of the heads' convolutions."""
    box_head: Literal["plain", "4conv1fc"] = "plain"
    """Two linear layers, or four 3x3 convolutions and one linear layer. With C4: plain."""
    norm: Norm = "sync"
    """Batch-norm with the statistics of all devices, of each device, of --splits parts of a device;
    group-norm in its place; batch-norm that rests as pretrained."""
    norm_also: tuple[Literal["neck", "heads"], ...] = ()
    """Where else such a norm is put; in C4's head it follows the last stage."""
    norm_eval: bool = False
    """Running statistics of the backbone stay as pretrained, though its scales learn."""
    splits: int = 8
    """Parts of a device's images for --norm split."""
    frozen_stages: int = -1
    """As MMDetection: the stem (0) and as many stages rest, their batch-norm too; -1: nothing."""
    trainable_layers: int = 5
    """As torchvision: only the last so many of stem and four stages learn; batch-norm below them
    still gathers statistics. 5: all."""
    roi_align: Literal["aligned", "torchvision"] = "aligned"
    """Half a pixel moved and as many samples as a cell is large, or torchvision's two by two."""
    box_loss: Literal["l1", "smooth-l1"] = "l1"
    """Of box corners; smooth-l1 is torchvision's, beta 1/9 (with retinanet: 1)."""
    proposals: tuple[int, int] = (1000, 1000)
    """Proposals of an image that are kept in training and testing; torchvision: 2000 1000."""
    proposals_before: tuple[int, int] = (2000, 1000)
    """Proposals of a level before duplicates are removed, in training and testing."""
    rois: int = 512
    """Proposals of an image that the box head learns from."""

    short_sides: tuple[int, ...] = (800,)
    """Shorter side of images in training, pixels: one of these is drawn for each image."""
    scales: Literal["choice", "range"] = "choice"
    """Draw one of --short-sides, or any whole number from the first to the last."""
    long_side: int = 1333
    """The longer side is at most this."""
    test_side: int = 800
    """Shorter side in testing."""
    crop: int = 0
    """Of segmentation: side of the square cut from each training image, pixels; 0: all of it."""
    flip: float = 0.5
    """Probability that an image is mirrored."""
    keep_empty: bool = False
    """Train also on images without objects, or of fewer than 32 pixels a side."""
    group_shapes: bool = True
    """Batches of wide images and of tall ones, so that little is padded."""

    epochs: float = 12.0
    """Passes over the training images."""
    steps: int = 0
    """Optimiser steps, in place of --epochs; 0: as those say."""
    batch_size: int = 16
    """Images a step, over all ranks."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum 0.9, or AdamW."""
    base_lr: float = 0.02
    """Peak learning rate per 16 images of a batch."""
    lr: float | None = None
    """Peak learning rate, absolute, in place of --base-lr."""
    weight_decay: float = 1e-4
    """Weight decay."""
    undecayed: tuple[Kind, ...] = ()
    """Parameters without it: norm (detectron2), bias, vector."""
    schedule: Literal["step", "cosine"] = "step"
    """Times 0.1 at each drop, or half a cosine to zero."""
    drops: tuple[float, ...] = (2 / 3, 11 / 12)
    """Where the step schedule drops, as shares of the run."""
    warmup_steps: int = 500
    """Steps in which the learning rate rises from a thousandth."""
    clip_norm: float = 0.0
    """Longest gradient of all parameters together; 0: any."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the networks; coordinates and losses are float32 in any case."""
    precise_norm: int = 0
    """Training batches whose statistics batch-norm takes before it is judged; 0: running ones."""
    readings: int = 1
    """Times that the test images are judged, evenly spread, the last at the end."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept; older ones are removed."""
    log_every: int = 10
    """Steps between lines of log.jsonl."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "channels", "rois", "long_side", "test_side", "splits")
        require_positive("--", self, "epochs", "batch_size", "base_lr", "readings")
        require_positive("--", self, "save_every", "keep", "log_every")
        require_not_negative("--", self, "steps", "weight_decay", "warmup_steps", "clip_norm")
        require_not_negative("--", self, "precise_norm", "crop")
        require_share("--", self, "flip")
        if self.lr is not None and not self.lr > 0:
            raise UserError(f"--lr must be above 0, not {self.lr}")
        if not math.isfinite(self.epochs):
            raise UserError(f"--epochs must be a finite number, not {self.epochs}")
        if not self.short_sides or min(self.short_sides) < 1:
            raise UserError(f"--short-sides takes pixels, not {self.short_sides}")
        if self.scales == "range" and list(self.short_sides) != sorted(self.short_sides)[:2]:
            raise UserError(
                f"--scales range takes --short-sides LEAST MOST, not {self.short_sides}"
            )
        if min(self.proposals + self.proposals_before) < 1:
            raise UserError("--proposals and --proposals-before must be above 0")
        self._refuse_what_does_not_fit()

    def _refuse_what_does_not_fit(self) -> None:
        if not (-1 <= self.frozen_stages <= 4 and 0 <= self.trainable_layers <= 5):
            raise UserError("--frozen-stages is from -1 to 4, --trainable-layers from 0 to 5")
        if self.frozen_stages >= 0 and self.trainable_layers < 5:
            raise UserError(
                "--frozen-stages and --trainable-layers are two ways to say what rests; use one"
            )
        if self.neck == "c4" and (self.detector == "retinanet" or self.box_head != "plain"):
            raise UserError("--neck c4 has its own box head; leave out 4conv1fc and retinanet")
        if self.neck == "c4" and "neck" in self.norm_also:
            raise UserError("--neck c4 has no neck to put a norm in; use --norm-also heads")
        if self.segments and (self.neck == "c4" or self.box_head != "plain" or self.norm_also):
            raise UserError(
                f"{self.detector} has its own head, normed as --norm says; leave out --neck, "
                "--box-head and --norm-also"
            )
        if not self.segments and (self.crop or self.categories):
            raise UserError(
                "--crop and --categories are for segmentation; use --detector fcn or deeplab"
            )
        if self.detector == "retinanet" and self.box_head != "plain":
            raise UserError("retinanet has its own heads; leave out --box-head")
        if self.norm == "frozen" and self.norm_also:
            raise UserError("--norm frozen rests as pretrained, and new layers were not; leave out "
                            "--norm-also")  # fmt: skip

    @property
    def segments(self) -> bool:
        """Whether each pixel gets a class, and no box is found."""
        return self.detector in ("fcn", "deeplab")

    @property
    def peak_lr(self) -> float:
        """The absolute learning rate at the end of the warm-up."""
        return self.lr if self.lr is not None else self.base_lr * self.batch_size / 16


@dataclass(frozen=True, kw_only=True)
class Train(Training):
    """A detector trained from a backbone: the same command again goes on, or says it is done."""

    checkpoint: tyro.conf.Positional[str]
    """CHECKPOINT: a run folder, a file of ours or others', random:NAME, torchvision:NAME, ..."""
    out: str
    """Folder of the run."""


@dataclass(frozen=True, kw_only=True)
class Compare(Training):
    """The same training from several backbones, with the same seeds: one table."""

    checkpoints: tyro.conf.Positional[tuple[str, ...]]
    """CHECKPOINTs to compare."""
    out: str
    """Folder of the runs, and of compare.json."""
    seeds: int = 3
    """Trainings of each, from --seed on; figures are means, with their spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "seeds")


@dataclass(frozen=True, kw_only=True)
class Eval(Data):
    """Boxes and masks that a trained detector finds, judged as COCO and VOC do."""

    run: tyro.conf.Positional[str]
    """Folder of a run of firstsight detect train."""
    test_side: int = 0
    """Shorter side of the images, pixels; 0: as in training."""
    batch_size: int = 0
    """Images per forward pass; 0: as in training."""
    precision: Literal["", "fp32", "bf16"] = ""
    """Arithmetic; empty: as in training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("--", self, "test_side", "batch_size")


UNBOUND = (
    *("out", "recipe", "device", "threads", "workers", "max_bad", "official"),
    *("log_every", "save_every", "keep"),
)
"""Settings that may differ when a run goes on: they do not change what is computed."""
