"""Which backbone a set of weights is of, told by their shapes, and how well they cover it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from firstsight import backbones
from firstsight.backbones import Backbone
from firstsight.backbones.cifar import DEPTHS
from firstsight.checkpoint.foreign import Foreign
from firstsight.errors import UserError

_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
"""By whether blocks have three convolutions, and blocks a stage."""
_WIDER: dict[tuple[str, tuple[int, ...]], str] = {
    ("resnet50", (128, 128)): "timm:wide_resnet50_2",
    ("resnet101", (128, 128)): "timm:wide_resnet101_2",
    ("resnet50", (128, 4)): "timm:resnext50_32x4d",
    ("resnet101", (256, 8)): "timm:resnext101_32x8d",
}
"""By outputs of a block's 3x3 convolution and inputs of each of them."""
_TRANSFORMERS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large"}


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A backbone with foreign weights in it, and what became of each tensor; all keys ours."""

    format: str
    """Of the file; firstsight: ours."""
    half: str
    """Which of its networks this is."""
    backbone: Backbone
    about: dict[str, Any]
    """What `backbone.json` says."""
    matched: tuple[str, ...]
    """Loaded."""
    filled: tuple[str, ...] = ()
    """Counters of batches, which no forward pass reads, set to 0 where the file has none."""
    missing: tuple[str, ...] = ()
    """Not in the file: left untrained."""
    unlike: tuple[str, ...] = ()
    """Of another shape there, said with both: left untrained."""
    unknown: tuple[str, ...] = ()
    """In the file, and of no use here."""
    notes: tuple[str, ...] = ()
    """What would give other features elsewhere, or may here."""
    dropped: tuple[str, ...] = ()
    """Keys of the file that are no part of the network."""
    head: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """What sat on the network there: `fc.*`."""
    licence: str = ""
    """What is known of the terms of the weights."""

    @property
    def total(self) -> int:
        """Tensors of the backbone."""
        return len(self.matched) + len(self.filled) + len(self.missing) + len(self.unlike)

    @property
    def gap(self) -> str:
        """What keeps this from being the network of the file, in words; empty where nothing."""
        said = []
        if self.missing:
            said.append(f"{len(self.missing)} tensors are missing, such as {self.missing[0]}")
        if self.unlike:
            said.append(f"{len(self.unlike)} have another shape: {self.unlike[0]}")
        if self.unknown:
            said.append(f"{len(self.unknown)} have no place, such as {self.unknown[0]}")
        return "; ".join(said)


def fitted(foreign: Foreign, where: str) -> Fit:
    """The backbone that foreign weights are of, with all of them that fit."""
    name, stem, size, notes = _described(foreign, where)
    backbone = backbones.build(name, stem, size)
    own, theirs = inner(backbone).state_dict(), foreign.weights
    unlike = [key for key in own if key in theirs and own[key].shape != theirs[key].shape]
    matched = [key for key in own if key in theirs and key not in unlike]
    absent = [key for key in own if key not in theirs]
    filled = [key for key in absent if key.endswith("num_batches_tracked")]
    inner(backbone).load_state_dict({key: theirs[key] for key in matched}, strict=False)
    about = {
        "backbone": name,
        "stem": stem,
        "width": backbone.width,
        "stride": backbone.stride,
        "size": size,
        "mean": list(foreign.format.mean),
        "std": list(foreign.format.std),
    }
    return Fit(
        format=foreign.name,
        half=foreign.half,
        backbone=backbone.eval(),
        about=about,
        matched=tuple(matched),
        filled=tuple(filled),
        missing=tuple(key for key in absent if key not in filled),
        unlike=tuple(f"{k} {[*theirs[k].shape]}, here {[*own[k].shape]}" for k in unlike),
        unknown=tuple(key for key in theirs if key not in own),
        notes=notes,
        dropped=foreign.dropped,
        head=foreign.head,
        licence=foreign.format.licence,
    )


def whole(form: str, backbone: Backbone, about: dict[str, Any]) -> Fit:
    """A backbone that is all there."""
    return Fit(
        format=form,
        half="backbone",
        backbone=backbone.eval(),
        about=about,
        matched=tuple(inner(backbone).state_dict()),
    )


def inner(backbone: Backbone) -> torch.nn.Module:
    """The module whose keys are the library's own."""
    return backbone.get_submodule("network") if isinstance(backbone, backbones.Timm) else backbone


