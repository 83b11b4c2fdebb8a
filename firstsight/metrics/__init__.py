"""Figures from features: pure functions of tensors."""

from __future__ import annotations

from firstsight.metrics.confusion import class_ious, confused, confusion, worst_classes
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
    accuracies,
    first_five,
    knn_accuracy,
    knn_predict,
    nearest,
    places,
    ranked,
    represented,
    votes,
)

__all__ = [
    "Distractors",
    "Metric",
    "Representation",
    "Weighting",
    "accuracies",
    "alignment",
    "class_alignment",
    "class_ious",
    "confused",
    "confusion",
    "effective_rank",
    "feature_std",
    "first_five",
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
    "votes",
    "worst_classes",
]
