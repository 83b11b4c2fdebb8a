"""A set of coloured squares on noise, in memory: what detectors are tried on."""

from pathlib import Path

import numpy as np

from firstsight.detect.annotations import AnnotatedImages, Objects, Picture
from firstsight.detect.masks import encode
from firstsight.detect.settings import Train

COLOURS = np.array([[220, 40, 40], [40, 60, 220]])


class Squares(AnnotatedImages):
    """Images of 64 to 96 pixels with one to three squares of two kinds; image i is a function of
    i."""

    def pixels(self, index):
        picture = self.pictures[index]
        random = np.random.default_rng(1000 + index)
        image = random.integers(90, 160, (picture.height, picture.width, 3)).astype(np.uint8)
        for (x1, y1, x2, y2), label in zip(
            picture.objects.boxes.astype(int), picture.objects.labels, strict=True
        ):
            image[y1:y2, x1:x2] = COLOURS[label]
        return image


def squares(count, first=0, objects=3, masks=True):
    """`count` images from number `first` on; each third is tall."""
    pictures = []
    for i in range(first, first + count):
        random = np.random.default_rng(i)
        width, height = (96, 64) if i % 3 else (64, 96)
        n = int(random.integers(1, objects + 1))
        corner = random.integers(0, 36, (n, 2))
        side = random.integers(18, 28, (n, 1))
        boxes = np.concatenate([corner, corner + side], 1).astype(np.float32)
        drawn = []
        for x1, y1, x2, y2 in boxes.astype(int):
            whole = np.zeros((height, width), bool)
            whole[y1:y2, x1:x2] = True
            drawn.append(encode(whole))
        found = Objects(
            boxes=boxes,
            labels=random.integers(0, 2, n),
            crowd=np.zeros(n, bool),
            difficult=np.zeros(n, bool),
            area=(side[:, 0] ** 2).astype(np.float32),
            masks=tuple(drawn) if masks else (),
        )
        pictures.append(
            Picture(name=f"{i}.png", image_id=i, width=width, height=height, objects=found)
        )
    names = ("red", "blue")
    return Squares(
        root=Path("none"), pictures=tuple(pictures), categories=names, category_ids=(0, 1)
    )


def config(out="none", **values):
    """Settings of a run of a few small steps."""
    small = {
        "checkpoint": "random:timm:test_resnet",
        "data": "squares",
        "annotations": "squares",
        "out": str(out),
        "channels": 16,
        "norm": "batch",
        "short_sides": (64,),
        "test_side": 64,
        "long_side": 128,
        "rois": 32,
        "proposals": (50, 50),
        "proposals_before": (100, 100),
        "epochs": 2.0,
        "batch_size": 4,
        "warmup_steps": 2,
        "base_lr": 0.02,
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
    }
    return Train(**small | values)
