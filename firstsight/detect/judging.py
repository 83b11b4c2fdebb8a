"""What a detector finds in the images of a set, and how good that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from firstsight import backbones, checkpoint, distributed
from firstsight.backbones import Backbone
from firstsight.detect import models, pictures, policies, segmentation, segmenters
from firstsight.detect.annotations import AnnotatedImages, Detections, Picture, open_annotated
from firstsight.detect.asking import answers
from firstsight.detect.curves import kept_apart
from firstsight.detect.figures import figures
from firstsight.detect.inputs import ImageSet
from firstsight.detect.masks import encode
from firstsight.detect.segmentation_data import SegmentedImages, open_segmented
from firstsight.detect.settings import Eval, Train, Training
from firstsight.detect.voc_figures import voc_figures
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.settings import merged, plain


def find(
    detector: nn.Module, images: AnnotatedImages, config: Training
) -> tuple[list[Detections], dict[str, Any]]:
    """The objects in all images, one `Detections` for each, and what that took."""

    def use(position: int, image: Tensor, result: dict[str, Tensor]) -> Detections:
        return brought_back(result, image, images.pictures[position])

    found, took = answers(detector, images, config, use)
    nothing = _nothing(config.detector == "mask-rcnn")
    return [found.get(i, nothing) for i in range(len(images))], took


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
    detector: nn.Module, images: ImageSet, config: Training, out: Path | None = None
) -> dict[str, Any]:
    """COCO's and VOC's figures (of segmentation mean IoU), percent, and what finding took.

    A run's folder `out` gets curves and pictures for its report. `images_per_second` counts
    decoding and the network; `peak_memory_gib` is that of the device since the start of the
    process, or of the process itself where that is the CPU.
    """
    if isinstance(images, SegmentedImages):
        return segmentation.judged(detector, images, config, out)
    found, took = find(detector, images, config)
    # on one rank, since it is the same on all, and takes memory
    result: dict[str, Any] = {}
    if distributed.rank() == 0:
        result = figures(images, found, official=config.official)
        result["voc"] = voc_figures(images, found)
        if out:
            result = kept_apart(out, result)
            pictures.save(out / "pictures", images, found, seed=config.seed)
        result.pop("curves", None)
    return {**distributed.share(result), **took}


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
    images = opened(asked.test_data, asked.test_annotations, asked, categories)
    require_same(categories, images, asked.test_annotations)
    result = judged(detector.to(device), images, asked)
    return {"protocol": protocol(asked), **result}


def opened(
    images: str, annotations: str, config: Training, categories: Sequence[str] = ()
) -> ImageSet:
    """A set as the detector needs it, what is wrong with it told: with masks where it learns or
    finds them, and with the `categories` that it knows where the file lists none of its own."""
    found: ImageSet
    if config.segments:
        names = tuple(categories) or config.categories
        found = open_segmented(images, annotations, names, max_bad=config.max_bad)
    else:
        masks = config.detector == "mask-rcnn"
        found = open_annotated(
            images, annotations, masks=masks, max_bad=config.max_bad, categories=categories
        )
    for line in found.told():
        say(f"{annotations}: {line}")
    return found


def require_same(categories: tuple[str, ...], images: ImageSet, where: str) -> None:
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
    *("crop", "steps", "batch_size", "test_side", "long_side", "precision", "official", "seed"),
)


def built(
    backbone: Backbone, classes: int, config: Training, mean: Any, std: Any
) -> policies.Resting:
    """The network that `config` names, on a backbone that it takes over."""
    build = segmenters.build if config.segments else models.build
    return build(backbone, classes, config, mean, std)


def load(run: str) -> tuple[policies.Resting, Train, tuple[str, ...]]:
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
    detector = built(backbone, len(categories), config, about["mean"], about["std"])
    checkpoint.load_state(detector, state["detector"], folder / "last")
    return detector, config, categories
