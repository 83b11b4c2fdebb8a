"""Backbones: images in, a feature map and pooled features out, whatever library they come from."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firstsight.backbones.conv import with_small_maps
from firstsight.errors import UserError, unknown

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


class Backbone(nn.Module, ABC):
    """A network that states its own width and stride."""

    name: str
    """What builds it again: resnet50, timm:NAME, timm:NAME,num_heads=12."""
    stem: str
    """First layers: standard or small."""
    width: int
    """C, the number of features."""
    map_width: int
    """Channels of the feature map: C, but for networks with a layer behind the pooling."""
    stride: int
    """Pixels of the image for each cell of the feature map, a side."""

    @abstractmethod
    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, h, w) from images (B, 3, H, W)."""

    @property
    def last_stage(self) -> int:
        """The number of the last stage that `stage_map` knows."""
        raise UserError(f"{self.name} has no stages to choose from; leave out --stages")

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """(B, C', h', w') after a stage, 0 to `last_stage`; what comes later is not computed."""
        raise UserError(f"{self.name} has no stages to choose from; leave out --stages")

    @abstractmethod
    def features(self, images: Tensor) -> Tensor:
        """Pooled features (B, C) from images (B, 3, H, W)."""

    def map_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The feature map (B, C, h, w) and pooled features (B, C): in one pass where it can be."""
        return self.feature_map(images), self.features(images)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features (B, C)."""
        return self.features(images)


class ResNet(Backbone):
    """A torchvision ResNet without its classifier, under torchvision's own parameter names."""

    def __init__(self, name: str, stem: str) -> None:
        import torchvision

        super().__init__()
        self.name, self.stem = name, stem
        network = getattr(torchvision.models, name)(weights=None)
        self.width = self.map_width = network.fc.in_features
        for child, module in network.named_children():
            if child != "fc":
                self.add_module(child, module)
        self.stride = 32
        if stem == "small":
            self.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.maxpool = nn.Identity()
            self.stride = 8
        with_small_maps(self)

    last_stage = 4

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, h, w): the output of layer4."""
        return self.stage_map(images, 4)

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """(B, C', h', w') after the stem (stage 0) or layer1 to layer4."""
        x = images
        layers = [f"layer{number}" for number in range(1, stage + 1)]
        for child in ("conv1", "bn1", "relu", "maxpool", *layers):
            x = self.get_submodule(child)(x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """(B, C): the mean over the map."""
        return self.feature_map(images).mean(dim=(2, 3))

    def map_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) and its mean (B, C)."""
        cells = self.feature_map(images)
        return cells, cells.mean(dim=(2, 3))


def zero_residuals(backbone: Backbone) -> None:
    """Let the residual blocks of an untrained torchvision ResNet begin as the identity.

    The scale of each block's last batch-norm becomes 0 (Goyal et al. 2017, section 5.1,
    https://arxiv.org/abs/1706.02677). Trained scales stay, and so does what comes from timm, which
    does this of itself where its authors meant it to.
    """
    if not isinstance(backbone, ResNet):
        return
    for block in backbone.modules():
        last = getattr(block, "bn3", getattr(block, "bn2", None))
        if isinstance(last, nn.BatchNorm2d) and bool((last.weight == 1).all()):
            nn.init.zeros_(last.weight)


class Timm(Backbone):
    """Any timm network without its classifier, under timm's own parameter names."""

    def __init__(self, name: str, size: int) -> None:
        import timm

        super().__init__()
        self.name, self.stem = f"timm:{name}", "standard"
        name, _, heads = name.partition(",num_heads=")
        if name.split(".")[0] not in timm.list_models():
            raise unknown("timm network", name, _near_timm(name))
        resizable = name.startswith(("vit", "deit", "eva", "beit"))
        options: dict[str, Any] = {"img_size": size, "dynamic_img_size": True} if resizable else {}
        if heads:
            options["num_heads"] = int(heads)  # same weights, other features
        network: Any = timm.create_model(name, pretrained=False, num_classes=0, **options)
        self.network = network
        with_small_maps(self)
        # what is pooled may be wider than the map: some have a layer between
        self.width = int(getattr(network, "head_hidden_size", None) or network.num_features)
        self.map_width = int(network.num_features)
        self.stride = size // max(self._map_side(size), 1)

    @torch.no_grad()
    def _map_side(self, size: int) -> int:
        # timm states a reduction for most networks, not for all: ask with one tiny batch
        training = self.training
        side = self.eval().feature_map(torch.zeros(1, 3, size, size)).shape[-1]
        self.train(training)
        return side

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, h, w); of a transformer, its patch tokens laid out as a map."""
        network: Any = self.network
        return self._laid_out(network.forward_features(images))

    @property
    def last_stage(self) -> int:
        """The last of timm's `feature_info`; of a transformer each block is a stage."""
        return len(getattr(self.network, "feature_info", ())) - 1

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """(B, C', h', w') after entry `stage` of timm's `feature_info`."""
        network: Any = self.network
        if not hasattr(network, "forward_intermediates"):
            return super().stage_map(images, stage)
        maps: list[Tensor] = network.forward_intermediates(
            images,
            indices=[stage],
            intermediates_only=True,
            output_fmt="NCHW",
            stop_early=True,
        )
        return maps[0]

    def features(self, images: Tensor) -> Tensor:
        """(B, C) as timm pools them for its classifier."""
        network: Any = self.network
        pooled: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
        return pooled

    def map_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) and (B, C), each as above."""
        network: Any = self.network
        x: Tensor = network.forward_features(images)
        return self._laid_out(x), network.forward_head(x, pre_logits=True)

    def _laid_out(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # tokens (B, prefix + h * w, C)
            x = x[:, getattr(self.network, "num_prefix_tokens", 0) :]
            side = round(x.shape[1] ** 0.5)
            return x.transpose(1, 2).reshape(len(x), self.map_width, side, side)
        # some are channels-last
        return x.permute(0, 3, 1, 2) if x.shape[1] != self.map_width else x


Layer = Literal["backbone", "embedding"]
"""What of a network is read: its pooled features, or what its method's projector makes of them."""


