"""evaluate dense: what a cell shows, which cells count, and what is said of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from firstsight import cli, load_backbone
from firstsight.errors import UserError
from firstsight.evaluate import dense
from firstsight.evaluate.dense import cells_of, drawn, overlap
from firstsight.evaluate.marks import cell_counts, cell_labels, marks_of, same_classes
from firstsight.features import Reader
from firstsight.metrics import confusion
from firstsight.sources import open_source
from firstsight.views.apply import resize
from tests.tiny import NETWORK

SPEC = f"random:{NETWORK}"


def test_cells_are_labelled_by_the_majority_of_their_pixels():
    """By a plain loop over pixels; sides that do not divide, ties, and pixels of no class."""
    random = np.random.default_rng(0)
    numbers = random.choice(np.array([0, 1, 2, 255], np.uint8), (13, 17))
    numbers[:5, :6] = 1
    pixels = [[[] for _ in range(3)] for _ in range(3)]
    for y in range(13):
        for x in range(17):
            pixels[int((y + 0.5) * 3 / 13)][int((x + 0.5) * 3 / 17)].append(int(numbers[y, x]))
    counts = cell_counts(numbers, 3, 3)
    labels, several = cell_labels(counts, mixed=True)
    pure, _ = cell_labels(counts, mixed=False)
    for row in range(3):
        for column in range(3):
            here = pixels[row][column]
            assert labels[row, column] == max(set(here), key=lambda n: (here.count(n), -n))
            assert several[row, column] == (len(set(here)) > 1)
            assert pure[row, column] == (255 if len(set(here)) > 1 else here[0])
    assert pure[0, 0] == 1 and several.sum() > 0


def test_marks_of_all_kinds(tmp_path):
    scenes = open_source("scenes:test@4")
    own = marks_of(scenes, "", "--test-marks")
    numbers = own.numbers(2, 96, 96)
    assert (numbers > 0).tolist() == scenes.mask(2).tolist()
    assert own.names[numbers.max()] == scenes.classes[scenes.labels[2]]
    folder = tmp_path / "images"
    (tmp_path / "masks").mkdir()
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / f"{i}.jpg")
    source = open_source(str(folder))
    grid = np.arange(600, dtype=np.uint8).reshape(20, 30) % 7
    Image.fromarray(grid).save(tmp_path / "masks" / "1.png")
    masks = marks_of(source, str(tmp_path / "masks"), "--train-marks")
    assert masks.known().tolist() == [1] and masks.numbers(1, 30, 20).tolist() == grid.tolist()
    with pytest.raises(UserError, match="30 x 20 pixels, and its image 31 x 20"):
        masks.numbers(1, 31, 20)
    lines = ["path,x1,y1,x2,y2,class", "0.jpg,0,0,19,9,cat", "0.jpg,5,2,9,5,bird"]
    (tmp_path / "boxes.csv").write_text("\n".join(lines))
    boxes = marks_of(source, str(tmp_path / "boxes.csv"), "--train-marks")
    assert boxes.names[0] == "background" and boxes.known().tolist() == [0]
    expected = np.zeros((20, 30), int)
    expected[0:10, 0:20] = boxes.names.index(boxes.marked[0].names[0])
    expected[2:6, 5:10] = boxes.names.index(boxes.marked[0].names[1])  # smaller: in front
    assert boxes.numbers(0, 30, 20).tolist() == expected.tolist()
    with pytest.raises(UserError, match="--train-marks takes a folder of index masks"):
        marks_of(source, "", "--train-marks")
    with pytest.raises(UserError, match="classes cannot be matched"):
        same_classes(masks, boxes)
    with pytest.raises(UserError, match="have a class 'arrow' that --train-marks lack"):
        same_classes(boxes, own)
    names, numbers = same_classes(own, own)
    assert names == own.names and numbers[:11].tolist() == list(range(11)) and numbers[11] == 255


def test_cells_are_the_columns_of_the_feature_map_with_their_labels():
    source = open_source("scenes:test@5")
    backbone, reader = load_backbone(SPEC), Reader(size=64, crop="whole", batch_size=2)
    marks = marks_of(source, "", "--test-marks")
    found = cells_of(backbone, source, marks, reader, None, True)
    height, width = found.shape
    assert len(found.labels) == 5 * height * width and found.aside == 0 and found.mixed > 0
    pixels = torch.from_numpy(resize(source.pixels(3), 64, 64, "bilinear")).permute(2, 0, 1)[None]
    mean, std = torch.tensor(reader.mean).view(3, 1, 1), torch.tensor(reader.std).view(3, 1, 1)
    with torch.no_grad():
        one = backbone.eval().feature_map((pixels / 255 - mean) / std)[0]  # (C, h, w)
    start = 3 * height * width
    torch.testing.assert_close(found.values[start + width + 1], one[:, 1, 1], atol=1e-4, rtol=1e-3)
    labels, _ = cell_labels(cell_counts(marks.numbers(3, 96, 96), height, width), True)
    assert found.labels[start : start + height * width].tolist() == labels.ravel().tolist()
    pure = cells_of(backbone, source, marks, reader, None, False)
    assert len(pure.labels) == len(found.labels) - found.mixed == len(found.labels) - pure.aside
    rows, some = drawn(found, 7, 0)
    assert len(rows) == len(some) == 7 and len(drawn(found, 0, 0)[0]) == len(found.labels)


def test_overlap_is_that_of_a_plain_loop():
    truth, found = torch.tensor([0, 0, 0, 1, 1, 3]), torch.tensor([0, 0, 1, 1, 3, 3])
    figures = overlap(confusion(truth, found, 4), ("a", "b", "c", "d"))
    assert figures["accuracy"] == pytest.approx(100 * 4 / 6)
    assert figures["iou"] == pytest.approx({"a": 200 / 3, "b": 100 / 3, "d": 50.0})  # no c at all
    assert figures["mean_iou"] == pytest.approx((200 / 3 + 100 / 3 + 50) / 3)


def painted(root, count):
    """Images whose left half is red or green, with index masks: cells tell which."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for i in range(count):
        pixels, numbers = np.full((64, 64, 3), 30, np.uint8), np.zeros((64, 64), np.uint8)
        pixels[:, :32, i % 2], numbers[:, :32] = 220, 1 + i % 2
        numbers[:, 60:] = 255
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        Image.fromarray(numbers).save(root / "masks" / f"{i}.png")
    return str(root / "images"), str(root / "masks")


