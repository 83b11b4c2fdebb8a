"""Index masks beside images, and the mean IoU against a plain loop."""

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


def test_indices_are_read_whatever_their_colours(folders):
    images, masks, values = folders
    one = open_segmented(images, masks, NAMES)
    assert one.names == ("x.jpg", "y.jpg") and one.masks == ("x.png", "y.png") and len(one) == 2
    assert (one.indices(0) == values).all() and (one.indices(1) == values[::-1]).all()
    assert one.pixels(0).shape == (4, 6, 3)
    chosen = f"{masks}/list.txt"
    with open(chosen, "w") as file:
        file.write("y\n")
    assert open_segmented(images, masks, NAMES, only=chosen).names == ("y.jpg",)


def test_bad_masks_are_one_sentence_each(folders, tmp_path):
    images, masks, _ = folders
    with pytest.raises(UserError, match=r"holds class 2, and there are 2"):
        open_segmented(images, masks, NAMES[:2]).indices(0)
    with open(tmp_path / "list", "w") as file:
        file.write("z\n")
    with pytest.raises(UserError, match=r"names z, and .*masks has none"):
        open_segmented(images, masks, NAMES, only=str(tmp_path / "list"))
    with pytest.raises(UserError, match="cannot read"):
        open_segmented(images, masks, NAMES, only=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="0 categories"):
        open_segmented(images, masks, ())
    Image.new("L", (4, 6)).save(tmp_path / "masks/z.png")
    with pytest.raises(UserError, match=r"4 x 6 pixels, and .* has 6 x 4"):
        open_segmented(images, masks, NAMES)
    Image.new("RGB", (6, 4)).save(tmp_path / "masks/z.png")
    with pytest.raises(UserError, match="holds colours"):
        open_segmented(images, masks, NAMES)
    (tmp_path / "masks/z.png").write_bytes(b"none")
    with pytest.raises(UserError, match="cannot read"):
        open_segmented(images, masks, NAMES)
    other = tmp_path / "other"
    other.mkdir()
    Image.new("L", (6, 4)).save(other / "w.png")
    with pytest.raises(UserError, match=r"no image .* has a mask of its name"):
        open_segmented(images, str(other), NAMES)


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
