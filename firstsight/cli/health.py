"""Options and results of the commands that look at a backbone without asking for labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from firstsight import settings
from firstsight.cli.flags import parsed, taken
from firstsight.cli.judge import Judging, Unlabelled, taken_of
from firstsight.cli.shown import show
from firstsight.errors import UserError, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class Diagnose(Unlabelled):
    """How healthy a backbone is, without labels: alignment, uniformity, rank, collapse."""

    dataset_mode: Literal["normal", "g-mask", "rand-g-mask", "avg-mask", "rand-avg-mask"] = "normal"
    """Which views of a folder of static views."""
    images: int = 5000
    """Images, drawn by --seed; 0: all."""
    topk: tuple[int, ...] = (1, 5)
    """A view counts as found among so many nearest."""
    uniformity: Literal["exact", "published"] = "exact"
    """Over all pairs, or over three random parts of 128 images."""
    map: Literal["pca", "tsne", "umap"] | None = None
    """Draw images and views in two dimensions: pca; tsne or umap, with firstsight[maps]."""
    map_images: int = 300
    """Images on the map, each with its two views."""
    out: str = ""
    """FILE.html for the map; empty: map.html, where --map is given."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_not_negative("--", self, "images")
        require_positive("--", self, "map_images")
        if self.snapshots and (self.map or self.out):
            raise UserError("a map shows one network: leave out --snapshots, or --map and --out")
        if not self.topk or min(self.topk) < 1:
            raise UserError(f"--topk takes numbers of 1 or more, not {self.topk}")


@dataclass(frozen=True, kw_only=True)
class Embed(Judging):
    """Write the features of all images of a SOURCE into a file."""

    data: str
    """SOURCE of the images."""
    out: str
    """FILE.npz or FILE.parquet to write."""
    layer: Literal["backbone", "embedding"] = "backbone"
    """Pooled features, or the projector's output (of a run folder)."""
    batch_size: int = 256
    """Images per forward pass."""
    download: bool = False
    """Fetch cifar10:train, cifar100:..., stl10:... where their files are missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("--", self, "batch_size")


def diagnose(args: list[str]) -> None:
    """Health of a backbone without labels: firstsight diagnose CHECKPOINT --data SOURCE."""
    target, args = taken(args, "--json")
    asked = settings.shallow(parsed(Diagnose, args, "diagnose"))

    from firstsight import diagnose

    if (result := taken_of(diagnose.run, "diagnose", asked, target)) is None:
        return
    pairs = [
        ("alignment, 0 is best", result["alignment"], ".4f"),
        ("uniformity, lower is better", result["uniformity"], ".4f"),
        ("class alignment, lower is better", result.get("class_alignment", {}), ".4f"),
    ]
    pairs += [
        (f"own view in the nearest {k}, percent", {p: v[k] for p, v in found.items()}, ".2f")
        for found in [result["instance_accuracy"]]
        for k in found["d-sd"]
    ]
    rows = [[name, *(f"{v:{how}}" for v in two.values())] for name, two, how in pairs if two]
    for name in ("effective_rank", "lidar", "feature_std", "spread"):
        rows.append([name.replace("_", " "), f"{result[name]:.4g}", ""])
    rows += [["images", f"{result['images']}", ""]]
    rows += [["map", result["map"]["out"], ""]] if "map" in result else []
    columns = ["", "originals (d, d-sd)", "views (sd, sd-sd)"]
    show(f"collapse: {result['collapse']}", columns, rows, result, target)


def embed(args: list[str]) -> None:
    """Features of all images in a file: firstsight embed CHECKPOINT --data SOURCE --out FILE."""
    target, args = taken(args, "--json")
    asked = settings.shallow(parsed(Embed, args, "embed"))

    from firstsight import embed

    result = embed.run(asked.pop("checkpoint"), **asked)
    rows = [[key, f"{result[key]}"] for key in ("images", "width", "unreadable")]
    show(result["out"], ["", ""], rows, result, target)
