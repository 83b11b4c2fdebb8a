"""MoCo v1: tell the other view of an image from a queue of views of other images.

He et al. 2020, https://arxiv.org/abs/1911.05722, Algorithm 1.

A query must pick the key of its own image out of K keys of other images. Keys come from a slow
average of the query encoder, so keys from many steps ago are still comparable with today's.

Shapes: B images per rank, W ranks, C backbone features, D embedding, K queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, Queue, full, uncast
from firstsight.nets.norms import among_others, split_batch_norm
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # He et al., section 4, and the authors' code: drops at 120 and 160 of 200
    views="mocov1",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    schedule="step",
    lr_every="epoch",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of MoCo v1."""

    dim: int = 128
    """D, size of the embedding that is compared."""
    queue_size: int = 65_536
    """K, number of past keys used as negatives; any length."""
    momentum: float = 0.999
    """Share of the momentum encoder that survives each optimiser step, 0 to 1."""
    temperature: float = 0.07
    """Divides cosine similarities; smaller is sharper."""
    symmetric: bool = False
    """Each view is query and key in turn, and the two losses are summed; not in the paper."""
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
        own = torch.einsum("bd,bd->b", queries, keys) / temperature  # (B,)
        others = queries @ negatives.T / temperature  # (B, K)
        every = torch.cat([own[:, None], others], dim=1)  # (B, 1 + K)
        return (every.logsumexp(dim=1) - own).mean()


class MoCoV1(Method):
    """MoCo v1 (He et al. 2020)."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projector = nn.Linear(backbone.width, config.dim)
        if config.splits > 1:
            split_batch_norm(self.backbone, config.splits)
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)
        self.queue = Queue(config.queue_size, config.dim)

    def forward(self, batch: Batch) -> Output:
        """The loss of two views; with `symmetric`, the sum of both directions."""
        first, second = batch.views  # (B, 3, H, W) each
        directions = [(first, second)]  # of query and key
        if self.config.symmetric:
            directions.append((second, first))
        negatives = self.queue.read()  # (K, D), old keys for both directions

        features = [self.backbone(query) for query, _ in directions]  # (B, C)
        queries = [F.normalize(self.projector(f), dim=1) for f in features]  # (B, D)
        keys = [self.encode_keys(key) for _, key in directions]  # (B, D), without gradient
        losses = [
            info_nce(q, k, negatives, self.config.temperature)
            for q, k in zip(queries, keys, strict=True)
        ]
        for k in reversed(keys):  # keys of view 1, then of view 2
            self.queue.push(distributed.gather(k))  # after the read: no key is its own negative
        loss = torch.stack(losses).sum()
        similarity = (queries[0].detach() * keys[0]).sum(dim=1).mean()
        return Output(loss, features[0].detach(), {"positive_similarity": similarity})

    def encode_keys(self, view: Tensor) -> Tensor:
        """Unit keys (B, D), each encoded among images that its query was not encoded with."""
        return F.normalize(among_others(self.momentum_encoder, view, self.config.splits), dim=1)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder.

        The paper's code moves it at the start of the next forward: the same sequence, since
        nothing happens in between and the copies start equal.
        """
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=self.config.momentum)
