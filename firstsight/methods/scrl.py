"""SCRL: predict, from a box in one view, what a slow copy makes of the same place in the other.

Roh et al. 2021, https://arxiv.org/abs/2103.06122, section 3, and the authors' code.

It is BYOL (Grill et al. 2020, https://arxiv.org/abs/2006.07733) with boxes for images: places that
both views show, cut out of the last feature map by RoIAlign. What is learnt must hold wherever an
object lies and however large it is seen, which is what detection needs. No term is of whole images.

Shapes: B images per rank, n boxes of each, K images whose views share enough, M = K n, C channels
of the map, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from firstsight import distributed, metrics, optim
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import UserError, require_not_negative, require_positive, require_share
from firstsight.geometry import BoxRule, box_rows, matched_places
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, full
from firstsight.nets.projectors import mlp
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # the authors' 200 epochs; their batch is 8192, the rate is per 256 images
    views="scrl",
    epochs=200,
    batch_size=256,
    base_lr=0.45,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    lars="scrl",
    lr_at="end",
    undecayed=("norm", "bias"),
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SCRL."""

    dim: int = 256
    """D, size of the embedding that is predicted."""
    hidden: int = 4096
    """Width of the hidden layer of projector and predictor."""
    momentum: float = 0.97
    """Share of the momentum encoder that survives the first step; rises to 1 over the run."""
    start: Literal["copied", "independent"] = "copied"
    """The momentum encoder at first: a copy of the online network, or other weights of its kind."""
    views_together: bool = True
    """Both views go through the networks as one batch, with common batch-norm statistics."""
    boxes: int = 10
    """n, boxes for each image."""
    min_size: int = 0
    """Shortest side of a box, pixels of either view; 0: one cell of the feature map."""
    max_iou: float = 0.5
    """Boxes of an image overlap less than this, intersection over union; 1: any."""
    jitter: float = 0.0
    """Boxes of the second view move and grow by at most this share of their sides."""
    grid: bool = True
    """A box lies in a cell of a grid drawn for it: small boxes are frequent; else anywhere."""
    aligned: bool = False
    """RoIAlign takes half a cell off, as detectors do since; the published code does not."""
    weights: Literal["boxes", "ranks"] = "boxes"
    """All boxes of all ranks count the same, or, as published, the mean of each rank does."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "boxes", "max_iou")
        require_not_negative("--method.", self, "min_size")
        require_share("--method.", self, "momentum", "max_iou", "jitter")


def scrl_loss(
    first_predicted: Tensor, second_predicted: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Scalar sum of both directions of the squared distance of unit vectors; 0 is best, 8 worst.

    All (M, D), row i from box i: predictions from the two views, and what they are to predict,
    crosswise: `second` from the first view, `first` from the second. Normalised inside; no gradient
    flows into what is predicted (Roh et al. 2021, both directions, mean over boxes).
    """
    one = F.cosine_similarity(full(first_predicted), full(second.detach()), dim=1)  # (M,)
    other = F.cosine_similarity(full(second_predicted), full(first.detach()), dim=1)  # (M,)
    return (4 - 2 * one - 2 * other).mean()


class SCRL(Method):
    """Spatially consistent representation learning (Roh et al. 2021)."""

    couples = "the weights of boxes"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.rule = BoxRule(
            count=config.boxes,
            min_size=config.min_size or backbone.stride,
            max_iou=config.max_iou,
            jitter=config.jitter,
            grid=config.grid,
        )
        self.projector = mlp(backbone.map_width, config.hidden, config.dim)
        self.predictor = mlp(config.dim, config.hidden, config.dim)
        # differs from the authors' code, as in BYOL: there the copy starts with other weights
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)
        if config.start == "independent":
            self.momentum_encoder.redraw()

    def forward(self, batch: Batch) -> Output:
        """The loss of two views, both directions; 0, with gradients of 0, where no box is found."""
        _refuse_small(batch.views[0].shape[-1], self.rule.min_size)
        (crops_1, crops_2), (flips_1, flips_2), views = batch.crops, batch.flips, batch.views
        matched = matched_places(
            crops_1, flips_1, crops_2, flips_2, views[0].shape[-1], rule=self.rule
        )
        usable = matched.usable & (matched.usable.sum() * self.rule.count > 1)  # for batch-norm
        kept = usable | ~usable.any()  # (B,): without any box, whole views with weight 0
        boxes: tuple[Tensor, ...] = (matched.first, matched.second)  # (B, n, 4) each
        if self.config.views_together:
            views, boxes, kept = (torch.cat(views),), (torch.cat(boxes),), kept.repeat(2)
        seen = [self.backbone.map_and_features(view) for view in views]
        regions = [self.regions(cells, b, kept) for (cells, _), b in zip(seen, boxes, strict=True)]
        predicted = torch.cat([self.predictor(self.projector(r)) for r in regions])  # (2M, D)

        with torch.no_grad():
            backbone, projector = self.momentum_encoder.copy
            maps = [cast(Backbone, backbone).feature_map(view) for view in views]
            regions = [self.regions(cells, b, kept) for cells, b in zip(maps, boxes, strict=True)]
            targets = torch.cat([projector(r) for r in regions])  # (2M, D)

        loss = scrl_loss(*predicted.chunk(2), *targets.chunk(2))
        loss = loss * self.weight(usable.to(loss.dtype))
        scalars = {
            "embedding_spread": metrics.spread(full(targets)),
            "images_with_boxes": usable.to(loss.dtype).mean(),
        }
        return Output(loss, seen[0][1].detach()[: len(batch)], scalars)

    def regions(self, cells: Tensor, boxes: Tensor, kept: Tensor) -> Tensor:
        """(K n, C) mean of the map (B, C, h, w) in each box (B, n, 4) of the images kept (B,).

        RoIAlign with one bin: bilinear samples, as many a side as the box has cells.
        """
        everything = torch.ones_like(kept)
        means: Tensor = roi_align(  # of all images: the shapes stay what they are
            full(cells),
            box_rows(boxes, everything).to(full(cells).dtype),
            output_size=1,
            spatial_scale=1 / self.backbone.stride,
            aligned=self.config.aligned,
        )  # (B n, C, 1, 1)
        return means.flatten(1)[kept.repeat_interleave(self.rule.count)]

    def weight(self, usable: Tensor) -> Tensor:
        """What the mean over this rank's boxes counts, so that the mean of ranks is that of all
        boxes; 0 where it has none. usable (B,) is 1 for images with boxes."""
        own = usable.sum()
        if self.config.weights == "ranks":
            return own.clamp_max(1)
        return own * distributed.world() / distributed.summed(own).clamp_min(1)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder, after the optimiser: less and less as the run goes on."""
        momentum = optim.cosine(progress, self.config.momentum, 1.0)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=momentum)


def _refuse_small(size: int, least: int) -> None:
    if size <= least:
        raise UserError(
            f"views of {size} pixels hold no two boxes of {least}; use a larger --size, a smaller "
            "--method.min-size, or --stem small"
        )
