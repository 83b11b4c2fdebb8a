"""One network, read in one way: images in, maps out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from firstsight import checkpoint
from firstsight.backbones import Backbone
from firstsight.errors import UserError
from firstsight.features import Reader
from firstsight.loader import normalised
from firstsight.localize import activation, controls, network
from firstsight.localize.commands import Network
from firstsight.localize.network import Changes
from firstsight.nets import cast_to

POSITIVE = ("sum", "attention")
"""Readings whose maps can be divided by that of noise."""


@dataclass
class Eye:
    """A network and how it is read."""

    backbone: Backbone
    reader: Reader
    seed: int
    stages: int | None
    features: activation.Features
    maps: activation.Reading
    device: torch.device
    classes: int = 0
    """Rows of the classifier, of a class activation map."""
    noise: Tensor | None = None
    """(h, w) mean map of images of noise, on the CPU; None before `blind`."""

    @torch.no_grad()
    def see(self, pixels: Tensor, classes: Tensor | None = None) -> Tensor:
        """(B, h, w) float64 maps, on the CPU, of uint8 images (B, 3, H, W)."""
        classes = None if classes is None else classes.to(self.device)
        return self._read(self._normal(pixels), classes)

    @torch.no_grad()
    def cells(self, pixels: Tensor) -> Tensor:
        """(B, C, h, w) feature maps of uint8 images (B, 3, H, W)."""
        with cast_to(self.reader.precision, self.device), _large_enough(self.backbone.name):
            return self.features(self._normal(pixels))

    @torch.no_grad()
    def blind(self) -> None:
        """Learn the map of noise: the mean over those noise images whose map is finite."""
        images = controls.noise(self.reader.size, self.seed).to(self.device)
        maps = self._read(images, None)
        finite = maps[maps.isfinite().all(dim=2).all(dim=1)]
        self.noise = finite.mean(dim=0) if len(finite) else torch.full_like(maps[0], torch.nan)

    @torch.no_grad()
    def learn(self, batches: Iterable[Tensor], total: int) -> None:
        """Find the principal component of uint8 images, which `maps` then reads."""
        made = (self._normal(pixels) for pixels in batches)
        with cast_to(self.reader.precision, self.device), _large_enough(self.backbone.name):
            self.maps = activation.principal(self.features, made, total)

    def _normal(self, pixels: Tensor) -> Tensor:
        layout = torch.channels_last
        return normalised(pixels.to(self.device), self.reader.mean, self.reader.std, layout)

    def _read(self, images: Tensor, classes: Tensor | None) -> Tensor:
        with cast_to(self.reader.precision, self.device), _large_enough(self.backbone.name):
            return self.maps(images, classes).cpu()


@contextmanager
def _large_enough(name: str) -> Iterator[None]:
    """Says in one sentence what torch says of maps too small to mirror or to normalise."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if not any(part in text for part in ("Padding size", "spatial element", "too small")):
            raise
        raise UserError(
            f"maps of {name} get too small for this ({text.splitlines()[0][:80]}); use a larger "
            "--input-size, fewer --stages, or --padding zeros --bn eval"
        ) from None


def open_eye(
    ask: Network, seed: int, device: torch.device, reading: str = "sum", classifier: str = ""
) -> Eye:
    """The network that was asked for, drawn by `seed` if it is untrained, ready to look through.

    Raises `UserError` where the network cannot be changed or read in this way.
    """
    changes = Changes(
        activation=ask.activation,
        init=ask.init,
        last_stride=ask.last_stride,
        bn=ask.bn,
        padding=ask.padding,
    )
    backbone, about = network.load(ask.checkpoint, seed, ask.input_size or 224, changes)
    reader = Reader.like(
        about,
        ask.input_size,
        precision=ask.precision,
        batch_size=ask.batch_size,
        workers=ask.workers,
        interpolation=ask.resample,
    )
    backbone.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    features, stage = activation.features_of(backbone, ask.stages)
    eye = Eye(
        backbone=backbone,
        reader=reader,
        seed=seed,
        stages=stage,
        features=features,
        maps=activation.summed(features),
        device=device,
    )
    if reading == "attention":
        eye.maps = activation.attention(backbone)
    if reading == "cam":
        weight, bias = _classifier(classifier, backbone)
        bias = None if bias is None else bias.to(device)
        eye.maps = activation.by_class(features, weight.to(device), bias)
        eye.classes = len(weight)
    return eye


def _classifier(path: str, backbone: Backbone) -> tuple[Tensor, Tensor | None]:
    """(K, C) and (K,): the one matrix in a checkpoint that classifies features of that width."""
    if not path:
        raise UserError("--reading cam needs the classifier: --classifier FILE, a checkpoint of it")
    state = checkpoint.read(Path(path))
    for outer in ("state_dict", "model"):
        state = state[outer] if isinstance(state.get(outer), dict) else state
    ends = ("fc.weight", "head.weight", "classifier.weight", "linear.weight")
    found = [
        name
        for name, value in state.items()
        if (name == "weight" or name.endswith(ends))
        and isinstance(value, Tensor)
        and value.ndim == 2
        and value.shape[1] == backbone.width
    ]
    if len(found) != 1:
        what = ", ".join(found) if found else "nothing"
        raise UserError(
            f"{path} should hold one classifier of {backbone.width} features "
            f"(..., {', '.join(ends)}); found {what}"
        )
    bias = state.get(found[0].removesuffix("weight") + "bias")
    return state[found[0]].float(), None if bias is None else bias.float()
