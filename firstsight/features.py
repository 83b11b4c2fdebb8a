"""backbone + source -> pooled features, counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import distributed, keyed
from firstsight.backbones import Backbone
from firstsight.errors import UserError
from firstsight.loader import Chunks, chunks, normalised
from firstsight.log import Meter, say
from firstsight.nets import cast_to
from firstsight.settings import Pretrain
from firstsight.sources.base import Source
from firstsight.version import __version__
from firstsight.views import IMAGENET_MEAN, IMAGENET_STD, Interpolation
from firstsight.views.apply import Crop, eval_policy


@dataclass(frozen=True, kw_only=True)
class Reader:
    """How features are read: the part of every protocol that does not depend on the reading."""

    size: int
    """Side of the evaluation view, pixels."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    precision: str = "fp32"
    batch_size: int = 256
    workers: int = 0
    interpolation: Interpolation = "bilinear"
    crop: Crop = "centre"
    """The middle of the image, or (of views, which are cut already) all of it."""

    @classmethod
    def of(cls, config: Pretrain) -> Reader:
        """How the backbone of a run is read: as its views are sized and normalised."""
        return cls(
            size=config.size,
            mean=config.views.mean,
            std=config.views.std,
            precision=config.precision,
            workers=config.workers,
        )

    @classmethod
    def like(cls, about: Mapping[str, Any], size: int, **more: Any) -> Reader:
        """How a backbone is read by what is known `about` it; `size` 0 is the side it learnt at."""
        return cls(
            size=size or int(about.get("size", 224)),
            mean=tuple(about.get("mean", IMAGENET_MEAN)),
            std=tuple(about.get("std", IMAGENET_STD)),
            **more,
        )

    @property
    def protocol(self) -> dict[str, Any]:
        """What a figure depends on by how its features were read."""
        return {
            "size": self.size,
            "view": eval_policy(self.size, self.interpolation, self.crop),
            "mean": list(self.mean),
            "std": list(self.std),
            "precision": self.precision,
            "versions": {"firstsight": __version__, "torch": torch.__version__},
        }


@dataclass(frozen=True)
class Features:
    """Features of the images of a source that could be read."""

    values: Tensor
    """(N, C) float32, on the CPU."""
    index: Tensor
    """(N,) position of each row in the source, rising."""
    unreadable: int
    """Images that could not be decoded and are not among the rows."""

    def labels(self, numbers: NDArray[np.int64]) -> Tensor:
        """(N,) label of each row, of the labels of all images of the source."""
        return torch.from_numpy(numbers)[self.index]


@dataclass(frozen=True)
class Seen:
    """A labelled training and test source as a backbone sees them: what accuracy is read from."""

    train: Tensor
    """(N, C)."""
    train_labels: Tensor
    """(N,)."""
    test: Tensor
    """(M, C)."""
    test_labels: Tensor
    """(M,), in the numbers of the training source."""


def extract(
    backbone: Backbone, source: Source, reader: Reader, index: NDArray[np.int64] | None = None
) -> Features:
    """Pooled features of the images at `index` (all by default), every image once on any W ranks.

    Nothing of the backbone changes, nor does the mode it is in.
    """
    distributed.same_buffers(backbone)  # one network is judged: that of the first rank
    wanted = np.arange(len(source)) if index is None else np.sort(index)
    dataset = Chunks(
        source=source,
        index=wanted,
        size=reader.size,
        interpolation=reader.interpolation,
        crop=reader.crop,
        batch_size=reader.batch_size,
    )
    values, found = [torch.empty(0, backbone.width)], [torch.empty(0, dtype=torch.long)]
    with Meter(f"features of {source.spec}", 0, len(wanted)) as meter:
        for number, (pixels, positions) in enumerate(chunks(dataset, reader.workers), start=1):
            if len(positions):
                values.append(pooled(backbone, pixels, reader).cpu())
                found.append(positions)
            done = number * reader.batch_size * distributed.world()
            meter.show(min(done, len(wanted)))
    every = distributed.collect((torch.cat(values), torch.cat(found)))
    rows, positions = (torch.cat(parts) for parts in zip(*every, strict=True))
    order = positions.argsort()
    return Features(rows[order], positions[order], len(wanted) - len(positions))


@torch.no_grad()
def pooled(backbone: Backbone, pixels: Tensor, reader: Reader) -> Tensor:
    """(B, C) float32 features of uint8 images (B, 3, H, W), on the backbone's device.

    The backbone runs in evaluation mode and is put back into the mode it was in; nothing of it
    changes, and no gradient is recorded.
    """
    parameter = next(backbone.parameters())
    layout = torch.channels_last if _is_channels_last(backbone) else torch.contiguous_format
    images = normalised(pixels.to(parameter.device), reader.mean, reader.std, layout)
    training = backbone.training
    backbone.eval()
    with cast_to(reader.precision, parameter.device):
        features = backbone.features(images).float()
    backbone.train(training)
    return features


def _is_channels_last(backbone: Backbone) -> bool:
    return any(
        p.ndim == 4
        and p.shape[1] > 1
        and p.is_contiguous(memory_format=torch.channels_last)
        and not p.is_contiguous()
        for p in backbone.parameters()
    )


def refuse_unusable(values: Tensor, *others: Tensor) -> None:
    """Raise `UserError` where features are not numbers; say where all of `values` are the same."""
    if not all(bool(part.isfinite().all()) for part in (values, *others)):
        raise UserError("some features are not numbers: take an earlier checkpoint or snapshot")
    if len(values) < 2:
        return
    apart, largest = (values - values[0]).abs().max(), values.abs().max()
    if apart <= 1e-5 * largest:  # in batches of another length the last bits differ
        say("all images have the same features: the backbone has collapsed")


def subset(source: Source, count: int, seed: int) -> NDArray[np.int64]:
    """`count` positions drawn from the source by seed (all, where it has no more)."""
    if count >= len(source):
        return np.arange(len(source))
    return np.random.default_rng(keyed.seed(seed, count)).permutation(len(source))[:count]
