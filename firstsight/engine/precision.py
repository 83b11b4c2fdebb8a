"""Which arithmetic and memory order are fastest here: a short trial, not a rule.

On a CPU either choice can win by factors, depending on its instructions and on the network.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch

from firstsight import distributed
from firstsight.engine import trial
from firstsight.loader import LAYOUTS
from firstsight.log import say
from firstsight.settings import Pretrain

_TRIAL_PIXELS = 64 * 64 * 64
"""Of a trial's images together: 64 of 64 pixels a side; never below 16."""


def pick(name: str, config: Pretrain) -> tuple[str, str]:
    """(precision, layout): what was asked for, and the fastest where `auto` was."""
    device = distributed.device()
    precisions = [config.precision] if config.precision != "auto" else _worth_trying(device)
    layouts = [config.layout] if config.layout != "auto" else list(LAYOUTS)
    if device.type == "cuda" and config.layout == "auto":
        layouts = ["channels_last"]
    pairs = list(itertools.product(precisions, layouts))
    if len(pairs) == 1:
        return pairs[0]
    rates = {pair: _rate(name, config, *pair) for pair in pairs}  # ranks work together in it
    best: tuple[str, str] = distributed.share(max(rates, key=rates.__getitem__))
    tried = ", ".join(f"{p} {layout} {rate:.0f}" for (p, layout), rate in rates.items())
    say(f"trial, images/s: {tried}; taking --precision {best[0]} --layout {best[1]}")
    return best


def _worth_trying(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bf16"] if torch.cuda.is_bf16_supported() else ["fp32"]
    return ["fp32"] if device.type == "mps" else ["fp32", "bf16"]


def _rate(name: str, config: Pretrain, precision: Any, layout: Any) -> float:
    """Images per second of the fastest of some steps."""
    share = config.batch_size // distributed.world()
    fitting = min(64, _TRIAL_PIXELS // config.size**2)
    count = min(max(fitting, 16), share)
    tried = dataclasses.replace(
        config, precision=precision, layout=layout, accumulate=1, compile=False
    )
    return count / trial.run(name, tried, count, count).seconds