def _described(foreign: Foreign, where: str) -> tuple[str, str, int, tuple[str, ...]]:
    """Name, stem, side of the images, and what is to be said."""
    notes = [foreign.format.note] if foreign.format.note else []
    if "patch_embed.proj.weight" in foreign.weights:
        name, size = _transformer(foreign, where, notes)
        return name, "standard", size, tuple(notes)
    if foreign.weights.get("conv1.weight", torch.empty(0)).shape == (16, 3, 3, 3):
        notes.append("shortcuts without weights: every second pixel, padded with zeros")
        return _cifar_resnet(foreign, where), "standard", 32, tuple(notes)
    name, stem = _resnet(foreign, where), "standard"
    if foreign.weights.get("conv1.weight", torch.empty(0)).shape[-1:] == (3,):
        stem = "small"
        if foreign.format.padding != 1:
            raise UserError(
                f"{where} has a first convolution of 3x3, which {foreign.name} pads by"
                f" {foreign.format.padding}: ours pads by 1 and would give other features"
            )
        notes.append(
            "the first convolution is 3x3: read with stride 1, padding 1 and no pooling behind it,"
            " which the file does not say"
        )
    return name, stem, 32 if stem == "small" else 224, tuple(notes)


def _cifar_resnet(foreign: Foreign, where: str) -> str:
    stages = _blocks(foreign)
    for name, blocks in DEPTHS.items():
        if stages == (blocks, blocks, blocks, 0):
            return name
    raise UserError(
        f"{where} ({foreign.name}) holds a ResNet of {stages} blocks a stage that begins with 16"
        f" channels; there are {', '.join(DEPTHS)}"
    )


def _blocks(foreign: Foreign) -> tuple[int, ...]:
    """Blocks of each of four stages."""
    places = [re.match(r"layer(\d)\.(\d+)\.", key) for key in foreign.weights]
    last = {int(p[1]): int(p[2]) for p in sorted(filter(None, places), key=lambda p: int(p[2]))}
    return tuple(last.get(stage, -1) + 1 for stage in range(1, 5))


def _resnet(foreign: Foreign, where: str) -> str:
    weights = foreign.weights
    stages = _blocks(foreign)
    name = _RESNETS.get(("layer1.0.conv3.weight" in weights, stages))
    shapes = {key: tuple(weights[key].shape) for key in weights}
    first = shapes.get("conv1.weight", ())
    if name is None or first[:1] not in ((64,), ()) or "layer1.0.conv2.weight" not in shapes:
        raise UserError(
            f"{where} ({foreign.name}) holds a ResNet of {stages} blocks a stage that begins with"
            f" {first[0] if first else '?'} channels; there are {', '.join(backbones.RESNETS)},"
            " wide_resnet50_2, resnext50_32x4d and the like"
        )
    inner = shapes["layer1.0.conv2.weight"][:2]
    if inner != (64, 64):
        if (name, inner) not in _WIDER:
            raise UserError(f"{where} holds a {name} with blocks of {inner[0]} channels: none here")
        return _WIDER[name, inner]
    return f"timm:{name}d" if "conv1.6.weight" in shapes else name


def _transformer(foreign: Foreign, where: str, notes: list[str]) -> tuple[str, int]:
    weights = foreign.weights
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    positions = weights.get("pos_embed", torch.empty(1, 0, width))
    side = math.isqrt(max(positions.shape[1] - 1, 0))
    if width not in _TRANSFORMERS or side**2 + 1 != positions.shape[1]:
        raise UserError(
            f"{where} holds a transformer of width {width} with {positions.shape[1]} positions;"
            f" known are widths {', '.join(map(str, _TRANSFORMERS))}, with a class token"
        )
    name = f"timm:{_TRANSFORMERS[width]}_patch{patch}_224"
    heads = foreign.format.heads.get(width)
    if heads is None and width == 384 and not positions[0, 0].any():
        heads = 12  # positions that were computed, not learnt: MoCo v3's
    if heads:
        notes.append(f"{heads} heads, as MoCo v3 has them; timm's has 6 in the same shapes")
        name += f",num_heads={heads}"
    elif width == 384:
        notes.append("6 heads, as timm and DINO have them: the file does not say")
    return name, side * patch
