"""SEED: a small network learns whom a large, trained one finds an image like.

Fang et al. 2021, https://arxiv.org/abs/2101.04731, section 3, and the authors' code.

Small networks learn little from contrast alone. Here a teacher, which stays as it is, says how much
its embedding of a view is like those of past images in a queue, and like itself; the student, which
sees the same view, must say the same. Only the teacher's embeddings are ever in the queue.

Shapes: B images per rank, C features of the student, D embedding of the teacher, K queue, L small
crops of each image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed
from firstsight.backbones import Backbone
from firstsight.batch import Batch
from firstsight.errors import UserError, require_not_negative, require_positive
from firstsight.methods import network
from firstsight.methods.base import Method, Output
from firstsight.nets import Queue, full, uncast
from firstsight.nets.norms import split_batch_norm
from firstsight.nets.projectors import two_layers
from firstsight.settings import Defaults

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULTS = Defaults(  # Fang et al., section 4.1, and the authors' code
    views="seed",
    epochs=200,
    batch_size=256,
    base_lr=0.03,
    weight_decay=1e-4,
    lr_every="epoch",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of SEED."""

    teacher: str = ""
    """CHECKPOINT of the teacher: a run, or a file of MoCo, SimCLR (PyTorch), SwAV or SEED; for its
    features any. It sees views normalised as --views.mean and --views.std say."""
    teacher_layer: Literal["embedding", "backbone"] = "embedding"
    """What of the teacher is compared: its embedding, or pooled features of its backbone."""
    queue_size: int = 65_536
    """K, number of past embeddings of the teacher; any length."""
    temperature: float = 0.2
    """Divides the student's cosine similarities; smaller is sharper."""
    teacher_temperature: float = 1e-4
    """Divides the teacher's; the authors' code has .0001, nearly one answer alone."""
    projector: Literal["mlp", "linear"] = "mlp"
    """Two layers, the first as wide as the backbone, or one."""
    local_crops: int = 0
    """L, small crops of each image after the first view, with a queue of their own; --preset
    seed-multicrop has 6."""
    splits: int = 1
    """Parts of each rank's batch with batch-norm statistics of their own; 8 emulates 8 devices."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "queue_size", "temperature", "teacher_temperature")
        require_positive("--method.", self, "splits")
        require_not_negative("--method.", self, "local_crops")


def seed_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float,
    teacher_temperature: float,
) -> Tensor:
    """Scalar mean cross-entropy of the student's choices with the teacher's; its entropy is best.

    student, teacher (B, D), row i from image i, and queue (K, D) are unit vectors. Both choose
    among the teacher's embedding of the image and the queue (Fang et al. 2021, equations 3 to 5);
    no gradient flows into the teacher's.
    """
    with uncast(student):
        student, teacher, queue = full(student), full(teacher.detach()), full(queue)
        said = _logits(student, teacher, queue) / temperature  # (B, 1 + K)
        wanted = _logits(teacher, teacher, queue) / teacher_temperature
        return F.cross_entropy(said, wanted.softmax(dim=1))


def _logits(rows: Tensor, own: Tensor, queue: Tensor) -> Tensor:
    """(B, 1 + K) similarities: to its own embedding of the teacher first, then to the queue."""
    return torch.cat([(rows * own).sum(dim=1, keepdim=True), rows @ queue.T], dim=1)


class SEED(Method):
    """Self-supervised distillation (Fang et al. 2021).

    The teacher is no part of the method's state: checkpoints hold a hash of its weights, and refuse
    to go on with another one.
    """

    views = "any"

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self._teacher = [_loaded(config)]  # in a list: neither trained, nor saved, nor put to train
        dim, width = self._teacher[0].width, backbone.width
        self.projector: nn.Module = nn.Linear(width, dim)
        if config.projector == "mlp":
            self.projector = two_layers(width, width, dim)
        if config.splits > 1:
            split_batch_norm(self.backbone, config.splits)
        self.queue = Queue(config.queue_size, dim)
        self.local_queue = Queue(config.queue_size if config.local_crops else 0, dim)

    def forward(self, batch: Batch) -> Output:
        """The loss of the first view, and with small crops the mean of theirs added to it."""
        view, *crops = batch.views  # (B, 3, H, W), L times (B, 3, h, w)
        if len(crops) != self.config.local_crops:
            raise UserError(
                f"seed takes one view and --method.local-crops {self.config.local_crops} small "
                f"ones, not {len(batch.views)} views; use --views.counts 1 (or --preset "
                "seed-multicrop --method.local-crops 6)"
            )
        features = self.backbone(view)  # (B, C)
        student = F.normalize(self.projector(features), dim=1)  # (B, D)
        teacher = self.taught(view)  # (B, D), without gradient
        loss = self.loss(student, teacher, self.queue.read())
        if crops:
            every = torch.cat(crops)  # (L B, 3, h, w)
            seen = F.normalize(self.projector(self.backbone(every)), dim=1)  # (L B, D)
            taught = self.taught(every)
            loss = loss + self.loss(seen, taught, self.local_queue.read())
            self.local_queue.push(distributed.gather(taught[: len(batch)]))  # of the first crop
        self.queue.push(distributed.gather(teacher))  # after the read
        similarity = (full(student.detach()) * teacher).sum(dim=1).mean()
        return Output(loss, features.detach(), {"teacher_similarity": similarity})

    def loss(self, student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
        """Scalar, at the two temperatures of the settings."""
        c = self.config
        return seed_loss(student, teacher, queue, c.temperature, c.teacher_temperature)

    @torch.no_grad()
    def taught(self, view: Tensor) -> Tensor:
        """Unit embeddings (B, D) of the teacher, whose batch-norm statistics rest."""
        return F.normalize(full(self._teacher[0](view)), dim=1)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # to the device, the precision and the layout of the rest; torch has no types here
        self._teacher[0]._apply(fn)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def get_extra_state(self) -> Tensor:
        """(32,) hash of the teacher's weights as they were loaded."""
        return self._teacher[0].fingerprint

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse to go on with a teacher that has another hash."""
        if not torch.equal(state.cpu(), self.get_extra_state()):
            raise UserError(
                f"{self.config.teacher} is not the teacher that the run began with; give back "
                "that one, or use --out to start another run"
            )


class _Teacher(nn.Module):
    """A network at rest, and the hash of what it was loaded as."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network, self.width = network.eval().requires_grad_(False), network.width
        digest = hashlib.sha256()
        for name, tensor in network.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        self.fingerprint = torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def forward(self, view: Tensor) -> Tensor:
        embedding: Tensor = self.network(view)
        return embedding


def _loaded(config: Config) -> _Teacher:
    if not config.teacher:
        raise UserError("seed learns from a teacher; name it: --method.teacher CHECKPOINT")
    with torch.device("cpu"):
        return _Teacher(network(config.teacher, config.teacher_layer, "--method.teacher-layer")[0])
