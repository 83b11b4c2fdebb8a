"""In which order images are visited: step -> indices, with no memory of earlier steps."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.errors import UserError


class Epochs:
    """Every image once an epoch, in an order drawn from (seed, epoch).

    What does not fill a batch at the end of an epoch is left out of that epoch.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        if images < 2:
            raise UserError(f"{images} image is too few to learn from; give --data more of them")
        if images < batch_size:
            raise UserError(
                f"{images} images do not fill a batch of {batch_size}; use --batch-size {images}"
            )
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.steps_per_epoch = images // batch_size
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, one at least."""
        return max(1, round(epochs * self.steps_per_epoch))

    def epoch(self, step: int) -> int:
        """The pass over the source that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> NDArray[np.int64]:
        """(batch_size,) images of `step`, over all ranks."""
        if (epoch := self.epoch(step)) != self._epoch:
            generator = np.random.default_rng(keyed.seed(self.seed, epoch))
            self._epoch, self._order = epoch, generator.permutation(self.images)
        start = (step % self.steps_per_epoch) * self.batch_size
        return self._order[start : start + self.batch_size]
