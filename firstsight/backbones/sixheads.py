"""The tiny transformer that ssl-small calls DeiT-Tiny: six heads of 64, where DeiT has three."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight.backbones import Backbone

NAME = "vit_tiny_6heads"
_WIDTH, _DEPTH, _HEADS, _HEAD, _HIDDEN, _PATCH, _DROP = 192, 12, 6, 64, 768, 16, 0.1


class SixHeads(Backbone):
    """A vision transformer of 12 blocks as ssl-small trains it (Shi et al. 2022, arXiv 2107.14762).

    Unlike DeiT-Tiny (timm:deit_tiny_patch16_224): queries, keys and values are 384 wide and have no
    biases, positions begin as N(0, 1), dropout is .1 in training, and the projection of patches
    stays as it was drawn. Images of another size than `size` get their positions by interpolation.
    """

    width = map_width = _WIDTH
    stride = _PATCH
    last_stage = _DEPTH - 1
    name, stem = NAME, "standard"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, _WIDTH, _PATCH, _PATCH).requires_grad_(False)
        self.first = nn.Parameter(torch.randn(1, 1, _WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // _PATCH) ** 2, _WIDTH))
        self.dropout = nn.Dropout(_DROP)
        self.blocks = nn.ModuleList(_Block() for _ in range(_DEPTH))
        self.norm = nn.LayerNorm(_WIDTH)

    def feature_map(self, images: Tensor) -> Tensor:
        """(B, 192, h, w): the patches behind the closing norm."""
        return self.map_and_features(images)[0]

    def stage_map(self, images: Tensor, stage: int) -> Tensor:
        """(B, 192, h, w): the patches after a block, 0 to 11, not normalised."""
        return _laid_out(self._tokens(images, stage + 1), images)

    def features(self, images: Tensor) -> Tensor:
        """(B, 192): the class token behind the closing norm."""
        return self.map_and_features(images)[1]

    def map_and_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 192, h, w) and (B, 192), each as above."""
        tokens = self.norm(self._tokens(images, _DEPTH))
        return _laid_out(tokens, images), tokens[:, 0]

    def _tokens(self, images: Tensor, blocks: int) -> Tensor:
        """(B, 1 + h * w, 192) after so many blocks."""
        from timm.layers.pos_embed import resample_abs_pos_embed

        patches = self.patches(images)  # (B, 192, h, w)
        x = torch.cat([self.first.expand(len(images), -1, -1), patches.flatten(2).mT], dim=1)
        sides = list(patches.shape[2:])
        x = cast(Tensor, self.dropout(x + resample_abs_pos_embed(self.positions, sides)))
        for block in self.blocks[:blocks]:
            x = block(x)
        return x


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        inner = _HEADS * _HEAD
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv = nn.Linear(_WIDTH, 3 * inner, bias=False)
        self.out = nn.Sequential(nn.Linear(inner, _WIDTH), nn.Dropout(_DROP))
        self.mlp = nn.Sequential(
            *(nn.Linear(_WIDTH, _HIDDEN), nn.GELU(), nn.Dropout(_DROP)),
            *(nn.Linear(_HIDDEN, _WIDTH), nn.Dropout(_DROP)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, 192)."""
        parts = self.qkv(self.norm1(x)).reshape(*x.shape[:2], 3, _HEADS, _HEAD)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, heads, N, 64) each
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return cast(Tensor, x + self.mlp(self.norm2(x)))


def _laid_out(tokens: Tensor, images: Tensor) -> Tensor:
    h, w = images.shape[2] // _PATCH, images.shape[3] // _PATCH
    return tokens[:, 1:].mT.reshape(len(images), _WIDTH, h, w)
