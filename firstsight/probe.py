"""Online readings: how good the features are, measured while training goes on.

A probe looks at a backbone in evaluation mode, without gradient, on sources of its own; it leaves
no trace in weights or batch-norm statistics.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight.backbones import Backbone
from firstsight.features import Reader, extract, subset
from firstsight.metrics import knn_accuracy
from firstsight.sources.base import Source, common_labels


@dataclass(frozen=True, kw_only=True)
class KnnProbe:
    """k-NN accuracy of the pooled features on two labelled sources."""

    train: Source
    test: Source
    reader: Reader
    k: int
    temperature: float
    images: int
    """Images of the bank in a quick reading; half as many are classified."""
    seed: int

    def __post_init__(self) -> None:
        self._labels()  # what is missing is said before anything is trained

    def _labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return common_labels(self.train, self.test, "--probe-train", "--probe-test")

    def read(self, backbone: Backbone) -> float:
        """Top-1, percent, over all images of both sources."""
        return self._accuracy(backbone, len(self.train), len(self.test))

    def read_quickly(self, backbone: Backbone) -> float:
        """Top-1, percent, over a fixed random part of both sources."""
        return self._accuracy(backbone, self.images, self.images // 2)

    def _accuracy(self, backbone: Backbone, bank: int, queries: int) -> float:
        train = extract(backbone, self.train, self.reader, subset(self.train, bank, self.seed))
        test = extract(backbone, self.test, self.reader, subset(self.test, queries, self.seed))
        bank_labels, test_labels = self._labels()
        figures = knn_accuracy(
            train.values,
            train.labels(bank_labels),
            test.values,
            test.labels(test_labels),
            [self.k],
            temperature=self.temperature,
        )
        return figures[self.k]["top1"]

    @property
    def protocol(self) -> dict[str, Any]:
        """All that the figure depends on."""
        return {
            "k": self.k,
            "temperature": self.temperature,
            "weighting": "softmax",
            "metric": "cosine",
            "layer": "backbone",
            "representation": "norm",
            **self.reader.protocol,
            "seed": self.seed,
            "classes": len(self.test.classes),
            "train": {"source": self.train.spec, "images": len(self.train)},
            "test": {"source": self.test.spec, "images": len(self.test)},
        }
