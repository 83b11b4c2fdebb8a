"""Map -> box against published vectors, and against the rule written as plain loops."""

import math

import numpy as np
import pytest
import torch

from firstsight.errors import UserError
from firstsight.geometry import cells_box, iou, object_box, object_cells
from firstsight.localize import published

DIAGONAL = ["1100000", "1100000", "0011000", "0011000", "0000011", "0000011", "0000010"]


def scda_map():
    i, j = np.mgrid[:7, :7].astype(float)
    peaks = np.exp(-((i - 2) ** 2 + (j - 3) ** 2) / 4)
    peaks += 0.9 * np.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 1.5)
    return peaks + 0.02 * ((3 * i + 5 * j) % 7)


def test_published_vector_of_components():
    values = np.array([[float(c) for c in row] for row in DIAGONAL])
    assert object_box(values, 224) == (0, 0, 128, 128)
    assert object_cells(values).sum() == 8
    assert object_box(values, 224, connectivity=4) == (160, 128, 224, 224)
    assert object_cells(values, 4).sum() == 5


def test_published_vector_of_the_whole_rule():
    values = scda_map()
    assert values.mean() == pytest.approx(0.385276, abs=5e-7)
    assert object_cells(values).sum() == 21
    box = object_box(torch.from_numpy(values), 224)
    assert box == (32, 0, 224, 224)
    assert iou(box, (40, 10, 170, 140)) == pytest.approx(0.392950, abs=5e-7)


def test_of_equal_components_the_first_in_the_rows_counts_not_in_opencvs_blocks():
    values = np.zeros((4, 8))
    values[0, 5] = values[1, 0] = 1  # OpenCV labels the second first: it scans 2 x 2 blocks
    assert object_box(values, (8, 4)) == (5, 0, 6, 1)


def plain_cells(values, connectivity, level):
    """The rule as loops: flood each cell in the order of rows; a later one must be larger."""
    h, w = values.shape
    above = {(y, x) for y in range(h) for x in range(w) if values[y, x] > level}
    best, done = set(), set()
    for start in sorted(above):
        if start in done:
            continue
        part, todo = set(), [start]
        while todo:
            y, x = todo.pop()
            if (y, x) in part or (y, x) not in above:
                continue
            part.add((y, x))
            for dy in (-1, 0, 1):
                for dx in (-1, 0, 1):
                    if connectivity == 8 or dy == 0 or dx == 0:
                        todo.append((y + dy, x + dx))
        done |= part
        best = part if len(part) > len(best) else best
    return best


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_are_those_of_plain_loops_ties_included(connectivity):
    generator = np.random.default_rng(0)
    for _ in range(300):
        values = generator.integers(0, 3, generator.integers(2, 10, 2)).astype(float)
        if values.min() == values.max():
            continue
        expected = plain_cells(values, connectivity, math.fsum(values.ravel()) / values.size)
        found = object_cells(values, connectivity)
        assert {(int(y), int(x)) for y, x in np.argwhere(found)} == expected


def test_cells_scale_by_nearest_neighbour_also_where_they_do_not_divide_the_image():
    generator = np.random.default_rng(1)
    for _ in range(200):
        h, w, height, width = (int(v) for v in generator.integers((2, 2, 10, 10), (9, 9, 40, 40)))
        cells = generator.random((h, w)) < 0.3
        cells[generator.integers(h), generator.integers(w)] = True
        large = cells[np.arange(height) * h // height][:, np.arange(width) * w // width]
        ys, xs = np.nonzero(large)
        expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
        assert cells_box(cells, (width, height)) == expected


def test_percentiles_and_numbers_are_thresholds_too():
    values = np.arange(16.0).reshape(4, 4)
    assert object_cells(values, threshold="percentile:60").sum() == 6  # 9.0 is not above itself
    assert object_cells(values, threshold=11.0).sum() == 4
    for wrong in ("median", "percentile:101", "percentile:x"):
        with pytest.raises(UserError, match="--threshold"):
            object_cells(values, threshold=wrong)
    with pytest.raises(UserError, match="--connectivity is 4 or 8"):
        object_box(values, 224, connectivity=6)


@pytest.mark.parametrize("bad", [0.1, math.nan, math.inf])
def test_a_map_that_shows_nothing_has_no_component_and_the_whole_image_as_box(bad):
    values = np.full((7, 7), 0.1)  # its mean is not exactly 0.1
    values[3, 3] = bad
    assert object_cells(values) is None
    assert object_box(values, 224) == (0, 0, 224, 224)


def test_scaling_a_map_changes_nothing():
    values = scda_map()
    assert object_box(values * 1e15, 224) == object_box(values + 3, 224) == object_box(values, 224)


def test_overlap_by_counting_pixels():
    generator = np.random.default_rng(2)
    for _ in range(50):
        a, b = (np.sort(generator.integers(0, 12, (2, 2)), axis=0).ravel() for _ in range(2))
        one, two = ({(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b))
        union = len(one | two)
        assert iou(a, b) == pytest.approx(len(one & two) / union if union else 0)
    assert iou((0, 0, 10, 10), (20, 20, 30, 30)) == 0


def test_published_class_activation_boxes_live_in_256_pixels_and_are_clamped():
    values = np.zeros((7, 7))
    values[2:5, 1:4] = 1.0
    x1, y1, x2, y2 = published.cam_box(values)
    # bilinear, half a cell of ramp around cells of 256 / 7 pixels; never scaled to 224
    cell = 256 / 7
    assert (x1, x2) == pytest.approx((cell, 4 * cell), abs=cell / 2)
    assert (y1, y2) == pytest.approx((2 * cell, 5 * cell), abs=cell / 2)
    assert published.cam_box(np.eye(7)[::-1] + 5 * np.pad([[1.0]], ((0, 6), (0, 6)))) is not None
    assert published.cam_box(np.pad(np.ones((5, 5)), 1))[0] >= 4
    corner = np.zeros((7, 7))
    corner[:, :] = np.linspace(0, 1, 7)
    box = published.cam_box(corner)
    assert box[1] == 4 and box[2] == 220 and box[3] == 220
    assert published.cam_box(np.ones((7, 7))) is None


def test_published_heat_divides_by_the_maximum():
    assert published.heat(np.array([[2.0, 4.0]])).tolist() == [[0, 127]]
    assert published.heat(np.array([[math.nan, 4.0]])).tolist() == [[0, 0]]
