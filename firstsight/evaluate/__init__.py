"""Labels in, accuracy out."""

from __future__ import annotations

from firstsight.evaluate.knn import knn
from firstsight.evaluate.snapshots import over_snapshots

__all__ = ["knn", "over_snapshots"]
