"""Batches on their way to the device while it still computes the step before."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from firstsight.batch import Batch


def ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches in the same order, on `device` where that is a CUDA device.

    There each is sent before the one in front of it is handed out: from pinned memory, which the
    device reads without the processor, on a stream of its own, beside the arithmetic. On all other
    devices nothing is done, since nothing would be gained.
    """
    return Ahead(device).over(batches) if device.type == "cuda" else batches


class Ahead:
    """Sends batches to a CUDA device on a side stream, one ahead of what is used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def over(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """All batches on the device, in order."""
        sent: Batch | None = None
        for batch in itertools.chain(batches, [None]):
            ready = self.arrived(sent) if sent is not None else None
            # after `arrived`, which waits for all that is on its way
            sent = self.send(batch) if batch is not None else None
            if ready is not None:
                yield ready

    def send(self, batch: Batch) -> Batch:
        """The batch on the device, its numbers still to come."""
        with torch.cuda.stream(self.side):
            return batch.pin_memory().to(self.device)

    def arrived(self, batch: Batch) -> Batch:
        """The batch, which whatever the device is told from here on may read."""
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self.side)
        for tensor in batch.tensors():
            if tensor.is_cuda:
                tensor.record_stream(now)  # else its memory would be given away while it is read
        return batch
