"""Maps of photographs: `firstsight localize` beside a plain loop, batch 1 over Pillow, one network.

    python benchmarks/localize.py FOLDER [--network resnet18] [--images 64] [--rounds 3]

Both squeeze each photograph to 224 x 224 (bicubic), normalise it, and sum the last map of the same
untrained network (last stride 1) over its channels in float64. They take turns, and the best round
of each counts; threads are what torch is given (OMP_NUM_THREADS). Then the maps are compared: ours
in fp32 must lie within 2 % of the range of each map, in bf16 within 15 %, or it exits with an
error; most of the former is how the two resize. How many boxes (of 14 x 14 cells) are the same is
printed, too.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from firstsight import distributed
from firstsight.geometry import object_box
from firstsight.localize.commands import Localize
from firstsight.localize.eyes import Eye, open_eye
from firstsight.localize.network import Changes, load
from firstsight.localize.reading import seen
from firstsight.sources import open_source
from firstsight.views import IMAGENET_MEAN, IMAGENET_STD

SIZE = 224
TOLERANCE = {"fp32": 0.02, "bf16": 0.15}


def plain(paths: list[Path], name: str) -> torch.Tensor:
    """(N, h, w) by a loop as people write it."""
    network, _ = load(f"random:{name}", 0, SIZE, Changes())
    maps = []
    with torch.no_grad():
        for path in paths:
            image = Image.open(path).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
            maps.append(network.feature_map(((pixels - mean) / std)[None])[0].double().sum(dim=0))
    return torch.stack(maps)


def ours(folder: str, name: str, index: np.ndarray, precision: str) -> torch.Tensor:
    """(N, h, w) as the command makes them."""
    ask = Localize(checkpoint=f"random:{name}", data=folder, precision=precision)
    eye: Eye = open_eye(ask, 0, distributed.device())
    source = open_source(folder)
    return torch.cat([eye.see(pixels) for pixels, _ in seen(eye, source, index)])


def main() -> None:
    """Measures, compares and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--network", default="resnet18")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    distributed.start("auto", torch.get_num_threads())
    source = open_source(args.folder)
    index = np.arange(min(args.images, len(source)))
    paths = [Path(args.folder) / source.identity(int(i)) for i in index]
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "plain loop": lambda: plain(paths, args.network),
        "fp32": lambda: ours(args.folder, args.network, index, "fp32"),
        "bf16": lambda: ours(args.folder, args.network, index, "bf16"),
    }
    best, maps = dict.fromkeys(ways, float("inf")), {}
    for _ in range(args.rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            maps[name] = way()
            best[name] = min(best[name], time.perf_counter() - began)
    truth = maps["plain loop"]
    span = truth.amax(dim=(1, 2)) - truth.amin(dim=(1, 2))
    boxes = [object_box(one, SIZE) for one in truth]
    print(f"{args.network}, {len(index)} photographs, {torch.get_num_threads()} threads")
    print(f"plain loop: {len(index) / best['plain loop']:.1f} images/s")
    failed = False
    for name, allowed in TOLERANCE.items():
        apart = ((maps[name] - truth).abs().amax(dim=(1, 2)) / span).max().item()
        same = sum(object_box(m, SIZE) == b for m, b in zip(maps[name], boxes, strict=True))
        failed |= apart > allowed
        print(
            f"{name}: {len(index) / best[name]:.1f} images/s, "
            f"{best['plain loop'] / best[name]:.2f} times; farthest {apart:.2%} of a map's range "
            f"(allowed {allowed:.0%}), {same} of {len(index)} boxes the same"
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
