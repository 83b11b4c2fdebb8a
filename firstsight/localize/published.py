"""What Tobias' released code does differently from its paper, kept to reproduce its figures."""

from __future__ import annotations

import cv2
import numpy as np
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from firstsight.geometry import Box, object_cells

_SIDE = 256  # what maps are scaled to, although images and boxes have 224 pixels


def cam_box(activation: ArrayLike) -> Box | None:
    """The box of a class activation map (h, w) in an image of 224 pixels, as published.

    The map is cut to 256 grey levels and scaled bilinearly to 256 pixels; the largest component
    above its mean, connected over edges, gives a box that includes its last pixel, of which the
    corners are moved into 4 to 220. Nothing is scaled back from 256 to 224. None: no component.
    """
    values = np.asarray(activation, np.float64)
    if not np.isfinite(values).all() or values.max() == values.min():
        return None
    values = values - values.min()
    grey = np.trunc(values / values.max() * 255).astype(np.uint8)
    large = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR)
    cells = object_cells(large, connectivity=4)
    if cells is None:
        return None
    rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
    x1, y1 = max(float(columns[0]), 4.0), max(float(rows[0]), 4.0)
    return x1, y1, min(float(columns[-1]), 220.0), min(float(rows[-1]), 220.0)


def pooled_grid(features: Tensor) -> Tensor:
    """(B, n, n) the published masks of feature maps (B, C, h, w): max-pool, then sum of channels.

    The pooling (2 x 2, stride 2, padding 1) takes rows {0}, {1, 2}, {3, 4}, {5, 6} of a map of 7
    together, and so lies up to 24 pixels beside the cells that are cut out later.
    """
    return F.max_pool2d(features, kernel_size=2, stride=2, padding=1).double().sum(dim=1)


def heat(activation: ArrayLike) -> NDArray[np.uint8]:
    """(h, w) grey levels of a map: (S - min) / max, times 255; 0 where it is not finite or flat.

    As published it is the maximum, not the range, that is divided by.
    """
    values = np.asarray(activation, np.float64)
    if not np.isfinite(values).all() or values.max() <= 0:
        return np.zeros(values.shape, np.uint8)
    return np.asarray((values - values.min()) / values.max() * 255).clip(0, 255).astype(np.uint8)
