"""Figures from features: pure functions of tensors."""

from __future__ import annotations

from firstsight.metrics.lie import (
    Distractors,
    alignment,
    class_alignment,
    effective_rank,
    feature_std,
    instance_accuracy,
    instance_ranks,
    lidar,
    sampled_uniformity,
    spectrum,
    spread,
    uniformity,
)
from firstsight.metrics.neighbours import (
    Metric,
    Representation,
    Weighting,
    knn_accuracy,
    knn_predict,
    nearest,
    places,
    ranked,
    represented,
    voted_accuracy,
    votes,
)

__all__ = [
    "Distractors",
    "Metric",
    "Representation",
    "Weighting",
    "alignment",
    "class_alignment",
    "effective_rank",
    "feature_std",
    "instance_accuracy",
    "instance_ranks",
    "knn_accuracy",
    "knn_predict",
    "lidar",
    "nearest",
    "places",
    "ranked",
    "represented",
    "sampled_uniformity",
    "spectrum",
    "spread",
    "uniformity",
    "voted_accuracy",
    "votes",
]
