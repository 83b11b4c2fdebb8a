"""What of a backbone learns in detection, and what its norms do: choices by name.

Two code bases say "freeze" and mean different things. MMDetection's frozen stages rest entirely:
no gradient, and batch-norm keeps its statistics. torchvision's untrained layers get no gradient,
and their batch-norm still gathers statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstsight.backbones import Backbone
from firstsight.detect.settings import Norm, Training
from firstsight.errors import UserError
from firstsight.nets.norms import global_batch_norm, group_norm, split_batch_norm

if TYPE_CHECKING:
    from typing_extensions import Self


class Resting(nn.Module):
    """A network in training, but for the parts of it that rest."""

    def __init__(self, network: nn.Module, resting: list[nn.Module]) -> None:
        super().__init__()
        self.network = network
        self._resting = tuple(resting)  # not registered a second time

    def train(self, mode: bool = True) -> Self:
        """Training mode, but for what rests."""
        super().train(mode)
        for module in self._resting:
            module.eval()
        return self


def apply(backbone: Backbone, config: Training) -> list[nn.Module]:
    """Give `backbone` the norms that `config` names, and take gradients from what shall rest; what
    must stay in evaluation mode. Raises `UserError` for a backbone of small images."""
    if backbone.stem == "small":
        raise UserError(
            f"this {backbone.name} has the small stem, for images of few pixels; a detector takes "
            "one pretrained with --stem standard"
        )
    normalise(backbone, config.norm, config.splits)
    resting = freeze(backbone, config.frozen_stages, config.trainable_layers)
    return resting + rest_norms(backbone, config.norm, config.norm_eval)


def stages(backbone: Backbone) -> list[list[nn.Module]]:
    """The stem and the four stages of a ResNet, of torchvision or of timm, in order.

    Raises `UserError` for other networks.
    """
    root: Any = getattr(backbone, "network", backbone)
    if not is_resnet(backbone):
        raise UserError(
            f"{backbone.name} has no stem and four stages; leave --neck, --frozen-stages and "
            "--trainable-layers as they are, or use a ResNet"
        )
    activation = root.relu if hasattr(root, "relu") else root.act1
    stem = [root.conv1, root.bn1, activation, root.maxpool]
    return [stem, [root.layer1], [root.layer2], [root.layer3], [root.layer4]]


def is_resnet(backbone: Backbone) -> bool:
    """Whether `stages` knows the parts of this network."""
    root = getattr(backbone, "network", backbone)
    return all(hasattr(root, part) for part in ("conv1", "bn1", "maxpool", "layer4"))


def normalise(module: nn.Module, kind: Norm, splits: int) -> None:
    """Make every batch-norm inside `module` what `kind` names; `batch` and `frozen` stay as is.

    Group-norm (Wu and He 2018, https://arxiv.org/abs/1803.08494, 32 groups) takes over the scales;
    what was pretrained with batch-norm has to get used to it.
    """
    if kind == "sync":
        global_batch_norm(module)
    elif kind == "split":
        split_batch_norm(module, splits)
    elif kind == "group":
        group_norm(module, 32)


def fresh(kind: Norm, splits: int) -> Callable[[int], nn.Module]:
    """What makes new norms of a kind from a number of channels, for neck and heads."""

    def made(channels: int) -> nn.Module:
        holder = nn.Sequential(nn.BatchNorm2d(channels))
        normalise(holder, kind, splits)
        return holder[0]

    return made


def freeze(backbone: Backbone, frozen_stages: int, trainable_layers: int) -> list[nn.Module]:
    """Take gradients from what shall rest; what must also stay in evaluation mode.

    `frozen_stages` (MMDetection): -1 nothing, 0 the stem, k also stages 1 to k; all of it stays in
    evaluation mode. `trainable_layers` (torchvision): the last n of stem and stages learn, and
    nothing is put into evaluation mode.
    """
    resting: list[nn.Module] = []
    if frozen_stages >= 0:
        resting = [module for part in stages(backbone)[: frozen_stages + 1] for module in part]
        _without_gradient(resting)
    if trainable_layers < 5:
        parts = stages(backbone)[: 5 - trainable_layers]
        _without_gradient([module for part in parts for module in part])
    return resting


def rest_norms(backbone: Backbone, kind: Norm, evaluating: bool) -> list[nn.Module]:
    """The batch-norms of `backbone` that stay in evaluation mode; `frozen` ones do not learn."""
    if kind != "frozen" and not evaluating:
        return []
    norms: list[nn.Module] = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    if kind == "frozen":
        _without_gradient(norms)
    return norms


def _without_gradient(modules: list[nn.Module]) -> None:
    for module in modules:
        module.requires_grad_(False)
