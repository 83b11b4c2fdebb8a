"""All methods for the same minutes on Imagenette at 64 px: what each has learnt by then.

    python benchmarks/methods_table.py DATA [--minutes 8] [--threads 1] [--seeds 0]
        [--methods simclr pic ...] [--out FOLDER]

DATA holds Imagenette's train.zip and val.zip. Each method's rate is measured first in 30 steps, and
its epochs are chosen so that training takes the minutes asked for; a run is `firstsight pretrain`
with ResNet-18 and its own settings below, judged before and after by k-NN and after by a linear
classifier. Tobias' masks are made once, outside these minutes. Runs lie in FOLDER: the same command
goes on where it stopped. SEED is taught by the SimCLR run of the same seed. The table is printed as
Markdown after each run.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

IMAGES = 9469
SIDE = ["--size", "64"]
ADAMW = ["--optimizer", "adamw", "--lr", "0.001", "--weight-decay", "0.05"]
SGD = ["--optimizer", "sgd", "--lr", "0.06", "--weight-decay", "5e-4"]
WARM = ["--warmup-epochs", "0.3", "--lr-every", "step"]
PAIR = ["--preset", "simclr-small"]
MOVING = ["--method.momentum", "0.99"]
HEADS = ["--method.hidden", "1024", "--method.dim", "256"]

# What differs from the published settings, since these are for 200 epochs and more at 224 px.
METHODS: dict[str, list[str]] = {
    "simclr": [*ADAMW, *PAIR, "--method.temperature", "0.1"],
    "pic": [*SGD, "--preset", "pic", "--order", "epochs", "--method.hidden", "512"],
    "scrl": [*SGD, "--preset", "scrl", *MOVING, *HEADS],
    "mocov2": [*ADAMW, *PAIR, *MOVING, "--method.queue-size", "4096", "--method.splits", "4"],
    "byol": [*SGD, *PAIR, *MOVING, *HEADS],
    "swav": [*ADAMW, *PAIR, "--method.prototypes", "512", "--method.hidden", "512"],
    "dino": [*ADAMW, *PAIR, *MOVING, "--method.prototypes", "2048", "--method.hidden", "512"],
    "barlow": [*ADAMW, *PAIR, "--method.hidden", "1024", "--method.dim", "1024"],
    "vicreg": [*ADAMW, *PAIR, "--method.hidden", "1024", "--method.dim", "1024"],
    "simsiam": [*SGD, *PAIR],
    "mocov3": [*ADAMW, *PAIR, *MOVING, *HEADS, "--method.temperature", "0.2"],
    "densecl": [*ADAMW, *PAIR, *MOVING, "--method.queue-size", "4096", "--method.hidden", "512"],
    "pixpro": [*SGD, *PAIR, *MOVING, *HEADS],
    "instdisc": [*SGD, "--preset", "instdisc", "--method.negatives", "4096"],
    "mocov1": [*ADAMW, *PAIR, *MOVING, "--method.queue-size", "4096", "--method.splits", "4"],
    "seed": [*ADAMW, "--method.queue-size", "4096"],
}
METHODS["tobias"] = [*METHODS["mocov2"], "--views.merge.probability", "0.3"]
SLIDING = {"epochs": ["sliding", "--window-size", "1024", "--window-stride", "128"]}
METHODS["pic-sliding"] = [part for word in METHODS["pic"] for part in SLIDING.get(word, [word])]
BY_ADAMW = ("byol", "scrl", "pixpro", "simsiam", "pic-sliding", "instdisc")
"""Published with SGD; rows of their own say what AdamW makes of them in so short a time."""
for row in BY_ADAMW:
    METHODS[f"{row}-adamw"] = [*ADAMW, *METHODS[row][len(SGD) :]]
QUEUE = ["--method.queue-size", "1920", "--method.queue-start", "0.02", "--method.epsilon", "0.03"]
METHODS["swav-queue"] = [*METHODS["swav"], *QUEUE]  # 128 images spread over 512 prototypes badly
METHOD_OF = {row: row.removesuffix("-adamw") for row in METHODS if row.endswith("-adamw")}
METHOD_OF |= {"tobias": "mocov2", "pic-sliding": "pic", "pic-sliding-adamw": "pic"}
METHOD_OF["swav-queue"] = "swav"
"""The method of those rows that are not named by theirs, but by what is changed in it."""


def firstsight(*arguments: str) -> None:
    """One command of the package, in a process of its own."""
    subprocess.run([sys.executable, "-m", "firstsight", *arguments], check=True)


def masks(asked: argparse.Namespace) -> Path:
    """The grids of all images by an untrained ResNet-50, made once."""
    file: Path = asked.out / "masks.json"
    if not file.exists():
        options = ("--precision", "bf16", "--batch-size", "8", "--threads", str(asked.threads))
        firstsight("masks", "--data", f"{asked.data}/train.zip", "--out", str(file), *options)
    return file


def pretrain(name: str, folder: Path, epochs: float, seed: int, asked: argparse.Namespace) -> Any:
    """The summary of a run; one that is there already is not run again."""
    if not (folder / "summary.json").exists():
        options = [*SIDE, "--batch-size", "128", *WARM, *METHODS[name]]
        if name == "seed":
            teacher = asked.out / f"simclr-{seed}"
            options += ["--method.teacher", str(teacher)]
        if name == "tobias":
            options += ["--views.merge.masks", str(masks(asked))]
        if not folder.name.endswith("-rate"):
            options += ["--probe-test", f"{asked.data}/val.zip", "--probe-readings", "3"]
        firstsight(
            *("pretrain", METHOD_OF.get(name, name), "--out", str(folder)),
            *("--data", f"{asked.data}/train.zip"),
            *("--backbone", "resnet18", "--epochs", str(epochs), "--seed", str(seed)),
            *("--threads", str(asked.threads), "--workers", "0", *options),
        )
    return json.loads((folder / "summary.json").read_text())


def table(asked: argparse.Namespace) -> str:
    """All runs that are there, as Markdown."""
    lines = ["| method | seed | images | minutes | images/s | k-NN before | after | linear |"]
    lines.append(8 * "|---" + "|")
    for name in METHODS:
        for seed in asked.seeds:
            file = asked.out / f"{name}-{seed}" / "summary.json"
            if file.exists():
                run = json.loads(file.read_text())
                cells = [name, seed, f"{run['images']:,}", f"{run['seconds'] / 60:.1f}"]
                cells += [f"{run['images_per_second']:.0f}"]
                cells += [f"{run['knn'][when]:.1f}" for when in ("untrained", "trained")]
                lines.append("| " + " | ".join(map(str, [*cells, run["linear"]["top1"]])) + " |")
    return "\n".join(lines)


def main() -> None:
    """Rates, runs, table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("runs/methods_table"))
    asked = parser.parse_args()
    for seed in asked.seeds:
        for name in asked.methods:
            tried = pretrain(name, asked.out / f"{name}-rate", 30 * 128 / IMAGES, 0, asked)
            epochs = round(60 * asked.minutes * tried["images_per_second"] / IMAGES, 2)
            pretrain(name, asked.out / f"{name}-{seed}", epochs, seed, asked)
            print(table(asked), flush=True)


if __name__ == "__main__":
    main()
