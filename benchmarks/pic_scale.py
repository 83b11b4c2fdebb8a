"""What a step of PIC takes with 10^4 to 10^7 images: K = 4096 negatives, and the full softmax.

    python benchmarks/pic_scale.py [--most 7] [--folder build/pic_scale] [--plot docs/pic_scale.svg]

The head is timed beside a tiny backbone: forward, backward and the update of a batch of 256 random
views of 32 pixels. Images come from a sliding window of 8192, which each of its passes leaves by
1024: so a row comes back after 32 steps, and has been written and read since. Each case is a
process of its own; the file of 10^7 images is sparse here, and is removed.

Memory is what the process grows by from its first step to its last: pages of its own, apart from
those of the mapped file, which the system takes back when it needs them. A step is the median, by
the clock and in time of the processor: on a machine that others use, the second is what to compare,
and what is drawn.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from firstsight import distributed, methods, optim
from firstsight.batch import Batch
from firstsight.engine import update
from firstsight.loader.windows import Windows
from firstsight.prototypes import fetched
from firstsight.settings import begun

NEGATIVES, BATCH, DIM, FLAT = 4096, 256, 128, 0.2
STEPS = {"full": 5}
"""Steps of a case, where they are not 72; the first half is not counted: a pass of the window."""
TIMES, SIZES = ("step", "busy", "p95", "save"), ("own", "mapped", "gpu")
LOOKS = {"file": "#1b6ca8", "host": "#2a9d57", "device": "#b8860b", "full": "#c03a2b"}


def of_process() -> dict[str, float]:
    """Bytes of this process: pages of its own, and of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = dict(line.split(":", 1) for line in lines)
    return {key: int(found[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")}


def case(place: str, images: int, folder: Path) -> dict[str, float]:
    """The figures of one place and number of images."""
    device = distributed.start("auto", threads=1)
    own = {"negatives": 0 if place == "full" else NEGATIVES, "dim": DIM}
    own["prototypes_in"] = "device" if place == "full" else place
    _, defaults, settings = methods.describe("pic")
    asked: dict[str, Any] = {"data": "none", "backbone": "timm:test_resnet", "size": 32}
    asked |= {"method": own, "precision": "fp32", "layout": "contiguous"}
    config = begun(defaults, settings, asked, "benchmark")
    began = time.perf_counter()
    method = methods.build("pic", config, images).to(device)
    for rows in fetched.inside(method).values():
        rows.open(folder, None)
        rows.commit(0, keep=2)  # from here on there is something to go back to
    start = time.perf_counter() - began
    optimizer, scaler = optim.of(method, config), update.scaler(config)
    order = Windows(images, BATCH, 0, window=8192, stride=1024)
    views = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8)
    seconds, busy, steps = [], [], STEPS.get(place, 72)
    for step in range(steps):
        batch = Batch(
            views=(views,),
            crops=(torch.tensor([[0.0, 0.0, 32.0, 32.0]]).repeat(BATCH, 1),),
            flips=(torch.zeros(BATCH, dtype=torch.bool),),
            index=torch.from_numpy(order.indices(step).copy()),
            coming=torch.from_numpy(order.indices(step + 1).copy()),
        )
        began, worked = time.perf_counter(), time.process_time()
        update.gradients(method, batch, scaler, config)
        update.apply(method, optimizer, scaler, config, progress=0.0, lr=0.03)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        busy.append(time.process_time() - worked)
        if step == 0:
            before = of_process()
    counted = sorted(seconds[steps // 2 :])
    began = time.perf_counter()
    for rows in fetched.inside(method).values():
        rows.commit(steps, keep=2)
    after = of_process()
    return {
        "start": start,
        "step": statistics.median(counted),
        "busy": statistics.median(busy[steps // 2 :]),
        "p95": counted[int(0.95 * len(counted))],
        "save": time.perf_counter() - began,
        "own": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
        "gpu": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
    }


def plot(found: dict[tuple[str, int], dict[str, float]], most: int) -> str:
    """An SVG: milliseconds of a step over the number of images, both as powers of ten."""
    steps = [one["busy"] * 1e3 for one in found.values()]
    low, high = math.floor(math.log10(min(steps))), math.ceil(math.log10(max(steps)))

    def at(images: float, ms: float) -> tuple[float, float]:
        x = 70 + 420 * (math.log10(images) - 4) / max(1, most - 4)
        return x, 250 - 220 * (math.log10(ms) - low) / (high - low)

    parts = ['<rect width="600" height="300" fill="#fff"/>']
    for power in range(low, high + 1):
        _, y = at(1e4, 10**power)
        parts.append(f'<path d="M70 {y:.0f}H490" stroke="#ddd"/>')
        parts.append(f'<text x="62" y="{y + 4:.0f}" text-anchor="end">{10**power:g} ms</text>')
    for power in range(4, most + 1):
        x, _ = at(10**power, 10**low)
        parts.append(f'<text x="{x:.0f}" y="270" text-anchor="middle">10^{power}</text>')
    parts.append('<text x="280" y="292" text-anchor="middle">images (prototypes)</text>')
    for place in dict.fromkeys(place for place, _ in found):
        points = [at(n, one["busy"] * 1e3) for (p, n), one in found.items() if p == place]
        line = " ".join(f"{x:.0f},{y:.0f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{LOOKS[place]}"/>')
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{LOOKS[place]}"/>'
                  for x, y in points]  # fmt: skip
    for row, place in enumerate(dict.fromkeys(place for place, _ in found)):
        name = "full softmax" if place == "full" else f"K {NEGATIVES}, {place}"
        y = 40 + 20 * row
        parts.append(f'<text x="500" y="{y}" fill="{LOOKS[place]}">{name}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 600 300" {style}>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def main() -> None:
    """Print the table, write the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=int, default=7, help="power of ten of the most images")
    parser.add_argument("--folder", type=Path, default=Path("build/pic_scale"))
    parser.add_argument("--plot", type=Path, default=Path("build/pic_scale.svg"))
    parser.add_argument("--case", nargs=2, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args.case[0], int(args.case[1]), args.folder)))
        return
    powers = range(4, args.most + 1)
    cases = [("file", 10**p) for p in powers]
    cases += [(place, 10**p) for place in ("host", "device", "full") for p in powers if p <= 6]
    found = {}
    print(
        "| prototypes in | images | start | step | processor | p95 | save | grows | mapped | GPU |"
    )
    print("|---" * 10 + "|")
    for place, images in cases:
        command = [sys.executable, __file__, "--folder", args.folder, "--case", place, images]
        try:
            done = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True)
        finally:
            shutil.rmtree(args.folder, ignore_errors=True)
        one = found[place, images] = json.loads(done.stdout.splitlines()[-1])
        times = [f"{one['start']:.1f} s", *(f"{one[k] * 1e3:.0f} ms" for k in TIMES)]
        sizes = [f"{one[key] / 2**20:.0f} MiB" for key in SIZES]
        print(f"| {place} | {images} | {' | '.join(times + sizes)} |", flush=True)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    args.plot.write_text(plot(found, args.most))
    steps = [found["file", 10**p]["busy"] for p in powers]
    spread = max(steps) / min(steps) - 1
    print(f"from the fastest to the slowest number of images: {spread:.0%}; {FLAT:.0%} is allowed")


if __name__ == "__main__":
    main()
