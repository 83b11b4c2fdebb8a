"""Which arithmetic and memory order are fastest here: a short trial, not a rule.

On a CPU either choice can win by factors, depending on its instructions and on the network.
"""

from __future__ import annotations

import itertools
import time

import torch

from firstsight import distributed, methods
from firstsight.batch import Batch
from firstsight.loader import LAYOUTS
from firstsight.log import say
from firstsight.settings import Pretrain

_TRIAL_IMAGES = 64
_TRIAL_STEPS = 3


def pick(name: str, config: Pretrain) -> tuple[str, str]:
    """(precision, layout): what was asked for, and the fastest where `auto` was."""
    device = distributed.device()
    precisions = [config.precision] if config.precision != "auto" else _worth_trying(device)
    layouts = [config.layout] if config.layout != "auto" else list(LAYOUTS)
    if device.type == "cuda" and config.layout == "auto":
        layouts = ["channels_last"]
    trials = list(itertools.product(precisions, layouts))
    if len(trials) == 1:
        return trials[0]
    rates = {trial: _rate(name, config, *trial) for trial in trials}  # ranks work together in it
    best: tuple[str, str] = distributed.share(max(rates, key=rates.__getitem__))
    tried = ", ".join(f"{p} {layout} {rate:.0f}" for (p, layout), rate in rates.items())
    say(f"trial, images/s: {tried}; taking --precision {best[0]} --layout {best[1]}")
    return best


def _worth_trying(device: torch.device) -> list[str]:
    if device.type == "cuda":
        return ["bf16"] if torch.cuda.is_bf16_supported() else ["fp32"]
    return ["fp32"] if device.type == "mps" else ["fp32", "bf16"]


def _rate(name: str, config: Pretrain, precision: str, layout: str) -> float:
    device = distributed.device()
    count = min(_TRIAL_IMAGES, config.batch_size // distributed.world())
    method = methods.build(name, config, count)
    method.to(device, memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    views = tuple(
        torch.randn(count, 3, side, side, device=device).contiguous(memory_format=LAYOUTS[layout])
        for side in config.views.sides(config.size)
    )
    none = torch.zeros(count, device=device)
    batch = Batch(views=views, crops=(none,) * len(views), flips=(none,) * len(views), index=none)
    best = float("inf")
    for _ in range(_TRIAL_STEPS):  # the fastest one: the first warms up, others may be disturbed
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = method(batch)
        output.loss.backward()
        output.loss.item()
        method.zero_grad()
        best = min(best, time.perf_counter() - began)
    return count / best
