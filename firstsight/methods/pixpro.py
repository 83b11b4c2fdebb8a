"""PixPro: predict, from one view, what the other view's network says of the same place.

Xie et al. 2021, https://arxiv.org/abs/2011.10043, sections 3.2 and 3.3.

Both views know where in the image their cells lie, so cells of one place are known to belong
together. One side is smoothed first: each cell takes on what cells similar to it say.

Shapes: B images per rank, C channels of the map, S = h * w cells of it, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import optim
from firstsight.backbones import Backbone, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import UserError, require_positive, require_share
from firstsight.geometry import cell_centres, cell_diagonals
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, full, uncast
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Xie et al., section 4.1; their batch is 1024, the rate is per 256 images
    views="byol",
    epochs=100,
    batch_size=256,
    base_lr=1.0,
    weight_decay=1e-5,
    warmup_epochs=5,
    optimizer="lars",
    lars="pixpro",
    lr_start=0.01,
    lr_end=1e-6,
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PixPro."""

    dim: int = 256
    """D, size of the embedding of each cell."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    momentum: float = 0.99
    """Share of the momentum encoder that survives the first step; rises to 1 over the run."""
    sharpness: float = 2.0
    """Power of the similarity with which a cell takes on what others say; higher: fewer of them."""
    transform_layers: Literal[0, 1, 2] = 1
    """Layers between what a cell says and what others take on of it."""
    distance: float = 0.7
    """Cells nearer than this are positives, in diagonals of the larger cell."""
    shares: bool = False
    """Distances in shares of the image's width and height, as the authors' code; else pixels."""
    instance: float = 0.0
    """Weight of a loss of whole views, predicted as in BYOL; 0: none."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "sharpness", "distance")
        require_share("--method.", self, "momentum")
        if not self.instance >= 0:
            raise UserError(f"--method.instance must be 0 or more, not {self.instance}")


def positives(
    crops: tuple[Tensor, ...],
    flips: tuple[Tensor, ...],
    height: int,
    width: int,
    distance: float,
) -> Tensor:
    """(B, S, S) of bool: which cells of the first view lie near which of the second.

    crops (B, 4) and flips (B,) of each view, maps of height * width cells. Distances are in
    diagonals of the larger of the two views' cells (Xie et al. 2021, equation 1).
    """
    centres = [cell_centres(c, f, height, width) for c, f in zip(crops, flips, strict=True)]
    unit = torch.maximum(*(cell_diagonals(c, height, width) for c in crops))  # (B,)
    apart = (centres[0][:, :, None] - centres[1][:, None]).square().sum(dim=-1).sqrt()  # (B, S, S)
    return torch.lt(apart, distance * unit[:, None, None])


def propagated(cells: Tensor, said: Tensor, sharpness: float) -> Tensor:
    """(B, D, h, w) unit vectors: each cell's sum of what all say, weighted by similarity to it.

    cells and what they say, `said`, are (B, D, h, w); weights are cosines of cells, negative ones
    0, to the power `sharpness` (Xie et al. 2021, equations 3 and 4).
    """
    with uncast(cells):
        unit = F.normalize(full(cells), dim=1).flatten(2)  # (B, D, S)
        values = F.normalize(full(said), dim=1).flatten(2)
        weights = (unit.transpose(1, 2) @ unit).clamp_min(0)  # (B, S, S)
        if sharpness < 1:
            weights = weights + 1e-6  # as the authors' code: unlike cells count a little
        mixed = values @ weights.pow(sharpness).transpose(1, 2)
        return F.normalize(mixed, dim=1).view_as(said)


def agreement(queries: Tensor, keys: Tensor, positive: Tensor) -> Tensor:
    """Scalar mean over images of the mean cosine over positive pairs; 1 is best.

    queries, keys (B, D, h, w), normalised inside; no gradient flows into keys. positive (B, S, S),
    cells of the query first. An image without a pair counts as 0 (equation 5, one direction).
    """
    with uncast(queries):
        queries = F.normalize(full(queries), dim=1).flatten(2)
        keys = F.normalize(full(keys.detach()), dim=1).flatten(2)
        cosines = queries.transpose(1, 2) @ keys  # (B, S, S)
        pairs = positive.to(cosines)
        return ((cosines * pairs).sum(dim=(1, 2)) / (pairs.sum(dim=(1, 2)) + 1e-6)).mean()


