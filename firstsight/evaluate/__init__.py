"""Labels in, accuracy out."""

from __future__ import annotations

from firstsight.evaluate.dense import dense
from firstsight.evaluate.finetune import finetune
from firstsight.evaluate.instance import instance
from firstsight.evaluate.knn import knn
from firstsight.evaluate.linear import linear
from firstsight.evaluate.snapshots import kept, over_snapshots

__all__ = ["dense", "finetune", "instance", "kept", "knn", "linear", "over_snapshots"]