class Embedding(Backbone):
    """A backbone whose features are the embedding that its method compared."""

    def __init__(self, backbone: Backbone, projector: nn.Module) -> None:
        super().__init__()
        self.name, self.stem = backbone.name, backbone.stem
        self.stride, self.map_width = backbone.stride, backbone.map_width
        self.backbone, self.projector = backbone, projector
        last = [m for m in projector.modules() if isinstance(m, nn.Linear)][-1]
        self.width = last.out_features

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, C, h, w), of the backbone."""
        return self.backbone.feature_map(images)

    def features(self, images: Tensor) -> Tensor:
        """(B, D) embeddings."""
        embedding: Tensor = self.projector(self.backbone.features(images))
        return embedding


def _near_timm(name: str) -> list[str]:
    import difflib

    import timm

    return difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4) or ["vit_tiny_*"]


def build(name: str, stem: str = "standard", size: int = 224) -> Backbone:
    """An untrained backbone by name; `size` is the side of its images where it needs to know."""
    if name.startswith("timm:"):
        if stem != "standard":
            raise UserError(f"{name} has no other stem; leave --stem standard")
        return Timm(name.removeprefix("timm:"), size)
    from firstsight.backbones import sixheads
    from firstsight.backbones.cifar import DEPTHS, CifarResNet

    if name in DEPTHS and stem == "standard":
        return CifarResNet(name)
    if name == sixheads.NAME and stem == "standard":
        return sixheads.SixHeads(size)
    if name not in RESNETS:
        raise unknown("backbone", name, [*RESNETS, *DEPTHS, sixheads.NAME, "timm:NAME"])
    return ResNet(name, stem)


def drop_paths(backbone: Backbone, rate: float) -> None:
    """Let a timm transformer leave out residual branches of single images while it trains.

    The share rises linearly over its blocks, from 0 to `rate` (Huang et al. 2016,
    https://arxiv.org/abs/1603.09382). Other networks stay as they are.
    """
    from timm.layers.drop import DropPath

    blocks = getattr(getattr(backbone, "network", None), "blocks", ())
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(share) if share else nn.Identity())


def freeze_patches(backbone: Backbone) -> None:
    """Keep the projection of a timm transformer's patches as it was drawn.

    Its gradients come in spikes that make training unstable (Chen et al. 2021, section 4.1,
    https://arxiv.org/abs/2104.02057). Raises `UserError` for a network without patches.
    """
    network = _with(backbone, "patch_embed", "--method.freeze-patches")
    network.patch_embed.requires_grad_(False)


@torch.no_grad()
def fix_positions(backbone: Backbone) -> None:
    """Give a timm transformer positions that stay: waves along the columns, then along the rows.

    A quarter of the channels each are sines and cosines of x and of y at wavelengths from 2 pi to
    10000 * 2 pi cells; tokens before the patches get zeros (Chen et al. 2021, appendix).
    """
    positions = _with(backbone, "pos_embed", "--method.fixed-positions").pos_embed  # (1, p + N, C)
    prefix: int = getattr(backbone.get_submodule("network"), "num_prefix_tokens", 0)
    side = round((positions.shape[1] - prefix) ** 0.5)
    quarter = positions.shape[2] // 4
    rates = 10000.0 ** (-torch.arange(quarter, device=positions.device) / quarter)
    angles = torch.arange(side, device=positions.device)[:, None] * rates  # (side, C / 4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, C / 2)
    columns, rows = waves.repeat(side, 1), waves.repeat_interleave(side, dim=0)
    positions.zero_()
    positions[0, prefix:, : 4 * quarter] = torch.cat([columns, rows], dim=1)
    positions.requires_grad_(False)


def _with(backbone: Backbone, part: str, flag: str) -> Any:
    network: Any = getattr(backbone, "network", None)
    if getattr(network, part, None) is None:
        raise UserError(f"{backbone.name} is no transformer that {flag} fits; leave it out")
    return network


@torch.no_grad()
def refuse_sides(backbone: Backbone, sides: Iterable[int]) -> None:
    """Raise `UserError` where the network takes no images of one of these sides, in pixels."""
    training = backbone.training
    for side in sides:
        try:
            backbone.eval()(torch.zeros(1, 3, side, side))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{backbone.name} takes no views of {side} pixels ({error}); "
                "use other --views.sizes, a ResNet, or views of one size"
            ) from None
    backbone.train(training)


def compile_all(module: nn.Module) -> None:
    """Let torch compile the passes of every backbone in `module`; their keys stay."""
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl"))
    if not any(map(shutil.which, compilers)):
        raise UserError("--compile needs a C++ compiler (g++ or clang++); leave out --compile")
    for backbone in module.modules():
        if isinstance(backbone, Backbone):
            backbone.compile()
            backbone.feature_map = torch.compile(backbone.feature_map)  # type: ignore[method-assign]
