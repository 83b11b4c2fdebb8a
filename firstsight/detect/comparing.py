"""The same training of a detector from several backbones, over the same seeds."""

from __future__ import annotations

import dataclasses
import re
import statistics
from pathlib import Path
from typing import Any

from firstsight import checkpoint, distributed
from firstsight.detect.settings import HEADLINES, Compare, Train, Training
from firstsight.detect.training import train
from firstsight.errors import UserError
from firstsight.settings import shallow


def compare(config: Compare) -> dict[str, Any]:
    """Mean, least and most of each figure over the seeds, for each CHECKPOINT.

    Each training is a run of its own in `config.out`, `NUMBER-NAME-seed-SEED`; the same command
    goes on with those that are not done. A seed draws heads, order, flips and samples, the same for
    every backbone; the backbone is what the CHECKPOINT says (`random:NAME` is always seed 0).
    """
    if not config.test_data:
        raise UserError("nothing to compare without judging; use --test-data, --test-annotations")
    runs = []
    for number, spec in enumerate(config.checkpoints):
        tests = [_one(config, number, spec, config.seed + i)["test"] for i in range(config.seeds)]
        runs.append({"checkpoint": spec, **spread(tests)})
    result = {
        "protocol": _protocol(config),
        "seeds": [config.seed + i for i in range(config.seeds)],
        "results": runs,
    }
    if distributed.rank() == 0:
        checkpoint.write_json(Path(config.out) / "compare.json", result)
    return result


def _one(config: Compare, number: int, spec: str, seed: int) -> dict[str, Any]:
    name = re.sub(r"[^\w.-]+", "-", spec).strip("-.")[-40:]
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(Training)}
    values |= {"out": str(Path(config.out) / f"{number}-{name}-seed-{seed}"), "seed": seed}
    return train(Train(checkpoint=spec, **values))


def spread(tests: list[dict[str, Any]]) -> dict[str, Any]:
    """For each kind of figure its mean, and the least and the most, over several trainings."""
    said: dict[str, Any] = {}
    for kind in HEADLINES:
        if all(kind in test for test in tests):
            names = [n for n in tests[0][kind] if None not in [test[kind][n] for test in tests]]
            lists = {name: [float(test[kind][name]) for test in tests] for name in names}
            said[kind] = {
                name: {"mean": statistics.fmean(v), "least": min(v), "most": max(v), "each": v}
                for name, v in lists.items()
            }
    return said


def _protocol(config: Compare) -> dict[str, Any]:
    left_out = ("checkpoints", "out", "seed", "seeds", "device", "threads", "workers")
    chosen = {key: value for key, value in shallow(config).items() if key not in left_out}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in chosen.items()}
