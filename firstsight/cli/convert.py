"""`firstsight convert`: its options, and its result as a table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from firstsight.cli.flags import parsed, taken
from firstsight.cli.shown import table, write_json
from firstsight.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Convert:
    """Hand a backbone over to another library, with all that is needed to load it there."""

    src: tyro.conf.Positional[str]
    """CHECKPOINT: a run folder, a file of ours or of a known foreign format, torchvision:NAME."""
    dst: tyro.conf.Positional[str]
    """The file to write, or a folder for it; what it is goes beside it, as .json."""
    to: (
        Literal[
            "torchvision",
            "timm",
            "detectron2",
            "mmdet",
            "huggingface",
            "safetensors",
            "onnx",
            "moco",
        ]
        | None
    ) = None
    """Library to write for. mmdet: with two configs of Mask R-CNN. huggingface: a folder."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """Format of SRC; without it recognised by content. A wrong one is answered with the list."""
    half: str | None = None
    """Which network of SRC: query, momentum, student, teacher, online, target; without it the one
    its authors use."""
    selfsup: Literal["moco", "swav"] | None = None
    """As MMDetection's selfsup2mmdet: --from and --to in one word."""
    allow_partial: bool = False
    """Write a backbone of which tensors are missing; they stay untrained."""


def convert(args: list[str]) -> None:
    """Hand a backbone over to another library: firstsight convert SRC DST --to FORMAT."""
    target, args = taken(args, "--json")
    asked = parsed(Convert, args, "convert")
    if (asked.to is None) == (asked.selfsup is None):
        raise UserError("to which library? use --to, for instance --to torchvision, or --selfsup")

    from firstsight import convert

    to = asked.to or "selfsup2mmdet"
    if target and Path(target) == convert.sidecar(asked.dst, to):
        raise UserError(f"{target} will say what {asked.dst} is; use another --json")
    fit = convert.read(asked.src, from_=asked.from_ or asked.selfsup, half=asked.half)
    result = convert.report(fit)
    write_json(target, result)  # said also where it is then refused
    _show_coverage(asked.src, result)
    result = convert.write(fit, asked.src, asked.dst, to=to, allow_partial=asked.allow_partial)
    write_json(target, result)
    for file in result["files"]:
        print(f"written: {file}")
    for note in result["notes"]:
        print(f"mind: {note}")


def _show_coverage(src: str, result: dict[str, Any]) -> None:
    rows = [["tensors matched", f"{result['matched']} of {result['total']}"]]
    for what, keys in {
        "missing": result["missing"],
        "of another shape": result["unlike"],
        "counters set to 0": result["filled"],
        "left out of the file": result["dropped"],
    }.items():
        some = f": {keys[0]}" + (", ..." if len(keys) > 1 else "") if keys else ""
        rows.append([what, f"{len(keys)}{some}"])
    table(f"{src}: {result['format']}, {result['half']}, {result['backbone']}", ["", ""], rows)
