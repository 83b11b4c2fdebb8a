"""The story of a pretraining run: settings resolved, engine, readings, summary, report."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, cast

import torch

from firstsight import checkpoint, distributed, engine, localize, methods, pictures
from firstsight.engine import folders, precision, state, trial
from firstsight.engine.guards import NonFinite
from firstsight.errors import UserError
from firstsight.evaluate.linear import cached
from firstsight.evaluate.protocols import PROTOCOLS, stated
from firstsight.features import Reader, Seen
from firstsight.loader import cache, merging, resident
from firstsight.loader.windows import order_of
from firstsight.localize.commands import Masks
from firstsight.localize.grids import write_masks
from firstsight.log import clock, read_log, require, say
from firstsight.probe import KnnProbe
from firstsight.report import write_report
from firstsight.settings import (
    Pretrain,
    begun,
    plain,
    write_yaml,
)
from firstsight.sources import fetch, open_source
from firstsight.sources.base import Source, class_count


def pretrain(name: str, config: Pretrain) -> Path:
    """Pretrain method `name`: start the run in `config.out` or go on with it; its folder."""
    if config.dry_run:
        raise UserError("a dry run is no run; call firstsight.run.dry_run, or leave out --dry-run")
    config, source = _opened(config)
    out = Path(distributed.share(config.out or str(folders.of(name, config))))
    config = dataclasses.replace(config, out=str(out))
    with folders.only_writer(out):
        earlier = out / "config.yaml"
        if distributed.share((out / "checkpoints").exists() and earlier.exists()):
            config = _with_masks(folders.continued(name, config, earlier), source)
            folders.extend(name, config, earlier)
        else:
            if distributed.share(any((out / "checkpoints").glob("*"))):
                raise UserError(
                    f"{out} holds checkpoints of a run whose config.yaml is gone; use another --out"
                )
            (out / "log.jsonl").unlink(missing_ok=True)  # of a run that saved nothing
            config = resident.settled(_picked(name, config), source)
            if distributed.rank() == 0:
                methods.build(name, config, len(source))  # refuses what does not fit together
            config = _with_masks(config, source, anew=True)
            if distributed.rank() == 0:
                write_yaml(earlier, {"name": name, **plain(config)})
        folders.require_shared(earlier)
        probe = _probe(config, source)
        summary = out / "summary.json"
        if summary.exists() and _finished(out, config, source):
            say(f"{out} is finished; more --epochs would extend it")
            return out
        # of a million images, banks and prototypes would take seconds
        images = len(source) if config.init_policy == "all" else 1
        untrained = methods.build(name, config, images).backbone
        _say_what_begins(name, config, source)
        _say_what_chunks_change(name, config)
        method, done, wanted, seen = _trained(name, config, source, probe, out)
        if done < wanted:
            say(f"stopped at step {done} of {wanted}")
            raise SystemExit(130)
        untrained.to(distributed.device())
        pictures.save(out, config, source, probe, untrained, method.backbone)  # on all ranks
        if probe and config.linear and seen is None:
            seen = probe.see(method.backbone, len(probe.train), len(probe.test))
        if distributed.rank() == 0:
            about = state.about(method, config)
            checkpoint.save_backbone(out / "backbone.safetensors", method.backbone, about)
            checkpoint.write_json(out / "backbone.json", about)
            figures = summarised(name, config, probe, out, done)
            if probe and config.linear and seen is not None:
                figures |= linear_after(config, probe, seen)
            checkpoint.write_json(summary, figures)
            write_report([out], out / "report.html")
            say(f"{out}: {_in_short(out)}; report in {out / 'report.html'}")
    return out


def dry_run(name: str, config: Pretrain) -> dict[str, Any]:
    """What the run would take, from a trial of some steps; nothing is written."""
    config, source = _opened(config)
    config = resident.settled(_picked(name, config), source)
    methods.build(name, config, len(source))
    try:
        return trial.dry_run(name, config, source)
    except torch.OutOfMemoryError:
        pass
    raise trial.too_large(name, config, len(source))


def _opened(config: Pretrain) -> tuple[Pretrain, Source]:
    """The source, and all refused that can be before anything is written."""
    distributed.start(config.device, config.threads, patience=max(60, 2 * config.timeout))
    require(config.loggers)
    if config.download:
        fetch(config.data, config.probe_train, config.probe_test)
    source = open_source(config.data)
    config = dataclasses.replace(config, workers=_workers(config))
    _refuse_unequal_shares(config)
    order_of(config, len(source))  # refuses batches and windows that cannot be filled
    if config.views.merge.masks:
        merging.merger_of(config, source)  # refuses masks that miss some images
    if config.order != "epochs" and config.window_size > len(source):
        say(f"--window-size {config.window_size}: each pass visits all {len(source)} images")
    if (queue := getattr(config.method, "queue_size", 0)) > len(source):
        say(f"--method.queue-size {queue}: each of the {len(source)} images is in it repeatedly")
    _probe(config, source)
    return config, source


def _picked(name: str, config: Pretrain) -> Pretrain:
    """`config` with the arithmetic and memory order that are fastest here, where it says auto."""
    picked, layout = precision.pick(name, config)
    return dataclasses.replace(
        config,
        precision=cast(Literal["fp32", "bf16", "fp16"], picked),
        layout=cast(Literal["channels_last", "contiguous"], layout),
    )


def _with_masks(config: Pretrain, source: Source, anew: bool = False) -> Pretrain:
    """`config` with the fingerprint of the masks, which are made first where no file is given.

    A run that goes on, not `anew`, finds its own in its folder, and is refused others.
    """
    merge, file = config.views.merge, merging.masks_file(config)
    if merge.probability == 0:
        return config
    if merge.foreground == "masks" and not merge.masks:
        if distributed.share(anew or not file.exists()):
            made = write_masks(
                Masks(
                    checkpoint=merge.network,
                    data=config.data,
                    out=str(file),
                    grid=merge.grid,
                    seed=config.seed,
                    workers=config.workers,
                    precision="bf16" if config.precision == "bf16" else "fp32",
                ),
                source,
            )
            say(
                f"masks: entropy {made['entropy']:.3f} bits a cell (0: one mask for all images), "
                f"constant cells {100 * made['constant_cells']:.0f} %"
            )
        distributed.barrier()  # the first rank has written
    found = merging.fingerprint(merging.foregrounds(config, source))
    if not anew and merge.sha256 != found:
        raise UserError(
            f"{file} is not what {config.out} began with; put the old one back, or use another "
            "--out"
        )
    merge = dataclasses.replace(merge, sha256=found)
    return dataclasses.replace(config, views=dataclasses.replace(config.views, merge=merge))


def _say_what_begins(name: str, config: Pretrain, source: Source) -> None:
    """One line, before minutes may pass without any."""
    steps = order_of(config, len(source)).steps(config.epochs)
    how = f"{config.backbone} on {distributed.device()} in {config.precision}"
    epochs = "1 epoch" if config.epochs == 1 else f"{config.epochs:g} epochs"
    much = f"{epochs} of {len(source):,} images, {steps:,} steps of {config.batch_size}"
    say(f"{name}, {how}: {much}; writing {config.out}")


def _say_what_chunks_change(name: str, config: Pretrain) -> None:
    """One line, where `--accumulate` is not the mathematics of the whole batch."""
    if config.accumulate > 1:
        lost = " and ".join(filter(None, [methods.load(name)[0].couples, "batch-norm statistics"]))
        size = config.batch_size / distributed.world() / config.accumulate
        say(f"--accumulate {config.accumulate}: {lost} come from {size:g} images at a time")


def _trained(
    name: str, config: Pretrain, source: Source, probe: KnnProbe | None, out: Path
) -> engine.Trained:
    """The engine's work; where memory is too small for it, what would fit is said.

    Numbers that are none are gone back from: to the last checkpoint, with a key of its own for each
    time, since the same views would only bring them back.
    """
    try:
        with cache.held(source, config.cache) as images:
            for back in range(config.rollbacks):
                try:
                    return engine.pretrain(name, config, images, probe, out, back)
                except NonFinite as fault:
                    again = f"({back + 1} of --rollbacks {config.rollbacks})"
                    say(f"{fault.what}; going back to it with other views {again}")
            return engine.pretrain(name, config, images, probe, out, config.rollbacks)
    except torch.OutOfMemoryError:
        pass  # only outside this block are the tensors of the failed step free
    raise trial.too_large(name, config, len(source))


def demo(*, out: str, epochs: float, seed: int, device: str, threads: int) -> Path:
    """The main job on generated scenes, with settings that show it in minutes on two cores."""
    _, defaults, own = methods.describe("simclr")
    chosen = {**DEMO, "epochs": epochs or DEMO["epochs"], "out": out}
    chosen |= {"seed": seed, "device": device, "threads": threads}
    chosen["warmup_epochs"] *= min(1.0, chosen["epochs"] / DEMO["epochs"])
    folder = pretrain("simclr", begun(defaults, own, chosen, "demo"))
    found = localize.run(str(folder), **OBJECTS, seed=seed, device=device, threads=threads)
    if distributed.rank() == 0:
        write_report([folder], folder / "report.html")
        say(f"objects in {OBJECTS['data']}: {found['notes'][-1]}")
    return folder


LINEAR_ROWS = 10_000_000
"""Rows that the linear classifier after a run trains on, for each setting: a minute or two.

