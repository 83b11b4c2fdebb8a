"""3x3 convolutions on maps of one or two pixels a side: there they are plain matrix products.

Small images end on such maps: ResNet-18 reaches 2x2 at 64 pixels and 1x1 at 32. Most taps of a 3x3
kernel then fall on padding, and CPU kernels for convolutions spend their time on them: two to ten
times that of the product. The sums are the same, in another order.
"""

from __future__ import annotations

import math
from typing import Any, cast

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
        if images.device.type == "cpu" and self.padding_mode == "zeros":
            if side == (1, 1):
                return self._whole(images, 1, ((1, 1),))
            if side == (2, 2) and stride == 2:
                return self._whole(images, 2, ((1, 1),))
            if side == (2, 2) and self.out_channels >= _WIDE:
                return self._whole(images, 2, ((1, 1), (1, 0), (0, 1), (0, 0)))
        return super().forward(images)

    def _whole(self, images: Tensor, side: int, firsts: _Places) -> Tensor:
        """(B, K, h', w') with one product for each image; around pixel p of the result the taps
        that fall on the map begin at `firsts[p]`, and are `side` wide and high."""
        weight = self.weight
        if torch.is_autocast_enabled("cpu"):  # before it is copied out, which then is cheaper
            weight = weight.to(torch.get_autocast_dtype("cpu"))
        taps = cast(Tensor, _Taps.apply(weight, side, firsts))
        pixels = images.permute(0, 2, 3, 1).flatten(1)  # (B, h * w * C), as channels-last has it
        out = math.isqrt(len(firsts))
        return F.linear(pixels, taps).view(len(images), out, out, -1).permute(0, 3, 1, 2)


_Places = tuple[tuple[int, int], ...]
"""(row, column) in a 3x3 kernel, one for each pixel."""


class _Taps(torch.autograd.Function):
    """(P * K, side^2 * C): for each of P pixels the taps of (K, C, 3, 3) that fall on the map.

    As slices it would be the same; their backward passes fill a whole weight with zeros for each.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, side: int, firsts: _Places) -> Tensor:
        ctx.side, ctx.firsts = side, firsts
        kernel = weight.permute(0, 2, 3, 1)  # (K, 3, 3, C)
        return torch.cat([kernel[:, y : y + side, x : x + side].flatten(1) for y, x in firsts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = grad.reshape(len(grad), ctx.side, ctx.side, -1).chunk(len(ctx.firsts))
        kernel = grad.new_zeros(len(parts[0]), 3, 3, parts[0].shape[3])
        for part, (y, x) in zip(parts, ctx.firsts, strict=True):
            kernel[:, y : y + ctx.side, x : x + ctx.side] += part
        return kernel.permute(0, 3, 1, 2), None, None


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
