"""Views: an image becomes several transformed copies.

What is *drawn* (`draw.py`: crop boxes, flips, colour factors, ...) is data and a pure function of
(seed, epoch, image, view); how it is *applied* (`apply.py`) is a separate, deterministic step.
This page holds what both need: the settings, and the presets of the papers. It imports neither
OpenCV nor torch, so that `--help` stays instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeVar

from firstsight.errors import UserError, require_positive, require_share, unknown

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR_STD = (0.2023, 0.1994, 0.2010)

_T = TypeVar("_T")

Interpolation = Literal["bilinear", "bicubic"]


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Another image's background behind the foreground of a view (Tobias)."""

    probability: float = 0.0
    """Probability that a view gets another background; Tobias' scripts have 0.3; 0: never."""
    foreground: Literal["masks", "random", "constant"] = "masks"
    """Which cells stay: the strongest of the image's mask; or, to compare with, cells at random, or
    the same lower right ones of every image."""
    masks: str = ""
    """JSON file of `firstsight masks`, or a published one. Empty: made as the run begins."""
    network: str = "random:resnet50"
    """CHECKPOINT that makes the masks where no file is given; random:NAME is drawn by --seed."""
    views: Literal["query", "both"] = "query"
    """Views that are merged: the first, as published, or the first two, each for itself."""
    grid: int = 4
    """Cells a side; those of a file of masks are as it has them."""
    share: float = 0.5
    """Share of cells that stay, rounded down to whole cells."""
    side: int = 224
    """Side of the squares in which images are merged, pixels; cut to a multiple of the grid."""
    sha256: str = ""
    """Which foregrounds: written by the run, which goes on with the same ones only."""

    def __post_init__(self) -> None:
        require_share("--views.merge.", self, "probability", "share")
        require_positive("--views.merge.", self, "grid", "side")
        if self.masks and self.foreground != "masks":
            raise UserError(
                f"--views.merge.foreground {self.foreground} reads no masks; leave out "
                f"--views.merge.masks {self.masks}"
            )


