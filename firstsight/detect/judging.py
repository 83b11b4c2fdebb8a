"""What a detector finds in the images of a set, and how good that is."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.roi_heads import paste_masks_in_image

from firstsight import backbones, checkpoint, distributed, trial
from firstsight.detect import models, pictures
from firstsight.detect.annotations import AnnotatedImages, Detections, Picture, open_annotated
from firstsight.detect.curves import kept_apart
from firstsight.detect.figures import figures
from firstsight.detect.inputs import Asked
from firstsight.detect.masks import encode
from firstsight.detect.models import Detector
from firstsight.detect.settings import Eval, Train, Training
from firstsight.detect.voc_figures import voc_figures
from firstsight.errors import UserError
from firstsight.loader import each
from firstsight.log import Meter, say
from firstsight.nets import cast_to
from firstsight.settings import merged, plain


class Found(NamedTuple):
    """What a detector found in a set, and what that took."""

    detections: list[Detections]
    """One for each image."""
    unreadable: int
    images_per_second: float
    """Decoding and network, over all ranks."""


def find(detector: Detector, images: AnnotatedImages, config: Training) -> Found:
    """The objects in all images; each rank looks at its share of them, and knows all at the end."""
    share = max(1, config.batch_size // distributed.world())
    asked = Asked(
        images=images, side=config.test_side, long_side=config.long_side, batch_size=share
    )
    mine = range(distributed.rank(), len(asked), distributed.world())
    device, mode = distributed.device(), detector.training
    detector.eval()
    began, found, done = time.perf_counter(), dict[int, Detections](), 0
    with torch.inference_mode(), Meter("judging", 0, len(mine)) as meter:
        for shown, positions in each(asked, mine, config.workers):
            floats = [one.to(device).float() / 255 for one in shown]
            with cast_to(config.precision, device):
                results = detector(floats) if floats else []
            for position, image, result in zip(positions, floats, results, strict=True):
                found[position] = brought_back(result, image, images.pictures[position])
            done += 1
            meter.show(done)
    rate = len(images) / (time.perf_counter() - began)
    for part in distributed.collect(found):
        found |= part
    detector.train(mode)
    nothing = _nothing(config.detector == "mask-rcnn")
    lost = len(images) - len(found)
    return Found([found.get(i, nothing) for i in range(len(images))], lost, rate)


def brought_back(result: dict[str, Tensor], image: Tensor, picture: Picture) -> Detections:
    """What was found in `image` (3, h, w), in pixels of the picture that it was made from."""
    height, width = image.shape[1:]
    scale = result["boxes"].new_tensor([picture.width / width, picture.height / height] * 2)
    boxes = result["boxes"].float() * scale
    masks = None
    if "masks" in result:
        whole = (picture.height, picture.width)
        # one by one: a hundred masks of a large image together are gigabytes as floats
        pairs = zip(result["masks"].float()[:, None], boxes[:, None], strict=True)
        masks = tuple(
            encode((paste_masks_in_image(mask, box, whole)[0, 0] > 0.5).cpu().numpy())
            for mask, box in pairs
        )
    return Detections(
        boxes=boxes.cpu().numpy(),
        scores=result["scores"].float().cpu().numpy(),
        labels=result["labels"].cpu().numpy(),
        masks=masks,
    )


def _nothing(masks: bool) -> Detections:
    return Detections(
        boxes=np.zeros((0, 4), np.float32),
        scores=np.zeros(0, np.float32),
        labels=np.zeros(0, np.int64),
        masks=() if masks else None,
    )


def judged(
    detector: Detector, images: AnnotatedImages, config: Training, out: Path | None = None
) -> dict[str, Any]:
    """COCO's and VOC's figures, percent, with the speed and memory of finding.

    A run's folder `out` gets curves and pictures for its report. `images_per_second` counts
    decoding and the network; `peak_memory_gib` is that of the device since the start of the
    process, or of the process itself where that is the CPU.
    """
    found = find(detector, images, config)
    if found.unreadable:
        say(f"{found.unreadable} images cannot be decoded: nothing is found in them")
    # on one rank, since it is the same on all, and takes memory
    result: dict[str, Any] = {}
    if distributed.rank() == 0:
        result = figures(images, found.detections, official=config.official)
        result["voc"] = voc_figures(images, found.detections)
        if out:
            result = kept_apart(out, result)
            pictures.save(out / "pictures", images, found.detections, seed=config.seed)
        result.pop("curves", None)
    return {
        **distributed.share(result),
        "images": len(images),
        "unreadable": found.unreadable,
        "images_per_second": round(found.images_per_second, 2),
        "peak_memory_gib": round(trial.peak_memory(distributed.device()) / 2**30, 2),
    }


def evaluate(config: Eval) -> dict[str, Any]:
    """The figures of a trained detector on its test images, or on those of --data."""
    device = distributed.start(config.device, config.threads)
    detector, trained, categories = load(config.run)
    given: dict[str, Any] = {
        "test_data": config.data or trained.test_data,
        "test_annotations": config.annotations or trained.test_annotations,
        "test_side": config.test_side or trained.test_side,
        "batch_size": config.batch_size or trained.batch_size,
        "precision": config.precision or trained.precision,
    }
    same: dict[str, Any] = {
        key: getattr(config, key) for key in ("official", "workers", "max_bad", "threads")
    }
    asked = dataclasses.replace(trained, **given, **same, device=config.device)
    if not asked.test_data or not asked.test_annotations:
        raise UserError(f"{config.run} was trained without test images; use --data, --annotations")
    images = opened(asked.test_data, asked.test_annotations, asked)
    require_same(categories, images, asked.test_annotations)
    result = judged(detector.to(device), images, asked)
    return {"protocol": protocol(asked), **result}


def opened(images: str, annotations: str, config: Training) -> AnnotatedImages:
    """A set as the detector needs it: with masks where it learns or finds them."""
    masks = config.detector == "mask-rcnn"
    return open_annotated(images, annotations, masks=masks, max_bad=config.max_bad)


def require_same(categories: tuple[str, ...], images: AnnotatedImages, where: str) -> None:
    """Refuse a set whose kinds of objects are not those that a detector knows."""
    if images.categories != categories:
        raise UserError(
            f"{where} has other categories than the detector learnt: "
            f"{_listed(images.categories)}, where it knows {_listed(categories)}"
        )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def protocol(config: Training) -> dict[str, Any]:
    """What the figures depend on."""
    values = plain(config)
    stated = {name: values[name] for name in _STATED if name in values}
    return {
        **stated,
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }


_STATED = (
    *("checkpoint", "recipe", "data", "annotations", "test_data", "test_annotations"),
    *("detector", "neck", "channels", "box_head", "norm", "norm_also", "norm_eval"),
    *("frozen_stages", "trainable_layers", "roi_align", "box_loss", "short_sides", "epochs"),
    *("steps", "batch_size", "test_side", "long_side", "precision", "official", "seed"),
)


def load(run: str) -> tuple[Detector, Train, tuple[str, ...]]:
    """The detector of a run as it is now, its settings, and the names of what it knows."""
    folder = Path(run) / "checkpoints"
    state, damaged = checkpoint.newest(folder)
    if state is None:
        raise UserError(damaged[0] if damaged else f"{run} holds no run of firstsight detect train")
    if "detector" not in state:
        raise UserError(
            f"{run} is a run of pretraining, not of a detector; train one from it with "
            f"firstsight detect train {run}"
        )
    config = merged(Train(checkpoint="", out=run), state["settings"], f"{folder}/last")
    about, categories = state["about"], tuple(state["categories"])
    backbone = backbones.build(about["backbone"], about["stem"], about["size"])
    detector = models.build(backbone, len(categories), config, about["mean"], about["std"])
    checkpoint.load_state(detector, state["detector"], folder / "last")
    return detector, config, categories
