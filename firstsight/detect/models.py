"""Detectors on a backbone of ours: torchvision's R-CNN, RPN, heads, pyramid and RetinaNet.

What torchvision does not know is here: feature maps of any backbone, the published details that
differ from its own (`settings.Training` names them), and coordinates that stay float32 while
convolutions run in bfloat16.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)
from torchvision.ops.poolers import LevelMapper

from firstsight.backbones import Backbone
from firstsight.detect import policies
from firstsight.detect.settings import Training
from firstsight.errors import UserError
from firstsight.nets import full

STRIDES = (4, 8, 16, 32)
"""Of the maps that a pyramid stands on."""


class Detector(policies.Resting):
    """Images (3, H, W) of any sizes, values in 0 to 1; losses by name, or what was found."""

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses of a batch in training; else a dict for each image.

        Targets and results have `boxes` (n, 4) in pixels of the image given, `labels` (n,) from 0,
        and with mask-rcnn `masks`: (n, H, W) in, (n, 1, 28, 28) shares within the box out.
        """
        if targets is not None:
            targets = [{**one, "labels": one["labels"] + self._first} for one in targets]
        found = self.network(images, targets)
        if not self.training:
            found = [{**one, "labels": one["labels"] - self._first} for one in found]
        return found

    @property
    def _first(self) -> int:
        """Torchvision counts the background as class 0 where there are two stages."""
        return 0 if isinstance(self.network, RetinaNet) else 1


def build(backbone: Backbone, classes: int, config: Training, mean: Any, std: Any) -> Detector:
    """A detector of `classes` kinds of objects that starts from `backbone`, which it takes over.

    `mean` and `std` are those that the backbone was pretrained with, of values in 0 to 1.
    """
    resting = policies.apply(backbone, config)
    if config.detector == "retinanet":
        network: Any = _retinanet(backbone, classes, config)
    elif config.neck == "c4":
        network = _with_c4(backbone, classes, config)
    else:
        network = _with_fpn(backbone, classes, config)
    network.transform = Prepared(mean, std)
    for module in network.modules():
        if isinstance(module, _ENDS):
            module.register_forward_hook(lambda module, given, out: _in_full(out))
    # on a CPU in bfloat16 a fifth faster than the other order, in float32 as fast
    return Detector(network, resting).to(memory_format=torch.channels_last)


def _in_full(out: Any) -> Any:
    """What a network says, in float32.

    bfloat16 has 8 bits: an anchor at pixel 700 would be off by two, and torchvision computes
    coordinates in the type of the maps.
    """
    if isinstance(out, Tensor):
        return full(out)
    if isinstance(out, dict):
        return OrderedDict((name, full(each)) for name, each in out.items())
    return tuple(_in_full(each) for each in out)


