"""Several views of several sizes through one network, each size in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn


def encoded(network: nn.Module, views: Sequence[Tensor]) -> Tensor:
    """(V * B, ...) what `network` makes of V views (B, 3, H, W), view after view.

    Neighbours of one size go through it as one batch, with common batch-norm statistics, as in
    SwAV's and DINO's code.
    """
    runs = [torch.cat(list(run)) for _, run in groupby(views, key=lambda view: view.shape[-1])]
    return torch.cat([network(run) for run in runs])
