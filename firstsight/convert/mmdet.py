"""Configs of MMDetection 3 that fine-tune a backbone as its selfsup_pretrain does.

Mask R-CNN with FPN on COCO; the first convolution rests, batch-norm of the backbone is
synchronised and learns, neck and heads have none. All else (SGD at 0.02 for 16 images, 500
iterations of warm-up) is in the configs beneath.
"""

from __future__ import annotations

from collections.abc import Iterable

SCHEDULES = ("1x", "ms-2x")
"""12 epochs at 800 pixels; 24 at 640 to 800."""

_WIDTHS = {18: [64, 128, 256, 512], 34: [64, 128, 256, 512]}

_MODEL = """\
# {what} of Mask R-CNN on the backbone in {file}; run it from that folder, with MMDetection 3.
_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_{base}_coco.py"

model = dict(
    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True),
    backbone=dict(
        depth={depth},
        style="pytorch",
        frozen_stages=0,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        norm_eval=False,
        init_cfg=dict(type="Pretrained", checkpoint="{file}"),
    ),
    neck=dict(in_channels={widths}),
)
"""

_SCALES = """
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomResize", scale=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
"""


def config(
    file: str, depth: int, mean: Iterable[float], std: Iterable[float], schedule: str
) -> str:
    """The text of a config for a ResNet of `depth` whose weights are in `file`."""
    scales = schedule.startswith("ms-")
    text = _MODEL.format(
        what="Multi-scale 2x" if scales else "1x",
        file=file,
        base=schedule.removeprefix("ms-"),
        mean=pixels(mean),
        std=pixels(std),
        depth=depth,
        widths=_WIDTHS.get(depth, [256, 512, 1024, 2048]),
    )
    return text + (_SCALES if scales else "")


def pixels(values: Iterable[float]) -> list[float]:
    """Of values in 0 to 1 those in 0 to 255."""
    return [round(value * 255, 3) for value in values]