Up to 100,000 images these are the 100 epochs of `evaluate linear`; of more, fewer epochs.
"""

DEMO: dict[str, Any] = {
    "data": "scenes:train",
    "probe_test": "scenes:test",
    "backbone": "resnet18",
    "size": 32,
    "epochs": 7.0,
    "batch_size": 64,
    "optimizer": "adamw",
    "lr": 1e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 0.3,
    "probe_readings": 3,
    "probe_images": 1000,
    "method": {"temperature": 0.1},
    # what tells scenes apart at first sight is colour and texture: views that leave little of
    # either make the network look at shapes
    "preset": "simclr",
    "views": {
        "min_scale": [0.4],
        "hue": 0.5,
        "gray": 0.4,
        "blur": [0.8],
        "solarize": [0.3],
    },
}
"""Settings of the demo where they differ from the method's own."""

OBJECTS: dict[str, Any] = {"data": "scenes:test@200", "input_size": 96, "last_stride": 1}
"""Where the backbone of the demo looks for objects: scenes as large as they are, maps of 6 x 6."""


def _workers(config: Pretrain) -> int:
    return config.workers if config.workers >= 0 else distributed.cores()


def _refuse_unequal_shares(config: Pretrain) -> None:
    world = distributed.world()
    if config.batch_size % world:
        fitting = max(config.batch_size - config.batch_size % world, 2 * world)
        raise UserError(
            f"batch size {config.batch_size} does not divide over {world} ranks; "
            f"use --batch-size {fitting} or {fitting + world}"
        )
    if (share := config.batch_size // world) < 2:
        raise UserError(f"one image a device has no company; use --batch-size {2 * world}")
    if share < 2 * config.accumulate:
        raise UserError(
            f"{share} images a device do not make {config.accumulate} chunks of two or more; "
            f"use --accumulate {share // 2}"
        )


def _finished(out: Path, config: Pretrain, source: Source) -> bool:
    records = read_log(out / "log.jsonl")
    wanted = order_of(config, len(source)).steps(config.epochs)
    return bool(records) and records[-1]["step"] >= wanted


def _probe(config: Pretrain, source: Source) -> KnnProbe | None:
    if not config.probe_test:
        if config.probe_train:
            raise UserError("--probe-train alone reads nothing; say what to classify: --probe-test")
        if config.probe in ("linear", "both"):
            raise UserError(
                f"--probe {config.probe} needs labelled images to read; use --probe-test"
            )
        return None
    if not config.probe_train and source.labels is None:
        raise UserError(f"{source.spec} has no labels to learn from; use --probe-train SOURCE")
    reader = Reader.of(config)
    train = open_source(config.probe_train) if config.probe_train else source
    if config.probe in ("linear", "both") and train.labels is not None:
        class_count(train)  # refuses one class alone
    return KnnProbe(
        train=train,
        test=open_source(config.probe_test),
        reader=reader,
        k=config.probe_k,
        temperature=config.probe_temperature,
        images=config.probe_images,
        seed=config.seed,
    )


def summarised(
    name: str, config: Pretrain, probe: KnnProbe | None, out: Path, steps: int
) -> dict[str, Any]:
    """What came of the run, in figures."""
    records = read_log(out / "log.jsonl")
    saved = checkpoint.read(out / "checkpoints" / "last")
    seconds, images = float(saved["seconds"]), steps * config.batch_size
    summary: dict[str, Any] = {
        "method": name,
        "steps": steps,
        "images": images,
        "seconds": round(seconds, 1),
        "images_per_second": round(images / seconds, 1),
        "bad_images": int(records[-1].get("bad_images", 0)),
        "versions": {"torch": torch.__version__},
    }
    if probe is not None and config.probe in ("knn", "both"):
        summary["knn"] = {
            "untrained": next((r["knn"] for r in records if r["step"] == 0), None),
            "trained": records[-1].get("knn"),
            "protocol": probe.protocol,
        }
    if probe is not None and config.probe in ("linear", "both"):
        found = {k: v for k, v in records[-1].items() if k.startswith("linear_")}
        summary["linear_online"] = {
            **{k.replace("linear_", "learning rate "): v for k, v in found.items()},
            "protocol": {
                "optimizer": "sgd, momentum 0.9",
                "schedule": "cosine over the run",
                "learnt_from": f"{probe.train.spec}, every {config.probe_every} steps"
                if config.probe_train
                else "the batches of the run, first views, in training mode",
                **probe.sources,
            },
        }
    return summary


def linear_after(config: Pretrain, probe: KnnProbe, seen: Seen) -> dict[str, Any]:
    """The reading of a linear classifier, for the summary; where there can be none, it is said."""
    how = PROTOCOLS["cached"]
    epochs = max(1, LINEAR_ROWS // max(1, len(seen.train)))
    how = dataclasses.replace(how, epochs=min(how.epochs, epochs))
    try:
        figures = cached(seen, class_count(probe.train), how, config.seed)
    except UserError as error:  # the run is done, and its other figures stand
        say(f"no linear classifier: {error}")
        return {}
    return {
        "linear": {
            **{key: figures[key] for key in ("top1", "top5", "best_top1", "best_epoch")},
            "protocol": {
                **stated("cached", how),
                "chosen": figures["chosen"],
                "best_chosen_on": figures["best_chosen_on"],
                **probe.sources,
            },
        }
    }


def _in_short(out: Path) -> str:
    summary = json.loads((out / "summary.json").read_text())
    text = f"{summary['images']} images in {clock(summary['seconds'])}"
    if "knn" in summary:
        knn = summary["knn"]
        figures = [f"{knn[when]:.1f} % {when}" for when in ("untrained", "trained") if knn[when]]
        text += f", k-NN {', '.join(figures)}"
    if "linear" in summary:
        text += f", linear {summary['linear']['top1']:.1f} %"
    return text
