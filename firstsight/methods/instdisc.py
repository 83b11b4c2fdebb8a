"""InstDisc: each image is to be told from all others by what a memory bank remembers of them.

Wu et al. 2018, https://arxiv.org/abs/1805.01978, equations 2 to 8.
Cao et al. 2020, https://arxiv.org/abs/2006.14618: a softmax over sampled images in place of NCE.

A class per image is too many for a classifier with weights. The bank needs none: a slow average of
each image's own embeddings stands for it, and some images drawn at random for all others.

Shapes: B images per rank, W ranks, C backbone features, D embedding, N images of the source, K
negatives.
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
from firstsight.errors import UserError, require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import full, uncast
from firstsight.nets.norms import split_batch_norm
from firstsight.nets.projectors import two_layers
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # PIC's code; warm-up from a hundredth, down to a rate of 1e-6
    views="instdisc",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    warmup_epochs=5,
    lr_start=0.01,
    lr_end=3.3333e-5,
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of InstDisc."""

    dim: int = 128
    """D, size of the embedding that is compared."""
    hidden: int = 2048
    """Width of the projector's hidden layer."""
    projector: Literal["mlp", "linear"] = "mlp"
    """Two layers as in PIC's code, or one as in the paper."""
    loss: Literal["softmax", "nce"] = "softmax"
    """Cross-entropy over the sampled images, or the paper's noise-contrastive estimation."""
    negatives: int = 65_536
    """K, images drawn at each step to stand for all others; the paper has 4096."""
    draws: Literal["batch", "image"] = "batch"
    """K for the whole batch; or, as in the published codes, K for each image: B K D numbers."""
    temperature: float = 0.07
    """Divides cosine similarities; smaller is sharper."""
    momentum: float = 0.5
    """Share of an image's row in the bank that survives a visit, 0 to 1."""
    bank: Literal["shared", "published"] = "shared"
    """One bank on all ranks, unit rows at first; or, as PIC's code has it, one for each rank that
    hears of its own images alone, with unit columns at first. Of these rank 0's is saved."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""
    splits: int = 1
    """Parts of each rank's batch with batch-norm statistics of their own; 4 emulates 4 devices."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "negatives", "temperature", "splits")
        require_share("--method.", self, "momentum")


def instance_softmax(
    embeddings: Tensor, own: Tensor, negatives: Tensor, temperature: float
) -> Tensor:
    """Scalar mean cross-entropy of picking each image's row among the negatives; 0 is best.

    embeddings and own (B, D) and negatives (K, D) or (B, K, D): unit vectors, and rows of the bank.
    """
    logits = scores(embeddings, own, negatives, temperature)  # (B, 1 + K)
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def instance_nce(
    embeddings: Tensor,
    own: Tensor,
    negatives: Tensor,
    temperature: float,
    normaliser: Tensor,
    images: int,
) -> Tensor:
    """Scalar mean of how badly an image's row is told from K rows of noise; 0 is best.

    As `instance_softmax`, with the normaliser Z of P(i | v) = exp(v . f / temperature) / Z and the
    N images that noise is drawn from (Wu et al. 2018, equation 7, its mean over K times K).
    """
    probabilities = scores(embeddings, own, negatives, temperature).exp() / normaliser  # (B, 1 + K)
    noise = negatives.shape[-2] / images  # K / N
    data = probabilities / (probabilities + noise + 1e-7)  # that a row is the image's own
    rest = noise / (probabilities + noise + 1e-7)
    return -(data[:, 0].log() + rest[:, 1:].log().sum(dim=1)).mean()


def scores(embeddings: Tensor, own: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """(B, 1 + K) similarities over the temperature in full precision, the own row's first."""
    with uncast(embeddings):
        embeddings = full(embeddings)
        positive = (embeddings * own).sum(dim=1, keepdim=True)  # (B, 1)
        if negatives.ndim == 2:
            others = embeddings @ negatives.T  # (B, K)
        else:
            others = (negatives @ embeddings[:, :, None]).squeeze(2)  # (B, K)
        return torch.cat([positive, others], dim=1) / temperature


class InstDisc(Method):
    """Instance discrimination (Wu et al. 2018; Cao et al. 2020).

    differs from the paper: no proximal term, which neither published code has. differs from the
    published codes: one draw of K images serves the whole batch, theirs draw K for each image
    (`draws`).
    """

    views = "any"
    rows: Tensor
    """(N, D), the bank."""
    drawn: Tensor
    """(K,) negatives of the next batch, drawn ahead: all chunks of it meet the same."""
    normaliser: Tensor
    """Z of NCE; 0: not known yet."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        if config.zero_init:
            zero_residuals(self.backbone)
        if config.splits > 1:
            split_batch_norm(self.backbone, config.splits)
        self.projector: nn.Module = nn.Linear(backbone.width, config.dim)
        if config.projector == "mlp":
            self.projector = two_layers(backbone.width, config.hidden, config.dim)
        # differs from the paper's code: its rows are of length 1 only on average
        along = 1 if config.bank == "shared" else 0
        rows = F.normalize(torch.randn(images, config.dim), dim=along)
        self.register_buffer("rows", rows)
        self.register_buffer("drawn", torch.randint(images, (config.negatives,)))
        self.register_buffer("normaliser", torch.zeros(()))
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: Batch) -> Output:
        """The loss of one view of each image."""
        if len(batch.views) != 1:
            raise UserError(
                f"instdisc takes one view of each image, not {len(batch.views)}; "
                "use --views.counts 1"
            )
        features = self.backbone(batch.views[0])  # (B, C)
        embeddings = F.normalize(full(self.projector(features)), dim=1)  # (B, D)
        drawn = self.drawn  # (K,)
        if self.config.draws == "image":
            shape = (len(batch), self.config.negatives)
            drawn = torch.randint(len(self.rows), shape, device=drawn.device)  # (B, K)
        own, negatives = self.rows[batch.index], self.rows[drawn]  # (B, D), (K, D) or (B, K, D)
        temperature = self.config.temperature
        if self.config.loss == "softmax":
            loss = instance_softmax(embeddings, own, negatives, temperature)
        else:
            self.know_normaliser(embeddings, own, negatives)
            z, images = self.normaliser.clone(), len(self.rows)
            loss = instance_nce(embeddings, own, negatives, temperature, z, images)
        self._seen.append((batch.index, embeddings.detach()))
        similarity = (embeddings.detach() * own).sum(dim=1).mean()
        return Output(loss, features.detach(), {"positive_similarity": similarity})

    @torch.no_grad()
    def know_normaliser(self, embeddings: Tensor, own: Tensor, negatives: Tensor) -> None:
        """Set Z, once for all: N times the mean of exp(v . f / temperature) of the first batch."""
        mean = scores(embeddings, own, negatives, self.config.temperature).exp().mean()
        z = distributed.summed(mean) / distributed.world() * len(self.rows)
        self.normaliser.copy_(torch.where(self.normaliser > 0, self.normaliser, z))

    @torch.no_grad()
    def after_step(self, progress: float, lr: float) -> None:
        """Let the bank follow the images that were seen, on all ranks, and draw new negatives."""
        momentum = self.config.momentum
        for index, embeddings in self._seen:
            if self.config.bank == "shared":
                index, embeddings = distributed.gather(index), distributed.gather(embeddings)
            moved = momentum * self.rows[index] + (1 - momentum) * embeddings.to(self.rows.dtype)
            self.rows[index] = F.normalize(moved, dim=1)
        self._seen = []
        drawn = torch.randint(len(self.rows), self.drawn.shape, device=self.drawn.device)
        self.drawn.copy_(distributed.shared(drawn))