class Prepared(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Normalises and pads; sizes are drawn and results put back elsewhere."""

    def __init__(self, mean: Any, std: Any) -> None:
        super().__init__(1, 1, list(mean), list(std))

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Both as they are."""
        return image, target

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        """As it is: `judging` brings it to the size of the original."""
        return result


class Body(nn.Module):
    """A backbone as detectors read it: maps of strides 4, 8, 16 and 32 in one pass."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self._chosen = [] if policies.is_resnet(backbone) else _of_strides(backbone)
        self.eval()
        with torch.no_grad():
            self.widths = [one.shape[1] for one in self(torch.zeros(1, 3, 64, 64))]
        if self._chosen:
            rest_unused(self, self(torch.zeros(1, 3, 64, 64)))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C_i, H / s_i, W / s_i) for each stride s_i."""
        if self._chosen:
            network: Any = self.backbone.get_submodule("network")
            maps: list[Tensor] = network.forward_intermediates(
                images, indices=self._chosen, intermediates_only=True, output_fmt="NCHW"
            )
            return maps
        x, maps = images, []
        for part in policies.stages(self.backbone):
            for module in part:
                x = module(x)
            maps.append(x)
        return maps[1:]


def _of_strides(backbone: Backbone) -> list[int]:
    """Positions in timm's `feature_info` of the last map of each stride."""
    info = getattr(getattr(backbone, "network", None), "feature_info", ())
    last = {entry["reduction"]: position for position, entry in enumerate(info)}
    if not set(STRIDES) <= set(last):
        raise UserError(
            f"{backbone.name} has no maps of strides {', '.join(map(str, STRIDES))} to detect on; "
            "use a ResNet, or another convolutional network"
        )
    return [last[stride] for stride in STRIDES]


def rest_unused(body: nn.Module, maps: list[Tensor]) -> None:
    """Take the gradient from what none of its maps depends on: several ranks would wait for it in
    vain."""
    learning = [p for p in body.parameters() if p.requires_grad]
    total = torch.stack([one.sum() for one in maps]).sum()
    for parameter, gradient in zip(
        learning, torch.autograd.grad(total, learning, allow_unused=True), strict=True
    ):
        parameter.requires_grad_(gradient is not None)


class Levels(nn.Module):
    """The pyramid over the maps of a backbone, from the map numbered `first` on."""

    def __init__(
        self, body: Body, first: int, channels: int, extra: ExtraFPNBlock, norm: Any
    ) -> None:
        super().__init__()
        self.body, self.first, self.out_channels = body, first, channels
        self.fpn = FeaturePyramidNetwork(body.widths[first:], channels, extra, norm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Maps (B, channels, h, w) by name: 0, 1, ... and those of the extra levels."""
        maps = enumerate(self.body(images)[self.first :])
        levels: dict[str, Tensor] = self.fpn(OrderedDict((str(i), x) for i, x in maps))
        return levels


class Pool(MultiScaleRoIAlign):  # type: ignore[misc]
    """RoIAlign from levels of known strides, aligned or as torchvision has it.

    torchvision infers strides from the sizes of its first batch; a run that goes on must not depend
    on where it began.
    """

    def __init__(self, strides: tuple[int, ...], side: int, aligned: bool) -> None:
        names = [str(i) for i in range(len(strides))]
        super().__init__(names, side, sampling_ratio=0 if aligned else 2)
        self.strides, self.aligned = strides, aligned
        self.mapper = LevelMapper(strides[0].bit_length() - 1, strides[-1].bit_length() - 1)

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: Any) -> Tensor:
        """(n, C, side, side) for the boxes of all images; large ones from coarse levels."""
        owners = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
        rows = torch.cat([torch.cat(owners), torch.cat(boxes)], dim=1)  # (n, 5)
        chosen = self.mapper(boxes)  # (n,)
        out = rows.new_zeros(len(rows), x["0"].shape[1], *self.output_size)
        for level, stride in enumerate(self.strides):
            here = torch.where(chosen == level)[0]
            pooled = roi_align(
                *(x[str(level)], rows[here], self.output_size, 1 / stride),
                sampling_ratio=self.sampling_ratio,
                aligned=self.aligned,
            )
            out[here] = pooled.to(out.dtype)
        return out


class L1Proposals(RegionProposalNetwork):  # type: ignore[misc]
    """Proposals whose corners are learnt with L1."""

    def compute_loss(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], wanted: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of objectness, and of the corners of objects: both means over the anchors drawn."""
        drawn = [torch.where(torch.cat(kind))[0] for kind in self.fg_bg_sampler(labels)]
        objects, both = drawn[0], torch.cat(drawn)
        off = F.l1_loss(deltas[objects], torch.cat(wanted)[objects], reduction="sum")
        score = objectness.flatten()[both]
        return F.binary_cross_entropy_with_logits(score, torch.cat(labels)[both]), off / len(both)


class L1Heads(RoIHeads):  # type: ignore[misc]
    """Heads whose boxes are learnt with L1; all else is torchvision's."""

    def select_training_samples(self, proposals: Any, targets: Any) -> Any:
        """As torchvision; what the boxes shall be is kept for the loss."""
        chosen = super().select_training_samples(proposals, targets)
        self._labels, self._wanted = torch.cat(chosen[2]), torch.cat(chosen[3])
        return chosen

    def forward(self, features: Any, proposals: Any, image_shapes: Any, targets: Any = None) -> Any:
        """As torchvision, with another `loss_box_reg`."""
        said: list[tuple[Tensor, Tensor]] = []
        ear = self.box_predictor.register_forward_hook(lambda module, given, out: said.append(out))
        try:
            found, losses = super().forward(features, proposals, image_shapes, targets)
        finally:
            ear.remove()
        if self.training:
            boxes = said[0][1].reshape(len(said[0][1]), -1, 4)  # (n, classes, 4)
            objects = torch.where(self._labels > 0)[0]
            off = boxes[objects, self._labels[objects]] - self._wanted[objects]
            losses["loss_box_reg"] = off.abs().sum() / len(self._labels)
        return found, losses


def _with_fpn(backbone: Backbone, classes: int, config: Training) -> nn.Module:
    made = policies.fresh(config.norm, config.splits)
    neck = made if "neck" in config.norm_also else None
    heads = made if "heads" in config.norm_also else None
    levels = Levels(Body(backbone), 0, config.channels, LastLevelMaxPool(), neck)
    aligned, width = config.roi_align == "aligned", config.channels
    parts: dict[str, Any] = {
        "box_roi_pool": Pool(STRIDES, 7, aligned),
        "box_predictor": FastRCNNPredictor(1024, classes + 1),
    }
    if config.box_head == "4conv1fc":
        parts["box_head"] = FastRCNNConvFCHead((width, 7, 7), [width] * 4, [1024], heads)
    sizes = tuple((side,) for side in (32, 64, 128, 256, 512))
    parts["rpn_anchor_generator"] = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    if config.detector == "mask-rcnn":
        parts["mask_roi_pool"] = Pool(STRIDES, 14, aligned)
        parts["mask_head"] = MaskRCNNHeads(width, [width] * 4, 1, heads)
        parts["mask_predictor"] = MaskRCNNPredictor(width, width, classes + 1)
    return _matched(levels, config, parts)


def _with_c4(backbone: Backbone, classes: int, config: Training) -> nn.Module:
    """The last stage works on the pooled boxes; an extra norm may follow it (He et al. 2020).

    differs from the paper: the mask head runs the last stage once more on the boxes that have an
    object, so batch-norm there sees these alone.
    """
    stem = StrideSixteen(backbone)
    last = nn.Sequential(policies.stages(backbone)[4][0])
    if "heads" in config.norm_also:
        last.add_module("norm", policies.fresh(config.norm, config.splits)(backbone.map_width))
    root: Any = getattr(backbone, "network", backbone)
    root.layer4 = nn.Identity()  # from here on it is the heads'
    pool = Pool((16,), 14, config.roi_align == "aligned")
    parts: dict[str, Any] = {
        "box_roi_pool": pool,
        "box_head": nn.Sequential(last, nn.AdaptiveAvgPool2d(1)),
        "box_predictor": FastRCNNPredictor(backbone.map_width, classes + 1),
        "rpn_anchor_generator": AnchorGenerator(((32, 64, 128, 256, 512),), ((0.5, 1.0, 2.0),)),
    }
    if config.detector == "mask-rcnn":
        parts |= {"mask_roi_pool": pool, "mask_head": last}
        width = backbone.map_width
        parts["mask_predictor"] = MaskRCNNPredictor(width, config.channels, classes + 1)
    return _matched(stem, config, parts)


class StrideSixteen(nn.Module):
    """A ResNet without its last stage."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.out_channels = Body(backbone).widths[2]
        self.backbone = backbone

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """One map, (B, C, H / 16, W / 16), by the name 0."""
        x = images
        for part in policies.stages(self.backbone)[:4]:
            for module in part:
                x = module(x)
        return {"0": x}


def _matched(backbone: nn.Module, config: Training, parts: dict[str, Any]) -> nn.Module:
    """torchvision's R-CNN with the numbers of `config`, and L1 where it asks for that."""
    kind = MaskRCNN if config.detector == "mask-rcnn" else FasterRCNN
    network: nn.Module = kind(
        backbone,
        rpn_post_nms_top_n_train=config.proposals[0],
        rpn_post_nms_top_n_test=config.proposals[1],
        rpn_pre_nms_top_n_train=config.proposals_before[0],
        rpn_pre_nms_top_n_test=config.proposals_before[1],
        box_batch_size_per_image=config.rois,
        **parts,
    )
    if config.box_loss == "l1":
        network.rpn.__class__, network.roi_heads.__class__ = L1Proposals, L1Heads
    return network


def _retinanet(backbone: Backbone, classes: int, config: Training) -> nn.Module:
    made = policies.fresh(config.norm, config.splits)
    neck = made if "neck" in config.norm_also else None
    heads = made if "heads" in config.norm_also else None
    width = config.channels
    levels = Levels(Body(backbone), 1, width, LastLevelP6P7(width, width), neck)
    head = RetinaNetHead(width, 9, classes, heads)
    head.regression_head._loss_type = config.box_loss.replace("-", "_")
    network: nn.Module = RetinaNet(levels, classes, head=head, detections_per_img=100)
    return network


_ENDS = (Levels, StrideSixteen, RPNHead, FastRCNNPredictor, MaskRCNNPredictor, RetinaNetHead)
"""Where networks end and coordinates or losses begin."""
