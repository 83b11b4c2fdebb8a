"""Cells of maps in pixels of the image, against plain loops."""

import math

import pytest
import torch

from firstsight.geometry import cell_centres, cell_diagonals

CROPS = [[10, 20, 70, 50], [0, 0, 7, 5], [3, 8, 4, 9]]
FLIPS = [False, True, True]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 7)])
def test_centres_row_by_row_with_columns_of_mirrored_views_reversed(height, width):
    got = cell_centres(torch.tensor(CROPS), torch.tensor(FLIPS), height, width)
    for b, ((x1, y1, x2, y2), flip) in enumerate(zip(CROPS, FLIPS, strict=True)):
        expected = []
        for row in range(height):
            for column in range(width):
                from_left = width - 1 - column if flip else column
                x = x1 + (from_left + 0.5) * (x2 - x1) / width
                expected.append([x, y1 + (row + 0.5) * (y2 - y1) / height])
        torch.testing.assert_close(got[b], torch.tensor(expected))


def test_diagonals():
    got = cell_diagonals(torch.tensor(CROPS), 2, 3)
    expected = [math.hypot((x2 - x1) / 3, (y2 - y1) / 2) for x1, y1, x2, y2 in CROPS]
    assert got.tolist() == pytest.approx(expected)


def test_doubles_stay_doubles():
    crops = torch.tensor(CROPS, dtype=torch.float64)
    assert cell_centres(crops, torch.tensor(FLIPS), 2, 2).dtype == torch.float64
    assert cell_diagonals(crops, 2, 2).dtype == torch.float64
