"""Static views: originals and augmented copies on disk, for measures that want fixed pairs.

The five kinds are those of ssl-small's experiments.sample-augs. Here they are seeded, in the order
of the source, and without loss.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.data.each import each
from firstsight.data.names import names_inside
from firstsight.errors import UserError
from firstsight.log import printable, say
from firstsight.sources import Source, UnreadableImage, open_source
from firstsight.sources.base import Pixels
from firstsight.sources.static import MANIFEST, read_manifest
from firstsight.views import Views
from firstsight.views.draw import draw

Aug = Literal["moco", "nointer", "super-hard", "hard", "easy"]
Iou = Literal["exact", "published"]

OVERLAPS = {"super-hard": (1e-4, 0.05, 2000), "hard": (0.05, 0.25, 1000), "easy": (0.25, 1.0, 1000)}
"""Smallest and largest IoU of the two crops, and how many pairs are tried."""
MEAN_COLOUR = (124, 116, 104)

_MOCO = Views()  # the crops, colours and flips of MoCo v2
_CORNER = Views(min_scale=(0.4,))
_CROPS = Views(flip=0.0, jitter=0.0, gray=0.0, blur=(0.0,))
_BLOCK = 100  # pairs drawn at a time
_NOISE, _PLACES, _FLIPS, _CORNERS = range(1, 5)  # what a key is for


def views(
    source: str,
    *,
    out: str,
    aug: Aug = "moco",
    images_per_class: int = 50,
    size: int = 224,
    iou: Iou = "exact",
    format: Literal["png", "jpeg"] = "png",
    seed: int = 0,
    workers: int = 0,
) -> dict[str, Any]:
    """Write OUT/NAME-0 (the original, in its size), -1, -2, ... and a manifest; what was done.

    Two views of each image; of the overlapping kinds ten: 1 and 2 the crops, 3 and 4 with their
    overlap replaced by uniform noise, 5 and 6 with a place of the same size, 7 to 10 the same in
    the mean colour. Crops are (half-open) boxes in pixels of the original; what is painted over is
    the overlap in pixels of the view; flips are drawn for each file, after that. Where no pair of
    crops has the wanted overlap the last one tried is taken, and counted in `missed`.

    differs from the paper: overlap is that of half-open boxes (`iou="published"`: their sides plus
    one in the intersection, but not in the areas), and views are PNG (`format="jpeg"`: quality 75).

    Everything is a function of (seed, position in the source): the same call goes on where it
    stopped. Raises `UserError` where `out` holds other views.
    """
    found = open_source(source)
    chosen = _chosen(found, images_per_class)
    names = names_inside(found)
    taken: set[str] = set()
    rows: list[dict[str, Any]] = []
    for index in chosen.tolist():
        name = names[index].rpartition(".")[0]
        name = names[index] if name in taken else name
        taken.add(name)
        label = None if found.labels is None else int(found.labels[index])
        rows.append({"name": name, "index": index, "label": label})
    asked = {
        "source": printable(source),
        "fingerprint": found.fingerprint(),
        "aug": aug,
        "images_per_class": images_per_class,
        "views": 10 if aug in OVERLAPS else 2,
        "size": size,
        "iou": iou,
        "format": format,
        "seed": seed,
        "classes": [printable(name) for name in found.classes],
    }
    folder = Path(out)
    try:
        _begin(folder, asked)
        made = _all_written(found, rows, folder, asked, workers)
        kept = [row for row, one in zip(rows, made, strict=True) if one is not None]
        missed = sum(not one.hit for one in made if one)
        _write(folder / MANIFEST, {**asked, "complete": True, "missed": missed, "files": kept})
    except OSError as error:
        raise UserError(
            f"cannot write into {out} ({error.strerror}); make room, and run again to go on"
        ) from error
    done = {"out": out, "images": len(kept), "views": asked["views"], "missed": missed}
    return done | {
        "left_out": len(rows) - len(kept),
        "written": sum(one.written for one in made if one),
    }


def _chosen(source: Source, images_per_class: int) -> NDArray[np.int64]:
    if images_per_class == 0:
        return np.arange(len(source))
    if source.labels is None:
        return np.arange(min(images_per_class, len(source)))
    first = [np.flatnonzero(source.labels == k)[:images_per_class] for k in set(source.labels)]
    return np.sort(np.concatenate(first))


def _begin(folder: Path, asked: dict[str, Any]) -> None:
    """The manifest of what is to be, or the same one found there."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / MANIFEST
    if not file.exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty, and holds no views; use another --out")
        _write(file, {**asked, "complete": False})
        return
    there = read_manifest(str(file))
    differing = [key for key, value in asked.items() if there.get(key) != value]
    if differing:
        key = differing[0]
        raise UserError(
            f"{folder} holds views with another {key} ({there.get(key)}, not {asked[key]}); use "
            "another --out"
        )


def _write(file: Path, manifest: dict[str, Any]) -> None:
    part = file.with_name(f".{file.name}.part")
    part.write_text(json.dumps(manifest, indent=1) + "\n")
    os.replace(part, file)


class _Made(NamedTuple):
    """What came of one image."""

    written: bool
    """Its files were not there before."""
    hit: bool
    """Its crops overlap as they should."""


