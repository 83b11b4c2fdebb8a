"""BYOL: predict, from one view, what a slow copy of the network makes of the other view.

Grill et al. 2020, https://arxiv.org/abs/2006.07733, section 3.1 and Algorithm 1.

There are no negatives: what keeps embeddings apart is that only the online side has a predictor and
a gradient, while the side that it predicts is a moving average that never sees the loss.

Shapes: B images per rank, C backbone features, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstsight import metrics, optim
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, full
from firstsight.nets.projectors import mlp
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Grill et al., section 3.2; their batch is 4096, the rate is per 256 images
    views="byol",
    epochs=1000,
    batch_size=256,
    base_lr=0.2,
    weight_decay=1.5e-6,
    warmup_epochs=10,
    optimizer="lars",
    lars="byol",
    undecayed=("norm", "bias"),
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of BYOL."""

    dim: int = 256
    """D, size of the embedding that is predicted."""
    hidden: int = 4096
    """Width of the hidden layer of projector and predictor."""
    momentum: float = 0.996
    """Share of the momentum encoder that survives the first step; rises to 1 over the run."""
    start: Literal["copied", "independent"] = "copied"
    """The momentum encoder at first: a copy of the online network, or other weights of its kind."""
    views_together: bool = False
    """Both views go through the networks as one batch, with common batch-norm statistics."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden")
        require_share("--method.", self, "momentum")


def byol_loss(
    first_predicted: Tensor, second_predicted: Tensor, first: Tensor, second: Tensor
) -> Tensor:
    """Scalar sum of both directions of the squared distance of unit vectors; 0 is best, 8 worst.

    All (B, D), row i from image i: predictions from the two views, and what they are to predict,
    crosswise: `second` from the first view, `first` from the second. Normalised inside; no gradient
    flows into what is predicted (Grill et al. 2020, equation 2 and its mirror image).
    """
    one = F.cosine_similarity(full(first_predicted), full(second.detach()), dim=1)  # (B,)
    other = F.cosine_similarity(full(second_predicted), full(first.detach()), dim=1)  # (B,)
    return (4 - 2 * one - 2 * other).mean()


class BYOL(Method):
    """BYOL (Grill et al. 2020)."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projector = mlp(backbone.width, config.hidden, config.dim)
        self.predictor = mlp(config.dim, config.hidden, config.dim)
        # differs from the paper's code, which draws other weights and saw no difference: a moving
        # average starts at what it averages, and a backbone that was given is then kept in both
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)
        if config.start == "independent":
            self.momentum_encoder.redraw()

    def forward(self, batch: Batch) -> Output:
        """The loss of two views, both directions."""
        views = (torch.cat(batch.views),) if self.config.views_together else batch.views
        features = [self.backbone(view) for view in views]  # (B, C) each, or once (2B, C)
        predicted = torch.cat([self.predictor(self.projector(f)) for f in features])  # (2B, D)
        targets = torch.cat([self.momentum_encoder(view) for view in views])  # (2B, D)
        loss = byol_loss(*predicted.chunk(2), *targets.chunk(2))
        spread = metrics.spread(full(targets))
        return Output(loss, features[0].detach()[: len(batch)], {"embedding_spread": spread})

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder, after the optimiser: less and less as the run goes on."""
        momentum = optim.cosine(progress, self.config.momentum, 1.0)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=momentum)
