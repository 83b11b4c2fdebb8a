"""How long COCO's figures take: 5,000 images, 80 classes, as many objects as in COCO's val.

    python benchmarks/detection_figures.py [--images 5000] [--official]

Annotations and detections are made up: about 7 objects an image, 30 detections an image, most of
them near an object; masks are 12-cornered outlines in images of 480 x 640. Timed is `figures` from
what is in memory to all numbers, loading excluded; the best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from firstsight.detect.annotations import AnnotatedImages, Detections, Objects, Picture
from firstsight.detect.figures import figures
from firstsight.detect.masks import bitmap, encode

CLASSES, HEIGHT, WIDTH = 80, 480, 640
OBJECTS, DETECTIONS = 7.3, 30.0  # an image
SHAPES, LIKE = 100, 4  # outlines, and those like each: drawing all detections would take minutes


def boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    """Boxes of all sizes, (count, 4)."""
    side = np.exp(rng.uniform(np.log(10), np.log(400), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([WIDTH, HEIGHT]) - side.clip(max=470))
    return np.concatenate([corner, corner + side], axis=1).clip(0, [WIDTH, HEIGHT] * 2)


def outline(box: np.ndarray) -> np.ndarray:
    """The ellipse in a box, as a polygon of twelve corners."""
    turn = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    centre, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return centre + half * np.stack([np.cos(turn), np.sin(turn)], axis=1)


def made(images: int, masks: bool) -> tuple[AnnotatedImages, list[Detections]]:
    """Images with objects, and detections of which half are near one."""
    rng = np.random.default_rng(0)
    pictures, found = [], []
    shapes = np.repeat(boxes(rng, SHAPES), LIKE, axis=0)
    shapes += rng.normal(0, 3, shapes.shape)
    shapes[:, 2:] = np.maximum(shapes[:, 2:], shapes[:, :2] + 4)
    runs = [encode(bitmap((outline(box),), HEIGHT, WIDTH)) for box in shapes] if masks else []
    for i in range(images):
        own = boxes(rng, int(rng.poisson(OBJECTS)))
        labels = rng.integers(0, CLASSES, len(own))
        crowd = rng.random(len(own)) < 0.01
        count = int(rng.poisson(DETECTIONS))
        near = boxes(rng, count)
        guesses = rng.integers(0, CLASSES, count)
        own_kinds, kinds = (rng.integers(0, len(shapes), n) for n in (len(own), count))
        if len(own) and count:
            of = rng.integers(0, len(own), count)
            close = rng.random(count) < 0.5
            near = np.where(close[:, None], own[of] + rng.normal(0, 4, (count, 4)), near)
            near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
            guesses = np.where(close, labels[of], guesses)
            like = own_kinds[of] // LIKE * LIKE + rng.integers(0, LIKE, count)
            kinds = np.where(close, like, kinds)
        if masks:
            own, near = shapes[own_kinds], shapes[kinds]
        pictures.append(
            Picture(
                name=f"{i}.jpg",
                image_id=i,
                width=WIDTH,
                height=HEIGHT,
                objects=Objects(
                    boxes=own.astype(np.float32),
                    labels=labels,
                    crowd=crowd,
                    area=(own[:, 2:] - own[:, :2]).prod(axis=1).astype(np.float32) * 0.75,
                    difficult=np.zeros(len(own), bool),
                    masks=tuple((outline(box),) for box in own) if masks else (),
                ),
            )
        )
        found.append(
            Detections(
                boxes=near.astype(np.float32),
                scores=rng.random(count).astype(np.float32),
                labels=guesses,
                masks=tuple(runs[kind] for kind in kinds) if masks else None,
            )
        )
    names = tuple(f"class {k}" for k in range(CLASSES))
    truth = AnnotatedImages(
        root=Path("nowhere"),
        pictures=tuple(pictures),
        categories=names,
        category_ids=tuple(range(CLASSES)),
    )
    return truth, found


def main() -> None:
    """Time both, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--official", action="store_true", help="by pycocotools")
    parser.add_argument("--json", help="write the result here")
    ask = parser.parse_args()
    result = {}
    for masks in (False, True):
        truth, found = made(ask.images, masks)
        seconds, cpu = [], []
        for _ in range(ask.repeats):
            wall, used = time.perf_counter(), time.process_time()
            shown = figures(truth, found, official=ask.official)
            seconds.append(time.perf_counter() - wall)
            cpu.append(time.process_time() - used)
        name = "boxes and masks" if masks else "boxes"
        result[name] = {
            "seconds": min(seconds),
            "cpu_seconds": min(cpu),
            "objects": sum(len(p.objects) for p in truth.pictures),
            "detections": sum(len(one.scores) for one in found),
            "AP": {kind: shown[kind]["AP"] for kind in ("bbox", "segm") if kind in shown},
        }
        print(name, json.dumps(result[name]))
    if ask.json:
        Path(ask.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