def _all_written(
    source: Source, rows: list[dict[str, Any]], folder: Path, asked: dict[str, Any], workers: int
) -> list[_Made | None]:
    """What came of each row; None where its image cannot be read."""
    aug, size, seed, end = (asked[key] for key in ("aug", "size", "seed", "format"))

    def one(number: int) -> _Made | None:
        name, index = rows[number]["name"], rows[number]["index"]
        places = [folder / f"{name}-{k}.{end}" for k in range(1 + asked["views"])]
        there, hit = places[-1].exists(), True  # it is written last
        if there and aug not in OVERLAPS:
            return _Made(False, hit)
        try:
            pixels = source.pixels(index)
        except UnreadableImage as error:
            say(f"left out {source.identity(index)}: {error}")
            return None
        if aug in OVERLAPS:
            boxes, hit = overlapping(pixels, aug, asked["iou"], seed, index)
        if not there:
            if aug in OVERLAPS:
                made = _painted(pixels, boxes, size, seed, index)
            else:
                made = _plain(pixels, aug, size, seed, index)
            for place, picture in zip(places, [pixels, *made], strict=True):
                _save(place, picture)
        return _Made(not there, hit)

    return list(each(one, len(rows), f"writing {folder}", workers))


def _save(place: Path, picture: Pixels) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    options = [cv2.IMWRITE_JPEG_QUALITY, 75] if place.suffix == ".jpeg" else []
    data = cv2.imencode(place.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1]
    part = place.with_name(f".{place.name}.part")
    part.write_bytes(data.tobytes())
    os.replace(part, place)


def _plain(pixels: Pixels, aug: Aug, size: int, seed: int, index: int) -> list[Pixels]:
    """Two views: of the whole image, or (nointer) of two different corners of half its sides."""
    from firstsight.views.apply import apply  # torch is behind it, and other works need none

    height, width = pixels.shape[:2]
    parts, how = [pixels, pixels], _MOCO
    if aug == "nointer":
        half = max(1, height // 2), max(1, width // 2)
        corners = np.random.default_rng(keyed.seed(seed, _CORNERS, index)).permutation(4)[:2]
        tops, lefts = (corners // 2) * (height - half[0]), (corners % 2) * (width - half[1])
        parts = [
            pixels[top : top + half[0], left : left + half[1]]
            for top, left in zip(tops, lefts, strict=True)
        ]
        how = _CORNER
    drawn = draw(how, parts[0].shape[1::-1], seed=seed, epoch=0, index=[index])
    return [apply(part, drawn, 0, v, size) for v, part in enumerate(parts)]


def overlapping(
    pixels: Pixels, aug: Aug, iou: Iou, seed: int, index: int
) -> tuple[NDArray[np.int64], bool]:
    """Two crops (2, 4) whose IoU is in the range of `aug`, neither inside the other; if found."""
    low, high, tries = OVERLAPS[aug]
    height, width = pixels.shape[:2]
    boxes = np.empty((0, 2, 4), np.int64)
    for start in range(0, tries, _BLOCK):
        count = min(_BLOCK, tries - start)
        keys = index * tries + start + np.arange(count)  # each try draws as an image of its own
        boxes = draw(_CROPS, [(width, height)] * count, seed=seed, epoch=0, index=keys).crops
        first, second = boxes[:, 0], boxes[:, 1]
        overlap = overlap_of(first, second, 1 if iou == "published" else 0)
        hits = (overlap >= low) & (overlap <= high) & ~_inside(first, second)
        hits &= ~_inside(second, first)
        if hits.any():
            return boxes[hits.argmax()], True
    return boxes[-1], False


def overlap_of(
    first: NDArray[np.int64], second: NDArray[np.int64], plus: int
) -> NDArray[np.float64]:
    """IoU (N,) of boxes (N, 4), the sides of the intersection longer by `plus`."""
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    common = np.clip(sides + plus, 0, None).prod(1)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (first, second)]
    return np.asarray(common / (areas[0] + areas[1] - common), np.float64)


def _inside(inner: NDArray[np.int64], outer: NDArray[np.int64]) -> NDArray[np.bool_]:
    fits = (inner[:, :2] >= outer[:, :2]).all(1) & (inner[:, 2:] <= outer[:, 2:]).all(1)
    return np.asarray(fits, np.bool_)


def _painted(
    pixels: Pixels, boxes: NDArray[np.int64], size: int, seed: int, index: int
) -> list[Pixels]:
    """The ten views of two overlapping crops."""
    from firstsight.views.apply import crop_resize

    noise = np.random.default_rng(keyed.seed(seed, _NOISE, index))
    places = np.random.default_rng(keyed.seed(seed, _PLACES, index))
    flips = np.random.default_rng(keyed.seed(seed, _FLIPS, index)).random(10) < 0.5
    plain = [crop_resize(pixels, box.tolist(), size) for box in boxes]
    common = np.concatenate([boxes[:, :2].max(0), boxes[:, 2:].min(0)])
    own = [_in_view(common, box, size) for box in boxes]
    made = list(plain)
    for filling in ("noise", "mean"):
        for random in (False, True):
            for view, (x1, y1, x2, y2) in zip(plain, own, strict=True):
                w, h = max(0, x2 - x1), max(0, y2 - y1)
                x, y = (places.integers(0, size - n + 1) for n in (w, h)) if random else (x1, y1)
                painted = view.copy()
                colour = noise.integers(0, 256, (h, w, 3)) if filling == "noise" else MEAN_COLOUR
                painted[y : y + h, x : x + w] = colour
                made.append(painted)
    return [np.ascontiguousarray(v[:, ::-1]) if f else v for v, f in zip(made, flips, strict=True)]


def _in_view(
    common: NDArray[np.int64], box: NDArray[np.int64], size: int
) -> tuple[int, int, int, int]:
    """A box of the image in whole pixels of a view of `box`, outwards."""
    scale = size / (box[2:] - box[:2])
    low = np.floor((common[:2] - box[:2]) * scale).clip(0, size)
    high = np.ceil((common[2:] - box[:2]) * scale).clip(0, size)
    x1, y1, x2, y2 = np.concatenate([low, high]).astype(int).tolist()
    return x1, y1, x2, y2
