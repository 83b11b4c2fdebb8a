"""`firstsight detect train`, `eval` and `compare`: what is typed, and what is shown of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from firstsight import recipes, settings
from firstsight.cli.flags import config_file, flagged, parsed, peeked, taken
from firstsight.cli.shown import protocol, table, write_json
from firstsight.detect.settings import HEADLINES, Compare, Eval, Train, Training
from firstsight.errors import UserError, unknown
from firstsight.log import is_first

T = TypeVar("T", Train, Compare)


def detect(args: list[str]) -> None:
    """Train a detector from a backbone, and judge it: firstsight detect train CHECKPOINT."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: firstsight detect train CHECKPOINT --data IMAGES --annotations F --out RUN")
        print("       firstsight detect eval RUN")
        print("       firstsight detect compare CHECKPOINT CHECKPOINT ... --out FOLDER\n")
        lines = [f"  {name:<8} {verb.__doc__}" for name, verb in VERBS.items()]
        print("\n".join(lines) + "\n\nfirstsight detect train --help lists its options")
        return
    if args[0] not in VERBS:
        raise unknown("work", args[0], VERBS)
    VERBS[args[0]](args[1:])


def train(args: list[str]) -> None:
    """A detector or a segmenter from a CHECKPOINT, trained and judged."""
    target, args = taken(args, "--json")
    config = _begun(Train, args, "detect train", {"checkpoint": tyro.MISSING})

    from firstsight.detect import train

    result = train(config)
    if not is_first():
        return

    from firstsight.report import write_report

    write_json(target, result)
    write_report([Path(config.out)], Path(config.out) / "report.html")
    if result["test"]:
        _figures(f"{config.out}, judged by {config.test_data}", result["test"])
    seconds, rate = result["seconds"], result["images_per_second"]
    print(f"{result['steps']} steps in {seconds} s, {rate} images/s, "
          f"at most {result['peak_memory_gib']} GiB")  # fmt: skip
    protocol(result)


def evaluate(args: list[str]) -> None:
    """The figures of a trained one, as COCO and VOC count."""
    target, args = taken(args, "--json")
    config = parsed(Eval, args, "detect eval")

    from firstsight.detect import evaluate

    result = evaluate(config)
    if is_first():
        write_json(target, result)
        _figures(f"{config.run}, {result['images']} images", result)
        protocol(result)


def compare(args: list[str]) -> None:
    """The same training from several CHECKPOINTs, over several seeds."""
    target, args = taken(args, "--json")
    config = _begun(Compare, args, "detect compare", {"checkpoints": tyro.MISSING})

    from firstsight.detect import compare

    result = compare(config)
    if not is_first():
        return
    write_json(target, result)
    for kind, names in HEADLINES.items():
        if kind in result["results"][0]:
            rows = [[one["checkpoint"], *_spread(one[kind], names)] for one in result["results"]]
            title = f"{kind}, percent: mean (least to most) of {len(result['seeds'])} seeds"
            table(title, ["", *names], rows)
    protocol(result)


VERBS = {"train": train, "eval": evaluate, "compare": compare}


def _begun(kind: type[T], args: list[str], prog: str, missing: dict[str, Any]) -> T:
    """Class defaults < `--recipe` < `--config FILE` < flags."""
    values, args = config_file(args)
    if values.pop("name", "detect") != "detect":
        raise UserError("--config holds settings of pretraining, not of a detector")
    early = {key: peeked(args, f"--{key}") for key in ("recipe", "epochs", "steps")}
    values |= {key: value for key, value in early.items() if value is not None}
    start = kind(**missing, out=tyro.MISSING)
    begun = settings.merged(start, recipes.of_detection(values), "--config or flags")
    config = flagged(kind, args, prog, kind.__doc__ or "", begun)
    assert isinstance(config, Training)
    return config


def _figures(title: str, result: dict[str, Any]) -> None:
    kinds = [kind for kind in HEADLINES if kind in result]
    rows = [[name, *(_number(result[kind][name]) for kind in kinds)] for name in result[kinds[0]]]
    for name, value in result.get("voc", {}).get("AP07", {}).items():
        rows.append([f"{name}, VOC 2007's 11 points", _number(value)])
    if "semantic" in result:
        rows += [[f"IoU, {row['name']}", _number(row["IoU"])] for row in result["per_class"]]
    rate, memory = result["images_per_second"], result["peak_memory_gib"]
    table(f"{title}, percent", ["", *kinds], rows)
    print(f"{rate} images/s, at most {memory} GiB")


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.1f}"


def _spread(figures: dict[str, Any], names: Sequence[str]) -> list[str]:
    shown = [figures.get(name) for name in names]
    return [
        f"{one['mean']:.1f} ({one['least']:.1f} to {one['most']:.1f})" if one else ""
        for one in shown
    ]
