"""Transfer to detection: annotated images in, boxes and masks out, and how good they are.

Data: `annotations` (what is in an image, read and checked), `segmentation_data` (index masks).
Figures: `figures` (COCO and VOC), `curves` (precision over recall), `pictures` (boxes drawn).
Training: `settings` (all choices, by name), `policies` (what rests, what norms do), `models` and
`segmenters` (networks), `inputs`, `training`, `asking`, `judging` and `segmentation`, `comparing`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from firstsight.detect.comparing import compare
    from firstsight.detect.judging import evaluate
    from firstsight.detect.training import train

__all__ = ["compare", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    # found on first use: the commands' settings are here too, and their help must not wait
    if name == "train":
        from firstsight.detect.training import train

        return train
    if name == "evaluate":
        from firstsight.detect.judging import evaluate

        return evaluate
    if name == "compare":
        from firstsight.detect.comparing import compare

        return compare
    raise AttributeError(name)
