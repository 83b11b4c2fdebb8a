"""Scores against plain counting; controls are what they say; what the controls explain."""

import math

import numpy as np
import pytest

from firstsight.localize import controls, scores
from firstsight.localize.boxes import Marked
from firstsight.localize.judging import judge, marks
from firstsight.localize.reading import STEPS, Boxer, Found
from firstsight.localize.truth import Truth
from firstsight.sources.base import Source
from firstsight.sources.masks import foreground

SIZE = 100


def test_an_overlap_of_exactly_half_is_wrong():
    boxes, truth = np.array([[0.0, 0, 10, 5], [0, 0, 10, 5.001]]), np.array([[0.0, 0, 10, 10]])
    overlaps = scores.best_overlaps(boxes, truth)
    assert overlaps[0] == 0.5
    assert scores.corloc(overlaps, 0.5) == 50.0


def test_the_best_of_several_marked_boxes_counts_and_none_is_0():
    box = np.array([[0.0, 0, 10, 10]])
    several = np.array([[50.0, 50, 60, 60], [0, 0, 10, 8], [0, 0, 10, 3]])
    assert scores.best_overlaps(box, several).tolist() == [0.8]
    assert scores.best_overlaps(box, np.empty((0, 4))).tolist() == [0.0]


def test_the_mean_over_classes_differs_from_that_over_images():
    overlaps, classes = np.array([0.9, 0.9, 0.9, 0.1]), np.array([0, 0, 0, 1])
    assert scores.corloc(overlaps, 0.5) == 75.0
    assert scores.corloc_over_classes(overlaps, classes, 0.5) == 50.0


def test_bootstrap_of_a_share_is_about_two_standard_errors_wide():
    values = np.array([0.0] * 300 + [100.0] * 100)
    low, high = scores.interval(values, 0)
    error = math.sqrt(0.25 * 0.75 / 400) * 100
    assert low == pytest.approx(25 - 1.96 * error, abs=0.6)
    assert high == pytest.approx(25 + 1.96 * error, abs=0.6)
    assert scores.interval(values, 0) == (low, high) != scores.interval(values, 1)


def test_the_best_threshold_is_that_of_the_most_right_boxes():
    overlaps = np.array([[0.9, 0.6, 0.2], [0.1, 0.6, 0.9], [0.1, 0.2, 0.6]])
    assert scores.max_box_accuracy(overlaps) == (pytest.approx(200 / 3), 1)


def test_a_box_is_explained_by_a_control_that_reaches_as_much():
    own, centre, full = np.array([1.0, 1, 0, 0]), np.array([1.0, 0, 0, 0]), np.zeros(4)
    found = scores.explained(100 * own, {"centre_box": 100 * centre, "full_image": full}, 0)
    assert found["best_control"] == "centre_box" and found["share"] == 0.5
    assert (found["score"], found["control"], found["difference"]) == (50, 25, 25)
    same = scores.explained(own, {"centre_box": own}, 0)
    assert same["share"] == 1.0 and same["interval"] == (0.0, 0.0)
    assert scores.explained(full, {"noise": own}, 0)["share"] is None


def test_controls_have_the_area_and_the_place_that_they_say():
    box = controls.centre_box(np.array([10.0, 0, 60, 50]), SIZE)
    assert box.tolist() == [25, 25, 75, 75]
    constant = controls.constant_mask(SIZE)
    cells = foreground(np.add.outer(np.arange(4.0), np.arange(4.0)), 9 / 16)
    assert constant.tolist() == [25, 25, 100, 100] and cells[1:, 1:].sum() >= 8


def test_sweep_is_the_box_at_each_share_of_the_range():
    values = np.zeros((4, 4))
    values[1, 1], values[1, 2] = 1.0, 0.5
    boxes = Boxer(size=4, threshold="mean", connectivity=8).sweep(values + 7)
    assert boxes[0].tolist() == [1, 1, 3, 2]  # strictly above the least
    for step, box in zip(STEPS, boxes, strict=True):
        assert box.tolist() == ([1, 1, 3, 2] if step < 0.5 else [1, 1, 2, 2])
    flat = Boxer(size=4, threshold="mean", connectivity=8).sweep(np.full((4, 4), math.nan))
    assert (flat == [0, 0, 4, 4]).all()


class Three(Source):
    spec = "three"
    labels = None

    def __len__(self):
        return 3

    def identity(self, index):
        return str(index)

    def pixels(self, index):
        raise NotImplementedError


def test_all_figures_of_a_small_set_counted_by_hand():
    """Two networks; three images of 200 x 100 pixels, the last without a box."""
    truth = Truth(
        {
            0: Marked([(0, 0, 100, 100), (100, 0, 200, 100)], ["cat", "dog"]),
            1: Marked([(50, 25, 150, 75)], ["dog"]),
            2: Marked([], []),
        },
        "coco",
        {},
    )
    shapes = np.array([[0, 200, 100], [1, 200, 100], [2, 200, 100]])
    left, whole, middle = [0, 0, 50, 100], [0, 0, 100, 100], [25, 25, 75, 75]
    tail = [whole] * len(STEPS)

    def found(one, two):
        boxes = np.array([[one, whole, *tail], [two, whole, *tail], [whole, whole, *tail]], float)
        noise = np.array([middle, *tail], float)
        return Found(SIZE, shapes, np.zeros((3, 3), bool), boxes, noise, False, (7, 7))

    both = [found(left, middle), found(whole, left)]
    marked = marks(truth, Three(), both[0], compat=False)
    assert marked.rows == [0, 1] and marked.counts["without_boxes"] == 1
    result = judge(both, marked, divide=True, seed=0)
    # network 1: 1.0 and 1.0; network 2: 0.5 and (25 x 50) / (5000 + 2500 - 1250) = 0.2
    assert result["corloc"] == {"0.3": 75.0, "0.5": 50.0, "0.7": 50.0}
    assert result["mean_iou"] == pytest.approx((1 + 1 + 0.5 + 0.2) / 4)
    # cat: 1.0, then 0.5; dog: the other half and the middle: 0, 1, then 0.5, 0.2
    assert result["corloc_over_classes"]["0.3"] == np.mean([(100 + 50) / 2, (100 + 50) / 2])
    assert result["corloc_over_classes"]["0.5"] == np.mean([(100 + 50) / 2, 0])
    assert result["over_seeds"]["corloc"]["0.5"]["lowest"] == 0.0
    assert result["over_seeds"]["corloc"]["0.5"]["highest"] == 100.0
    assert result["controls"]["full_image"]["corloc"]["0.3"] == 50.0  # 0.5 and 0.25
    assert result["controls"]["noise"]["corloc"]["0.7"] == 50.0
    assert result["controls"]["noise_divided"]["mean_iou"] == pytest.approx((0.5 + 0.25) / 2)
    assert result["max_box_acc"] == {"0.5": 0.0, "threshold": 0.0}
    compat = marks(truth, Three(), both[0], compat=True)
    assert compat.rows == [0, 1, 2]  # without boxes: wrong, as published
    assert judge(both, compat, True, 0)["corloc"]["0.5"] == pytest.approx(100 / 3)