@dataclass(frozen=True, kw_only=True)
class Views:
    """How views are drawn. Tuples hold one value per resolution or view; the last one repeats."""

    counts: tuple[int, ...] = (2,)
    """Views at each resolution: 2 is two global crops, 2 6 adds six local ones."""
    sizes: tuple[int, ...] = ()
    """Side of the views at each resolution, pixels; empty: --size for all of them."""
    min_scale: tuple[float, ...] = (0.2,)
    """Smallest crop at each resolution, share of the image area."""
    max_scale: tuple[float, ...] = (1.0,)
    """Largest crop at each resolution, share of the image area."""
    min_ratio: float = 0.75
    """Narrowest crop, width over height; the widest is its inverse."""
    interpolation: Interpolation = "bilinear"
    """Filter of the antialiased resize."""
    margin: float = 3.0
    """JPEGs are decoded at 1/2, 1/4 or 1/8 of their size where the crops of all views keep so many
    times the pixels of their view, a side; 0: never."""
    flip: float = 0.5
    """Probability of a left-right flip."""
    jitter: float = 0.8
    """Probability of colour jitter; its four parts are applied in random order."""
    brightness: float = 0.4
    """Jitter: brightness factor drawn from 1 - b to 1 + b."""
    contrast: float = 0.4
    """Jitter: contrast factor drawn from 1 - c to 1 + c."""
    saturation: float = 0.4
    """Jitter: saturation factor drawn from 1 - s to 1 + s."""
    hue: float = 0.1
    """Jitter: hue shift drawn from -h to h, in turns of the colour circle (at most 0.5)."""
    strength: float = 1.0
    """Jitter: its four parts times this, hue at most 0.5; ssl-small's `cj` with its preset."""
    gray: float = 0.2
    """Probability of turning grey."""
    blur: tuple[float, ...] = (0.5,)
    """Probability of blur for each view."""
    blur_by: Literal["gaussian", "resize"] = "gaussian"
    """Blur: a Gaussian, or, as SCRL's code, made 1.1, 1.2 or 1.5 times smaller and large again."""
    min_sigma: float = 0.1
    """Blur: smallest standard deviation, pixels of the view."""
    max_sigma: float = 2.0
    """Blur: largest standard deviation, pixels of the view."""
    solarize: tuple[float, ...] = (0.0,)
    """Probability, for each view, of inverting all values from 128 up."""
    hide: float = 0.0
    """Probability of Hide-and-Seek: cells of a grid of 4, 8 or 16 a side become the mean colour,
    each with probability 0.5; ssl-small has 0.75."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, values in 0 to 1."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Divides each channel after the mean, values in 0 to 1."""
    merge: Merge = field(default_factory=Merge)
    """Backgrounds of other images, before the crop."""

    def __post_init__(self) -> None:
        if not self.counts:
            raise UserError("--views.counts is empty; give at least one number, such as 2")
        _within("counts", self.counts, 1, None)
        _within("sizes", self.sizes, 1, None)
        groups, total = len(self.counts), sum(self.counts)
        for name, values, at_most, of_what in (
            ("sizes", self.sizes, groups, "resolutions"),
            ("min_scale", self.min_scale, groups, "resolutions"),
            ("max_scale", self.max_scale, groups, "resolutions"),
            ("blur", self.blur, total, "views"),
            ("solarize", self.solarize, total, "views"),
        ):
            if len(values) > at_most:
                raise UserError(
                    f"--{_flag(name)} has {len(values)} values for {at_most} {of_what};"
                    f" give at most {at_most} (the last one repeats)"
                )
            if not values and name != "sizes":
                raise UserError(f"--{_flag(name)} is empty; give at least one number")
        for group in range(groups):
            low, high = _repeat(self.min_scale, group), _repeat(self.max_scale, group)
            if not 0 < low <= high <= 1:
                raise UserError(
                    f"crops from {low} to {high} of the image area are impossible; choose"
                    " 0 < --views.min-scale <= --views.max-scale <= 1"
                )
        if self.margin and not self.margin >= 1:
            raise UserError(
                f"--views.margin {self.margin} would enlarge views; choose 0 (whole) or at least 1"
            )
        if not 0 < self.min_ratio <= 1:
            raise UserError(f"--views.min-ratio {self.min_ratio} is not in (0, 1]")
        for name in ("flip", "jitter", "gray", "hide"):
            _within(name, (getattr(self, name),), 0, 1)
        for name in ("blur", "solarize"):
            _within(name, getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation", "strength"):
            _within(name, (getattr(self, name),), 0, None)
        _within("hue", (self.hue,), 0, 0.5)
        if not 0 < self.min_sigma <= self.max_sigma:
            raise UserError(
                f"blur from {self.min_sigma} to {self.max_sigma} pixels is impossible; choose"
                " 0 < --views.min-sigma <= --views.max-sigma"
            )
        if self.interpolation not in ("bilinear", "bicubic"):
            raise unknown("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if min(self.std) <= 0:
            raise UserError(f"--views.std {self.std} must be above 0 in each channel")
        if self.merge.probability > 0 and self.counts[0] < 2:
            raise UserError(
                "--views.merge is for two views of one size, of which one is merged, not for "
                f"--views.counts {' '.join(map(str, self.counts))}; leave it out"
            )

    @property
    def total(self) -> int:
        """V, the number of views of one image."""
        return sum(self.counts)

    @property
    def resolution(self) -> tuple[int, ...]:
        """For each of the V views, which entry of `counts` it belongs to: 0 0 1 1 1 for 2 3."""
        return tuple(group for group, count in enumerate(self.counts) for _ in range(count))

    @property
    def scales(self) -> tuple[tuple[float, float], ...]:
        """For each of the V views, the smallest and largest crop, shares of the image area."""
        return tuple(
            (_repeat(self.min_scale, g), _repeat(self.max_scale, g)) for g in self.resolution
        )

    @property
    def strengths(self) -> tuple[float, float, float, float]:
        """Of the four parts of the jitter: brightness, contrast, saturation, hue."""
        hue = min(0.5, self.hue * self.strength)
        return (
            *(self.brightness * self.strength, self.contrast * self.strength),
            *(self.saturation * self.strength, hue),
        )

    @property
    def blurs(self) -> tuple[float, ...]:
        """For each of the V views, the probability of blur."""
        return tuple(_repeat(self.blur, view) for view in range(self.total))

    @property
    def solarizes(self) -> tuple[float, ...]:
        """For each of the V views, the probability of solarizing."""
        return tuple(_repeat(self.solarize, view) for view in range(self.total))

    def sides(self, size: int) -> tuple[int, ...]:
        """For each of the V views, its side in pixels; `size` where the settings name none."""
        return tuple(_repeat(self.sizes or (size,), g) for g in self.resolution)


def _repeat(values: tuple[_T, ...], position: int) -> _T:
    return values[min(position, len(values) - 1)]


def _flag(name: str) -> str:
    return "views." + name.replace("_", "-")


def _within(name: str, values: tuple[float, ...], low: float, high: float | None) -> None:
    allowed = f"at least {low}" if high is None else f"from {low} to {high}"
    for value in values:
        # written so that NaN is refused too
        if not (value >= low and (high is None or value <= high)):
            raise UserError(f"--{_flag(name)} {value} is out of range; choose a value {allowed}")


_BYOL = Views(
    min_scale=(0.08,),
    interpolation="bicubic",
    saturation=0.2,
    blur=(1.0, 0.1),
    solarize=(0.0, 0.2),
)
_PIC = Views(counts=(1,), min_scale=(0.08,), brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

PRESETS: Mapping[str, Views] = MappingProxyType(
    {
        # differs from the paper: its code turns grey before the jitter, here grey comes after.
        "mocov1": Views(jitter=1.0, hue=0.4, blur=(0.0,)),
        "mocov2": Views(),
        # differs from the paper: its code feeds values in 0 to 1 without mean and deviation.
        "simclr": Views(
            min_scale=(0.08,),
            interpolation="bicubic",
            brightness=0.8,
            contrast=0.8,
            saturation=0.8,
            hue=0.2,
        ),
        "byol": _BYOL,
        # differs from the authors' code: there blur is a resize down and up again.
        "scrl": replace(_BYOL, min_scale=(0.2,)),  # smaller crops would share too little
        # One view, the colours of MoCo v1.
        "instdisc": Views(counts=(1,), jitter=1.0, hue=0.4, blur=(0.0,)),
        # One view, the colours of SimCLR; and a large crop with three small ones.
        "pic": _PIC,
        "pic-multicrop": replace(
            _PIC, counts=(1, 3), sizes=(160, 96), min_scale=(0.14, 0.08), max_scale=(1.0, 0.14)
        ),
        # The deviation of red is that of the authors' code (.229 elsewhere).
        "swav": Views(
            counts=(2, 6),
            sizes=(224, 96),
            min_scale=(0.14, 0.05),
            max_scale=(1.0, 0.14),
            brightness=0.8,
            contrast=0.8,
            saturation=0.8,
            hue=0.2,
            std=(0.228, 0.224, 0.225),
        ),
        "dino": Views(
            counts=(2, 8),
            sizes=(224, 96),
            min_scale=(0.4, 0.05),
            max_scale=(1.0, 0.4),
            interpolation="bicubic",
            saturation=0.2,
            blur=(1.0, 0.1, 0.5),
            solarize=(0.0, 0.2, 0.0),
        ),
        # One view, the colours of MoCo v2, for teacher and student; and with six small crops.
        "seed": Views(counts=(1,)),
        "seed-multicrop": Views(
            counts=(1, 6), sizes=(224, 96), min_scale=(0.14, 0.05), max_scale=(1.0, 0.14)
        ),
        # MoCo v2 as ssl-small's published runs have it; its code alone starts at a strength of 1.5.
        "ssl-small": Views(brightness=0.8, contrast=0.8, saturation=0.8, hue=0.4, gray=0.5),
        # Small images: the CIFAR-10 demo of MoCo, whose crops keep torchvision's default range.
        "mocov2-small": Views(min_scale=(0.08,), blur=(0.0,), mean=CIFAR_MEAN, std=CIFAR_STD),
        # The CIFAR-10 setting of SimCLR (appendix B.9): half the colour strength, no blur.
        "simclr-small": Views(
            min_scale=(0.08,),
            interpolation="bicubic",
            blur=(0.0,),
            mean=CIFAR_MEAN,
            std=CIFAR_STD,
        ),
        "pic-small": replace(_PIC, blur=(0.0,), mean=CIFAR_MEAN, std=CIFAR_STD),
    }
)
"""The views of the papers by name: start from one with `dataclasses.replace`."""
