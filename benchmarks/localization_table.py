"""The table of docs/localization.md: one factor at a time from Tobias' published default.

    python benchmarks/localization_table.py DATA [--images 1000] [--seeds 5] [--base resnet50]
        [--precision fp32] [--batch-size 8] [--sets tiny raccoon coco]
        [--only default padding ...] [--out FILE]

DATA holds tiny-imagenet-8, raccoon and coco. Each row is `firstsight localize` with one setting
changed; it is printed as soon as it is there and kept in FILE (JSON), so that the same command goes
on where it stopped; a table for each set comes at the end. CorLoc .5 in percent, means over seeds;
"left" is the difference to the best of the four controls that see nothing, with the middle 95 %
over bootstraps of images; "nothing" are maps without a cell above the threshold: the box is then
the whole image.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from firstsight.localize import run

SETS = {
    "tiny": ("tiny-imagenet-8", "tiny-imagenet-8/boxes.csv"),
    "raccoon": ("raccoon", "raccoon/annotations"),
    "coco": ("coco/val2017", "coco/annotations/instances_val2017.json"),
}
FACTORS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "default": [("published default", {})],
    "backbone": [
        ("ResNet-18", {"checkpoint": "random:resnet18"}),
        ("VGG-16", {"checkpoint": "random:timm:vgg16"}),
        ("EfficientNet-B0", {"checkpoint": "random:timm:efficientnet_b0"}),
        ("ViT-S/16, last block", {"checkpoint": "random:timm:vit_small_patch16_224"}),
        (
            "ViT-S/16, attention",
            {"checkpoint": "random:timm:vit_small_patch16_224", "reading": "attention"},
        ),
    ],
    "stride": [("last stride 2", {"last_stride": 2})],
    "stage": [(f"stage {stage}", {"stages": stage}) for stage in range(4)],
    "activation": [
        (name, {"activation": name}) for name in ("sigmoid", "atan", "tanh", "gelu", "identity")
    ],
    "init": [
        (name, {"init": name})
        for name in (
            "kaiming-uniform",
            "xavier-normal",
            "xavier-uniform",
            "normal:0.1",
            "uniform:0.1",
            "normal:1",
        )
    ],
    "bn": [("batch-norm of each image", {"bn": "batch"})],
    "padding": [(name, {"padding": name}) for name in ("reflect", "replicate")],
    "resolution": [("112 px", {"input_size": 112}), ("448 px", {"input_size": 448})],
    "threshold": [("60th percentile", {"threshold": "percentile:60"})],
}
HEAD = "| setting | CorLoc .5 | over seeds | centred box | map of noise | over noise | left "
HEAD += "| nothing |\n" + 8 * "|---" + "|"


def line(setting: str, result: dict[str, Any], seeds: int) -> str:
    """A row of the table."""
    spread, left = result["over_seeds"]["corloc"]["0.5"], result["explained"]["corloc_0.5"]
    of = {key: figures["corloc"]["0.5"] for key, figures in result["controls"].items()}
    over = f"{of['noise_divided']:.1f}" if "noise_divided" in of else ""
    low, high = left["interval"]
    maps = (result["images"] + result["without_boxes"]) * seeds
    return (
        f"| {setting} | {result['corloc']['0.5']:.1f} "
        f"| {spread['lowest']:.1f} to {spread['highest']:.1f} "
        f"| {of['centre_box']:.1f} | {of['noise']:.1f} | {over} "
        f"| {left['difference']:+.1f} ({low:+.1f} to {high:+.1f}) "
        f"| {100 * result['fallbacks'] / maps:.0f} % |"
    )


def above(name: str, result: dict[str, Any]) -> str:
    """What is the same in all rows of a set."""
    of = {key: figures["corloc"]["0.5"] for key, figures in result["controls"].items()}
    return (
        f"\n{name}, {result['images']} images: whole image {of['full_image']:.1f}, "
        f"lower right 3 x 3 of 4 x 4 {of['constant_mask']:.1f}\n\n{HEAD}"
    )


def main() -> None:
    """Fills the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--base", default="resnet50")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--only", nargs="+", default=list(FACTORS), choices=FACTORS)
    parser.add_argument("--out", type=Path, default=Path("localization.json"))
    args = parser.parse_args()
    kept = json.loads(args.out.read_text()) if args.out.exists() else {}
    how = {"threads": args.threads, "batch_size": args.batch_size}
    rows: dict[str, list[str]] = {}
    for setting, changed in (row for factor in args.only for row in FACTORS[factor]):
        for name in args.sets:
            source, boxes = SETS[name]
            asked = {
                "checkpoint": f"random:{args.base}",
                "data": str(args.data / source),
                "boxes": str(args.data / boxes),
                "images": args.images,
                "seeds": args.seeds,
                "precision": args.precision,
                **changed,
            }
            key = json.dumps(asked, sort_keys=True)
            if key not in kept:
                kept[key] = run(**asked, **how)
                args.out.write_text(json.dumps(kept) + "\n")
            row = line(setting, kept[key], args.seeds)
            print(f"{name} {row}", flush=True)
            rows.setdefault(name, [above(name, kept[key])]).append(row)
    print("\n".join(row for lines in rows.values() for row in lines))


if __name__ == "__main__":
    main()
