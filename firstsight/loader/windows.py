"""The sliding window: a part of the source is visited again and again while it moves on slowly.

Cao et al. 2020, https://arxiv.org/abs/2006.14618, section 3.2. Where every image is a class of its
own, an epoch visits each class once, and the network forgets it until the next. A window of W
images, shuffled anew in each pass and then moved on by S, visits an image in W / S passes running,
and then lets it rest until the window has come round.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from firstsight import distributed, keyed
from firstsight.errors import UserError
from firstsight.loader.cache import Shares
from firstsight.order import Epochs
from firstsight.settings import Pretrain

_PASS = 1
"""Part of the key of a pass's own order, beside the one of which images it holds."""


class Windows:
    """Pass k visits once, in an order of its own, each image of window k.

    Window k is W places from place k * S on (around the end) of one order of all images that never
    changes. What does not fill a batch at the end of a pass is left out of that pass. An epoch is
    as many visits as there are images; the run ends with a whole window. A window longer than the
    source is the source.
    """

    def __init__(self, images: int, batch_size: int, seed: int, window: int, stride: int) -> None:
        Epochs(images, batch_size, seed)  # refuses what no order can serve
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.window, self.stride = min(window, images), stride
        if self.window < batch_size:
            raise UserError(
                f"a window of {window} images does not fill a batch of {batch_size}; "
                f"use --window-size {batch_size} or more"
            )
        self.steps_per_pass = self.window // batch_size
        self.steps_per_epoch = self.steps_per_pass * images / self.window
        self._pass, self._order = -1, np.empty(0, np.int64)
        self._all: NDArray[np.int64] | None = None

    def steps(self, epochs: float) -> int:
        """Steps of the windows that so many epochs take, the last one whole."""
        return math.ceil(epochs * self.images / self.window) * self.steps_per_pass

    def epoch(self, step: int) -> int:
        """The pass that `step` belongs to, from 0: a visit in each has views of its own."""
        return step // self.steps_per_pass

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) images of `step`, over all ranks."""
        if (number := self.epoch(step)) != self._pass:
            generator = np.random.default_rng(keyed.seed(self.seed, number, _PASS))
            self._pass, self._order = number, generator.permutation(self.members(number))
        start = (step % self.steps_per_pass) * self.batch_size
        return self._order[start : start + self.batch_size]

    def members(self, number: int) -> NDArray[np.int64]:
        """(W,) images of window `number`."""
        if self._all is None:
            self._all = np.random.default_rng(keyed.seed(self.seed, 0)).permutation(self.images)
        return self._all[(number * self.stride + np.arange(self.window)) % self.images]


class RandomWindows(Windows):
    """The windows of PIC's released code, which never slide: for comparison.

    Its sampler takes the end of the window for the end of the source. So the window stands still on
    the first W images of an order of all, and that order is drawn anew where the window would move
    past its end: at every pass but each (W / S)-th, which repeats the images of the one before.
    Where W is S it is never drawn anew (their code without `--shuffle-per-epoch`): the other images
    are never seen.
    """

    def members(self, number: int) -> NDArray[np.int64]:
        """(W,) images of window `number`."""
        if number * self.stride % self.window == 0:  # not drawn anew for this one
            number = number - 1 if number and self.stride < self.window else 0
        generator = np.random.default_rng(keyed.seed(self.seed, number))
        return generator.permutation(self.images)[: self.window]


Order: TypeAlias = Epochs | Windows
"""step -> indices."""


def order_of(config: Pretrain, images: int) -> Order:
    """The order in which a run visits its images."""
    if config.cache == "part":
        if config.order != "epochs":
            raise UserError(
                f"--order {config.order} goes over all images, and --cache part has a share of "
                "them on each machine; use --cache shared or --order epochs"
            )
        return Shares(images, config.batch_size, config.seed, distributed.machines())
    if config.order == "epochs":
        return Epochs(images, config.batch_size, config.seed)
    kind = Windows if config.order == "sliding" else RandomWindows
    window, stride = config.window_size, config.window_stride
    return kind(images, config.batch_size, config.seed, window, stride)
