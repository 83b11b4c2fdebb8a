"""What a method is: a module whose forward takes a batch and returns the loss, in paper order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from firstsight.backbones import Backbone
from firstsight.batch import Batch


@dataclass(frozen=True)
class Output:
    """What one forward pass says."""

    loss: Tensor
    """Scalar, the mean over this rank's images."""
    features: Tensor
    """(B, C), detached: pooled features of the first view, for probes."""
    scalars: dict[str, Tensor] = field(default_factory=dict)
    """Detached figures to log."""


class Method(nn.Module, ABC):
    """A pretraining method. Momentum encoders, queues and prototypes live inside it."""

    backbone: Backbone
    """What is kept after pretraining."""
    views: ClassVar[Literal["pair", "any"]] = "pair"
    """Views of an image that it takes: two of one size, or any that its own page allows."""
    global_views: ClassVar[int] = 1
    """How many views, of those that may be any, must come first and be of one size."""
    steady: tuple[str, ...] = ()
    """Modules of its own whose learning rate stays at the peak."""
    couples: ClassVar[str] = ""
    """What the loss takes from the batch at hand, and so only from a chunk of it with
    `--accumulate`: `negatives`; empty: the loss of each image stands alone (batch-norm apart)."""

    @abstractmethod
    def __init__(self, config: Any, backbone: Backbone, images: int) -> None:
        """Build the networks; `images` is the length of the source."""
        super().__init__()
        self.backbone = backbone

    @abstractmethod
    def forward(self, batch: Batch) -> Output:
        """The loss of a batch of normalised views."""

    def before_step(self, progress: float) -> None:
        """Called between backward and the optimiser; `progress` is the share of the run done."""

    def after_step(self, progress: float, lr: float) -> None:
        """Called after the optimiser: moving averages, row updates."""
