"""3x3 convolutions on maps of one or two pixels a side: there they are plain matrix products.

Small images end on such maps: ResNet-18 reaches 2x2 at 64 pixels and 1x1 at 32. Most taps of a 3x3
kernel then fall on padding, and CPU kernels for convolutions spend their time on them: two to ten
times that of the product. The sums are the same, in another order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDE = 512
"""Output channels from which a 2x2 map is better multiplied as a whole, measured."""


class Conv3x3(nn.Conv2d):
    """A convolution of kernel 3 and padding 1 that multiplies tiny maps on a CPU as matrices."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, K, h', w') from (B, C, h, w)."""
        side, stride = images.shape[2:], self.stride[0]
        if images.device.type == "cpu":
            if side == (1, 1):
                return _whole(images, self.weight[:, :, 1:2, 1:2], 1)
            if side == (2, 2) and stride == 2:
                return _whole(images, self.weight[:, :, 1:, 1:], 1)
            if side == (2, 2) and stride == 1 and self.out_channels >= _WIDE:
                parts = [self.weight[:, :, 1 - y : 3 - y, 1 - x : 3 - x] for y, x in _CORNERS]
                return _whole(images, torch.cat(parts), 2)
        return super().forward(images)


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
"""(y, x) of the pixels of a 2x2 map: around each, other taps of the kernel fall on the map."""


def _whole(images: Tensor, taps: Tensor, side: int) -> Tensor:
    """(B, K, side, side) from all of (B, C, h, w); taps (side^2 * K, C, h, w), pixel by pixel."""
    pixels = images.permute(0, 2, 3, 1).flatten(1)  # (B, h * w * C), as channels-last stores it
    product = F.linear(pixels, taps.permute(0, 2, 3, 1).flatten(1))  # (B, side * side * K)
    return product.view(len(images), side, side, -1).permute(0, 3, 1, 2)


def with_small_maps(module: nn.Module) -> None:
    """Let the 3x3 convolutions in `module` know the short way; parameters and keys stay."""
    for conv in module.modules():
        if type(conv) is nn.Conv2d and _fits(conv):
            conv.__class__ = Conv3x3


def _fits(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.dilation == (1, 1)
        and conv.stride in ((1, 1), (2, 2))
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
    )