def pixpro_loss(
    first_smoothed: Tensor, second_smoothed: Tensor, first: Tensor, second: Tensor, positive: Tensor
) -> Tensor:
    """Scalar: minus twice the agreement, both directions summed; -4 is best.

    Maps (B, D, h, w) of the two views, smoothed, and of the momentum encoder, crosswise; positive
    (B, S, S), cells of the first view by those of the second.
    """
    one = agreement(first_smoothed, second, positive)
    return -2 * (one + agreement(second_smoothed, first, positive.transpose(1, 2)))


def instance_loss(
    first_predicted: Tensor, second_predicted: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Scalar: minus twice the cosine of prediction (B, D) and key of the other view, both ways."""
    one = F.cosine_similarity(full(first_predicted), full(second.detach()), dim=1)  # (B,)
    other = F.cosine_similarity(full(second_predicted), full(first.detach()), dim=1)  # (B,)
    return -2 * (one + other).mean()


def pointwise(width: int, hidden: int, dim: int) -> nn.Sequential:
    """Two layers with batch-norm and ReLU between them, applied to every cell of a map."""
    first, last = nn.Conv2d(width, hidden, 1), nn.Conv2d(hidden, dim, 1)
    return nn.Sequential(first, nn.BatchNorm2d(hidden), nn.ReLU(inplace=True), last)


class PixPro(Method):
    """PixPro (Xie et al. 2021). differs from the paper: its code has distances in `shares`."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        dim, hidden = config.dim, config.hidden
        if config.zero_init:
            zero_residuals(self.backbone)
        self.projector = pointwise(backbone.map_width, hidden, dim)
        self.transform: nn.Module = nn.Identity()
        if config.transform_layers:
            one = config.transform_layers == 1
            self.transform = nn.Conv2d(dim, dim, 1) if one else pointwise(dim, dim, dim)
        self.instance_heads = nn.ModuleList()  # projector and predictor
        if config.instance:
            heads = [pointwise(backbone.map_width, hidden, dim), pointwise(dim, hidden, dim)]
            self.instance_heads.extend(heads)
        self.momentum_encoder = MomentumEncoder(*self._followed())

    def _followed(self) -> list[nn.Module]:
        return [self.backbone, self.projector, *self.instance_heads[:1]]

    def forward(self, batch: Batch) -> Output:
        """The loss of two views, both directions."""
        seen = [self.backbone.map_and_features(view) for view in batch.views]
        maps = [cells for cells, _ in seen]  # 2 x (B, C, h, w)
        cells = [self.projector(m) for m in maps]  # 2 x (B, D, h, w)
        first, second = (propagated(c, self.transform(c), self.config.sharpness) for c in cells)

        with torch.no_grad():
            backbone, projector, *instance = self.momentum_encoder.copy
            key_maps = [cast(Backbone, backbone).feature_map(view) for view in batch.views]
            key, other = (projector(m) for m in key_maps)  # (B, D, h, w) each

        distance, (height, width) = self.config.distance, first.shape[2:]
        crops = batch.crops_in_shares if self.config.shares else batch.crops  # 2 x (B, 4)
        positive = positives(crops, batch.flips, height, width, distance)  # (B, S, S)
        loss = pixpro_loss(first, second, key, other, positive)
        if self.config.instance:
            own, predictor = self.instance_heads
            one, two = (predictor(own(m)).mean(dim=(2, 3)) for m in maps)  # (B, D) each
            with torch.no_grad():
                key, other = (instance[0](m).mean(dim=(2, 3)) for m in key_maps)
            loss = loss + self.config.instance * instance_loss(one, two, key, other)
        scalars = {"positive_pairs": positive.sum(dim=(1, 2)).float().mean()}
        return Output(loss, seen[0][1].detach(), scalars)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder, less and less; the paper's code does in the next forward."""
        momentum = optim.cosine(progress, self.config.momentum, 1.0)
        self.momentum_encoder.follow(*self._followed(), momentum=momentum)
