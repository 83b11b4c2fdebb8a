"""What `firstsight localize` and `firstsight masks` can be told. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import tyro

from firstsight.errors import UserError, require_positive
from firstsight.settings import Common
from firstsight.views import Interpolation


@dataclass(frozen=True, kw_only=True)
class Network(Common):
    """Which network is read, what is changed in it, and what it sees."""

    checkpoint: tyro.conf.Positional[str] = "random:resnet50"
    """CHECKPOINT: random:NAME (untrained, drawn by --seed), a run folder, a file of ours, ..."""
    data: str
    """SOURCE of the images."""
    stages: int | None = None
    """The last stage that is computed: of a ResNet 0 (stem) to 4; timm:NAME numbers its own.
    Unset: the whole network."""
    activation: Literal["own", "relu", "sigmoid", "atan", "tanh", "gelu", "silu", "identity"] = (
        "own"
    )
    """What stands in the place of each ReLU, GELU or SiLU; gates keep theirs."""
    init: str = "own"
    """Weights of random:NAME: own, kaiming-normal, kaiming-uniform, xavier-normal, xavier-uniform,
    normal:S (deviation S), uniform:A (from -A to A)."""
    last_stride: Literal[0, 1, 2] = 0
    """Step of a ResNet's last stage: 1 makes its map twice as fine. 0: 1 for random:resnetNN, as
    published; what it is for any other network."""
    bn: Literal["eval", "batch"] = "eval"
    """Batch-norm by its running statistics, or by those of each image alone."""
    padding: Literal["zeros", "reflect", "replicate"] = "zeros"
    """What convolutions see beyond the edge of a map."""
    input_size: int = 0
    """Side of the square that each image is squeezed into, pixels; 0: as pretrained, 224 where
    untrained."""
    resample: Interpolation = "bicubic"
    """Filter of that resize (antialiased)."""
    compat: bool = False
    """Do what Tobias' released code does where it differs from its paper; see the documentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network; sums are float64 in any case."""
    batch_size: int = 32
    """Images per forward pass."""
    workers: int = 0
    """Processes that decode; 0: this one."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""

    def __post_init__(self) -> None:
        require_positive("--", self, "batch_size")
        if min(self.input_size, self.workers) < 0:
            raise UserError("--input-size and --workers must not be below 0")


@dataclass(frozen=True, kw_only=True)
class Localize(Network):
    """Boxes of objects from activations, and how right they are, beside controls."""

    boxes: str = ""
    """Where the objects are: CSV, COCO's JSON, a folder of VOC's or ImageNet's XML, CUB's folder.
    Empty: that of scenes:..., which have boxes; else nothing is scored."""
    reading: Literal["sum", "cam", "attention", "pca"] = "sum"
    """The map: sum over channels; class activation (needs --classifier); what a transformer's class
    token looks at; the first principal component of all cells of all images (DDT)."""
    classifier: str = ""
    """Checkpoint with the classifier that --reading cam weighs channels by."""
    threshold: str = ""
    """Cells above it are the object: mean, percentile:P or zero. Empty: mean; zero for pca."""
    connectivity: Literal[8, 4] = 8
    """Cells hang together over edges and corners, or over edges only."""
    seeds: int = 1
    """Untrained networks, from --seed on; figures are means, with their spread."""
    images: int = 0
    """Images that are read, drawn by --seed; 0: all."""
    snapshots: bool = False
    """Read every snapshot of a run, and keep the curve in its folder."""
    out: str = ""
    """Folder for boxes.json and pictures; those of a run lie in its own, and in its report."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "seeds")
        if self.images < 0:
            raise UserError("--images must not be below 0")


@dataclass(frozen=True, kw_only=True)
class Masks(Network):
    """Grids that say which cells of each image are foreground, for merging backgrounds."""

    out: str
    """The JSON file to write."""
    grid: int = 4
    """Cells a side."""
    layout: Literal["ours", "published"] | None = None
    """JSON with what made the grids, or the published file of keys CLASS/FILE; unset: published
    with --compat."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "grid")


NAMES = {
    "noise": "map of noise",
    "noise_divided": "map over map of noise",
    "full_image": "whole image",
    "centre_box": "centred box, same area",
    "constant_mask": "lower right 3 x 3 of 4 x 4",
}
COLUMNS = ["", "CorLoc .3", "CorLoc .5", "CorLoc .7", "over classes .5", "mean IoU"]


def score_rows(result: dict[str, Any]) -> list[list[str]]:
    """The table of `COLUMNS`: the map itself, then its controls."""
    named = [(result["protocol"]["reading"], result)]
    named += [(NAMES[name], figures) for name, figures in result["controls"].items()]
    rows = []
    for name, figures in named:
        over = figures["corloc_over_classes"]
        cells = [figures["corloc"][level] for level in ("0.3", "0.5", "0.7")]
        cells.append(None if over is None else over["0.5"])
        shown = ["" if cell is None else f"{cell:.1f}" for cell in cells]
        rows.append([name, *shown, f"{figures['mean_iou']:.3f}"])
    return rows
