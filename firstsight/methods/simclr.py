"""SimCLR: two views of an image find each other among the views of all other images of the batch.

Chen et al. 2020, https://arxiv.org/abs/2002.05709, Algorithm 1.

Negatives are the batch itself, so there is no second encoder and no memory; large batches and
strong colour jitter do the work. Every embedding is query, positive and negative at once, so the
gradient flows through the gather over ranks.

Shapes: B images per rank, W ranks, C backbone features, D embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed
from firstsight.backbones import Backbone, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import require_positive
from firstsight.methods.base import Method, Output
from firstsight.nets import full, uncast
from firstsight.nets.projectors import two_layers
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Chen et al., section 2.2; their batch is 4096, the rate is per 256 images
    views="simclr",
    epochs=100,
    batch_size=256,
    base_lr=0.3,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    lars="simclr",
    undecayed=("norm", "bias"),
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SimCLR."""

    dim: int = 128
    """D, size of the embedding that is compared."""
    hidden: int = 2048
    """Width of the projector's hidden layer."""
    projector: Literal["normed", "mlp"] = "normed"
    """Two layers with batch-norm behind each; or, as in PIC's code, with none."""
    temperature: float = 0.1
    """Divides cosine similarities; smaller is sharper."""
    key_gradient: bool = True
    """The gradient also reaches what an embedding is compared with; in PIC's SimCLR it does not."""
    zero_init: bool = False
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "temperature")


def nt_xent(first: Tensor, second: Tensor, temperature: float, key_gradient: bool = True) -> Tensor:
    """Scalar NT-Xent, the mean over the 2B embeddings of two views; 0 is best.

    first, second (B, D): row i of both comes from image i; they are normalised inside. Over ranks
    each embedding of this rank is compared with those of all ranks (Chen et al. 2020, equation 1).
    Without `key_gradient` these are constants, as in PIC's code: half of the gradient is missing.
    """
    with uncast(first):
        first, second = F.normalize(full(first), dim=1), F.normalize(full(second), dim=1)
        every = torch.cat([distributed.gather(first), distributed.gather(second)])  # (2WB, D)
        every = every if key_gradient else every.detach()
        own = distributed.rank() * len(first) + torch.arange(len(first), device=first.device)
        other = own + len(every) // 2
        logits = torch.cat([first, second]) @ every.T / temperature  # (2B, 2WB)
        rows = torch.arange(len(logits), device=first.device)
        logits = logits.index_put((rows, torch.cat([own, other])), logits.new_tensor(-torch.inf))
        return F.cross_entropy(logits, torch.cat([other, own]))  # nothing is its own negative


class SimCLR(Method):
    """SimCLR (Chen et al. 2020)."""

    couples = "negatives"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        if config.zero_init:
            zero_residuals(self.backbone)
        if config.projector == "mlp":
            self.projector = two_layers(backbone.width, config.hidden, config.dim)
        else:  # as in the authors' code: batch-norm on both layers, which makes biases idle
            self.projector = nn.Sequential(
                nn.Linear(backbone.width, config.hidden, bias=False),
                nn.BatchNorm1d(config.hidden),
                nn.ReLU(inplace=True),
                nn.Linear(config.hidden, config.dim, bias=False),
                nn.BatchNorm1d(config.dim),
            )
            # the authors' last norm has a scale and no offset
            self.projector.get_parameter("4.bias").requires_grad_(False)

    def forward(self, batch: Batch) -> Output:
        """The NT-Xent loss of two views, encoded in one pass as one batch of 2B images."""
        views = torch.cat(batch.views)  # (2B, 3, H, W)
        features = self.backbone(views)  # (2B, C)
        first, second = self.projector(features).chunk(2)  # (B, D) each
        loss = nt_xent(first, second, self.config.temperature, self.config.key_gradient)
        similarity = F.cosine_similarity(first.detach().float(), second.detach().float()).mean()
        return Output(loss, features.detach()[: len(batch)], {"positive_similarity": similarity})
