"""Labels in, accuracy out."""

from __future__ import annotations

from firstsight.evaluate.knn import knn
from firstsight.evaluate.linear import linear
from firstsight.evaluate.snapshots import over_snapshots

__all__ = ["knn", "linear", "over_snapshots"]
