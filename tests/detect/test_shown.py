"""Pictures of detections, and what the report says of a detector."""

import json

import cv2
import numpy as np
import pytest
import yaml

from firstsight.detect import pictures
from firstsight.detect.curves import kept_apart
from firstsight.detect.figures import figures
from firstsight.detect.masks import encode
from firstsight.report import write_report
from tests.detect.sets import detections, drawn, images, objects
from tests.test_report import Page, words


@pytest.fixture
def photo(tmp_path):
    """One grey image of 280 x 280 with an object of each class; three detections."""
    grey = np.full((280, 280, 3), 100, np.uint8)
    cv2.imwrite(str(tmp_path / "0.png"), grey)
    truth = images(objects([(20, 20, 120, 120), (160, 160, 260, 260)], [0, 1]), side=280)
    object.__setattr__(truth, "root", tmp_path)
    inside = np.zeros((280, 280), bool)
    inside[60:80, 60:80] = True
    boxes = [(22, 20, 120, 120), (160, 160, 260, 258), (200, 20, 240, 60)]
    runs = (encode(inside), encode(~inside & inside), encode(inside & ~inside))
    # right; of the wrong class; not sure enough to be drawn
    return truth, detections(boxes, [0.9, 0.8, 0.4], [0, 0, 0], runs)


def test_what_is_found_is_green_or_orange_and_what_is_marked_white(photo):
    truth, found = photo
    shown = pictures.drawn(truth, 0, found)
    assert shown[100, 22].tolist() == [0, 190, 130]
    assert shown[200, 160].tolist() == [233, 120, 0]
    assert shown[100, 20].tolist() == [255, 255, 255]
    assert shown[20, 220].tolist() == [100, 100, 100]
    tint = (0.6 * 100 + 0.4 * np.array([0, 190, 130])).astype(int)
    assert shown[70, 70].tolist() == tint.tolist() and shown[90, 70].tolist() == [100, 100, 100]


def test_a_sheet_shows_images_with_objects_that_can_be_read(photo, tmp_path):
    truth, found = photo
    pictures.save(tmp_path / "pictures", truth, [found])
    sheet = cv2.imread(str(tmp_path / "pictures/detections.png"))[..., ::-1]
    assert (sheet[:280, :280] == pictures.drawn(truth, 0, found)).all()
    assert (sheet[:280, 290:] == 255).all()
    captions = json.loads((tmp_path / "pictures/captions.json").read_text())
    assert "orange where none is" in captions["detections"]
    (tmp_path / "0.png").unlink()
    assert (pictures.sheet(truth, [found]) == 255).all()


def run(folder, seed=0, **values):
    folder.mkdir()
    settings = {"detector": "mask-rcnn", "checkpoint": "random:resnet18", "epochs": 1, **values}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    lines = [json.dumps({"step": s, "epoch": s / 10, "loss": 2 - s / 10}) for s in range(1, 11)]
    (folder / "log.jsonl").write_text("\n".join(lines))
    result = figures(*drawn(seed, 4, masks=True))
    kept = kept_apart(folder, result)
    assert "curves" in result and "curves" not in kept
    (folder / "summary.json").write_text(json.dumps({"steps": 10, "test": kept}))
    return folder, result


def test_the_report_of_a_detector(tmp_path):
    folder, result = run(tmp_path / "run")
    text = write_report([folder], tmp_path / "report.html").read_text()
    said = words(Page(text))
    assert "firstsight · detection" in said and "mask-rcnn" in said
    for kind in ("bbox", "segm"):
        for name, value in result[kind].items():
            assert f"{name}" in said and f"{value:.1f}" in said
        for row in result["per_class"][:3]:
            assert f"{row[kind]['AP50']:.1f}" in said
    assert "d0" + 3 * "\N{EN DASH}" in said.replace(" ", "")  # a class without objects
    assert "Mean over classes, masks, IoU .75" in said and "recall 0" in said
    assert "k-NN" not in said and "pretrain" not in said
    # the curve of class a, where the drawing has it: 1000 units a side
    first = result["curves"]["bbox"]["classes"]["a"][0]
    assert f"M0.0 {(100 - first) * 10:.1f}" in text


def test_reports_compare_detectors_and_tell_when_there_are_no_figures(tmp_path):
    (one, first), (other, second) = run(tmp_path / "one"), run(tmp_path / "other", seed=9)
    said = words(Page(write_report([one, other], tmp_path / "both.html").read_text()))
    for result in (first, second):
        assert f"{result['segm']['AP75']:.1f}" in said
    assert "Each class, other, percent" in said
    (one / "summary.json").unlink()
    said = words(Page(write_report([one], tmp_path / "one.html").read_text()))
    assert "No figures yet" in said


def test_the_report_of_a_segmenter_and_of_two(tmp_path):
    for name, iou in (("one", 41.25), ("other", 52.5)):
        (tmp_path / name).mkdir()
        settings = {"detector": "fcn", "checkpoint": "random:resnet18", "epochs": 1}
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(settings))
        (tmp_path / name / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}))
        rows = [{"name": "sea", "pixels": 1200, "IoU": iou, "recall": 66.6},
                {"name": "<sky>", "pixels": 0, "IoU": None, "recall": None}]  # fmt: skip
        test = {"semantic": {"mIoU": iou, "accuracy": 71.5}, "per_class": rows}
        (tmp_path / name / "summary.json").write_text(json.dumps({"steps": 1, "test": test}))
    text = write_report([tmp_path / "one"], tmp_path / "one.html").read_text()
    said = words(Page(text))
    for shown in ("41.2", "Mean IoU on the test images", "71.5", "sea", "1,200", "66.6", "<sky>"):
        assert shown in said
    assert "Precision over recall" not in said and "random:resnet18" in said
    assert "<sky>" not in text
    both = write_report([tmp_path / "one", tmp_path / "other"], tmp_path / "both.html").read_text()
    assert all(shown in words(Page(both)) for shown in ("41.2", "52.5", "Each class, other"))
