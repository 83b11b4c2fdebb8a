"""Places: what a view's cells show of the image, and where the object of an activation map is."""

from firstsight.geometry.cells import cell_centres, cell_diagonals
from firstsight.geometry.matched import BoxRule, Matched, box_rows, matched_boxes, matched_places
from firstsight.geometry.objects import Box, cells_box, iou, object_box, object_cells, percentile

__all__ = [
    "Box",
    "BoxRule",
    "Matched",
    "box_rows",
    "cell_centres",
    "cell_diagonals",
    "cells_box",
    "iou",
    "matched_boxes",
    "matched_places",
    "object_box",
    "object_cells",
    "percentile",
]
