"""What a detector is shown: sizes, flips and boxes against plain computations, and the order."""

import dataclasses

import numpy as np
import pytest
import torch

from firstsight.detect import inputs
from firstsight.detect.annotations import Objects, Picture
from firstsight.errors import UserError
from firstsight.sources.base import UnreadableImage
from tests.detect.squares import config, squares


@pytest.mark.parametrize(
    ("width", "height", "short", "long", "expected"),
    [
        (640, 480, 800, 1333, (1067, 800)),  # 1066.67 is rounded, not cut
        (480, 640, 800, 1333, (800, 1067)),
        (1000, 300, 800, 1333, (1333, 400)),  # 399.9
        (1, 1000, 800, 1333, (1, 1333)),
    ],
)
def test_sizes_keep_proportions_and_round(width, height, short, long, expected):
    assert inputs.fitted(width, height, short, long) == expected


def test_boxes_and_masks_move_with_the_image():
    """A picture of one bright square: after resizing and a flip its box is where the square is."""
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[10:30, 20:50] = 200
    bright = pixels[..., 0] > 0
    objects = Objects(
        boxes=np.array([[20, 10, 50, 30], [0, 0, 80, 40], [5, 5, 5, 9]], np.float32),
        labels=np.array([3, 1, 2]),
        crowd=np.array([False, True, False]),
        difficult=np.zeros(3, bool),
        area=np.ones(3, np.float32),
    )
    picture = Picture(name="a", image_id=1, width=80, height=40, objects=objects)
    masks = np.stack([bright, ~bright, bright])
    for flip, box in ((False, [40, 20, 100, 60]), (True, [60, 20, 120, 60])):
        image, target = inputs.shown(pixels, picture, (160, 80), flip, masks)
        assert target["boxes"].tolist() == [box] and target["labels"].tolist() == [3]
        x1, y1, x2, y2 = box
        inside = torch.zeros(80, 160, dtype=torch.bool)
        inside[y1:y2, x1:x2] = True
        assert torch.equal(target["masks"][0].bool(), inside)
        assert torch.equal(image[0] >= 100, inside)
        assert image.shape == (3, 80, 160) and image.is_contiguous()
    uneven, target = inputs.shown(pixels, picture, (60, 33), False)
    assert target["boxes"][0].tolist() == pytest.approx([15, 8.25, 37.5, 24.75])
    assert "masks" not in target and uneven.shape == (3, 33, 60)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone():
    values = config(short_sides=(480, 512, 544), flip=0.25, seed=5)
    sides = [inputs.side_of(values, e, i) for e in range(3) for i in range(1000)]
    assert [sides.count(s) / 3000 for s in (480, 512, 544)] == pytest.approx([1 / 3] * 3, abs=0.03)
    ranged = config(short_sides=(640, 800), scales="range", seed=5)
    drawn = {inputs.side_of(ranged, 0, i) for i in range(3000)}
    assert drawn == set(range(640, 801))
    flips = [[inputs.flipped(values, e, i) for i in range(2000)] for e in range(2)]
    assert np.mean(flips) == pytest.approx(0.25, abs=0.03) and flips[0] != flips[1]
    again = dataclasses.replace(values, batch_size=2, out="elsewhere")
    assert [inputs.flipped(again, 0, i) for i in range(2000)] == flips[0]
    other = dataclasses.replace(values, seed=6)
    assert [inputs.flipped(other, 0, i) for i in range(2000)] != flips[0]


def test_batches_hold_images_of_one_shape():
    images = squares(40, masks=False)
    order = inputs.order_of(images, np.arange(40), config())
    tall = sum(p.height > p.width for p in images.pictures)
    assert order.steps_per_epoch == tall // 4 + (40 - tall) // 4
    epochs = []
    for epoch in range(2):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        visited = [order.indices(step) for step in steps]
        for index in visited:
            assert len({images.pictures[i].height > images.pictures[i].width for i in index}) == 1
        flat = np.concatenate(visited).tolist()
        assert len(set(flat)) == len(flat)
        epochs.append(flat)
    assert epochs[0] != epochs[1]
    fresh = inputs.order_of(images, np.arange(40), config())
    last = 2 * order.steps_per_epoch - 1
    assert fresh.indices(last).tolist() == epochs[1][-4:]  # without the steps before it
    with pytest.raises(UserError, match="fill no batch of 39 of one kind; use --batch-size"):
        inputs.order_of(images, np.arange(40), config(batch_size=39))


def test_ranks_share_a_batch_and_bad_images_are_replaced():
    images = squares(12)
    made = {"images": images, "chosen": np.arange(12), "config": config(flip=0.5)}
    made["order"] = inputs.order_of(images, made["chosen"], made["config"])
    whole = inputs.Steps(rank=0, world=1, **made)[1]
    halves = [inputs.Steps(rank=r, world=2, **made)[1] for r in range(2)]
    for mine, theirs in zip(whole.images, [x for h in halves for x in h.images], strict=True):
        assert torch.equal(mine, theirs)

    class Bad(type(images)):
        def pixels(self, index):
            if index % 2:
                raise UnreadableImage(str(index))
            return super().pixels(index)

    some = Bad(**{f.name: getattr(images, f.name) for f in dataclasses.fields(images)})
    batch = inputs.Steps(rank=0, world=1, **made | {"images": some})[1]
    assert len(batch.images) == 4 and batch.bad
    again = inputs.Steps(rank=0, world=1, **made | {"images": some})[1]
    assert all(torch.equal(a, b) for a, b in zip(batch.images, again.images, strict=True))


def test_images_without_objects_are_left_out_unless_kept():
    images = squares(6)
    empty = dataclasses.replace(
        images.pictures[2].objects, crowd=np.ones(len(images.pictures[2].objects), bool)
    )
    pictures = list(images.pictures)
    pictures[2] = dataclasses.replace(pictures[2], objects=empty)
    pictures[4] = dataclasses.replace(pictures[4], height=20)
    images = dataclasses.replace(images, pictures=tuple(pictures))
    assert inputs.worth_training(images, keep_empty=False).tolist() == [0, 1, 3, 5]
    assert inputs.worth_training(images, keep_empty=True).tolist() == list(range(6))
