"""Semantic segmentation on a backbone of ours: torchvision's heads of FCN and DeepLab v3.

FCN: Long et al. 2015, https://arxiv.org/abs/1411.4038. DeepLab v3: Chen et al. 2017,
https://arxiv.org/abs/1706.05587, whose pyramid of dilations is 12, 24 and 36 at stride 8.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from firstsight.backbones import Backbone, Timm
from firstsight.detect import policies
from firstsight.detect.models import Prepared, rest_unused
from firstsight.detect.segmentation_data import ASIDE
from firstsight.detect.settings import Training
from firstsight.nets import full


class Segmenter(policies.Resting):
    """Images (3, H, W) of any sizes, values in 0 to 1; the loss, or scores for each pixel."""

    def __init__(self, network: nn.Module, resting: list[nn.Module], mean: Any, std: Any) -> None:
        super().__init__(network, resting)
        self._prepared = Prepared(mean, std)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """The loss of a batch in training; else scores (classes, H, W) of each image.

        Targets have `indices` (H, W): the class of each pixel, 255 for none.
        """
        batch: Tensor = self._prepared(images)[0].tensors  # (B, 3, H', W'), padded to their largest
        scores = full(self.network(batch))  # (B, classes, h, w)
        scores = F.interpolate(scores, batch.shape[2:], mode="bilinear", align_corners=False)
        if targets is None:
            return [
                s[:, : one.shape[1], : one.shape[2]] for s, one in zip(scores, images, strict=True)
            ]
        return {"loss_pixels": pixel_loss(scores, _padded(targets, batch))}


def _padded(targets: list[dict[str, Tensor]], batch: Tensor) -> Tensor:
    """(B, H', W') classes; pixels beyond an image are of none."""
    whole = batch.new_full((len(batch), *batch.shape[2:]), ASIDE, dtype=torch.long)
    for row, one in zip(whole, targets, strict=True):
        height, width = one["indices"].shape
        row[:height, :width] = one["indices"]
    return whole


def pixel_loss(scores: Tensor, indices: Tensor) -> Tensor:
    """Cross-entropy in nats of scores (B, K, H, W), the mean over the pixels of a class.

    `indices` (B, H, W) are 0 to K - 1, or 255 for none. 0 where no pixel is of a class.
    """
    total = F.cross_entropy(scores, indices, ignore_index=ASIDE, reduction="sum")
    return total / (indices != ASIDE).sum().clamp(min=1)


def build(backbone: Backbone, classes: int, config: Training, mean: Any, std: Any) -> Segmenter:
    """A network that gives each pixel one of `classes`; it takes `backbone` over.

    The last two stages of a ResNet keep the size of the stage before them (`dilate`); of other
    networks the last map is taken as it is. The head's norms are those of `config.norm`, but that
    `frozen` ones could learn nothing and stay plain. differs from the papers: no second loss on an
    earlier stage.
    """
    if policies.is_resnet(backbone):
        dilate(backbone)
    resting = policies.apply(backbone, config)
    body = Map(backbone)
    make = FCNHead if config.detector == "fcn" else DeepLabHead
    head = make(body.width, classes)
    policies.normalise(head, "batch" if config.norm == "frozen" else config.norm, config.splits)
    network = nn.Sequential(body, head).to(memory_format=torch.channels_last)
    return Segmenter(network, resting, mean, std)


class Map(nn.Module):
    """The last map of a backbone, (B, C, h, w) with C = `width`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        cells = self.eval()(torch.zeros(1, 3, 64, 64))
        self.width = cells.shape[1]
        rest_unused(self, [cells])

    def forward(self, images: Tensor) -> Tensor:
        """The map of images whose sides are multiples of 32."""
        if isinstance(self.backbone, Timm):  # a transformer's tokens too, however wide the image
            return self.backbone.stage_map(images, self.backbone.last_stage)
        return self.backbone.feature_map(images)


def dilate(backbone: Backbone) -> None:
    """Let the last two stages of a ResNet keep their maps at stride 8, with the same weights.

    What halved the map now steps by 1, and the 3x3 convolutions behind it look 2 (then 4) cells
    apart: every second (fourth) cell of the new map is a cell of the old one (Chen et al. 2017,
    section 3.1). Where a shortcut of timm's pools, it does so over neighbours, as timm has it.
    """
    if isinstance(backbone, Timm):
        weights = backbone.get_submodule("network").state_dict()
        name = backbone.name.removeprefix("timm:")
        network = timm.create_model(name, num_classes=0, output_stride=8)
        network.load_state_dict(weights)
        backbone.network = network
        return
    apart = 1
    for stage in policies.stages(backbone)[3:]:
        before, apart = apart, 2 * apart
        convolutions: list[nn.Conv2d] = [m for m in stage[0].modules() if isinstance(m, nn.Conv2d)]
        for one in convolutions:
            if one.kernel_size == (3, 3):
                one.__class__ = nn.Conv2d  # ours knows a short way for tiny maps, and no dilation
                cells = before if one.stride == (2, 2) else apart
                one.dilation = one.padding = (cells, cells)
            one.stride = (1, 1)
