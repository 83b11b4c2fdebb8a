"""The published ways to train a linear classifier on frozen features: numbers alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from firstsight.errors import UserError, require_positive, require_share, unknown
from firstsight.optim.schedule import Schedule
from firstsight.settings import plain
from firstsight.views import Interpolation

Representation = Literal["original", "norm", "standard"]

_RATES = (1e-3, 1e-2, 0.1, 1.0)
_DECAYS = (0.0, 1e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a linear classifier is trained; its backbone is never trained."""

    augment: bool = True
    """Train on random crops and flips, drawn anew in each epoch; or on features extracted once."""
    lr: tuple[float, ...] = ()
    """Peak learning rates, absolute: several are compared (on cached features)."""
    base_lr: float | None = None
    """Peak learning rate per 256 images of a batch, where `lr` is empty."""
    weight_decay: tuple[float, ...] = (0.0,)
    """Weight decays: each is tried with each learning rate."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS around it: each tensor moves by its own length times 0.001."""
    momentum: float = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum."""
    batch_size: int = 256
    """Images a step, over all ranks."""
    epochs: int = 100
    """Passes over the training images."""
    warmup_epochs: float = 0
    """Epochs in which the learning rate rises linearly from zero."""
    schedule: Literal["cosine", "step"] = "cosine"
    """Learning rate after the warm-up: half a cosine to zero, or times 0.1 at each drop."""
    drops: tuple[float, ...] = (0.6, 0.8)
    """Where the step schedule drops, as shares of the epochs."""
    once_an_epoch: bool = False
    """The learning rate changes between epochs only, not at every step."""
    init_std: float = 0.01
    """Standard deviation of the first weights, biases 0; 0: as torch draws a linear layer."""
    batch_norm: Literal["rest", "batch"] = "rest"
    """Batch-norm of the backbone while the head learns: by its running statistics, which rest; or
    by those of each batch, towards which a copy's running statistics move, as PIC's code has it."""
    representation: Representation = "original"
    """Features as they are; of unit length; or each of mean 0 and deviation 1 over the training
    images."""
    min_scale: float = 0.08
    """Smallest random crop, share of the image area."""
    interpolation: Interpolation = "bilinear"
    """Filter of the resize, in training and testing."""

    def __post_init__(self) -> None:
        require_positive("--", self, "batch_size", "epochs", "min_scale")
        require_share("--", self, "momentum", "min_scale")
        for flag, values in (("--lr", self.peaks), ("--weight-decay", self.weight_decay)):
            low = 0 if flag == "--weight-decay" else 1e-12
            if not values or not all(low <= value < math.inf for value in values):
                raise UserError(f"{flag} {values} will not do; give finite numbers above 0")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise UserError(
                f"a warm-up of {self.warmup_epochs:g} epochs does not fit into {self.epochs}; "
                f"use --warmup-epochs {self.epochs / 10:g}"
            )
        if not 0 <= self.init_std < math.inf:
            raise UserError(f"--init-std must not be below 0: {self.init_std}")
        if self.nesterov and not self.momentum:
            raise UserError("--nesterov True needs a --momentum above 0")
        if self.augment and len(self.settings) > 1:
            raise UserError(
                "several settings are compared on cached features: use --protocol cached, "
                "or one --lr and one --weight-decay"
            )
        if self.batch_norm == "batch" and not self.augment:
            raise UserError("--batch-norm batch needs crops; use --protocol pic, or leave it out")
        if self.augment and self.representation == "standard":
            raise UserError(
                "--representation standard needs cached features; use original or norm, "
                "or --protocol cached"
            )

    @property
    def peaks(self) -> tuple[float, ...]:
        """The absolute learning rates at the end of the warm-up."""
        scaled = () if self.base_lr is None else (self.base_lr * self.batch_size / 256,)
        return self.lr or scaled

    @property
    def settings(self) -> list[tuple[float, float]]:
        """(learning rate, weight decay) of each classifier that is trained."""
        return list(itertools.product(self.peaks, self.weight_decay))

    def rate(self, step: int, steps_an_epoch: int) -> float:
        """The learning rate of `step` (from 0), as a share of its peak."""
        if self.once_an_epoch:
            step -= step % steps_an_epoch
        return Schedule(
            steps=self.epochs * steps_an_epoch,
            peak=1.0,
            warmup=round(self.warmup_epochs * steps_an_epoch),
            shape=self.schedule,
            drops=self.drops,
        ).rate(step)


PROTOCOLS: dict[str, Protocol] = {
    "cached": Protocol(augment=False, lr=_RATES, weight_decay=_DECAYS, representation="standard"),
    # He et al. 2020, section 4.1 (https://arxiv.org/abs/1911.05722), and its code
    "moco": Protocol(lr=(30.0,), schedule="step"),
    # Cao et al. 2020 (https://arxiv.org/abs/2006.14618) and its code.
    # differs from the paper: its code lets batch-norm run in training mode (--batch-norm batch),
    # here statistics rest; it tests on a random 49,920 of 50,000 images, here on all of them.
    "pic": Protocol(lr=(30.0,), warmup_epochs=5, init_std=0.0),
    # Grill et al. 2020, appendix C.1 (https://arxiv.org/abs/2006.07733)
    "byol": Protocol(
        base_lr=0.2,
        nesterov=True,
        batch_size=1024,
        epochs=80,
        init_std=0.0,
        interpolation="bicubic",
    ),
    # Roh et al. 2021 (https://arxiv.org/abs/2103.06122) and its code; its BYOL takes base_lr 0.05.
    "scrl": Protocol(
        base_lr=0.2,
        optimizer="lars",
        nesterov=True,
        batch_size=4096,
        epochs=80,
        warmup_epochs=5,
        init_std=0.0,
        interpolation="bicubic",
    ),
    # Caron et al. 2020 (https://arxiv.org/abs/2006.09882) and its code; Barlow Twins has the same
    "swav": Protocol(lr=(0.3,), weight_decay=(1e-6,), once_an_epoch=True),
    # Chen et al. 2020 (https://arxiv.org/abs/2002.05709) and its code
    "simclr": Protocol(
        base_lr=0.1,
        weight_decay=(1e-6,),
        nesterov=True,
        batch_size=4096,
        epochs=90,
        interpolation="bicubic",
    ),
    # Chen and He 2021 (https://arxiv.org/abs/2011.10566) and its code
    "simsiam": Protocol(
        base_lr=0.1, optimizer="lars", batch_size=4096, epochs=90, once_an_epoch=True
    ),
    # Bardes et al. 2022 (https://arxiv.org/abs/2105.04906) and its README
    "vicreg": Protocol(lr=(0.02,), weight_decay=(1e-6,), once_an_epoch=True),
    # Transfer as in ssl-small (Shi et al. 2022, https://arxiv.org/abs/2107.14762) and its scripts:
    # this is CIFAR-10's; its Caltech-101 has rate 2.
    # differs from the paper: its CIFAR test images are squeezed to 224, ours cut from 256.
    "ssl-small": Protocol(
        lr=(1.5,),
        epochs=60,
        schedule="step",
        drops=(2 / 3,),
        representation="norm",
        min_scale=0.6,
        interpolation="bicubic",
    ),
    # Caron et al. 2021 (https://arxiv.org/abs/2104.14294) and its code.
    # differs from the paper: pooled features of the last block, not class tokens of several.
    "dino": Protocol(base_lr=0.001, batch_size=1024, once_an_epoch=True),
}
"""The published protocols by name; all of them train on random crops, save `cached`."""


def overridden(name: str, epochs: int | None, given: dict[str, Any]) -> Protocol:
    """The protocol called `name` with what is `given` (neither None nor empty) put over it."""
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    start = PROTOCOLS[name]
    changes = {key: value for key, value in given.items() if value not in (None, ())}
    if "base_lr" in changes:
        changes = {"lr": ()} | changes
    if epochs is not None:
        warmup = start.warmup_epochs * min(1.0, epochs / start.epochs)
        changes = {"epochs": epochs, "warmup_epochs": warmup} | changes
    return dataclasses.replace(start, **changes)


def stated(name: str, how: Protocol) -> dict[str, Any]:
    """What the figures depend on by how the classifier is trained."""
    left_out = {"base_lr"}
    left_out |= {"drops"} if how.schedule == "cosine" else set()
    left_out |= set() if how.augment else {"min_scale", "batch_norm"}
    numbers = {key: value for key, value in plain(how).items() if key not in left_out}
    return {"name": name, **numbers, "lr": list(how.peaks), "layer": "backbone"}
