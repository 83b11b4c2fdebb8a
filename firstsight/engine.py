"""The training loop. There is one, it is here, and it has no hooks.

What happens once in a while (a line in the log, a reading, a checkpoint) is an `if` in the loop.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from firstsight import checkpoint, distributed, keyed, methods, optim
from firstsight.errors import UserError
from firstsight.loader import LAYOUTS, Steps, batches, on_device
from firstsight.log import Log, Meter, say
from firstsight.methods.base import Method
from firstsight.order import Epochs
from firstsight.probe import KnnProbe
from firstsight.settings import Pretrain, plain
from firstsight.sources.base import Source

SNAPSHOTS = 10
"""Backbones kept over a run, evenly spread."""


def pretrain(
    name: str, config: Pretrain, source: Source, probe: KnnProbe | None, out: Path
) -> tuple[Method, int, int]:
    """Train method `name` from where the run in `out` stands; config is resolved (no `auto`).

    Returns the method, the steps done and the steps wanted: fewer are done when a signal asked the
    run to stop, and the same call then goes on.
    """
    device = distributed.device()
    layout = LAYOUTS[config.layout]
    order = Epochs(len(source), config.batch_size, config.seed)
    steps = max(1, round(config.epochs * order.steps_per_epoch))
    warmup = round(config.warmup_epochs * order.steps_per_epoch)

    method = methods.build(name, config, len(source)).to(device, memory_format=layout)  # type: ignore[call-overload]
    groups = optim.groups(method, config.undecayed)
    optimizer = optim.build(config.optimizer, groups, config.weight_decay)
    first, seconds = resume(out, method, optimizer, source)
    model = parallel(method, device)  # DDP over several ranks, the method itself on one
    method.train()

    main = distributed.rank() == 0
    fingerprint = source.fingerprint()
    log = Log(out, first) if main else None
    stream = batches(
        Steps(
            source=source,
            views=config.views,
            size=config.size,
            order=order,
            seed=config.seed,
            rank=distributed.rank(),
            world=distributed.world(),
        ),
        first,
        steps,
        config.workers,
    )
    if probe and first == 0:  # every rank takes its share of a reading
        readings = {"knn": probe.read(method.backbone)}
        readings["knn_quick"] = probe.read_quickly(method.backbone)
        if log:
            log.write(0, {"epoch": 0.0, **readings})

    bad: set[str] = set()
    waited = trained = 0.0  # seconds since the last line of the log
    images = 0
    done = first
    with Meter(name, first, steps) as meter, stop_signal() as stopped:
        for step in range(first, steps):
            began = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - began
            done, progress = step + 1, step / steps
            logging = done % config.log_every == 0 or done == steps
            reading = probe is not None and due(done, steps, config.probe_readings)
            stopping = (distributed.world() == 1 or logging) and distributed.anyone(stopped())
            saving = done % config.save_every == 0 or done == steps or stopping

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
                refuse_nonfinite(output.loss, method, step, out)
            method.before_step(progress)
            optimizer.step()
            optimizer.zero_grad()
            method.after_step(progress, lr)
            trained += time.perf_counter() - began
            images += config.batch_size

            note_bad(batch.bad, bad, config.max_bad * len(source))
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
                if reading and done < steps:
                    assert probe is not None
                    figures["knn_quick"] = probe.read_quickly(method.backbone)
                elif probe and done == steps:
                    figures["knn"] = probe.read(method.backbone)
                if log:
                    log.write(done, figures)
                    meter.show(done, told(figures))
            if main and due(done, steps, SNAPSHOTS):
                snapshot(out, method, config, done)
            if saving and main:
                refuse_to_save_nonfinite(method, step, out)
                state = {"step": done, "seconds": seconds + trained, "source": fingerprint}
                state |= {"method": method.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"name": name, "settings": plain(config), "about": about(method, config)}
                checkpoint.save(out / "checkpoints", done, state, config.keep)
            if stopping:
                break
    if log:
        log.close()
    distributed.barrier()
    return method, done, steps


def resume(
    out: Path, method: Method, optimizer: torch.optim.Optimizer, source: Source
) -> tuple[int, float]:
    """Load the newest whole checkpoint of the run; (steps done, seconds trained) or zeros."""
    state, damaged = checkpoint.newest(out / "checkpoints")
    for complaint in damaged:
        say(f"{complaint}; taking the one before it")
    if state is None:
        return 0, 0.0
    if state["source"] != source.fingerprint():
        raise UserError(
            f"{source.spec} no longer holds the images that {out} was trained on; "
            f"use --out to start another run"
        )
    checkpoint.load_state(method, state["method"], out / "checkpoints" / "last")
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"]), float(state["seconds"])


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


def note_bad(names: tuple[str, ...], known: set[str], most: float) -> None:
    """Name each undecodable image once; refuse to go on with more than `most` of them."""
    for name in sorted(set(names) - known):
        known.add(name)
        say(f"cannot decode {name}: replaced ({len(known)} so far)")
    if names and len(known) > most:
        raise UserError(
            f"{len(known)} images cannot be decoded, {min(known)} among them, and --max-bad allows "
            f"{most:.0f}; mend or remove them, or allow more"
        )


def refuse_nonfinite(loss: Tensor, method: nn.Module, step: int, out: Path) -> None:
    """Stop the run when the loss is not finite, before anything is updated or saved with it."""
    if not math.isfinite(loss.item()):
        raise nonfinite(f"the loss is {loss.item()}", method, step, out)


def refuse_to_save_nonfinite(method: nn.Module, step: int, out: Path) -> None:
    """Stop the run when an update broke a tensor: the checkpoint before it stays the last."""
    if not all(t.isfinite().all() for t in method.state_dict().values()):
        raise nonfinite("the update broke the networks", method, step, out)


def nonfinite(what: str, method: nn.Module, step: int, out: Path) -> UserError:
    """What to tell: which tensors went bad, and where the last good ones are."""
    tensors: list[tuple[str, Tensor | None]] = list(method.state_dict().items())
    tensors += [(f"gradient of {name}", p.grad) for name, p in method.named_parameters()]
    bad = [name for name, t in tensors if t is not None and not t.isfinite().all()]
    named = f"{len(bad)} tensors went bad, {', '.join(bad[:3])} first" if bad else "no tensor did"
    last = out / "checkpoints" / "last"
    kept = f"the last good checkpoint is {last.resolve()}" if last.exists() else "none was saved"
    return UserError(
        f"{what} at step {step} ({named}); {kept}; start another run with a lower --lr, "
        f"a longer --warmup-epochs or --precision fp32"
    )


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
    return ", ".join([text, *readings])


@contextlib.contextmanager
def stop_signal() -> Iterator[Any]:
    """While inside, SIGINT and SIGTERM do not end the process; the value says whether one came."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means at once
        came.append(number)
        say("stopping after this step; the same command goes on from there")

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
