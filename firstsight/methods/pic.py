"""PIC: every image is a class of its own, and the network learns to say which image it sees.

Cao et al. 2020, https://arxiv.org/abs/2006.14618; the multi-crop form is that of its code.

One class per image needs no pairs and no second network, but is met once an epoch, too seldom to
be learnt: so images come in a window that slides slowly over the source (`--order sliding`). Those
of the images seen last are enough, if others catch up on what momentum and decay did to them since.

Shapes: B images per rank, V views, R = V B, C features, D embedding, N images, K recent, S in use.
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
from firstsight.errors import UserError, require_not_negative, require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import full, uncast
from firstsight.nets.norms import split_batch_norm
from firstsight.nets.projectors import two_layers
from firstsight.prototypes import fetched, rows
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # the authors' code; warm-up from a hundredth, down to a rate of 1e-6
    views="pic",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    warmup_epochs=5,
    lr_start=0.01,
    lr_end=3.3333e-5,
    order="sliding",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of PIC."""

    dim: int = 128
    """D, size of the embedding and of each image's prototype."""
    hidden: int = 2048
    """Width of the projector's hidden layer."""
    projector: Literal["mlp", "linear"] = "mlp"
    """Two layers, or one."""
    temperature: float = 0.2
    """Divides cosine similarities; smaller is sharper."""
    negatives: int = 0
    """K: the images seen last, whose prototypes an image is told from, and those of its batch (of
    its chunk, with --accumulate); 0: all images."""
    correction: bool = True
    """Prototypes that took part in no loss catch up on the momentum and decay that they missed."""
    prototypes_in: Literal["device", "host", "file"] = "device"
    """Where they rest, the K and some apart: the device, the host's memory, a file of the run."""
    rate_tolerance: float = 0.001
    """With K negatives, prototypes keep their rate until the run's differs by more, as a share."""
    prototype_momentum: float = 0.9
    """Momentum of the SGD of the prototypes, whatever --optimizer moves the networks."""
    prototype_rate: float = 1.0
    """Learning rate of the prototypes, in rates of the run; about 30 beside adamw."""
    prototype_decay: float = 1e-4
    """Weight decay of the prototypes."""
    prototype_clip: float = 0.0
    """Longest gradient of all prototypes together (of the networks: --clip-norm); 0: any."""
    shortest: float = 0.0
    """Length to which shorter prototypes are stretched: the short ones turn fastest; 0: none."""
    longest: float = 0.0
    """Length to which longer prototypes are cut; the same as shortest: all have one; 0: none."""
    zero_init: bool = True
    """Residual blocks begin as the identity (torchvision ResNets; timm's decide themselves)."""
    splits: int = 1
    """Parts of each rank's batch with batch-norm statistics of their own; 4 emulates 4 devices."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "temperature", "splits")
        require_share("--method.", self, "rate_tolerance", "prototype_momentum")
        bounds = ("prototype_rate", "prototype_clip", "shortest", "longest")
        require_not_negative("--method.", self, "negatives", "prototype_decay", *bounds)
        if 0 < self.longest < self.shortest:
            raise UserError(f"--method.longest must be {self.shortest} or more, not {self.longest}")
        if self.prototypes_in != "device" and not self.negatives:
            where = f"--method.prototypes-in {self.prototypes_in}"
            raise UserError(f"{where} is for some in use at a time; add --method.negatives 65536")


def pic_loss(embeddings: Tensor, prototypes: Tensor, index: Tensor, temperature: float) -> Tensor:
    """Scalar mean cross-entropy of telling each image from all prototypes; 0 is best.

    embeddings (R, D), prototypes (S, D), normalised inside; index (R,) the row of each image's own
    prototype (Cao et al. 2020, equation 3). With C classes it cannot fall below
    log(1 + (C - 1) exp(-C / (C - 1) / temperature)): 9.06 on ImageNet at .2.
    """
    return F.cross_entropy(cosines(embeddings, prototypes) / temperature, index)


def cosines(embeddings: Tensor, prototypes: Tensor) -> Tensor:
    """(R, S) cosine similarities, in full precision whatever autocast says."""
    with uncast(embeddings):
        z, v = F.normalize(full(embeddings), dim=1), F.normalize(full(prototypes), dim=1)
        return z @ v.T


@torch.no_grad()
def prototype_gradient(
    embeddings: Tensor, prototypes: Tensor, logits: Tensor, index: Tensor, temperature: float
) -> Tensor:
    """(S, D) gradient of the summed cross-entropies of `logits` (R, S), by the prototypes.

    In closed form, (I - v v') / |w| sum_i (p_ij - [j = y_i]) z_i / temperature with unit v and z:
    so it is in full precision and free of any scaling of the loss.
    """
    with uncast(embeddings):
        push = logits.softmax(dim=1)  # (R, S)
        push[torch.arange(len(index), device=index.device), index] -= 1
        pull = push.T @ F.normalize(embeddings, dim=1) / temperature  # (S, D)
        length: Tensor = prototypes.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = prototypes / length
        return (pull - unit * (unit * pull).sum(dim=1, keepdim=True)) / length


class PIC(Method):
    """Parametric instance classification (Cao et al. 2020)."""

    views = "any"

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
        self.sampled = 0 < config.negatives < images
        place = config.prototypes_in if self.sampled else "device"
        self.prototypes = fetched.of(
            *(place, images, config.dim),
            momentum=config.prototype_momentum,
            decay=config.prototype_decay,
            tolerance=config.rate_tolerance,
            correction=config.correction,
        )
        self.recent = rows.Recent(config.negatives if self.sampled else 0, images)
        self._parts: list[tuple[Tensor | None, Tensor]] = []  # of the chunks of this step
        self._visited, self._crops = list[Tensor](), 0

    def forward(self, batch: Batch) -> Output:
        """The loss of any number of views; prototypes learn from those of the first one's size."""
        temperature = self.config.temperature
        members, own = self.classes(batch.index)  # (S,) or None for all; (B,)
        prototypes = self.prototypes.now(members, batch.coming)  # (S, D)
        features = [self.backbone(view) for view in batch.views]  # V x (B, C), each a batch
        with uncast(features[0]):
            embeddings = torch.cat([self.projector(full(f)) for f in features])  # (R, D)
        index = own.repeat(len(batch.views))  # (R,)
        logits = cosines(embeddings, prototypes) / temperature  # (R, S)
        loss = F.cross_entropy(logits, index)
        figures = {
            "instance_accuracy": 100 * (logits.argmax(dim=1) == index).to(loss.dtype).mean(),
            **rows.lengths("embedding_norm", embeddings),
            **self.prototypes.figures(prototypes),
        }
        if torch.is_grad_enabled():
            large = len(batch) * sum(v.shape == batch.views[0].shape for v in batch.views)
            learnt = (embeddings[:large], prototypes, logits[:large], index[:large])
            self._parts.append((members, prototype_gradient(*learnt, temperature)))
            self._visited.append(batch.index)
            self._crops += len(index)
        return Output(loss, features[0].detach(), figures)

    def classes(self, index: Tensor) -> tuple[Tensor | None, Tensor]:
        """Images that take part (S,), rising, None for all; where among them `index` (B,) is."""
        if not self.sampled:
            return None, index
        members: Tensor = torch.unique(torch.cat([self.recent.index, distributed.gather(index)]))
        return members, torch.searchsorted(members, index)

    def after_step(self, progress: float, lr: float) -> None:
        """Move the prototypes by the mean gradient of all ranks, and remember who was seen."""
        members, total = rows.merged(self._parts)
        total = distributed.summed(total) / (self._crops * distributed.world())
        c, rate = self.config, lr * self.config.prototype_rate
        self.prototypes.move(members, total, rate, c.prototype_clip, c.shortest, c.longest)
        if self.sampled:
            self.recent.push(torch.cat([distributed.gather(index) for index in self._visited]))
            self.prototypes.rest(self.recent.index)
        self._parts, self._visited, self._crops = [], [], 0
