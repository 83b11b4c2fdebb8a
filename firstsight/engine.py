"""The training loop. There is one, it is here, and it has no hooks.

What happens once in a while (a line in the log, a reading, a checkpoint) is an `if` in the loop.
"""

from __future__ import annotations

import inspect
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from firstsight import checkpoint, distributed, keyed, methods, optim
from firstsight.errors import UserError
from firstsight.features import Seen
from firstsight.guards import (
    note_bad,
    refuse_nonfinite_loss,
    refuse_nonfinite_networks,
    stop_signal,
)
from firstsight.loader import LAYOUTS, Steps, batches, on_device
from firstsight.log import Log, Meter, say
from firstsight.methods.base import Method
from firstsight.order import Epochs
from firstsight.probe import KnnProbe, Online
from firstsight.settings import Pretrain, plain
from firstsight.sources.base import Source

SNAPSHOTS = 10
"""Backbones kept over a run, evenly spread."""


class Trained(NamedTuple):
    """What training came to."""

    method: Method
    done: int
    """Steps done: fewer than wanted when a signal asked the run to stop; the same call goes on."""
    wanted: int
    seen: Seen | None
    """The features of the last reading, where it was taken just now."""


def pretrain(
    name: str, config: Pretrain, source: Source, probe: KnnProbe | None, out: Path
) -> Trained:
    """Train method `name` from where the run in `out` stands; config is resolved (no `auto`)."""
    device, layout = distributed.device(), LAYOUTS[config.layout]
    order = Epochs(len(source), config.batch_size, config.seed)
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    warmup = round(config.warmup_epochs * order.steps_per_epoch)

    method = methods.build(name, config, len(source))
    method.to(device, memory_format=layout)  # type: ignore[call-overload]
    groups = optim.groups(method, config.undecayed)
    optimizer = optim.build(config.optimizer, groups, config.weight_decay)
    online = None
    if probe and config.probe != "none":
        online = Online(probe, config, source, method.backbone.width, device)
    first, seconds, bad = resume(out, method, optimizer, online, source)
    model = parallel(method, device)  # DDP over several ranks, the method itself on one
    method.train()

    main, fingerprint = distributed.rank() == 0, source.fingerprint()
    log = Log(out, first) if main else None
    maker = Steps(
        source=source,
        views=config.views,
        size=config.size,
        order=order,
        seed=config.seed,
        rank=distributed.rank(),
        world=distributed.world(),
    )
    stream = batches(maker, first, steps, config.workers)
    if online:
        online.begin(first, steps)
    if online and first == 0:  # every rank takes its share of a reading
        readings = online.untrained(method.backbone)
        if log and readings:
            log.write(0, {"epoch": 0.0, **readings})

    seen: Seen | None = None
    new_bad: set[str] = set()
    waited = trained = 0.0  # seconds since the last line of the log
    images, done = 0, first
    with Meter(name, first, steps) as meter, stop_signal() as stopped:
        for step in range(first, steps):
            began = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - began
            done, progress = step + 1, step / steps
            logging = done % config.log_every == 0 or done == steps
            reading = online is not None and due(done, steps, config.probe_readings + 1)
            stopping = (distributed.world() == 1 or logging) and distributed.anyone(stopped())
            saving = done % config.save_every == 0 or done == steps or stopping
            keeping = due(done, steps, SNAPSHOTS)

            torch.manual_seed(keyed.seed(config.seed, step, distributed.rank()))
            lr = optim.rate(
                step,
                steps,
                peak=config.peak_lr,
                warmup=warmup,
                schedule=config.schedule,
                drops=config.drops,
            )
            optim.set_rate(optimizer, lr)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                output = model(on_device(batch, config.views, device, layout))
            output.loss.backward()
            # reading a loss waits for the device, so on a fast one that is rare
            if device.type == "cpu" or logging or saving:
                refuse_nonfinite_loss(output.loss, method, step, out)
            method.before_step(progress)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(progress, lr)
            if online:
                online.learn(step, steps, method.backbone, output.features, batch.label)
            trained += time.perf_counter() - began
            images += config.batch_size
            new_bad |= set(batch.bad)

            if logging or saving:
                note_bad(new_bad, bad, config.max_bad * len(source))
                new_bad.clear()
            if logging or reading:
                figures = {
                    "epoch": done / order.steps_per_epoch,
                    "loss": distributed.mean(output.loss.detach()),
                    "lr": lr,
                    "images_per_second": images / trained,
                    "data_wait": waited / trained,
                    "bad_images": float(len(bad)),
                    **{key: distributed.mean(value) for key, value in output.scalars.items()},
                }
                seconds, waited, trained, images = seconds + trained, 0.0, 0.0, 0
                if online and done == steps:
                    readings, seen = online.fully(method.backbone)
                    figures |= readings
                elif online and reading:
                    figures |= online.quickly(method.backbone)
                if log:
                    log.write(done, figures)
                    meter.show(done, told(figures))
            if main and (saving or keeping):
                refuse_nonfinite_networks(method, step, out)
            if main and keeping:
                snapshot(out, method, config, done)
            if main and saving:
                state = {"step": done, "seconds": seconds + trained, "bad": sorted(bad)}
                state |= {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"source": fingerprint, "about": about(method, config)}
                state |= {"name": name, "settings": plain(config)}
                state |= {"probes": online.state_dict() if online else {}}
                checkpoint.save(out / "checkpoints", done, state, config.keep)
            if stopping:
                say("stopping; the same command goes on from there")
                break
    if log:
        log.close()
    distributed.barrier()
    return Trained(method, done, steps, seen)


