"""SwAV: tell from one view of an image to which prototypes another view was assigned.

Caron et al. 2020, https://arxiv.org/abs/2006.09882, equations 1 to 3 and Algorithm 1.

No images are compared: each view is compared with learned prototypes. Codes that spread a batch
evenly over all prototypes keep every image from taking the same one. Small crops make views cheap.

Shapes: B images per rank, W ranks, V views, C backbone features, D embedding, K prototypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed, metrics
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import UserError, require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import Queue, full, uncast
from firstsight.nets.multicrop import encoded
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Caron et al., appendix A; their batch is 4096, the rate is per 256 images
    views="swav",
    epochs=200,
    batch_size=256,
    base_lr=0.3,
    weight_decay=1e-6,
    warmup_epochs=10,
    optimizer="lars",
    lars="larc",
    lr_start=0.0625,
    lr_end=0.001,
    lr_at="linspace",
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SwAV."""

    dim: int = 128
    """D, size of the embedding."""
    hidden: int = 2048
    """Width of the projector's hidden layer."""
    prototypes: int = 3000
    """K, number of prototypes; may exceed the images of a batch."""
    temperature: float = 0.1
    """Divides the scores of what is predicted; smaller is sharper."""
    epsilon: float = 0.05
    """Divides the scores of codes; larger is more even, 0.03 helps against collapse."""
    iterations: int = 3
    """Rounds of Sinkhorn and Knopp in which codes become even."""
    freeze: float = 0.005
    """Share of the run in which prototypes stay as drawn; the papers' is one epoch."""
    queue_size: int = 0
    """Past embeddings of each assigned view that help to spread codes; 3840 for batches of 256."""
    queue_start: float = 0.0
    """Share of the run after which the queue begins to fill; it is used once it is full."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "prototypes", "temperature")
        require_positive("--method.", self, "epsilon", "iterations")
        require_share("--method.", self, "freeze", "queue_start")
        if self.queue_size < 0:
            raise UserError(f"--method.queue-size must be 0 or more, not {self.queue_size}")


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """(B, K) codes, rows that sum to 1, from scores (B, K): prototypes get about equal shares.

    Section 3.1, the algorithm of Cuturi 2013, in logarithms: each sum is taken less its maximum, so
    that no epsilon overflows (the published exponentials do, in float16 at the published epsilon).
    """
    with uncast(scores):
        logits = full(scores) / epsilon
        for _ in range(iterations):
            logits = logits - logits.logsumexp(dim=0, keepdim=True)  # prototypes get equal shares
            logits = logits - logits.logsumexp(dim=1, keepdim=True)  # last: an image is whole
        return logits.exp()


def swav_loss(scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float) -> Tensor:
    """Scalar mean cross-entropy between codes of one view and scores of every other; 0 is best.

    scores: (B, K) of each view. codes: (B, K) of each of the first few, from `sinkhorn`; no
    gradient flows into them (equations 1 and 2, over all pairs as in section 3.3).
    """
    guesses = [F.log_softmax(full(score) / temperature, dim=1) for score in scores]
    terms = [
        -(code.detach() * guess).sum(dim=1).mean()
        for i, code in enumerate(codes)
        for v, guess in enumerate(guesses)
        if v != i
    ]
    return torch.stack(terms).mean()


class SwAV(Method):
    """SwAV (Caron et al. 2020).

    Codes come from the first two views. Over several ranks they are those of the whole batch, and
    each rank holds the whole queue: the published code gives each rank a part of both.
    """

    views = "any"
    global_views = 2
    couples = "codes"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projector = nn.Sequential(
            nn.Linear(backbone.width, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, config.dim),
        )
        self.prototypes = nn.Linear(config.dim, config.prototypes, bias=False)
        lengths = [config.queue_size] * self.global_views if config.queue_size else []
        self.queues = nn.ModuleList(Queue(length, config.dim) for length in lengths)
        self._empty_queues()

    def forward(self, batch: Batch) -> Output:
        """The loss of two or more global views and any number of local ones."""
        with torch.no_grad():
            self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        features = encoded(self.backbone, batch.views)  # (VB, C)
        projected = self.projector(features)  # (VB, D), all views under common statistics
        with uncast(projected):
            embeddings = F.normalize(full(projected), dim=1)
            scores = self.prototypes(embeddings).chunk(len(batch.views))  # V x (B, K)
            seen = embeddings.detach().chunk(len(batch.views))[: self.global_views]
            codes = [self.codes(rows, number) for number, rows in enumerate(seen)]  # 2 x (B, K)
            loss = swav_loss(scores, codes, self.config.temperature)
        spread = metrics.spread(torch.cat(seen))
        return Output(loss, features.detach()[: len(batch)], {"embedding_spread": spread})

    @torch.no_grad()
    def codes(self, embeddings: Tensor, number: int) -> Tensor:
        """Codes (B, K) of one view's embeddings (B, D), spread with the queue of that view."""
        everyone = rows = distributed.gather(embeddings)  # (WB, D)
        if self.queues:
            queue = cast(Queue, self.queues[number])
            past = queue.read()
            if past[-1].any():  # the last place is filled: all are
                rows = torch.cat([past, everyone])
            queue.push(everyone)  # after the read: no image counts twice
        scores = rows @ self.prototypes.weight.T
        codes = sinkhorn(scores, self.config.epsilon, self.config.iterations)[-len(everyone) :]
        return codes.chunk(distributed.world())[distributed.rank()]

    def before_step(self, progress: float) -> None:
        """Hold prototypes still at the start of the run: without gradient nothing moves them."""
        if progress < self.config.freeze:
            self.prototypes.weight.grad = None

    def after_step(self, progress: float, lr: float) -> None:
        """Forget what was pushed before the queue's start."""
        if progress < self.config.queue_start:
            self._empty_queues()

    @torch.no_grad()
    def _empty_queues(self) -> None:
        for buffer in self.queues.buffers():
            buffer.zero_()
