"""MoCo v2 on 64-pixel Imagenette: firstsight beside lightly, in turn, in one run.

Same recipe for both: ResNet-18 with its standard stem, the MoCo v2 views, SGD, cosine, K = 4096,
asymmetric loss. lightly runs as its own examples do it (its views by Pillow in loader workers,
float32, DistributedDataParallel left out as here there is one process). Both are then read by the
same k-NN over all images, by the same code.

    python benchmarks/mocov2_imagenette.py --data imagenette128 --seeds 3 --epochs 2

`--data` is a folder with train.zip, train_map.txt, val.zip and val_map.txt. Where `lightly` is not
installed (`pip install lightly`), only ours is measured.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from firstsight import backbones
from firstsight.backbones.conv import Conv3x3
from firstsight.features import Reader, extract
from firstsight.metrics import knn_accuracy
from firstsight.sources import open_source
from firstsight.sources.base import common_labels

SIZE, BATCH, LR, DECAY, QUEUE, MOMENTUM, TEMPERATURE = 64, 128, 0.03, 1e-4, 4096, 0.99, 0.2


def ours(data: Path, epochs: float, seed: int, out: Path) -> dict[str, float]:
    """The command that a user would type, then its own summary and the common reading."""
    command = [
        *(sys.executable, "-m", "firstsight", "pretrain", "mocov2"),
        *("--data", f"{data / 'train.zip'}", "--backbone", "resnet18", "--size", f"{SIZE}"),
        *("--epochs", f"{epochs}", "--batch-size", f"{BATCH}", "--lr", f"{LR}"),
        *("--weight-decay", f"{DECAY}", "--method.queue-size", f"{QUEUE}"),
        *("--method.momentum", f"{MOMENTUM}", "--method.temperature", f"{TEMPERATURE}"),
        *("--lr-every", "step"),
        *("--seed", f"{seed}", "--out", f"{out}"),
    ]
    subprocess.run(command, check=True)
    summary = json.loads((out / "summary.json").read_text())
    from firstsight import load_backbone

    return {
        "images_per_second": summary["images_per_second"],
        "knn": knn(load_backbone(str(out)), data),
    }


class ZippedPhotographs(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The photographs as users of lightly feed them: Pillow images, then its transform."""

    def __init__(self, path: Path, transform: object) -> None:
        names = [line.split("\t")[0] for line in path.with_name("train_map.txt").open()]
        with zipfile.ZipFile(path) as archive:
            self.files = [archive.read(name) for name in names]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return self.transform(Image.open(io.BytesIO(self.files[index])).convert("RGB"))  # type: ignore[operator]


def lightlys(data: Path, epochs: float, seed: int) -> dict[str, float]:
    """MoCo v2 as lightly's example trains it, with the recipe above."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import MoCoV2Transform

    torch.manual_seed(seed)
    network = backbones.build("resnet18")
    for module in network.modules():  # as torchvision has it, without our short ways
        if isinstance(module, Conv3x3):
            module.__class__ = nn.Conv2d
    head = MoCoProjectionHead(512, 512, 128)
    key_network, key_head = copy.deepcopy(network), copy.deepcopy(head)
    deactivate_requires_grad(key_network)
    deactivate_requires_grad(key_head)
    criterion = NTXentLoss(temperature=TEMPERATURE, memory_bank_size=(QUEUE, 128))
    trained = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(trained, lr=LR, momentum=0.9, weight_decay=DECAY)
    photographs = ZippedPhotographs(data / "train.zip", MoCoV2Transform(input_size=SIZE))
    loader = torch.utils.data.DataLoader(
        photographs, BATCH, shuffle=True, drop_last=True, num_workers=torch.get_num_threads()
    )
    steps, done, began = round(epochs * len(loader)), 0, time.perf_counter()
    while done < steps:
        for first, second in loader:
            for group in optimizer.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * done / steps))
            update_momentum(network, key_network, MOMENTUM)
            update_momentum(head, key_head, MOMENTUM)
            queries = head(network(first))
            with torch.no_grad():
                keys = key_head(key_network(second))
            loss = criterion(queries, keys)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == steps:
                break
    seconds = time.perf_counter() - began
    return {"images_per_second": steps * BATCH / seconds, "knn": knn(network, data)}


def knn(network: nn.Module, data: Path) -> float:
    """Top-1 over all images: k 20, temperature .07, pooled features."""
    bank, queries = open_source(f"{data / 'train.zip'}"), open_source(f"{data / 'val.zip'}")
    reader = Reader(size=SIZE, workers=torch.get_num_threads())
    train, test = (extract(network, source, reader) for source in (bank, queries))  # type: ignore[arg-type]
    labels, truth = common_labels(bank, queries, "bank", "queries")
    figures = knn_accuracy(
        train.values, train.labels(labels), test.values, test.labels(truth), [20]
    )
    return figures[20]["top1"]


def main() -> None:
    """Measure, seed by seed in turn, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the zips")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2)
    options = parser.parse_args()
    try:
        import lightly  # noqa: F401

        both = True
    except ImportError:
        both = False
    rows: dict[str, list[dict[str, float]]] = {"firstsight": [], "lightly": []}
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            rows["firstsight"].append(ours(options.data, options.epochs, seed, out))
        print("firstsight", seed, rows["firstsight"][-1], flush=True)
        if both:
            rows["lightly"].append(lightlys(options.data, options.epochs, seed))
            print("lightly", seed, rows["lightly"][-1], flush=True)
    for name, figures in rows.items():
        if figures:
            rates = [row["images_per_second"] for row in figures]
            scores = [row["knn"] for row in figures]
            spread = f"{min(scores):.1f} to {max(scores):.1f}"
            print(f"{name}: {statistics.median(rates):.0f} images/s (median), k-NN", end=" ")
            print(f"{statistics.mean(scores):.2f} % (mean; {spread})")
    if both:
        ratios = [
            a["images_per_second"] / b["images_per_second"]
            for a, b in zip(*rows.values(), strict=True)
        ]
        gaps = [a["knn"] - b["knn"] for a, b in zip(*rows.values(), strict=True)]
        print(f"speed: {min(ratios):.2f} to {max(ratios):.2f} times, pair by pair")
        print(f"k-NN: {statistics.mean(gaps):+.2f} points on average")


if __name__ == "__main__":
    main()
