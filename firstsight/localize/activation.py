"""Where the activations of a network lie: four readings that make one map (h, w) of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from firstsight.backbones import Backbone, Timm
from firstsight.errors import UserError
from firstsight.log import Meter

Features = Callable[[Tensor], Tensor]
"""Normalised images (B, 3, H, W) -> feature map (B, C, h, w)."""
Reading = Callable[[Tensor, Tensor | None], Tensor]
"""Normalised images (B, 3, H, W), their classes (B,) where known -> maps (B, h, w) in float64."""


def features_of(backbone: Backbone, stages: int | None) -> tuple[Features, int | None]:
    """The map that is read, and the stage it is after; None: the backbone's own map.

    Of a transformer it is the last block's, before the closing layer norm: that one makes the sum
    over the channels of a token 0, whatever the image is.
    """
    if stages is None and isinstance(backbone, Timm) and hasattr(backbone.network, "blocks"):
        closing = getattr(backbone.network, "norm", None)
        stages = backbone.last_stage if isinstance(closing, nn.LayerNorm) else None
    if stages is None:
        return backbone.feature_map, None
    if not 0 <= stages <= backbone.last_stage:
        last = backbone.last_stage
        raise UserError(f"{backbone.name} has stages 0 to {last}; --stages {stages} is none")
    return lambda images: backbone.stage_map(images, stages), stages


def activation_sum(features: Tensor) -> Tensor:
    """(B, h, w) the sum over channels of (B, C, h, w), in float64 (SCDA, Wei et al. 2017)."""
    return features.sum(dim=1, dtype=torch.float64)


def class_activation(features: Tensor, weight: Tensor, classes: Tensor) -> Tensor:
    """(B, h, w) CAM (Zhou et al. 2016): features (B, C, h, w) weighed for each image's class.

    `weight` is (K, C), that of the classifier on averaged features; `classes` (B,) says its row.
    """
    return torch.einsum("bchw,bc->bhw", features.double(), weight.double()[classes])


def summed(features: Features) -> Reading:
    """Sums of activations."""
    return lambda images, classes: activation_sum(features(images))


def by_class(features: Features, weight: Tensor, bias: Tensor | None) -> Reading:
    """CAM of the class of each image; of the one the classifier finds most likely, if unknown."""

    def read(images: Tensor, classes: Tensor | None) -> Tensor:
        maps = features(images)
        if classes is None:
            logits = maps.float().mean(dim=(2, 3)) @ weight.T
            classes = (logits if bias is None else logits + bias).argmax(dim=1)
        return class_activation(maps, weight, classes)

    return read


def attention(backbone: Backbone) -> Reading:
    """What the class token of timm's transformers looks at in the last block, mean over heads.

    Without a class token: what all patches look at, on average (as DINO draws it, Caron et al.
    2021, section 4.2.2, with its heads averaged).
    """
    network: Any = backbone.network if isinstance(backbone, Timm) else None
    layer = getattr(network.blocks[-1], "attn", None) if hasattr(network, "blocks") else None
    if layer is None or not hasattr(layer, "attn_drop"):
        raise UserError(f"--reading attention needs a transformer of timm, not {backbone.name}")
    layer.fused_attn = False  # fused kernels keep their weights to themselves
    prefix = int(getattr(network, "num_prefix_tokens", 0))
    seen: list[Tensor] = []
    layer.attn_drop.register_forward_hook(lambda module, args, output: seen.append(args[0]))

    def read(images: Tensor, classes: Tensor | None) -> Tensor:
        seen.clear()
        h, w = backbone.feature_map(images).shape[2:]
        weights = seen[0].double().mean(dim=1)  # (B, N, N)
        rows = weights[:, 0] if prefix else weights.mean(dim=1)
        return rows[:, prefix:].reshape(len(images), h, w)

    return read


def principal(features: Features, batches: Iterable[Tensor], total: int) -> Reading:
    """The first principal component of all cells of a set of images (DDT, Wei et al. 2019).

    `batches` are normalised images, `total` says how many. Its sign is open; here the component
    agrees with the sum of activations. Cells above 0 belong to what the images have in common.
    """
    count, done = 0, 0
    total_sum = total_square = sums = torch.zeros(())
    with Meter("what the images share", 0, total) as meter:
        for images in batches:
            cells = features(images).double().flatten(2).transpose(1, 2).flatten(0, 1)  # (n, C)
            cells = cells[cells.isfinite().all(dim=1)]
            count += len(cells)
            total_sum = total_sum + cells.sum(dim=0)
            total_square = total_square + cells.T @ cells
            sums = sums + cells.T @ cells.sum(dim=1)
            done += len(images)
            meter.show(done)
    if count == 0:
        raise UserError("no image gives a finite feature map; --bn batch or another --init may")
    mean = total_sum / count
    covariance = total_square / count - mean[:, None] * mean
    component = torch.linalg.eigh(covariance)[1][:, -1]
    together = component @ (sums / count - mean * mean.sum())  # covariance with the sum
    component = component * (1 if together >= 0 else -1)

    def read(images: Tensor, classes: Tensor | None) -> Tensor:
        cells = features(images).double() - mean[:, None, None]
        return torch.einsum("bchw,c->bhw", cells, component)

    return read
