"""What a detector is told of its sets when they are opened."""

from firstsight.detect import judging
from tests.detect.squares import config
from tests.detect.test_annotations import box, coco, photos, voc

__all__ = ["photos"]  # a fixture


def test_a_detector_is_told_what_was_left_out_and_of_the_classes_that_were_not(photos, capsys):
    """Ids with gaps, one class without a box, ids of images as text."""
    rows = [{"id": name, "file_name": f"{name}.png"} for name in "abc"]
    bad = [box(1, 1, 9, 9, image="a"), box(5, 5, 0, 9, image="b")]
    file = coco(photos, bad, images=rows)
    one = judging.opened(str(photos), file, config(max_bad=0.5))
    assert one.category_ids == (3, 90) and one.pictures[0].objects.labels.tolist() == [0]
    said = capsys.readouterr().err
    assert "instances.json: 1 boxes without area (annotation 2 of b.png (5, 5, 5, 14" in said
    assert "1 categories without an object (cup)" in said


def test_a_test_set_that_lacks_a_class_is_judged_by_those_that_were_learnt(photos, tmp_path):
    learnt, other = tmp_path / "learnt", tmp_path / "other"
    voc(learnt, "a", ("ant", 0, 3, 3, 9, 9), ("zebu", 0, 3, 3, 9, 9))
    voc(other, "b", ("zebu", 0, 3, 3, 9, 9))
    first = judging.opened(str(photos), str(learnt), config())
    second = judging.opened(str(photos), str(other), config(), first.categories)
    judging.require_same(first.categories, second, "other")
    assert second.pictures[0].objects.labels.tolist() == [1]
