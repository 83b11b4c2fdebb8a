"""MoCo v3: tell the other view of an image from other views of the same large batch.

Chen et al. 2021, https://arxiv.org/abs/2104.02057, section 3 and Algorithm 1.

The queue of MoCo is gone: keys are those of the batch, over all ranks, from a slow average of the
network. A predictor on the query side and both directions make up for it. In transformers the
projection of patches stays random: its gradients are what makes them unstable.

Shapes: B images per rank, W ranks, C backbone features, D embedding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed, optim
from firstsight.backbones import Backbone, fix_positions, freeze_patches, zero_residuals
from firstsight.batch import Batch
from firstsight.errors import require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, full, uncast
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # ResNet-50 of the authors' code, 100 epochs; their batch is 4096
    views="byol",
    epochs=100,
    batch_size=256,
    base_lr=0.6,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    lars="barlow",
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MoCo v3."""

    dim: int = 256
    """D, size of the embedding that is compared."""
    hidden: int = 4096
    """Width of the hidden layers of projector and predictor."""
    momentum: float = 0.99
    """Share of the momentum encoder that survives the first step; rises to 1 over the run."""
    temperature: float = 1.0
    """Divides cosine similarities; 0.2 for transformers."""
    projector_layers: Literal[2, 3] = 2
    """Layers of the projector: 2 for ResNets, 3 for transformers."""
    predictor_norm: bool = False
    """Batch-norm behind the predictor's last layer, as the code has it for transformers."""
    freeze_patches: bool = False
    """The projection of patches stays random; for transformers of timm."""
    fixed_positions: bool = False
    """Positions are fixed waves, not learned; for transformers of timm."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "temperature")
        require_share("--method.", self, "momentum")


def mocov3_loss(
    first_predicted: Tensor,
    second_predicted: Tensor,
    first: Tensor,
    second: Tensor,
    temperature: float,
) -> Tensor:
    """Scalar sum of both directions of the cross-entropy of picking an image's key; 0 is best.

    All (B, D), row i from image i: predictions from the two views, and keys of the two views,
    crosswise: `second` for the first view, `first` for the second. Normalised inside; keys are
    those of all ranks, and no gradient flows into them. Each direction is multiplied by twice the
    temperature (Chen et al. 2021, equation 1 and Algorithm 1).
    """
    one = _picked(first_predicted, second, temperature)
    other = _picked(second_predicted, first, temperature)
    return 2 * temperature * (one + other)


def _picked(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    with uncast(queries):
        queries = F.normalize(full(queries), dim=1)
        keys = distributed.gather(F.normalize(full(keys.detach()), dim=1))  # (WB, D)
        logits = queries @ keys.T / temperature  # (B, WB)
        own = torch.arange(len(queries), device=queries.device)
        return F.cross_entropy(logits, own + distributed.rank() * len(queries))


def layers(*widths: int, last_norm: bool) -> nn.Sequential:
    """Linear layers without bias, batch-norm and ReLU between them, batch-norm behind the last."""
    built: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        if built:
            built += [nn.BatchNorm1d(before), nn.ReLU(inplace=True)]
        built.append(nn.Linear(before, after, bias=False))
    return nn.Sequential(*built, *[nn.BatchNorm1d(widths[-1], affine=False)] * last_norm)


class MoCoV3(Method):
    """MoCo v3 (Chen et al. 2021)."""

    couples = "negatives"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        if config.zero_init:
            zero_residuals(self.backbone)
        if config.freeze_patches:
            freeze_patches(self.backbone)
        if config.fixed_positions:
            fix_positions(self.backbone)
        hidden = [config.hidden] * (config.projector_layers - 1)
        self.projector = layers(backbone.width, *hidden, config.dim, last_norm=True)
        self.predictor = layers(
            config.dim, config.hidden, config.dim, last_norm=config.predictor_norm
        )
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)

    def forward(self, batch: Batch) -> Output:
        """The loss of two views, both directions; each view is a batch of its own."""
        features = [self.backbone(view) for view in batch.views]  # 2 x (B, C)
        first, second = [self.predictor(self.projector(f)) for f in features]  # (B, D) each
        key, other = [self.momentum_encoder(view) for view in batch.views]  # (B, D) each
        loss = mocov3_loss(first, second, key, other, self.config.temperature)
        similarity = F.cosine_similarity(full(first.detach()), full(other), dim=1)
        return Output(loss, features[0].detach(), {"positive_similarity": similarity.mean()})

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder: less and less as the run goes on.

        The paper's code moves it in the next forward, before the keys: the same sequence (its
        momentum is one step further on the cosine).
        """
        momentum = optim.cosine(progress, self.config.momentum, 1.0)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=momentum)
