"""Where the cells of a feature map lie in the image that its view was cut from."""

from __future__ import annotations

import torch
from torch import Tensor

from firstsight.nets import full


def cell_centres(crops: Tensor, flips: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, 2) x and y of the centres of cells, row by row, in pixels of the image.

    crops are (B, 4) boxes x1, y1, x2, y2, half-open, flips (B,) of bool: the columns of a mirrored
    view run from right to left.
    """
    crops = full(crops)
    across = (torch.arange(width, device=crops.device, dtype=crops.dtype) + 0.5) / width
    down = (torch.arange(height, device=crops.device, dtype=crops.dtype) + 0.5) / height
    across = torch.where(flips[:, None], 1 - across, across)  # (B, width), shares of the crop
    x1, y1, x2, y2 = crops[:, :, None].unbind(dim=1)  # (B, 1) each
    x = (x1 + across * (x2 - x1))[:, None, :].expand(-1, height, -1)  # (B, height, width)
    y = (y1 + down * (y2 - y1))[:, :, None].expand(-1, -1, width)
    return torch.stack([x, y], dim=-1).flatten(1, 2)


def cell_diagonals(crops: Tensor, height: int, width: int) -> Tensor:
    """(B,) length of the diagonal of one cell, in pixels of the image."""
    crops = full(crops)
    return torch.hypot((crops[:, 2] - crops[:, 0]) / width, (crops[:, 3] - crops[:, 1]) / height)
