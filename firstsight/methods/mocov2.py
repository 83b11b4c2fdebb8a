"""MoCo v2: tell the other view of an image from a queue of views of other images.

He et al. 2020, https://arxiv.org/abs/1911.05722, Algorithm 1.
Chen et al. 2020, https://arxiv.org/abs/2003.04297: the MLP projector, blur and cosine schedule.

A query must pick the key of its own image out of K keys of other images. Keys come from a slow
average of the query encoder, so keys from many steps ago are still comparable with today's.

Shapes: B images per rank, W ranks, C backbone features, D embedding, K queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from firstsight import distributed
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, Queue, full, uncast
from firstsight.nets.norms import among_others, split_batch_norm
from firstsight.nets.projectors import contrastive
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Chen et al., section 3, and the authors' code
    views="mocov2",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    lr_every="epoch",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MoCo v2."""

    dim: int = 128
    """D, size of the embedding that is compared."""
    queue_size: int = 65_536
    """K, number of past keys used as negatives; any length."""
    momentum: float = 0.999
    """Share of the momentum encoder that survives each optimiser step, 0 to 1."""
    temperature: float = 0.2
    """Divides cosine similarities; smaller is sharper."""
    symmetric: bool = False
    """Each view is query and key in turn, and the two losses are summed."""
    projector: Literal["mlp", "linear", "none", "simple", "deep", "dropout", "wide"] = "mlp"
    """Two layers, or one as in MoCo v1 and in the authors' CIFAR-10 demo; or ssl-small's: none (is
    linear), simple (is mlp), deep (three layers), dropout (half of mlp's), wide (twice mlp's)."""
    splits: int = 1
    """Parts of each rank's batch with batch-norm statistics of their own; 8 emulates 8 devices."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "queue_size", "temperature", "splits")
        require_share("--method.", self, "momentum")


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Scalar mean cross-entropy of picking each query's key among the negatives; 0 is best.

    queries, keys (B, D) and negatives (K, D) are unit vectors (He et al. 2020, equation 1).
    """
    with uncast(queries):
        queries, keys, negatives = full(queries), full(keys), full(negatives)
        positive = (queries * keys).sum(dim=1, keepdim=True)  # (B, 1)
        negative = queries @ negatives.T  # (B, K)
        logits = torch.cat([positive, negative], dim=1) / temperature  # (B, 1 + K)
        answer = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, answer)  # the positive is column 0


class MoCoV2(Method):
    """MoCo v2 (He et al. 2020; Chen et al. 2020)."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projector = contrastive(config.projector, backbone.width, config.dim)
        if config.splits > 1:
            split_batch_norm(self.backbone, config.splits)
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)
        self.queue = Queue(config.queue_size, config.dim)

    def forward(self, batch: Batch) -> Output:
        """The loss of two views; with `symmetric`, the sum of both directions."""
        first, second = batch.views  # (B, 3, H, W) each
        negatives = self.queue.read()  # (K, D)

        features = self.backbone(first)  # (B, C)
        queries = F.normalize(self.projector(features), dim=1)  # (B, D)
        keys = self.encode_keys(second)  # (B, D), without gradient
        loss = info_nce(queries, keys, negatives, self.config.temperature)

        if self.config.symmetric:  # both directions see the same old queue
            swapped = F.normalize(self.projector(self.backbone(second)), dim=1)
            swapped_keys = self.encode_keys(first)
            loss = loss + info_nce(swapped, swapped_keys, negatives, self.config.temperature)
            self.queue.push(distributed.gather(swapped_keys))  # keys of view 1, then of view 2

        self.queue.push(distributed.gather(keys))  # after the read: no key is its own negative
        similarity = (queries.detach() * keys).sum(dim=1).mean()
        return Output(loss, features.detach(), {"positive_similarity": similarity})

    def encode_keys(self, view: Tensor) -> Tensor:
        """Unit keys (B, D), each encoded among images that its query was not encoded with."""
        return F.normalize(among_others(self.momentum_encoder, view, self.config.splits), dim=1)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder; the paper's code does at the start of the next forward.

        The same sequence: nothing happens in between, and the copies start equal.
        """
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=self.config.momentum)
