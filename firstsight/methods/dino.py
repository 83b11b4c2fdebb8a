"""DINO: guess, from any view of an image, what a slow copy of the network says of a global view.

Caron et al. 2021, https://arxiv.org/abs/2104.14294, equations 1 to 4 and Algorithm 1.

Both say a distribution over K outputs that nobody named. Two opposite forces keep them from saying
the same of every image: a centre, subtracted from the teacher, against one output for all, and a
low temperature against all outputs alike.

Shapes: B images per rank, W ranks, V views, C backbone features, D bottleneck, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed, metrics, optim
from firstsight.backbones import Backbone, drop_paths
from firstsight.batch import Batch
from firstsight.errors import require_positive, require_share
from firstsight.methods.base import Method, Output
from firstsight.nets import MomentumEncoder, full
from firstsight.nets.multicrop import encoded
from firstsight.settings import Defaults

DEFAULTS = Defaults(  # Caron et al., section 3.2; their batch is 1024, the rate is per 256 images
    views="dino",
    epochs=100,
    batch_size=256,
    base_lr=0.0005,
    weight_decay=0.04,
    weight_decay_end=0.4,
    warmup_epochs=10,
    optimizer="adamw",
    undecayed=("norm", "bias", "vector"),
    lr_end=0.002,
    lr_at="linspace",
    clip_param=3.0,
    batch_norm="global",
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of DINO."""

    dim: int = 256
    """D, size of the bottleneck before the last layer."""
    hidden: int = 2048
    """Width of the hidden layers of the projector."""
    prototypes: int = 65_536
    """K, number of outputs of the last layer."""
    momentum: float = 0.996
    """Share of the teacher that survives the first step; rises to 1 over the run."""
    student_temperature: float = 0.1
    """Divides the outputs of the student."""
    teacher_temperature: float = 0.04
    """Divides the centred outputs of the teacher; up to 0.07 in long runs, with a warm-up."""
    teacher_start: float = 0.04
    """Temperature of the teacher where its warm-up begins."""
    teacher_warmup: float = 0.0
    """Share of the run in which the temperature of the teacher rises linearly."""
    centre_momentum: float = 0.9
    """Share of the centre that survives each step."""
    freeze: float = 0.01
    """Share of the run in which the last layer stays as drawn; the paper's is one epoch."""
    free_length: bool = False
    """Rows of the last layer learn their length; else they are unit vectors."""
    head_norm: bool = False
    """Batch-norm in the hidden layers of the projector."""
    drop_path: float = 0.1
    """Share of the student's residual branches left out, of a timm transformer's last block."""

    def __post_init__(self) -> None:
        require_positive("--method.", self, "dim", "hidden", "prototypes", "student_temperature")
        require_positive("--method.", self, "teacher_temperature", "teacher_start")
        require_share("--method.", self, "momentum", "centre_momentum", "freeze")
        require_share("--method.", self, "teacher_warmup", "drop_path")


def dino_loss(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    centre: Tensor,
    student_temperature: float,
    teacher_temperature: float | Tensor,
) -> Tensor:
    """Scalar mean cross-entropy over all pairs of a teacher's view and another of the student.

    students: raw outputs (B, K) of each view; teachers: those of the first few views; centre (K,).
    No gradient flows into the teachers (Caron et al. 2021, equations 2 and 3).
    """
    guesses = [F.log_softmax(full(s) / student_temperature, dim=1) for s in students]  # V x (B, K)
    targets = [
        F.softmax((full(t.detach()) - centre) / teacher_temperature, dim=1) for t in teachers
    ]
    terms = [
        -(target * guess).sum(dim=1).mean()
        for i, target in enumerate(targets)
        for v, guess in enumerate(guesses)
        if v != i
    ]
    return torch.stack(terms).mean()


class Projector(nn.Module):
    """Three layers with GELU, a unit vector, and a last layer whose rows are normalised."""

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((width, config.hidden), (config.hidden, config.hidden)):
            layers.append(nn.Linear(before, after))
            layers += [nn.BatchNorm1d(after)] if config.head_norm else []
            layers.append(nn.GELU())
        self.mlp = nn.Sequential(*layers, nn.Linear(config.hidden, config.dim))
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last = nn.Linear(config.dim, config.prototypes, bias=False)
        length = torch.ones(config.prototypes, 1)
        self.length = nn.Parameter(length, requires_grad=config.free_length)

    def forward(self, features: Tensor) -> Tensor:
        """(B, K) from (B, C)."""
        bottleneck = F.normalize(self.mlp(features), dim=1)  # (B, D)
        return F.linear(bottleneck, F.normalize(self.last.weight, dim=1) * self.length)


class DINO(Method):
    """DINO (Caron et al. 2021).

    The teacher is the momentum encoder; it sees the first two views. Its temperature and momentum
    are those of the share of the run done a step before; the published code sets the temperature
    once an epoch. differs from the paper: positions of a transformer are resized as timm does it.
    """

    views = "any"
    global_views = 2
    centre: Tensor
    """(K,) running mean of the teacher's outputs."""
    temperature: Tensor
    """Of the teacher, in the step to come."""

    def __init__(self, config: Config, backbone: Backbone, images: int) -> None:
        super().__init__(config, backbone, images)
        self.config = config
        self.projector = Projector(config, backbone.width)
        self.momentum_encoder = MomentumEncoder(self.backbone, self.projector)
        drop_paths(self.backbone, config.drop_path)  # after the copy: the teacher drops nothing
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("temperature", torch.tensor(self._teacher_temperature(0.0)))
        self._said: list[tuple[Tensor, int]] = []  # this step's outputs of the teacher: sum, rows

    def forward(self, batch: Batch) -> Output:
        """The loss of two or more global views and any number of local ones."""
        features = encoded(self.backbone, batch.views)  # (VB, C)
        students = self.projector(features).chunk(len(batch.views))  # V x (B, K)
        said = full(encoded(self.momentum_encoder, batch.views[: self.global_views]))  # (2B, K)
        self._said.append((said.sum(dim=0), len(said)))
        loss = dino_loss(
            students,
            said.chunk(self.global_views),
            self.centre,
            self.config.student_temperature,
            self.temperature,
        )
        spread = metrics.spread(said)
        return Output(loss, features.detach()[: len(batch)], {"embedding_spread": spread})

    def before_step(self, progress: float) -> None:
        """Hold the last layer still at the start of the run: without gradient nothing moves it."""
        if progress < self.config.freeze:
            self.projector.last.weight.grad = self.projector.length.grad = None

    @torch.no_grad()
    def after_step(self, progress: float, lr: float) -> None:
        """Move centre (equation 4, over all ranks), teacher, and the teacher's temperature."""
        rows = sum(count for _, count in self._said) * distributed.world()
        mean = distributed.summed(torch.stack([total for total, _ in self._said]).sum(0)) / rows
        self._said.clear()
        self.centre.lerp_(mean.to(self.centre), 1 - self.config.centre_momentum)
        momentum = optim.cosine(progress, self.config.momentum, 1.0)
        self.momentum_encoder.follow(self.backbone, self.projector, momentum=momentum)
        self.temperature.fill_(self._teacher_temperature(progress))

    def _teacher_temperature(self, progress: float) -> float:
        warmup, start = self.config.teacher_warmup, self.config.teacher_start
        risen = min(1.0, progress / warmup) if warmup else 1.0
        return start + (self.config.teacher_temperature - start) * risen
