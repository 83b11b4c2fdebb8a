"""The small ResNets that CIFAR was first read with: three stages of 16, 32 and 64 channels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from firstsight.backbones import Backbone

DEPTHS = {f"cifar_resnet{6 * blocks + 2}": blocks for blocks in (3, 5, 7, 9, 18)}
"""Blocks a stage by name: depths 20, 32, 44, 56 and 110."""


class CifarResNet(Backbone):
    """A ResNet for images of 32 pixels (He et al. 2016, https://arxiv.org/abs/1512.03385, 4.2).

    Shortcuts have no weights: where a stage begins they take every second pixel, and zeros for the
    new channels, half of them in front (the option A of the paper, as its well-known ports have
    it). Parameter names are theirs.
    """

    width = map_width = 64
    stride = 4

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.stem = name, "standard"
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, channels in enumerate((16, 32, 64), start=1):
            blocks = [_Block(channels // 2, channels, 2) if stage > 1 else _Block(16, 16, 1)]
            blocks += [_Block(channels, channels, 1) for _ in range(DEPTHS[name] - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 64, h, w)."""
        return self.stage_map(images, self.last_stage)

    @property
    def last_stage(self) -> int:
        """Three; 0 is the first convolution."""
        return 3

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """(B, C', h', w') after the first convolution (stage 0) or layer1 to layer3."""
        x = F.relu(self.bn1(self.conv1(images)))
        for number in range(1, stage + 1):
            x = self.get_submodule(f"layer{number}")(x)
        return x

    def features(self, images: Tensor) -> Tensor:
        """(B, 64): the mean over the map."""
        return self.feature_map(images).mean(dim=(2, 3))

    def map_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 64, h, w) and its mean (B, 64)."""
        cells = self.feature_map(images)
        return cells, cells.mean(dim=(2, 3))


class _Block(nn.Module):
    def __init__(self, before: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, channels - before

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w)."""
        out = F.relu(self.bn1(self.conv1(x)))
        if self.more:
            half = self.more // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(self.bn2(self.conv2(out)) + x)
