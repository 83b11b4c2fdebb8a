"""How well a network marks the pixels of a set: mean IoU over classes, and pictures of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from firstsight import distributed
from firstsight.detect import pictures
from firstsight.detect.asking import answers
from firstsight.detect.segmentation_data import SegmentedImages, confusion, mean_iou
from firstsight.detect.settings import Training
from firstsight.sources.base import Pixels


def judged(
    segmenter: nn.Module, images: SegmentedImages, config: Training, out: Path | None = None
) -> dict[str, Any]:
    """The figures of a set of images, and what they took; pictures go into `out`.

    `semantic` holds mIoU and accuracy in percent (`segmentation_data.mean_iou`), counted at the
    size of the masks; `per_class` a row for each class: its pixels, its IoU, and the share of them
    that were found (recall).
    """
    classes = len(images.categories)
    counted = np.zeros((classes, classes), np.int64)
    drawn = set(pictures.some(len(images), config.seed)) if out else set()

    def use(position: int, image: Tensor, scores: Tensor) -> Pixels | None:
        """Count the pixels of an image; what was found in it, where it will be drawn."""
        picture = images.pictures[position]
        found = classified(scores, picture.width, picture.height)
        np.add(counted, confusion(images.indices(position), found, classes), out=counted)
        return found if position in drawn else None

    found, took = answers(segmenter, images, config, use)
    table = sum(distributed.collect(counted), np.zeros_like(counted))
    if out and distributed.rank() == 0:
        kept = {position: one for position, one in found.items() if one is not None}
        pictures.save_marks(out / "pictures", images, kept)
    figures = mean_iou(table)
    rows = [
        {"name": name, "pixels": int(row.sum()), "IoU": iou, "recall": _share(row[i], row.sum())}
        for i, (name, row, iou) in enumerate(
            zip(images.categories, table, figures.pop("per_class"), strict=True)
        )
    ]
    return {"semantic": figures, "per_class": rows, **took}


def classified(scores: Tensor, width: int, height: int) -> Pixels:
    """(height, width) uint8 the class with the highest score of (K, h, w), at another size."""
    whole = F.interpolate(scores[None], (height, width), mode="bilinear", align_corners=False)
    found: Pixels = whole[0].argmax(0).to("cpu").numpy().astype(np.uint8)
    return found


def _share(part: Any, whole: Any) -> float | None:
    return 100 * float(part) / float(whole) if whole else None
