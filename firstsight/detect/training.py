"""Training a detector: one loop, in the manner of the pretraining engine.

A run in `--out` is resumed by the same command, and on a CPU it then ends bit for bit where it
would have ended uninterrupted.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstsight import checkpoint, distributed, keyed, optim, parallel
from firstsight.detect.inputs import Batch, ImageSet, Steps, order_of, to_device, worth_training
from firstsight.detect.judging import built, judged, opened, protocol, require_same
from firstsight.detect.policies import Resting
from firstsight.detect.segmentation_data import SegmentedImages
from firstsight.detect.settings import HEADLINES, UNBOUND, Train
from firstsight.engine import folders, trial
from firstsight.engine.guards import (
    note_bad,
    refuse_nonfinite_loss,
    refuse_nonfinite_networks,
    stop_signal,
)
from firstsight.errors import UserError
from firstsight.loader import each
from firstsight.log import Log, Meter, read_log, say, told
from firstsight.nets import cast_to
from firstsight.optim.schedule import Schedule, due
from firstsight.order import Epochs
from firstsight.settings import plain, read_yaml, write_yaml


@dataclass(kw_only=True)
class Run:
    """The parts of a run that training changes, and how far it is."""

    out: Path
    config: Train
    detector: Resting
    optimizer: torch.optim.Optimizer
    about: dict[str, Any]
    """Of the backbone."""
    categories: tuple[str, ...]
    images: str
    """A fingerprint of the training images and their objects."""
    step: int = 0
    """Optimiser steps done."""
    seconds: float = 0.0
    """Spent training."""
    bad: set[str] = field(default_factory=set)
    """Images that could not be decoded."""

    def resume(self) -> None:
        """Take up the newest whole checkpoint, where there is one."""
        saved, damaged = checkpoint.newest(self.out / "checkpoints")
        for complaint in damaged:
            say(f"{complaint}; taking the one before it")
        if saved is None:
            return
        if saved["images"] != self.images:
            raise UserError(
                f"{self.config.annotations} no longer holds what {self.out} was trained on; "
                "use --out to start another run"
            )
        checkpoint.load_state(self.detector, saved["detector"], self.out / "checkpoints" / "last")
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = int(saved["step"]), float(saved["seconds"])
        self.bad = set(saved["bad"])

    def save(self) -> None:
        """Write a checkpoint."""
        values: dict[str, Any] = {"step": self.step, "seconds": self.seconds}
        values |= {"bad": sorted(self.bad), "images": self.images, "about": self.about}
        values |= {"categories": list(self.categories), "settings": plain(self.config)}
        values |= {"detector": self.detector.state_dict()}
        values |= {"optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.out / "checkpoints", self.step, values, self.config.keep)


def train(config: Train) -> dict[str, Any]:
    """Train a detector from a CHECKPOINT, or go on with it; its `summary.json`.

    That holds the figures of the test images where they are given, steps, images a second of
    training, and the peak of memory. Raises `UserError` for what does not fit together.
    """
    distributed.start(config.device, config.threads)
    images, tests = _opened(config)
    out = Path(config.out)
    with folders.only_writer(out):
        _begin_or_continue(config, out)
        distributed.barrier()
        summary = out / "summary.json"
        chosen = worth_training(images, config.keep_empty)
        order = order_of(images, chosen, config)
        steps = config.steps or order.steps(config.epochs)
        if summary.exists() and read_log(out / "log.jsonl")[-1:]:
            say(f"{out} is finished; use another --out for another training")
            return dict(json.loads(summary.read_text()))
        try:
            run, result = trained(config, images, tests, out, order, steps)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{config.batch_size // distributed.world()} images at a time do not fit into the "
                f"memory of {distributed.device()}; use a smaller --batch-size (the learning rate "
                "follows), smaller --short-sides, or --precision bf16"
            ) from None
        if run.step < steps:
            say(f"stopped at step {run.step} of {steps}")
            raise SystemExit(130)
        if tests and result is None:  # stopped between the last step and here
            result = judged(run.detector, tests, config, out)
        figures = {
            "protocol": protocol(config),
            "steps": steps,
            "images": steps * config.batch_size,
            "training_images": len(chosen),
            "left_out": len(images) - len(chosen),
            "seconds": round(run.seconds, 1),
            "images_per_second": round(steps * config.batch_size / run.seconds, 2),
            "peak_memory_gib": round(trial.peak_memory(distributed.device()) / 2**30, 2),
            "test": result,
        }
        if distributed.rank() == 0:
            checkpoint.write_json(summary, figures)
    return figures


def _opened(config: Train) -> tuple[ImageSet, ImageSet | None]:
    """The images to train on and to judge by; what does not fit is refused before anything is
    written."""
    if not config.data or not config.annotations:
        raise UserError("which images? use --data FOLDER and --annotations")
    if bool(config.test_data) != bool(config.test_annotations):
        raise UserError("--test-data and --test-annotations go together")
    world = distributed.world()
    if config.batch_size % world:
        raise UserError(
            f"batch size {config.batch_size} does not divide over {world} ranks; "
            f"use --batch-size {-(-config.batch_size // world) * world}"
        )
    if config.detector == "deeplab" and config.batch_size // world < 2:
        raise UserError(
            "deeplab takes a mean over each image, which batch-norm of one image cannot scale; use "
            "a --batch-size of two or more a device"
        )
    if config.norm == "split" and config.batch_size // world < 2 * config.splits:
        raise UserError(
            f"{config.batch_size // world} images a device do not make {config.splits} parts of "
            "two or more; use --splits or a larger --batch-size"
        )
    images = opened(config.data, config.annotations, config)
    masked = isinstance(images, SegmentedImages) or images.has_masks
    if config.detector == "mask-rcnn" and not masked:
        raise UserError(f"{config.annotations} has no masks to learn; use --detector faster-rcnn")
    if not config.test_data:
        return images, None
    tests = opened(config.test_data, config.test_annotations, config, images.categories)
    require_same(images.categories, tests, config.test_annotations)
    return images, tests


def _begin_or_continue(config: Train, out: Path) -> None:
    """Write the settings of a new run; refuse to go on with one that was started otherwise."""
    earlier = out / "config.yaml"
    if distributed.share(earlier.exists() and any((out / "checkpoints").glob("step-*.pt"))):
        values = read_yaml(earlier)
        if values.pop("name", "") != "detect":
            raise UserError(f"{out} is a run of pretraining; use another --out")
        old = plain(folders.begun_with(config, values, str(earlier)))
        differing = folders.differences(old, plain(config), UNBOUND)
        if differing:
            raise folders.started_otherwise(out, differing, first="checkpoint")
    elif distributed.rank() == 0:
        (out / "log.jsonl").unlink(missing_ok=True)  # of a run that saved nothing
        write_yaml(earlier, {"name": "detect", **plain(config)})


def started(config: Train, images: ImageSet, out: Path) -> Run:
    """A detector on the device with its optimiser, as drawn by the seed, or as it was left."""
    backbone, about = checkpoint.load_backbone(config.checkpoint)
    about = checkpoint.about_backbone(
        backbone, about.get("size", 224), *(about.get(k, v) for k, v in _NORMALISED.items())
    )
    torch.manual_seed(keyed.seed(config.seed, len(images.categories)))
    detector = built(backbone, len(images.categories), config, about["mean"], about["std"])
    detector.to(distributed.device())
    groups = optim.groups(detector, config.undecayed)
    if not groups:
        raise UserError("nothing is left to learn; use another --frozen-stages")
    run = Run(
        out=out,
        config=config,
        detector=detector,
        optimizer=optim.build(config.optimizer, groups, config.weight_decay),
        about=about,
        categories=images.categories,
        images=fingerprint(images),
    )
    run.resume()
    return run


_NORMALISED = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
"""What untrained and published networks are fed with, where nothing else is known."""


def fingerprint(images: ImageSet) -> str:
    """Changes with the names, sizes, boxes and labels of a set, or with its masks."""
    digest = hashlib.sha256(repr(images.categories).encode())
    if isinstance(images, SegmentedImages):
        for marked in images.pictures:
            digest.update(f"{marked.name} {marked.sum}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()[:16]
    for one in images.pictures:
        digest.update(f"{one.name} {one.width} {one.height}".encode("utf-8", "surrogateescape"))
        digest.update(one.objects.boxes.tobytes() + one.objects.labels.tobytes())
    return digest.hexdigest()[:16]


def trained(
    config: Train,
    images: ImageSet,
    tests: ImageSet | None,
    out: Path,
    order: Epochs,
    steps: int,
) -> tuple[Run, dict[str, Any] | None]:
    """Train from where the run in `out` stands; its end, and the figures of the test images."""
    device, world = distributed.device(), distributed.world()
    if config.warmup_steps >= steps:
        say(f"--warmup-steps {config.warmup_steps}: the rate rises in all {steps} steps")
    schedule = Schedule(
        steps=steps,
        peak=config.peak_lr,
        warmup=min(config.warmup_steps, steps),
        shape=config.schedule,
        drops=config.drops,
        start=0.001,
    )
    run = started(config, images, out)
    detector, first = run.detector, run.step
    main = distributed.rank() == 0
    model = parallel.replica(detector)  # DDP over several ranks, the detector itself on one
    model.train()
    chosen = worth_training(images, config.keep_empty)
    shows = Steps(
        images=images,
        chosen=chosen,
        order=order,
        config=config,
        rank=distributed.rank(),
        world=world,
    )
    log = Log(out, first, ("jsonl",), plain(config)) if main else None
    stream = each(shows, range(first, steps), config.workers)
    result: dict[str, Any] | None = None
    new_bad: set[str] = set()
    waited = spent = 0.0  # seconds since the last line of the log
    counted = 0
    with Meter("training", first, steps) as meter, stop_signal() as stopped:
        for step in range(first, steps):
            began = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - began
            done = step + 1
            logging = done % config.log_every == 0 or done == steps
            stopping = (world == 1 or logging) and distributed.anyone(stopped())
            saving = done % config.save_every == 0 or done == steps or stopping
            reading = tests is not None and due(done, steps, config.readings)

            lr = schedule.rate(step)
            losses = gradients(model, batch, config, step)
            loss = torch.stack(list(losses.values())).sum()
            if device.type == "cpu" or logging or saving:
                refuse_nonfinite_loss(loss, detector, step, out)
            optim.set_rate(run.optimizer, lr)
            optim.clip(detector.parameters(), config.clip_norm, 0.0)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.step = done
            took = time.perf_counter() - began
            run.seconds, spent = run.seconds + took, spent + took
            counted += config.batch_size
            new_bad |= set(batch.bad)

            if logging or saving:
                note_bad(new_bad, run.bad, config.max_bad * len(chosen))
                new_bad.clear()
            if done == steps and config.precise_norm:
                precise_norms(detector, shows, config, steps)
            if saving:
                refuse_nonfinite_networks(detector, step, out)  # asks all ranks
            if main and saving:
                run.save()
            figures: dict[str, float] = {}
            if reading and tests is not None:
                distributed.same_buffers(detector)
                result = judged(detector, tests, config, out)
                figures |= {
                    f"{kind}_{name}": result[kind][name]
                    for kind in HEADLINES
                    for name in HEADLINES[kind]
                    if result.get(kind, {}).get(name) is not None
                }
            if logging or reading:
                figures |= {
                    "epoch": done / order.steps_per_epoch,
                    "loss": distributed.mean(loss),
                    "lr": lr,
                    "images_per_second": counted / spent,
                    "data_wait": waited / spent,
                    **{name: distributed.mean(value) for name, value in losses.items()},
                }
                waited, spent, counted = 0.0, 0.0, 0
                if log:
                    log.write(done, figures)
                    meter.show(done, told(figures))
            if stopping:
                say("stopping; the same command goes on from there")
                break
    if log:
        log.close()
    distributed.barrier()
    return run, result


def gradients(model: nn.Module, batch: Batch, config: Train, step: int) -> dict[str, Tensor]:
    """Forward and backward of this rank's batch; its losses by name, without their graph.

    What the network samples (anchors, proposals) is drawn by (seed, step, rank).
    """
    device = distributed.device()
    torch.manual_seed(keyed.seed(config.seed, step, distributed.rank()))
    images, targets = to_device(batch, device)
    with cast_to(config.precision, device):
        losses: dict[str, Tensor] = model(images, targets)
    torch.autograd.backward(torch.stack(list(losses.values())).sum())
    return {name: loss.detach() for name, loss in losses.items()}


@torch.no_grad()
def precise_norms(detector: Resting, shows: Steps, config: Train, first: int) -> None:
    """Give batch-norm the statistics of `config.precise_norm` more training batches.

    In place of the moving average, which lags behind the weights: means of the batches' means and
    mean squares (PreciseBN, Wu and Johnson 2021, https://arxiv.org/abs/2105.07576). What rests
    stays. Over several ranks the statistics are those of rank 0, as detectron2's differ by rank.
    """
    norms: list[Any] = [m for m in detector.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [norm.momentum for norm in norms]
    sums = [torch.zeros(2, norm.num_features, device=norm.weight.device) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the running statistics are those of the batch
    count = config.precise_norm
    for step, batch in enumerate(each(shows, range(first, first + count), 0), first):
        torch.manual_seed(keyed.seed(config.seed, step, distributed.rank()))
        with cast_to(config.precision, distributed.device()):
            detector(*to_device(batch, distributed.device()))
        for total, norm in zip(sums, norms, strict=True):
            mean, variance = norm.running_mean, norm.running_var
            total += torch.stack([mean, variance + mean.square()]) / count
    for norm, momentum, (mean, square) in zip(norms, before, sums, strict=True):
        norm.momentum = momentum
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(square - mean.square())
    distributed.same_buffers(detector)
