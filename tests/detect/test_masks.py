"""Masks are COCO's, pixel by pixel and letter by letter, without its code."""

import numpy as np
import pytest
from pycocotools import mask as official

from firstsight.detect.masks import (
    BadMask,
    bitmap,
    checked,
    compressed,
    decode,
    encode,
    runs,
    uncompressed,
)


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, numpy 2
def test_polygons_have_the_pixels_that_coco_gives_them():
    rng = np.random.default_rng(0)
    for i in range(400):
        height, width = (int(n) for n in rng.integers(1, 40, 2))
        points = rng.uniform(-10, 50, (int(rng.integers(3, 9)), 2))
        if i % 3 == 0:  # corners on the grid, and on that which is five times finer
            points = np.round(points * (1 if i % 2 else 5)) / (1 if i % 2 else 5)
        if i % 5 == 0:
            points[1] = points[0]
        more = rng.uniform(0, 40, (4, 2))
        rows = [points.ravel().tolist(), more.ravel().tolist()]
        expected = official.decode(official.merge(official.frPyObjects(rows, height, width)))
        shown = bitmap((points, more), height, width)
        assert shown.shape == (height, width) and (shown == expected.astype(bool)).all(), i


def test_run_lengths_are_cocos_both_ways():
    rng = np.random.default_rng(1)
    cases = [np.zeros((3, 4)), np.ones((3, 4)), np.eye(5), np.ones((400, 300))]
    cases += [rng.random((int(rng.integers(1, 60)), 37)) < share for share in (0.1, 0.5, 0.99)]
    for pixels in cases:
        pixels = np.asfortranarray(pixels, np.uint8)
        theirs, ours = official.encode(pixels), encode(pixels)
        assert ours == {"size": list(pixels.shape), "counts": theirs["counts"].decode()}
        for counts in (ours["counts"], theirs["counts"], runs(pixels).tolist()):
            drawn = decode({"size": list(pixels.shape), "counts": counts}, *pixels.shape)
            assert (drawn == pixels.astype(bool)).all()


def test_run_lengths_count_down_the_columns_and_zeros_first():
    pixels = np.array([[0, 1], [1, 1], [0, 0]])  # columns 010, 110
    assert runs(pixels).tolist() == [1, 1, 1, 2, 1]
    assert runs(1 - pixels).tolist() == [0, 1, 1, 1, 2, 1]
    values = np.array([5, 70_000, 3, 2, 70_001, 1], np.int64)  # large, and falling
    assert uncompressed(compressed(values)).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        ({"size": [4, 3], "counts": [12]}, "of size"),
        ({"size": [3, 4], "counts": [5, 6]}, "11 pixels for 12"),
        ({"size": [3, 4], "counts": [-1, 13]}, "run lengths"),
        ({"size": [3, 4], "counts": "\x00"}, "cannot be read"),
        ({"size": [3, 4], "counts": "P"}, "cannot be read"),
        ({"size": [3, 4], "counts": ["a"]}, "cannot be read"),
        ({"size": [3, 4]}, "run lengths"),
        ({"counts": [12]}, "of size"),
        ([[0, 0, 1, 1]], "three corners"),
        ([[0, 0, 1, 1, 2]], "lists of"),
        ([0, 0, 1, 1, 2, 2], "lists of"),
        ([[0, 0, 1, 1, 2, float("nan")]], "three corners"),
        ([], "three corners"),
        (7, "lists of"),
    ],
)
def test_what_is_no_mask_of_the_image_is_said(mask, said):
    with pytest.raises(BadMask, match=said):
        checked(mask, 3, 4)


def test_polygons_in_shares_of_the_image_are_scaled():
    (outline,) = checked([[0, 0, 0.5, 0, 0.5, 1]], 10, 20, (20, 10))
    assert outline.tolist() == [[0, 0], [10, 0], [10, 10]]