def resume(
    out: Path,
    method: Method,
    optimizer: torch.optim.Optimizer,
    online: Online | None,
    source: Source,
) -> tuple[int, float, set[str]]:
    """Load the newest whole checkpoint: steps done, seconds trained, bad images (0, 0, none)."""
    state, damaged = checkpoint.newest(out / "checkpoints")
    for complaint in damaged:
        say(f"{complaint}; taking the one before it")
    if state is None:
        return 0, 0.0, set()
    if state["source"] != source.fingerprint():
        raise UserError(
            f"{source.spec} no longer holds the images that {out} was trained on; "
            f"use --out to start another run"
        )
    checkpoint.load_state(method, state["method"], out / "checkpoints" / "last")
    optimizer.load_state_dict(state["optimizer"])
    if online:
        online.load_state_dict(state.get("probes", {}))
    return int(state["step"]), float(state["seconds"]), set(state["bad"])


def parallel(method: Method, device: torch.device) -> nn.Module:
    """The method as one of W replicas that average their gradients; itself when alone."""
    if distributed.world() == 1:
        return method
    # each rank keeps batch-norm statistics of its own: nothing is overwritten from rank 0.
    # Newer releases of torch have another name for that
    known = inspect.signature(DistributedDataParallel).parameters
    keep = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [device] if device.type == "cuda" else None
    options: dict[str, Any] = {"device_ids": devices, keep: False}
    return DistributedDataParallel(method, **options)


def due(done: int, steps: int, times: int) -> bool:
    """Whether one of `times` evenly spread moments of a run falls on this step; the end is one."""
    return times > 0 and (done * times) // steps > ((done - 1) * times) // steps


def about(method: Method, config: Pretrain) -> dict[str, Any]:
    """What a reader of the backbone needs to know."""
    return checkpoint.about_backbone(
        method.backbone, config.size, config.views.mean, config.views.std
    )


def snapshot(out: Path, method: Method, config: Pretrain, done: int) -> None:
    """Keep the backbone as it is now."""
    folder = out / "snapshots"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{done:08d}.safetensors"
    checkpoint.save_backbone(path, method.backbone, {**about(method, config), "step": done})


def told(figures: dict[str, float]) -> str:
    """The figures that a person watches."""
    text = f"loss {figures['loss']:.3f}, {figures['images_per_second']:.0f} images/s"
    text += f", waited {figures['data_wait']:.0%}"
    readings = [f"k-NN {v:.1f} %" for k, v in figures.items() if k.startswith("knn")]
    if linear := [v for k, v in figures.items() if k.startswith("linear")]:
        readings.append(f"linear up to {max(linear):.1f} %")
    return ", ".join([text, *readings])