def test_the_command_tells_cells_apart_by_what_they_show(tmp_path, capsys):
    images, masks = painted(tmp_path, 6)
    out = tmp_path / "dense.json"
    args = ["evaluate", "dense", SPEC, "--train", images, "--test", images, "--train-marks", masks]
    args += ["--test-marks", masks, "--size", "64", "--threads", "1", "--device", "cpu", "--k", "1"]
    cli.main([*args, "--epochs", "3", "--json", str(out)])
    result = json.loads(out.read_text())
    assert result["knn"]["accuracy"] == result["knn"]["mean_iou"] == 100  # each finds itself
    assert set(result["knn"]["iou"]) == {"0", "1", "2"}
    assert result["most_frequent"]["accuracy"] == 50 and result["cells"]["test"] > 6
    assert result["most_frequent"]["mean_iou"] == pytest.approx(50 / 3)
    assert result["protocol"]["mixed_cells"] == "counted" and result["mixed"]["test"] > 0
    shown = capsys.readouterr().out
    assert "mean IoU" in shown and f"{result['linear']['mean_iou']:.2f}" in shown
    with pytest.raises(UserError, match="show one class only"):
        alone = painted(tmp_path / "alone", 1)[0]
        for mask in (tmp_path / "alone" / "masks").iterdir():
            Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask)
        marks = str(tmp_path / "alone" / "masks")
        dense(SPEC, train=alone, test=alone, train_marks=marks, test_marks=marks, size=64)


def test_cells_that_are_too_large_to_be_of_one_class_are_said_so():
    asked = {"train": "scenes:train@9", "test": "scenes:test@9", "size": 32, "device": "cpu"}
    with pytest.raises(UserError, match=r"maps have 1 x 1\); use a larger --size"):
        dense(SPEC, mixed="left-out", **asked)
