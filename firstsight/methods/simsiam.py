"""SimSiam: predict one view's embedding from the other's, with a stop of the gradient and no more.

Chen and He 2021, https://arxiv.org/abs/2011.10566, Algorithm 1.

There is one network and no momentum: each embedding is predicted as if it were a constant. Without
that stop, or without the predictor, all embeddings collapse to one point (section 4).

Shapes: B images per rank, C backbone features, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import metrics
from firstsight.backbones import Backbone, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import require_positive
from firstsight.methods.base import Method, Output
from firstsight.nets import full
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Chen and He, section 3; their batch is 512, the rate is per 256 images
    views="mocov2",
    epochs=100,
    batch_size=256,
    base_lr=0.05,
    weight_decay=1e-4,
    lr_every="epoch",
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SimSiam."""

    dim: int = 2048
    """D, size of the embedding that is predicted."""
    hidden: int = 512
    """Width of the predictor's hidden layer: a bottleneck."""
    steady_predictor: bool = False
    """The learning rate of the predictor stays at its peak, as in the published run."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden")


def simsiam_loss(
    first_predicted: Tensor, second_predicted: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Scalar mean of both directions of the negative cosine; -1 is best, 1 worst.

    All (B, D), row i from image i: predictions from the two views, and the embeddings they are to
    predict, crosswise: `second` from the first view, `first` from the second. Normalised inside; no
    gradient flows into what is predicted (Chen and He 2021, equation 4).
    """
    one = F.cosine_similarity(full(first_predicted), full(second.detach()), dim=1)  # (B,)
    other = F.cosine_similarity(full(second_predicted), full(first.detach()), dim=1)  # (B,)
    return -(one + other).mean() / 2


class SimSiam(Method):
    """SimSiam (Chen and He 2021).

    The predictor's learning rate falls with that of the rest, which is the baseline of its Table 1;
    with `steady_predictor` it stays, as in the authors' published run.
    """

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.steady = ("predictor",) * config.steady_predictor
        if config.zero_init:
            zero_residuals(self.backbone)
        width = backbone.width
        self.projector = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width, bias=False),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, config.dim),
            nn.BatchNorm1d(config.dim, affine=False),
        )
        # as in the authors' code: the norm that follows takes this bias out again
        self.projector.get_parameter("6.bias").requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(config.dim, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )

    def forward(self, batch: Batch) -> Output:
        """The loss of two views; each goes through the networks as a batch of its own."""
        features = [self.backbone(view) for view in batch.views]  # 2 x (B, C)
        embeddings = [self.projector(f) for f in features]  # 2 x (B, D)
        predicted = [self.predictor(embedding) for embedding in embeddings]  # 2 x (B, D)
        loss = simsiam_loss(*predicted, *embeddings)
        spread = metrics.spread(full(torch.cat(embeddings).detach()))
        return Output(loss, features[0].detach(), {"embedding_spread": spread})
