"""How fast a run would be on many devices: measured on the one at hand, predicted for the rest."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from firstsight import distributed, methods, optim, parallel
from firstsight.batch import Batch
from firstsight.distributed.traffic import Cluster, Predicted, Step, predicted
from firstsight.engine import precision, trial, update
from firstsight.loader import LAYOUTS
from firstsight.settings import Pretrain
from firstsight.sources import open_source

_STEPS = 5
_LARGE, _SMALL = 2**23, 1
"""Numbers in the messages that tell a link's bandwidth (32 MiB) and its latency."""

ASSUMPTIONS = (
    "each machine is as fast as this one, and its processes do not slow each other down",
    "replicas (--parallel ddp); gradients in float32, averaged in buckets of 25 MiB while the "
    "backward goes on, as fast as the slowest link of one ring through all ranks",
    "the method gathers and sums at once, in sequence; its step is measured with the rows of all "
    "ranks, each a copy of this one's",
    "views are made by all cores of a machine, beside training; reading files costs nothing more",
    "left out: readings, checkpoints, and on a GPU the sums of --batch-norm global",
)
"""What a prediction rests on."""


def scale(
    name: str,
    config: Pretrain,
    *,
    images: int,
    machines: tuple[int, ...],
    devices: int,
    inside: float,
    between: float,
    latency: float,
) -> dict[str, Any]:
    """Measure a step of `images` here, and predict it for each number of machines.

    Bandwidths in GB/s (10^9 bytes), latency in microseconds. Among several ranks their own link is
    measured and taken for `inside`, and their own step is set beside its prediction.
    """
    distributed.start(config.device, config.threads)
    config = dataclasses.replace(config, batch_size=images * distributed.world(), init="")
    source = open_source(config.data)
    picked, layout = precision.pick(name, config)
    config = dataclasses.replace(config, precision=picked, layout=layout)  # type: ignore[arg-type]
    views = images / trial.seconds_of_views(config, source)
    ranks = distributed.world()
    link: dict[str, float] = {}
    if ranks > 1:
        link = link_of_ranks()
        inside, latency = link["GB/s"], link["microseconds"]
    speeds = {"inside": inside * 1e9, "between": between * 1e9, "latency": latency / 1e6}
    shapes = [Cluster(machines=m, devices=devices, **speeds) for m in machines]
    own = Cluster(machines=1, devices=ranks, **speeds)
    shapes += [own] if ranks > 1 and own not in shapes else []
    alone = measured(name, config, images, len(source), 1)
    steps = {1: alone}
    for world in sorted({shape.world for shape in shapes} - {1}):
        steps[world] = measured(name, config, images, len(source), world)
    cores = distributed.cores() * distributed.local_world()
    found = {s: predicted(steps[s.world], alone, s, views * cores) for s in shapes}
    result: dict[str, Any] = {
        "method": name,
        "images_per_device": images,
        "alone": _milliseconds(alone),
        "gradients_mib": round(alone.gradients / 2**20, 2),
        "views_per_second_and_core": round(views, 1),
        "cores": cores,
        "link": {"inside": inside, "between": between, "latency": latency, "measured": ranks > 1},
        "predicted": [_row(shape, steps[shape.world], what) for shape, what in found.items()],
        "assumptions": list(ASSUMPTIONS),
        "protocol": {
            "backbone": config.backbone,
            "size": config.size,
            "precision": config.precision,
            "layout": config.layout,
            "device": str(distributed.device()),
            "steps": f"the fastest of {_STEPS}: others may be disturbed",
            "torch": torch.__version__,
        },
    }
    if ranks > 1:
        together = _together(name, config, images, len(source))
        told = steps[ranks]
        computed = told.forward + told.backward + told.update
        told_step = computed + found[own].gradients + found[own].exchange
        result["checked"] = {
            "ranks": ranks,
            "predicted_ms": round(1000 * told_step, 1),
            "measured_ms": round(1000 * together, 1),
            "computed_ms": round(1000 * computed, 1),
        }
    return result


