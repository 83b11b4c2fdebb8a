"""Labels in, accuracy out."""

from __future__ import annotations

from firstsight.evaluate.knn import knn

__all__ = ["knn"]
