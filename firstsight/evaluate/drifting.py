"""The frozen backbone that does not stay the same: batch-norm in training mode, as PIC's code."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from firstsight.backbones import Backbone
from firstsight.features import Reader, extract
from firstsight.sources.base import Source

Tested = Callable[[], tuple[Tensor, Tensor]]
"""Features (M, C) and labels (M,) of the test images, as they are after an epoch."""


def still(rows: Tensor, labels: Tensor) -> Tested:
    """Those of a backbone that stays the same."""
    return lambda: (rows, labels)


class Drifting(Backbone):
    """A copy of a backbone whose batch-norm runs in training mode while a head learns on it.

    differs from the standard protocol: features of a training image depend on the others of its
    batch, running statistics move towards those of the crops, and the test images are read with
    these. Weights rest, but at the end it is another network.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.network = copy.deepcopy(backbone)
        self.name, self.stem, self.stride = backbone.name, backbone.stem, backbone.stride
        self.width, self.map_width = backbone.width, backbone.map_width
        self.learning = True

    def feature_map(self, images: Tensor) -> Tensor:
        """As the copy has it."""
        return self.network.feature_map(images)

    def features(self, images: Tensor) -> Tensor:
        """(B, C); while a head learns, by the statistics of these images, which move its own."""
        self.network.train(self.learning)
        return self.network.features(images)

    def tested(self, asked: Source, reader: Reader, labels: Tensor) -> Tested:
        """The test images, read again each time: by running statistics, which rest meanwhile."""

        def again() -> tuple[Tensor, Tensor]:
            self.learning = False
            values = extract(self, asked, reader).values
            self.learning = True
            return values, labels

        return again
