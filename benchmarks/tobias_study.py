"""Tobias against its baseline and two controls: is it the object that merged backgrounds keep?

    python benchmarks/tobias_study.py SOURCE TEST --out study --minutes 600 \\
        --sizes 1000 4000 --probabilities 0.3 0.5 --seeds 5 --epochs 50

SOURCE and TEST are labelled. For each seed and size a subset is drawn; on it MoCo v2 trains without
merging, and for each probability with Tobias' masks, with cells at random, and with the same lower
right cells for every image. All runs see as many images. After `--minutes` no run is
begun; the same command goes on from there, in the middle of a run too. The table says k-NN and
linear top-1 as mean and range over seeds, and the mean difference to the baseline of the same seed
with its standard error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KINDS = {"masks": "Tobias", "random": "random cells", "constant": "lower right cells"}
Row = tuple[int, float, str]
"""Images, probability, what stays; the baseline has probability 0."""


def rows(sizes: list[int], probabilities: list[float]) -> Iterator[Row]:
    """All settings of the study, in the order of its table."""
    for size in sizes:
        yield size, 0.0, "masks"
        yield from ((size, p, kind) for p in probabilities for kind in KINDS)


def folder(out: Path, row: Row, seed: int) -> Path:
    """Where a run of the study lies."""
    size, p, kind = row
    return out / "runs" / f"{size}-{f'{kind}-{p:g}' if p else 'baseline'}-{seed}"


def command(*words: object) -> None:
    """One call of firstsight, in a process of its own; an interrupted one ends the study."""
    subprocess.run([sys.executable, "-m", "firstsight", *map(str, words)], check=True)


def train(options: argparse.Namespace, row: Row, seed: int) -> None:
    """The run of one setting; it goes on where it was stopped."""
    (size, p, kind), out = row, options.out
    images, masks = out / f"{size}-{seed}", out / f"{size}-{seed}.json"
    if not images.exists():
        parts = ("--images", size, "--seed", seed, "--how", "copy")
        command("data", "subset", options.source, "--out", images, *parts)
    merge: list[object] = ["--views.merge.probability", p, "--views.merge.foreground", kind]
    if p and kind == "masks":
        merge += ["--views.merge.masks", masks]
        if not masks.exists():
            command("masks", options.network, "--data", images, "--out", masks, "--seed", seed)
    command(
        *("pretrain", "mocov2", "--data", images, "--out", folder(out, row, seed)),
        *("--backbone", options.backbone, "--size", options.size),
        *("--epochs", options.epochs * max(options.sizes) / size),
        *("--batch-size", options.batch_size, "--base-lr", 0.06, "--lr-every", "step"),
        *("--method.queue-size", options.queue_size, "--method.momentum", 0.99),
        *("--probe-train", options.source, "--probe-test", options.test, "--probe-readings", 1),
        *("--seed", seed, "--precision", options.precision),
        *("--layout", "channels_last", *merge),
    )


def figures(options: argparse.Namespace, row: Row) -> dict[int, tuple[float, float]]:
    """Seed -> k-NN and linear top-1 of the finished runs of a setting."""
    found = {}
    for seed in range(options.seeds):
        path = folder(options.out, row, seed) / "summary.json"
        if path.exists():
            summary = json.loads(path.read_text())
            found[seed] = (summary["knn"]["trained"], summary["linear"]["top1"])
    return found


def spread(values: list[float]) -> str:
    """Mean, and the range where there are several."""
    text = f"{statistics.mean(values):.1f}"
    return text if len(values) == 1 else f"{text} ({min(values):.1f} to {max(values):.1f})"


def gap(values: list[float]) -> str:
    """Mean of differences, with its standard error."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else ""
    error = statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.mean(values):+.1f} ± {error:.1f}"


def table(options: argparse.Namespace) -> str:
    """What there is so far, as Markdown."""
    head = ["images", "p", "kept", "seeds", "k-NN", "to baseline", "linear", "to baseline"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows(options.sizes, options.probabilities):
        size, p, kind = row
        found, base = figures(options, row), figures(options, (size, 0.0, "masks"))
        cells = [f"{size:,}", f"{p:g}" if p else "", KINDS[kind] if p else "baseline"]
        cells.append(f"{len(found)}")
        for number in range(2):
            cells.append(spread([one[number] for one in found.values()]) if found else "")
            both = [found[s][number] - base[s][number] for s in found if s in base and p]
            cells.append(gap(both))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="labelled images to draw from; they are the bank of k-NN")
    parser.add_argument("test", help="labelled images to classify")
    parser.add_argument("--out", type=Path, default=Path("tobias-study"))
    parser.add_argument("--minutes", type=float, default=600, help="begin no run after so long")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 4000], help="images")
    parser.add_argument("--probabilities", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument(
        "--epochs", type=float, default=50, help="of the largest size; smaller ones have more"
    )
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--size", type=int, default=64, help="side of the views, pixels")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--queue-size", type=int, default=4096)
    parser.add_argument("--network", default="random:resnet50", help="what makes the masks")
    parser.add_argument("--precision", default="fp32", help="the same for all runs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    began, wanted = time.monotonic(), list(rows(options.sizes, options.probabilities))
    for seed, row in ((seed, row) for seed in range(options.seeds) for row in wanted):
        if time.monotonic() - began > 60 * options.minutes:
            print("out of time; the same command goes on")
            break
        if not (folder(options.out, row, seed) / "summary.json").exists():
            train(options, row, seed)
    print(table(options))


if __name__ == "__main__":
    main()
