"""Barlow Twins: two views agree in each dimension, and no two dimensions say the same.

Zbontar et al. 2021, https://arxiv.org/abs/2103.03230, equations 1 and 2, Algorithm 1.

The cross-correlation of the two views' embeddings over the batch is pulled towards the identity:
ones on its diagonal make embeddings invariant, zeros beside it keep them from collapsing.

Shapes: B images per rank, W ranks, C backbone features, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firstsight import distributed, metrics
from firstsight.backbones import Backbone, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import require_positive
from firstsight.methods.base import Method, Output
from firstsight.nets import full, uncast
from firstsight.nets.projectors import mlp
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # the authors' code; their batch is 2048, the rate is per 256 images
    views="byol",
    epochs=1000,
    batch_size=256,
    base_lr=0.2,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    excluded_lr=0.024,  # .0048 beside .2
    undecayed=("norm", "bias", "vector"),
    lr_end=0.001,
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of Barlow Twins."""

    dim: int = 8192
    """D, size of the embedding whose dimensions are told apart."""
    hidden: int = 8192
    """Width of the projector's two hidden layers."""
    redundancy: float = 0.0051
    """Lambda, weight of the correlations between different dimensions."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "redundancy")


def barlow_loss(first: Tensor, second: Tensor, redundancy: float = 0.0051) -> Tensor:
    """Scalar distance of the cross-correlation from the identity; 0 is best.

    first, second (B, D): row i of both comes from image i. Over ranks the correlation is that of
    the whole batch, and so is the gradient (Zbontar et al. 2021, equation 1). differs from the
    paper: the authors' code sums over ranks out of autograd's sight, so it has 1/W of the gradient.
    """
    with uncast(first):
        correlation = cross_correlation(full(first), full(second))  # (D, D)
        agreement = (correlation.diagonal() - 1).square().sum()
        squares = correlation.square()
        return agreement + redundancy * (squares.sum() - squares.diagonal().sum())


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """(D, D) over the batch of all ranks: row d is dimension d of `first`, columns of `second`."""
    images = len(first) * distributed.world()

    def standardised(rows: Tensor) -> Tensor:  # a batch-norm without scale and offset
        centred = rows - distributed.summed(rows.sum(dim=0)) / images  # (B, D)
        variance = distributed.summed(centred.square().sum(dim=0)) / images  # (D,)
        return centred * (variance + 1e-5).rsqrt()

    return distributed.summed(standardised(first).T @ standardised(second)) / images


class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021).

    Biases and norms have a learning rate of their own, 0.0048 per 256 images beside 0.2. On W
    devices the authors' code gives them 1/W of that (`barlow_loss`): --excluded-lr 0.024 / W.
    """

    couples = "correlations"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        if config.zero_init:
            zero_residuals(self.backbone)
        widths = (backbone.width, config.hidden, config.hidden, config.dim)
        self.projector = mlp(*widths, hidden_bias=False)

    def forward(self, batch: Batch) -> Output:
        """The loss of two views; each goes through the networks as a batch of its own."""
        features = [self.backbone(view) for view in batch.views]  # 2 x (B, C)
        first, second = (self.projector(f) for f in features)  # (B, D) each
        loss = barlow_loss(first, second, self.config.redundancy)
        spread = metrics.spread(full(torch.cat([first, second]).detach()))
        return Output(loss, features[0].detach(), {"embedding_spread": spread})
