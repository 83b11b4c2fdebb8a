"""Labels in, accuracy out."""

from __future__ import annotations

from firstsight.evaluate.knn import knn
from firstsight.evaluate.linear import linear

__all__ = ["knn", "linear"]
