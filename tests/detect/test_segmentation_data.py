"""Index masks beside images, and the mean IoU against a plain loop."""

import os

import numpy as np
import pytest
from PIL import Image

from firstsight.detect.segmentation_data import confusion, mean_iou, open_segmented
from firstsight.errors import UserError

NAMES = ("ground", "cat", "dog")


@pytest.fixture
def folders(tmp_path):
    """x and y, 6 wide and 4 high; x has a mask with a palette, y a grey one; z has none."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    for name in "xyz":
        Image.new("RGB", (6, 4)).save(images / f"{name}.jpg")
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    values[0, 0] = 255
    palette = Image.new("P", (6, 4))
    palette.putdata(values.ravel().tolist())
    palette.putpalette([*range(255, -1, -1)] * 3)
    palette.save(masks / "x.png")
    Image.fromarray(values[::-1].copy()).save(masks / "y.png")
    return str(images), str(masks), values


def test_indices_are_read_whatever_their_colours(folders, tmp_path):
    images, masks, values = folders
    one = open_segmented(images, masks, NAMES)
    pairs = [(p.name, p.mask, p.width, p.height) for p in one.pictures]
    assert pairs == [("x.jpg", "x.png", 6, 4), ("y.jpg", "y.png", 6, 4)] and len(one) == 2
    assert (one.indices(0) == values).all() and (one.indices(1) == values[::-1]).all()
    assert one.pixels(0).shape == (4, 6, 3) and one.pictures[0].sum != one.pictures[1].sum
    assert one.told() == ["1 images without a mask (z.jpg)"]
    (tmp_path / "classes.txt").write_text("a\nb\n\nc\n")
    assert open_segmented(images, masks).categories == ("a", "b", "c")


def test_lists_of_voc_choose_images_and_know_its_classes(folders, tmp_path):
    images, masks, _ = folders
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    os.rename(masks, tmp_path / "SegmentationClass")
    (lists / "val.txt").write_text("y\n")
    one = open_segmented(images, str(lists / "val.txt"))
    assert [p.name for p in one.pictures] == ["y.jpg"] and one.told() == []
    assert one.categories[:2] == ("background", "aeroplane") and len(one.categories) == 21
    (lists / "val.txt").write_text("y\nz\nw\n")
    with pytest.raises(UserError, match=r"2 of 3 masks .*1 masks without an image, first w; 1 li"):
        open_segmented(images, str(lists / "val.txt"))
    one = open_segmented(images, str(lists / "val.txt"), max_bad=0.7)
    assert one.told()[0] == "1 listed images without a mask (z)" and len(one) == 1


def test_bad_masks_are_counted_named_and_left_out(folders, tmp_path):
    images, masks, _ = folders

    def refused(said, names=NAMES, where=masks):
        with pytest.raises(UserError, match=said):
            open_segmented(images, where, names)

    refused(r"2 of 2 masks .*2 masks with a number .*first x\.png \(class 2 of 2\)", NAMES[:2])
    refused(r"names 0 classes; give 1 to 255 by --categories", ())
    refused("no folder of index masks", where=str(tmp_path / "absent"))
    Image.new("L", (4, 6)).save(tmp_path / "masks/z.png")
    said = r"1 of 3 masks cannot be used \(1 masks of another size than their image, first z\.png"
    refused(said + r" \(4 x 6, the upright image is 6 x 4\)\); mend .*--max-bad")
    one = open_segmented(images, masks, NAMES, max_bad=0.5)
    assert len(one) == 2 and "1 masks of another size than their image" in one.told()[0]
    Image.new("RGB", (6, 4)).save(tmp_path / "masks/z.png")
    refused(r"hold colours, not indices, first z\.png \(RGB\)")
    (tmp_path / "masks/z.png").write_bytes(b"none")
    refused(r"unreadable, first z\.png of z\.jpg")
    other = tmp_path / "other"
    other.mkdir()
    Image.new("L", (6, 4)).save(other / "w.png")
    refused(r"1 of 1 masks .*without an image, first w", where=str(other))


def test_mean_iou_is_that_of_a_plain_loop():
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(3):
        truth = rng.integers(0, 4, (7, 9)).astype(np.uint8)
        truth[rng.random(truth.shape) < 0.2] = 255
        pairs.append((truth, np.where(rng.random(truth.shape) < 0.5, truth % 4, 1)))
    shown = mean_iou(sum(confusion(truth, found, 6) for truth, found in pairs))
    each, right, total = [], 0, 0
    for label in range(6):  # classes 4 and 5 are nowhere
        both = either = 0
        for truth, found in pairs:
            for t, f in zip(truth.ravel().tolist(), found.ravel().tolist(), strict=True):
                if t != 255:
                    both += t == label and f == label
                    either += t == label or f == label
        each.append(100 * both / either if either else None)
    for truth, found in pairs:
        right += int((truth == found)[truth != 255].sum())
        total += int((truth != 255).sum())
    assert shown["per_class"] == pytest.approx(each)
    assert shown["mIoU"] == pytest.approx(sum(each[:4]) / 4) and each[4:] == [None, None]
    assert shown["accuracy"] == pytest.approx(100 * right / total)
    nothing = mean_iou(np.zeros((2, 2), np.int64))
    assert nothing == {"mIoU": None, "accuracy": None, "per_class": [None, None]}
