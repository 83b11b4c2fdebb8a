"""A few steps on random images: how long they take, how much memory, how many images fit."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from firstsight import backbones, distributed, methods, optim
from firstsight.batch import Batch
from firstsight.engine import update
from firstsight.errors import UserError
from firstsight.loader import LAYOUTS, Steps
from firstsight.loader.merging import merger_of
from firstsight.loader.windows import order_of
from firstsight.log import clock
from firstsight.settings import Pretrain
from firstsight.sources.base import Source

_STEPS = 3

_PART = 32
"""Images of a trial in place of a batch that takes long."""
_PATIENCE = 4.0
"""Seconds that a step of a trial may take before a part of it must do."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What some optimiser steps took."""

    seconds: float
    """Of the fastest step: the first warms up, others may be disturbed."""
    memory: int
    """Bytes at the highest: of the device, or of this process where that is the CPU."""
    parameters: int
    """Numbers in the backbone."""


def run(name: str, config: Pretrain, images: int, source_images: int) -> Trial:
    """Some steps of a method for that source on `images` random images; config is resolved."""
    device, layout = distributed.device(), LAYOUTS[config.layout]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    random = dataclasses.replace(config, init="", init_policy="backbone")  # takes as long
    method = methods.build(name, random, source_images)
    method.to(device, memory_format=layout)  # type: ignore[call-overload]
    if config.compile:
        backbones.compile_all(method)
    optimizer, scaler = optim.of(method, config), update.scaler(config)
    batch = random_batch(config, images)
    best = float("inf")
    for _ in range(_STEPS):
        began = time.perf_counter()
        update.gradients(method, batch, scaler, config).loss.item()
        update.apply(method, optimizer, scaler, config, progress=0.0, lr=0.0)
        best = min(best, time.perf_counter() - began)
        if best > _PATIENCE:  # long enough to tell
            break
    return Trial(
        seconds=best,
        memory=peak_memory(device),
        parameters=sum(p.numel() for p in method.backbone.parameters()),
    )


def random_batch(config: Pretrain, images: int) -> Batch:
    """Views of noise, each of the whole image."""
    sides = config.views.sides(config.size)
    views = tuple(torch.randint(256, (images, 3, s, s), dtype=torch.uint8) for s in sides)
    whole = torch.tensor([[0.0, 0.0, config.size, config.size]]).repeat(images, 1)
    return Batch(
        views=views,
        crops=(whole,) * len(sides),
        flips=(torch.zeros(images, dtype=torch.bool),) * len(sides),
        index=torch.arange(images),
        sizes=whole[:, 2:],
    )


def of_share(name: str, config: Pretrain, images: int, source_images: int) -> Trial:
    """`run`; where a CPU would take long for it, from a part of the images: both grow with them."""
    chunk = -(-images // config.accumulate)
    if distributed.device().type != "cpu" or chunk <= 2 * _PART:
        return run(name, config, images, source_images)
    part = dataclasses.replace(config, accumulate=1)
    few = run(name, part, _PART // 2, source_images)
    more = run(name, part, _PART, source_images)
    if more.seconds * images / _PART < _PATIENCE:
        return run(name, config, images, source_images)
    each = (more.memory - few.memory) / (_PART - _PART // 2)
    return Trial(
        seconds=more.seconds * images / _PART,
        memory=round(more.memory + each * (chunk - _PART)),
        parameters=more.parameters,
    )


def peak_memory(device: torch.device) -> int:
    """Bytes at the highest, of the device or of this process on the CPU; 0 where nobody says."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # not on this platform
        return 0
    unit = 1 if sys.platform == "darwin" else 1024  # of what getrusage says
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def dry_run(name: str, config: Pretrain, source: Source) -> dict[str, Any]:
    """What a run would take, from a trial of its steps and of its views; config is resolved."""
    order = order_of(config, len(source))
    steps, world = order.steps(config.epochs), distributed.world()
    trial = of_share(name, config, config.batch_size // world, len(source))
    views = seconds_of_views(config, source)
    step = seconds_per_step(trial.seconds, views, config.workers, distributed.cores())
    return {
        "method": name,
        "steps": steps,
        "images": steps * config.batch_size,
        "parameters": trial.parameters,
        "memory_gib": round(trial.memory / 2**30, 2),
        "seconds_network": round(trial.seconds, 4),
        "seconds_views": round(views, 4),
        "seconds_per_step": round(step, 4),
        "hours": round(steps * step / 3600, 3),
        "time": clock(steps * step),
    }


def seconds_of_views(config: Pretrain, source: Source) -> float:
    """What this rank's share of the views of a step takes one process."""
    maker = Steps(
        source=source,
        views=config.views,
        size=config.size,
        order=order_of(config, len(source)),
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world(),
        views_on=config.views_on,
        merger=merger_of(_without_masks(config), source),
    )
    began = time.perf_counter()
    maker.batch(0)
    return time.perf_counter() - began


def _without_masks(config: Pretrain) -> Pretrain:
    """`config` with the same foreground for all images: masks are not made yet, and none is
    quicker than another."""
    merge = dataclasses.replace(config.views.merge, foreground="constant", masks="")
    return dataclasses.replace(config, views=dataclasses.replace(config.views, merge=merge))


def seconds_per_step(network: float, views: float, workers: int, cores: int) -> float:
    """Of one step, given the seconds of the network alone and of its views in one process.

    Workers make views while the network trains; on a CPU both share the cores.
    """
    if workers == 0:
        return network + views
    if distributed.device().type == "cpu":
        return network + views / cores
    return max(network, views / min(workers, cores))


def too_large(name: str, config: Pretrain, source_images: int) -> UserError:
    """What to say when the memory of the device is full: the batch that would fit."""
    device, share = distributed.device(), config.batch_size // distributed.world()
    chunk = -(-share // config.accumulate)
    fit = chunk // 2  # on several ranks nobody may be left to take part in a trial
    if device.type == "cuda" and distributed.world() == 1:
        torch.cuda.empty_cache()
        whole = dataclasses.replace(config, accumulate=1)
        fit = fitting(
            lambda images: run(name, whole, images, source_images).memory,
            chunk,
            room=torch.cuda.mem_get_info()[0],
        )
    return told_what_fits(config, device, fit)


def fitting(peak: Callable[[int], int], tried: int, room: int) -> int:
    """How many of `tried` images fit into `room` bytes, by the peaks of two smaller numbers.

    Memory is taken to grow by the same amount for each image, and a tenth is left free; 0 where
    not even the smaller of the two fits.
    """
    few = max(2, tried // 8)
    try:
        fixed, more = peak(few), peak(2 * few)
    except torch.OutOfMemoryError:
        return 0
    each = max(1, (more - fixed) / few)
    return max(0, min(tried - 1, int(few + (0.9 * room - fixed) / each)))


def told_what_fits(config: Pretrain, device: torch.device, fit: int) -> UserError:
    """One sentence: what did not fit, and the flags with which it would, `fit` images at a time."""
    share = config.batch_size // distributed.world()
    chunk = -(-share // config.accumulate)
    what = f"{chunk} images at a time do not fit into the memory of {device}"
    if fit < 2:
        return UserError(f"{what}, nor do few; use a smaller --size or another --backbone")
    smaller = distributed.world() * config.accumulate * fit
    chunks = -(-share // fit)
    return UserError(f"{what}; use --batch-size {smaller}, or keep it with --accumulate {chunks}")
