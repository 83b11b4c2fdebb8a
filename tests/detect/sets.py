"""Annotated images in memory, and detections near their objects, for tests of figures."""

from pathlib import Path

import numpy as np

from firstsight.detect.annotations import AnnotatedImages, Detections, Objects, Picture
from firstsight.detect.masks import bitmap, encode


def objects(boxes, labels, **values):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    count = len(boxes)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    flags = {name: np.zeros(count, bool) for name in ("crowd", "difficult")}
    flags |= {name: np.array(values[name], bool) for name in flags if name in values}
    area = np.array(values.get("area", area), np.float32)
    masks = tuple(values.get("masks", ()))
    return Objects(boxes=boxes, labels=np.array(labels, np.int64), area=area, masks=masks, **flags)


def images(*each, classes=2, side=160):
    pictures = [
        Picture(name=f"{i}.png", image_id=i, width=side, height=side, objects=one)
        for i, one in enumerate(each)
    ]
    return AnnotatedImages(
        root=Path("nowhere"),
        pictures=tuple(pictures),
        categories=tuple("abcdefgh"[:classes]),
        category_ids=tuple(range(1, classes + 1)),
    )


def detections(boxes, scores, labels, masks=None):
    return Detections(
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        scores=np.array(scores, np.float32),
        labels=np.array(labels, np.int64),
        masks=masks,
    )


def outline(box, cut=0.25):
    """A box without its upper left corner, as a polygon."""
    x1, y1, x2, y2 = (float(value) for value in box)
    w, h = (x2 - x1) * cut, (y2 - y1) * cut
    return np.array([(x1 + w, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1 + h)])


def drawn(seed=0, count=8, classes=4, masks=False):
    """Images with objects of all sizes, crowds among them, and noisy detections with equal scores.

    The last class has detections, and no object; one image has no object, one no detection.
    """
    rng = np.random.default_rng(seed)
    truths, found = [], []
    for i in range(count):
        boxes = _boxes(rng, 0 if i == 2 else 9)
        labels = rng.integers(0, classes - 1, len(boxes))
        crowd = rng.random(len(boxes)) < 0.15
        shapes = [
            encode(bitmap((outline(b),), 160, 160)) if c else (outline(b),)
            for b, c in zip(boxes, crowd, strict=True)
        ]
        own = objects(boxes, labels, crowd=crowd, masks=shapes if masks else ())
        truths.append(own)
        near = (boxes + rng.normal(0, 3, boxes.shape))[rng.random(len(boxes)) < 0.9]
        near = np.concatenate([near, near + 2, _boxes(rng, 6)]) if i != 3 else near[:0]
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        guesses = rng.integers(0, classes, len(near))
        if len(boxes) and len(near):
            sure = rng.random(len(near)) < 0.8
            closest = np.abs(near[:, None] - boxes[None]).sum(axis=2).argmin(axis=1)
            guesses = np.where(sure, labels[closest], guesses)
        scores = rng.integers(1, 20, len(near)) / 20  # many are equal
        runs = tuple(encode(bitmap((outline(b, 0.3),), 160, 160)) for b in near)
        found.append(detections(near, scores, guesses, runs if masks else None))
    return images(*truths, classes=classes), found


def _boxes(rng, count):
    corner = rng.uniform(0, 100, (count, 2))
    side = rng.choice([12, 30, 50, 120], (count, 1)) * rng.uniform(0.7, 1.0, (count, 2))
    return np.concatenate([corner, np.minimum(corner + side, 160)], axis=1)
