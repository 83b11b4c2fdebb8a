"""Images of a source as localisation sees them: all of each, squeezed into a square."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firstsight.loader import Chunks, chunks
from firstsight.sources.base import Source, UnreadableImage
from firstsight.views import Interpolation
from firstsight.views.apply import resize


@dataclass(frozen=True, kw_only=True)
class Squares(Chunks):
    """Images resized to (size, size) whatever their shape, and which they are."""

    def __getitem__(self, chunk: int) -> tuple[Tensor, Tensor]:
        """(B', 3, size, size) uint8; (B', 3) position, width and height of those readable."""
        found, pictures = [], []
        for i in self.index[chunk * self.batch_size : (chunk + 1) * self.batch_size]:
            try:
                pixels = self.source.pixels(int(i))
            except UnreadableImage:
                continue
            pictures.append(resize(pixels, self.size, self.size, self.interpolation))
            found.append((int(i), pixels.shape[1], pixels.shape[0]))
        stack = np.stack(pictures) if pictures else np.empty((0, self.size, self.size, 3), np.uint8)
        told = torch.tensor(found, dtype=torch.long).reshape(-1, 3)
        return torch.from_numpy(stack).permute(0, 3, 1, 2), told


def squares(
    source: Source,
    index: NDArray[np.int64],
    size: int,
    batch_size: int,
    workers: int,
    interpolation: Interpolation,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the images at `index`, in batches: pixels, and (B', 3) which."""
    made = Squares(
        source=source, index=index, size=size, batch_size=batch_size, interpolation=interpolation
    )
    for pixels, told in chunks(made, workers):
        if len(told):
            yield pixels, told
