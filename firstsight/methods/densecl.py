"""DenseCL: tell each place of a view from other images, as MoCo v2 tells the whole view.

Wang et al. 2021, https://arxiv.org/abs/2011.09157, equations 1 to 3.

One embedding for an image may forget where things are. Here every cell of the map has one too, and
its positive is the cell of the other view that the backbone finds most alike: no geometry is asked.

Shapes: B images per rank, W ranks, C channels of the map, S cells of it, D embedding, K queue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import UserError, require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, Queue, full, uncast
from firstsight.nets.norms import among_others, split_batch_norm
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Wang et al., section 4.1: ImageNet
    views="mocov2",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    lr_every="epoch",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DenseCL."""

    dim: int = 128
    """D, size of the embeddings that are compared, of images and of cells."""
    hidden: int = 2048
    """Width of the hidden layers of both projectors."""
    queue_size: int = 65_536
    """K, number of past keys used as negatives, of images and of means over cells."""
    momentum: float = 0.999
    """Share of the momentum encoder that survives each optimiser step, 0 to 1."""
    temperature: float = 0.2
    """Divides cosine similarities; smaller is sharper."""
    weight: float = 0.5
    """Share of the dense loss in the sum, 0 to 1; the rest is that of MoCo v2."""
    start: float = 0.0
    """Share of the run before the dense loss counts; in the paper's code, not in its settings."""
    grid: int = 0
    """Cells a side to which maps are pooled before cells are compared; 0: as they are."""
    splits: int = 1
    """Parts of each rank's batch with batch-norm statistics of their own; 8 emulates 8 devices."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "queue_size", "temperature", "splits")
        require_share("--method.", self, "momentum", "weight", "start")
        if self.grid < 0:
            raise UserError(f"--method.grid must be 0 or more, not {self.grid}")


def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Scalar mean cross-entropy of picking each query's key among the negatives; 0 is best.

    queries, keys (B, D) and negatives (K, D) are unit vectors (equation 1).
    """
    with uncast(queries):
        queries, keys, negatives = full(queries), full(keys), full(negatives)
        positive = (queries * keys).sum(dim=1, keepdim=True)  # (B, 1)
        logits = torch.cat([positive, queries @ negatives.T], dim=1) / temperature  # (B, 1 + K)
        answer = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        return F.cross_entropy(logits, answer)  # the positive is column 0


@torch.no_grad()
def matches(query_cells: Tensor, key_cells: Tensor) -> Tensor:
    """(B, S) for each cell of one map (B, C, S), the most similar cell of the other, by cosine.

    Of equally similar ones the first (section 3.3, equation 3).
    """
    with uncast(query_cells):
        queries, keys = F.normalize(full(query_cells), dim=1), F.normalize(full(key_cells), dim=1)
        return (queries.transpose(1, 2) @ keys).argmax(dim=2)


def dense_info_nce(
    queries: Tensor, keys: Tensor, match: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """Scalar: `info_nce` of all cells, each with the key cell that it is matched to; 0 is best.

    queries, keys (B, D, S) are unit vectors along D, match (B, S) as from `matches`, negatives
    (K, D) unit vectors (equation 2).
    """
    keys = keys.gather(2, match[:, None].expand_as(keys))  # (B, D, S)
    every, its_key = (x.transpose(1, 2).flatten(0, 1) for x in (queries, keys))  # (B * S, D) each
    return info_nce(every, its_key, negatives, temperature)


class Projectors(nn.Module):
    """Two layers for the pooled features, and two of their own for every cell."""

    def __init__(self, config: Config, width: int, map_width: int) -> None:
        super().__init__()
        first, last = nn.Linear(width, config.hidden), nn.Linear(config.hidden, config.dim)
        for layer in (first, last):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        self.whole = nn.Sequential(first, nn.ReLU(inplace=True), last)
        early, late = (
            nn.Conv2d(map_width, config.hidden, 1),
            nn.Conv2d(config.hidden, config.dim, 1),
        )
        self.dense = nn.Sequential(early, nn.ReLU(inplace=True), late)

    def forward(self, features: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """(B, D) and (B, D, S), not normalised, from (B, C) and a map (B, C, h, w)."""
        return self.whole(features), self.dense(cells).flatten(2)


class DenseCL(Method):
    """DenseCL (Wang et al. 2021)."""

    share: Tensor
    """Of the dense loss, in the step to come."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projectors = Projectors(config, backbone.width, backbone.map_width)
        if config.splits > 1:
            split_batch_norm(self.backbone, config.splits)
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projectors)
        self.queue = Queue(config.queue_size, config.dim)
        self.dense_queue = Queue(config.queue_size, config.dim)
        self.register_buffer("share", torch.tensor(0.0 if config.start else config.weight))

    def forward(self, batch: Batch) -> Output:
        """The loss of two views, one direction, of images and of cells."""
        first, second = batch.views  # (B, 3, H, W) each
        config, negatives = self.config, self.queue.read()  # (K, D)
        dense_negatives = self.dense_queue.read()  # (K, D)

        features, cells, whole, dense = self.encode(self.backbone, self.projectors, first)
        key_cells, key, dense_key = self.encode_keys(second, cells.shape)
        mean_key = F.normalize(dense_key.mean(dim=2), dim=1)  # (B, D), of cells not yet normalised
        whole, key, dense, dense_key = (
            F.normalize(t, dim=1) for t in (whole, key, dense, dense_key)
        )

        loss = info_nce(whole, key, negatives, config.temperature)
        match = matches(cells, key_cells)  # (B, S)
        dense_loss = dense_info_nce(dense, dense_key, match, dense_negatives, config.temperature)
        self.queue.push(distributed.gather(key))  # after the read: no key is its own negative
        self.dense_queue.push(distributed.gather(mean_key))
        scalars = {"image_loss": loss.detach(), "dense_loss": dense_loss.detach()}
        return Output((1 - self.share) * loss + self.share * dense_loss, features.detach(), scalars)

    def encode(
        self, backbone: Backbone, projectors: nn.Module, images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features (B, C), cells (B, C, S), embedding (B, D) and dense embedding (B, D, S)."""
        cells, features = backbone.map_and_features(images)
        if self.config.grid:
            cells = F.adaptive_avg_pool2d(cells, self.config.grid)
        whole, dense = projectors(features, cells)
        return features, cells.flatten(2), whole, dense

    @torch.no_grad()
    def encode_keys(self, view: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Cells (B, C, S), embedding (B, D) and dense embedding (B, D, S) of the momentum encoder.

        Each image is encoded in other company than its query was; `shape` is that of the cells.
        """
        backbone, projectors = self.momentum_encoder.copy

        def flat(images: Tensor) -> Tensor:  # a row for each image: dealt out and back at once
            parts = self.encode(cast(Backbone, backbone), projectors, images)[1:]
            return torch.cat([full(part).flatten(1) for part in parts], dim=1)

        (_, channels, count), dim = shape, self.config.dim
        rows = among_others(flat, view, self.config.splits)
        cells, key, dense = torch.split(rows, [channels * count, dim, dim * count], dim=1)
        return cells.reshape(-1, channels, count), key, dense.reshape(-1, dim, count)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the momentum encoder, and let the dense loss count from its start."""
        momentum = self.config.momentum
        self.momentum_encoder.follow(self.backbone, self.projectors, momentum=momentum)
        self.share.fill_(self.config.weight if progress >= self.config.start else 0.0)
