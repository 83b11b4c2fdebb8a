"""VICReg: embeddings of two views are close, vary over images, and vary in each dimension apart.

Bardes et al. 2022, https://arxiv.org/abs/2105.04906, equations 1 to 6, Algorithm 1.

Each way to collapse has a term of its own against it: all images alike has no variance, dimensions
that repeat each other have covariance. No normalisation, negatives or second network is needed.

Shapes: B images per rank, W ranks, C backbone features, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from firstsight import distributed, metrics
from firstsight.backbones import Backbone, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import UserError, require_positive
from firstsight.methods.base import Method, Output
from firstsight.nets import full, uncast
from firstsight.nets.projectors import mlp
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Bardes et al., section 4; their batch is 2048, the rate is per 256 images
    views="byol",
    epochs=1000,
    batch_size=256,
    base_lr=0.2,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    undecayed=("norm", "bias", "vector"),
    lr_end=0.001,
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of VICReg."""

    dim: int = 8192
    """D, size of the embedding."""
    hidden: int = 8192
    """Width of the projector's two hidden layers."""
    invariance: float = 25.0
    """Weight of the squared distance of an image's two embeddings; 0 or more."""
    variance: float = 25.0
    """Weight of what is missing to a deviation of 1 in each dimension; 0 or more."""
    covariance: float = 1.0
    """Weight of the squared covariances of different dimensions; 0 or more."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden")
        for name in ("invariance", "variance", "covariance"):
            weight = getattr(self, name)
            if not weight >= 0:  # so that NaN is refused too
                raise UserError(f"--method.{name} must not be below 0, but is {weight}")


def vicreg_loss(
    first: Tensor,
    second: Tensor,
    invariance: float = 25.0,
    variance: float = 25.0,
    covariance: float = 1.0,
) -> Tensor:
    """Scalar weighted sum of the three terms; 0 is best.

    first, second (B, D): row i of both comes from image i. Variances and covariances are those of
    the batch of all ranks, with its gradient (Bardes et al. 2022, equation 6). differs from the
    paper: the variance terms of the two views are averaged, as in the authors' code, not summed.
    """
    with uncast(first):
        distance = F.mse_loss(full(first), full(second))  # its mean over ranks is the batch's
        every = [distributed.gather(full(rows)) for rows in (first, second)]  # 2 x (WB, D)
        missing = sum(missing_deviation(rows) for rows in every) / 2
        mutual = sum(mutual_covariance(rows) for rows in every)
        return invariance * distance + variance * missing + covariance * mutual


def missing_deviation(rows: Tensor) -> Tensor:
    """Scalar: how far the deviation of a dimension of (N, D) is below 1, mean over dimensions."""
    return F.relu(1 - (rows.var(dim=0) + 1e-4).sqrt()).mean()


def mutual_covariance(rows: Tensor) -> Tensor:
    """Scalar: squared covariances of different dimensions of (N, D), summed, over D."""
    squares = torch.cov(rows.T).square()  # (D, D)
    return (squares.sum() - squares.diagonal().sum()) / rows.shape[1]


class VICReg(Method):
    """VICReg (Bardes et al. 2022)."""

    couples = "variances and covariances"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        if config.zero_init:
            zero_residuals(self.backbone)
        self.projector = mlp(backbone.width, config.hidden, config.hidden, config.dim)

    def forward(self, batch: Batch) -> Output:
        """The loss of two views; each goes through the networks as a batch of its own."""
        c = self.config
        features = [self.backbone(view) for view in batch.views]  # 2 x (B, C)
        first, second = (self.projector(f) for f in features)  # (B, D) each
        loss = vicreg_loss(first, second, c.invariance, c.variance, c.covariance)
        spread = metrics.spread(full(torch.cat([first, second]).detach()))
        return Output(loss, features[0].detach(), {"embedding_spread": spread})
