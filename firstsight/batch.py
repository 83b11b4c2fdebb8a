"""What travels from the loader to a method: views, where each was cut from, and of which image."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Colours:
    """What was drawn for B views and is still to be done to them, in the order of `Drawn`.

    Stays on the CPU when a batch moves: which images draw what must be known without waiting.
    """

    jitter: Tensor
    """(B,) of bool: the colours are jittered."""
    order: Tensor
    """(B, 4) order of the jitter."""
    factors: Tensor
    """(B, 4) factors of brightness, contrast, saturation; hue shift in turns."""
    gray: Tensor
    """(B,) of bool: turned grey."""
    sigmas: Tensor
    """(B,) standard deviation of the blur, pixels of the view; 0 is no blur."""
    shrinks: Tensor
    """(B,) how many times smaller and large again instead; 0: not at all."""
    solarize: Tensor
    """(B,) of bool: values from 128 up are inverted."""

    def parts(self, count: int) -> list[Colours]:
        """The same in `count` parts, cut as `Batch.chunks` cuts."""
        names = [field.name for field in fields(self)]
        cut = zip(*(getattr(self, name).tensor_split(count) for name in names), strict=True)
        return [Colours(**dict(zip(names, part, strict=True))) for part in cut]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B images in V views each.

    The geometry travels with the pixels: methods that compare places (SCRL, DenseCL, PixPro) and
    views that merge backgrounds need to know what each view shows of the original.
    """

    views: tuple[Tensor, ...]
    """V tensors (B, 3, H, W): uint8 as the loader makes them, float and normalised for a method."""
    crops: tuple[Tensor, ...]
    """V tensors (B, 4): x1, y1, x2, y2 in pixels of the upright original, half-open."""
    flips: tuple[Tensor, ...]
    """V tensors (B,) of bool: the view is mirrored left to right."""
    index: Tensor
    """(B,) position of each image in the source (of the slot, where a bad file was replaced)."""
    sizes: Tensor | None = None
    """(B, 2) width and height of the upright originals, pixels; None where nobody asks for it."""
    label: Tensor | None = None
    """(B,) integer labels, where the source has them; never seen by a method's loss."""
    bad: tuple[str, ...] = ()
    """Identities of the files that could not be decoded and were replaced in this batch."""
    colours: tuple[Colours, ...] = ()
    """For each view what the device has still to do to it, the flip first; empty: nothing."""
    coming: Tensor | None = None
    """(W * B,) positions of the images of the next step, over all ranks; on the CPU."""

    def __len__(self) -> int:
        return len(self.index)

    @property
    def crops_in_shares(self) -> tuple[Tensor, ...]:
        """`crops` in shares of the width and the height of the image, 0 to 1."""
        if self.sizes is None:
            raise ValueError("crops in shares of the image need `sizes` of the originals")
        return tuple(crop / self.sizes.repeat(1, 2) for crop in self.crops)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on `device`."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

        return replace(
            self,
            views=move(self.views),
            crops=move(self.crops),
            flips=move(self.flips),
            index=self.index.to(device, non_blocking=True),
            sizes=None if self.sizes is None else self.sizes.to(device, non_blocking=True),
            label=None if self.label is None else self.label.to(device, non_blocking=True),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that `to` moves."""
        may = (tensor for tensor in (self.sizes, self.label) if tensor is not None)
        return (*self.views, *self.crops, *self.flips, self.index, *may)

    def pin_memory(self) -> Batch:
        """The same batch in memory that a CUDA device reads by itself (torch's loader calls it)."""

        def pinned(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(t if t.is_cuda or t.is_pinned() else t.pin_memory() for t in tensors)

        return replace(
            self,
            views=pinned(self.views),
            crops=pinned(self.crops),
            flips=pinned(self.flips),
            index=pinned((self.index,))[0],
            sizes=None if self.sizes is None else pinned((self.sizes,))[0],
            label=None if self.label is None else pinned((self.label,))[0],
        )

    def chunks(self, count: int) -> list[Batch]:
        """The batch in `count` parts of neighbours that differ by one image at most."""

        def parts(tensor: Tensor) -> tuple[Tensor, ...]:
            return tensor.tensor_split(count)

        views, crops, flips = (
            list(zip(*map(parts, tensors), strict=True))
            for tensors in (self.views, self.crops, self.flips)
        )
        sizes, labels = (
            [None] * count if tensor is None else parts(tensor)
            for tensor in (self.sizes, self.label)
        )
        colours = list(zip(*(one.parts(count) for one in self.colours), strict=True))
        return [
            replace(self, views=v, crops=c, flips=f, index=i, sizes=s, label=label, colours=drawn)
            for v, c, f, i, s, label, drawn in zip(
                *(views, crops, flips, parts(self.index), sizes, labels),
                colours or [()] * count,
                strict=True,
            )
        ]
