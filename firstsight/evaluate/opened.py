"""What a reading with labelled images begins with: the network, and both sources with labels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from firstsight import checkpoint, distributed
from firstsight.backbones import Backbone
from firstsight.features import Reader
from firstsight.sources import fetch, open_source
from firstsight.sources.base import Source, class_count, common_labels
from firstsight.views import Interpolation


class Opened(NamedTuple):
    """A backbone on its device, and what it is judged by."""

    backbone: Backbone
    reader: Reader
    source: Source
    """To learn from."""
    asked: Source
    """To be right about."""
    labels: NDArray[np.int64]
    asked_labels: NDArray[np.int64]
    """In the numbers of `source`."""
    classes: int
    device: torch.device


def opened(
    spec: str,
    *,
    train: str,
    test: str,
    size: int,
    precision: Literal["fp32", "bf16"],
    interpolation: Interpolation,
    workers: int,
    download: bool,
    device: str,
    threads: int,
) -> Opened:
    """Raises `UserError` where labels are missing, differ, or are of one class alone."""
    where = distributed.start(device, threads)
    backbone, about = checkpoint.load_backbone(spec)
    reader = Reader.like(
        about, size, precision=precision, workers=workers, interpolation=interpolation
    )
    backbone.to(where)
    if download:
        fetch(train, test)
    source, asked = open_source(train), open_source(test)
    labels, asked_labels = common_labels(source, asked, "--train", "--test")
    return Opened(backbone, reader, source, asked, labels, asked_labels, class_count(source), where)