def link_of_ranks() -> dict[str, float]:
    """GB/s of a ring through all ranks, and the microseconds of a message of no length."""
    world = distributed.world()

    def seconds(numbers: int) -> float:
        tensor = torch.zeros(numbers, device=distributed.device())
        return _fastest(lambda: float(distributed.summed(tensor)[0]))

    none, many = seconds(_SMALL), seconds(_LARGE)
    crossing = 2 * (world - 1) / world * 4 * _LARGE
    hops = 2 * (world - 1).bit_length()
    return {
        "GB/s": distributed.mean(torch.tensor(crossing / max(many - none, 1e-9) / 1e9)),
        "microseconds": distributed.mean(torch.tensor(none / hops * 1e6)),
    }


def measured(name: str, config: Pretrain, images: int, source_images: int, world: int) -> Step:
    """A step on this device as one of `world` ranks, the others imagined."""
    distributed.barrier()  # ranks share a machine: all of them measure at once
    with distributed.imagined(world) as sent:
        work = _Work(name, config, images, source_images)
        work.step(work.method)
        sent.clear()
        work.step(work.method)
        told = tuple(sent)
        times = [work.step(work.method) for _ in range(_STEPS)]
    forward, backward, rest = min(times, key=sum)
    gradients = sum(p.nbytes for p in parallel.members(work.optimizer))
    return Step(
        images=images,
        forward=forward,
        backward=backward,
        update=rest,
        gradients=gradients,
        sent=told,
    )


def _together(name: str, config: Pretrain, images: int, source_images: int) -> float:
    """Seconds of a step that the ranks at hand really take together."""
    work = _Work(name, config, images, source_images)
    model = parallel.replica(work.method)
    work.step(model)
    return min(sum(work.step(model)) for _ in range(_STEPS))


class _Work:
    """A method, its optimiser and a batch of noise."""

    def __init__(self, name: str, config: Pretrain, images: int, source_images: int) -> None:
        self.config = dataclasses.replace(config, accumulate=1)
        device, layout = distributed.device(), LAYOUTS[config.layout]
        self.method = methods.build(name, self.config, source_images)
        self.method.to(device, memory_format=layout)  # type: ignore[call-overload]
        self.optimizer = optim.of(self.method, config)
        self.scaler = update.scaler(config)
        self.batch = trial.random_batch(config, images)

    def step(self, model: nn.Module) -> tuple[float, float, float]:
        """Seconds of forward, backward and update."""
        timed = _Timed(model)
        began = time.perf_counter()
        update.gradients(timed, self.batch, self.scaler, self.config).loss.item()
        _finish()
        middle = time.perf_counter()
        method, config = self.method, self.config
        update.apply(method, self.optimizer, self.scaler, config, progress=0.0, lr=0.0)
        _finish()
        ended = time.perf_counter()
        return timed.done - began, middle - timed.done, ended - middle


class _Timed(nn.Module):
    """A model that notes when its forward is done."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.done = model, 0.0

    def forward(self, batch: Batch) -> Any:
        said = self.model(batch)
        _finish()
        self.done = time.perf_counter()
        return said


def _finish() -> None:
    """Wait for the device."""
    if distributed.device().type == "cuda":
        torch.cuda.synchronize()


def _fastest(work: Callable[[], Any]) -> float:
    work()
    times: list[float] = []
    for _ in range(_STEPS):
        distributed.barrier()
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _milliseconds(step: Step) -> dict[str, float]:
    parts = {"forward": step.forward, "backward": step.backward, "update": step.update}
    return {f"{part}_ms": round(1000 * seconds, 2) for part, seconds in parts.items()}


def _row(shape: Cluster, step: Step, told: Predicted) -> dict[str, Any]:
    return {
        "machines": shape.machines,
        "devices": shape.devices,
        "images_per_second": round(told.images_per_second, 1),
        "efficiency": round(told.efficiency, 3),
        "step_ms": round(1000 * told.step, 2),
        **_milliseconds(step),
        "gradients_ms": round(1000 * told.gradients, 2),
        "exchange_ms": round(1000 * told.exchange, 2),
        "exchanged_mib": round(sum(one.size for one in step.sent) / 2**20, 3),
        "data_ms": round(1000 * told.data, 2),
    }
