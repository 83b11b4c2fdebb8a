"""Online readings: how good the features are, measured while training goes on.

A probe looks at a backbone in evaluation mode, without gradient, on sources of its own; it leaves
no trace in weights or batch-norm statistics. Linear probes train while the backbone does, on
features that are cut off from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight import distributed, optim
from firstsight.backbones import Backbone
from firstsight.features import Reader, Seen, extract, pooled, subset
from firstsight.loader import Labelled, labelled
from firstsight.metrics import knn_accuracy
from firstsight.nets.heads import Descent, Heads
from firstsight.order import Epochs
from firstsight.settings import Pretrain
from firstsight.sources.base import Source, class_count, common_labels


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
        return self.accuracy(self.see(backbone, len(self.train), len(self.test)))

    def read_quickly(self, backbone: Backbone) -> float:
        """Top-1, percent, over a fixed random part of both sources."""
        return self.accuracy(self.see(backbone, self.images, self.images // 2))

    def see(self, backbone: Backbone, bank: int, queries: int) -> Seen:
        """Features of `bank` images of the first source and of `queries` of the second."""
        train = extract(backbone, self.train, self.reader, subset(self.train, bank, self.seed))
        test = extract(backbone, self.test, self.reader, subset(self.test, queries, self.seed))
        bank_labels, test_labels = self._labels()
        return Seen(train.values, train.labels(bank_labels), test.values, test.labels(test_labels))

    def accuracy(self, seen: Seen) -> float:
        """Top-1 of k-NN, percent."""
        figures = knn_accuracy(
            seen.train,
            seen.train_labels,
            seen.test,
            seen.test_labels,
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
            **self.sources,
        }

    @property
    def sources(self) -> dict[str, Any]:
        """What any reading of these two sources depends on."""
        return {
            **self.reader.protocol,
            "seed": self.seed,
            "classes": len(self.test.classes),
            "train": {"source": self.train.spec, "images": len(self.train)},
            "test": {"source": self.test.spec, "images": len(self.test)},
        }


class Online:
    """What a run reads of its backbone on the way: k-NN, and linear probes that train beside it.

    The probes learn from the run's own batches where `--data` gives the labels, and otherwise from
    batches of the labelled source, every so many steps. Their learning rates fall along half a
    cosine over the run.
    """

    def __init__(
        self, probe: KnnProbe, config: Pretrain, source: Source, width: int, device: torch.device
    ) -> None:
        """`source` is that of pretraining, `width` the backbone's."""
        self.probe, self.knn = probe, config.probe in ("knn", "both")
        self.lrs = config.probe_lrs if config.probe in ("linear", "both") else ()
        self.every = 1 if probe.train is source else config.probe_every
        self._own, self._config = probe.train is source, config
        self._images: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._descent: Descent | None = None
        if self.lrs:
            heads = Heads(len(self.lrs), width, class_count(probe.train), seed=config.seed)
            self._descent = Descent(heads.to(device), [(lr, 0.0) for lr in self.lrs])

    def begin(self, first: int, steps: int) -> None:
        """Make ready for steps `first` to `steps - 1`."""
        if not self._descent or self._own:
            return
        train, world = self.probe.train, distributed.world()
        size = min(self._config.batch_size, len(train)) // world * world
        images = Labelled(
            source=train,
            size=self.probe.reader.size,
            order=Epochs(len(train), max(size, world), self._config.seed),
            seed=self._config.seed,
            rank=distributed.rank(),
            world=world,
        )
        every = self.every
        self._images = labelled(images, first // every, steps // every, self._config.workers)

    def learn(
        self, step: int, steps: int, backbone: Backbone, features: Tensor, labels: Tensor | None
    ) -> None:
        """Train the probes, where it is their turn after `step`.

        features (B, C) and labels (B,) are those of the run's batch. Nothing flows back into the
        backbone, and its batch-norm statistics stay as they are.
        """
        if not self._descent or (step + 1) % self.every:
            return
        if not self._own:
            pixels, labels = next(self._images)
            features = pooled(backbone, pixels, self.probe.reader)
        assert labels is not None
        # every rank trains the same probes on the whole batch: there is no gradient to average
        rows = distributed.gather(features.float())
        truth = distributed.gather(labels.to(rows.device))
        factor = optim.cosine(step / steps, 1.0, 0.0)
        self._descent.step(rows, truth, factor)

    def untrained(self, backbone: Backbone) -> dict[str, float]:
        """k-NN before the first step, on all images and on a part of them."""
        if not self.knn:
            return {}
        return {
            "knn": self.probe.read(backbone),
            "knn_quick": self.probe.read_quickly(backbone),
        }

    def quickly(self, backbone: Backbone) -> dict[str, float]:
        """Readings on a fixed random part of both sources."""
        images = self.probe.images
        seen = self.probe.see(backbone, images if self.knn else 0, images // 2)
        return self._figures(seen, "_quick")

    def fully(self, backbone: Backbone) -> tuple[dict[str, float], Seen]:
        """Readings on all images, and the features that they were taken from."""
        seen = self.probe.see(backbone, len(self.probe.train), len(self.probe.test))
        return self._figures(seen, ""), seen

    def _figures(self, seen: Seen, suffix: str) -> dict[str, float]:
        figures = {f"knn{suffix}": self.probe.accuracy(seen)} if self.knn else {}
        if self._descent:
            judged = self._descent.heads.judged(seen.test, seen.test_labels)
            for lr, accuracy in zip(self.lrs, judged, strict=True):
                figures[f"linear{suffix}_{lr:g}"] = accuracy["top1"]
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The probes as they stand; empty where there are none."""
        return self._descent.state_dict() if self._descent else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the probes as they stood."""
        if self._descent and state:
            self._descent.load_state_dict(state)
