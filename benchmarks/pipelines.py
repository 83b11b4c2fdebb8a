"""Images per second of one core through whole pipelines, ours beside lightly's, in turn, one run.

    python benchmarks/pipelines.py PHOTOS [--images 40] [--rounds 5]

PHOTOS is a folder of photographs; they are resized to 500x375 (or 375x500) and written anew as JPEG
of quality 90 in memory. lightly opens each file with Pillow and ends with normalised floats. Ours
ends with uint8 views: the device normalises them (and colours them, in the rows that say so). All
figures are CPU seconds of one thread, the best of the rounds, so that neighbours matter less. The
sharpness of packed sources is told beside: the energy of differences of neighbouring pixels in
their plain crops, as a share of that from JPEG.
"""

import argparse
import dataclasses
import io
import tempfile
import time
from pathlib import Path

import cv2
import torch
from lightly.transforms import MoCoV2Transform, SimCLRTransform, SwaVTransform
from PIL import Image

from firstsight import data, open_source
from firstsight.loader import Steps, on_device
from firstsight.loader.resident import Resident, ResidentSteps
from firstsight.order import Epochs
from firstsight.process import keep_freed_memory
from firstsight.views import PRESETS, Views

SWAV = Views(
    counts=(2, 6),
    sizes=(224, 96),
    min_scale=(0.14, 0.05),
    max_scale=(1.0, 0.14),
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
)


def jpegs(folder, count, where, long=500):
    """Photographs at 500x375, or in that shape, as JPEG files."""
    where.mkdir()
    for number, path in enumerate(sorted(Path(folder).glob("*.jpg"))[:count]):
        image = Image.open(path).convert("RGB")
        size = (long, long * 3 // 4) if image.width >= image.height else (long * 3 // 4, long)
        image.resize(size, Image.Resampling.LANCZOS).save(where / f"{number:04}.jpg", quality=90)
    return sorted(where.glob("*.jpg"))


def of_lightly(transform, files):
    """A round of lightly: files to its views."""
    encoded = [file.read_bytes() for file in files]

    def made(_):
        for one in encoded:
            transform(Image.open(io.BytesIO(one)).convert("RGB"))

    return made


def of_ours(source, views, size, kind=Steps, **options):
    """A round of ours: what a worker does for one batch of the whole source."""
    images = len(source)
    order = Epochs(images, images, 0)
    steps = kind(
        source=source, views=views, size=size, order=order, seed=0, rank=0, world=1, **options
    )
    return steps.batch


def with_colours(made, views):
    """The same with what follows on the device, here the CPU."""
    return lambda step: on_device(made(step), views, torch.device("cpu"), torch.contiguous_format)


def sharpness(source, views):
    """Mean squared difference of neighbouring pixels of crops without colours or blur."""
    plain = dataclasses.replace(views, jitter=0.0, gray=0.0, blur=(0.0,))
    made = torch.stack(of_ours(source, plain, 224)(0).views).double()
    return float(made.diff(dim=-1).square().mean() + made.diff(dim=-2).square().mean())


def measured(title, rows, images, rounds):
    """Each row in turn in every round; ratios to the first."""
    best = dict.fromkeys(rows, float("inf"))
    for step in range(rounds):
        for name, made in rows.items():
            began = time.process_time()
            made(step)
            best[name] = min(best[name], time.process_time() - began)
    first = next(iter(best.values()))
    print(f"\n{title}")
    for name, seconds in best.items():
        print(f"  {name:52}{images / seconds:9.1f} images/s{first / seconds:8.2f} x", flush=True)


def main() -> None:
    """Measures all pipelines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos")
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_freed_memory()  # as in workers; lightly has it too
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        files = jpegs(args.photos, args.images, folder)
        photos = open_source(str(folder))
        packs = {}
        for side in (500, 340):
            target = f"{name}/{side}.pack"
            data.pack(str(folder), out=target, side=side, workers=1)
            packs[side] = open_source(target)
        moco = PRESETS["mocov2"]
        rows = {
            "lightly, JPEG": of_lightly(MoCoV2Transform(input_size=224), files),
            "JPEG, all in the worker": of_ours(photos, moco, 224),
            "JPEG, colours on the device": of_ours(photos, moco, 224, views_on="device"),
        }
        for side, pack in packs.items():
            rows[f"packed at {side}, all in the worker"] = of_ours(pack, moco, 224)
            rows[f"packed at {side}, colours on the device"] = of_ours(
                pack, moco, 224, views_on="device"
            )
        measured("two MoCo v2 views at 224", rows, len(files), args.rounds)
        for side, pack in packs.items():
            share = sharpness(pack, moco) / sharpness(photos, moco)
            print(f"  packed at {side}: sharpness {share:.2f} of that from JPEG")

        big = jpegs(args.photos, args.images // 4, Path(name) / "big", long=2400)
        large = open_source(str(Path(name) / "big"))
        rows = {
            "lightly, JPEG": of_lightly(MoCoV2Transform(input_size=112), big),
            "decoded whole": of_ours(large, dataclasses.replace(moco, margin=0.0), 112),
            "decoded as small as crops allow": of_ours(large, moco, 112),
        }
        measured(
            "two MoCo v2 views at 112 of photographs at 2400x1800", rows, len(big), args.rounds
        )
        rows = {
            "lightly, JPEG": of_lightly(SwaVTransform(), files),
            "JPEG, all in the worker": of_ours(photos, SWAV, 224),
            "JPEG, colours on the device": of_ours(photos, SWAV, 224, views_on="device"),
        }
        measured("SwAV, 2 x 224 and 6 x 96", rows, len(files), args.rounds)

        small = Path(name) / "small"
        small.mkdir()
        for number in range(512):
            image = Image.open(files[number % len(files)]).resize((32, 32))
            image.save(small / f"{number:04}.png")
        views = PRESETS["simclr-small"]
        held = Resident(open_source(str(small)), torch.device("cpu"))
        rows = {
            "lightly, PNG": of_lightly(
                SimCLRTransform(input_size=32, gaussian_blur=0.0), sorted(small.glob("*.png"))
            ),
            "PNG, all in the worker": of_ours(open_source(str(small)), views, 32),
            "memory, all in the worker": of_ours(held, views, 32),
            "resident, with colours and normalise": with_colours(
                of_ours(held, views, 32, ResidentSteps), views
            ),
        }
        measured("two SimCLR views at 32", rows, 512, args.rounds)


if __name__ == "__main__":
    main()
