"""Views of many small images at once are those of one image, level by level."""

import dataclasses

import numpy as np
import pytest
import torch

from firstsight import loader
from firstsight.loader import Steps
from firstsight.order import Epochs
from firstsight.sources.base import Source
from firstsight.views import PRESETS, apply, many
from firstsight.views.draw import draw
from tests.views.pictures import generated


class Small(Source):
    """Photographs of one size; `odd` has another."""

    spec = "small"

    def __init__(self, count, size=(32, 32), odd=None):
        self.count, self.size, self.odd = count, size, odd

    def __len__(self):
        return self.count

    def identity(self, index):
        return f"{index}"

    def pixels(self, index):
        return generated(index, *((40, 20) if index == self.odd else self.size))


@pytest.mark.parametrize("preset", ["simclr-small", "mocov2-small", "byol"])
@pytest.mark.parametrize(("size", "side"), [((32, 32), 32), ((48, 30), 24), ((20, 44), 40)])
def test_many_at_once_are_one_after_the_other(preset, size, side):
    blur_by = "resize" if preset == "byol" else "gaussian"
    views = dataclasses.replace(PRESETS[preset], hide=0.3, blur_by=blur_by)
    images = [generated(seed, *size) for seed in range(40)]
    drawn = draw(views, [size] * 40, seed=0, epoch=0, index=np.arange(40))
    drawn.factors[:4, :, 3] = 0.0  # no turn at all
    outs = [np.empty((40, side, side, 3), np.uint8) for _ in range(2)]
    many.apply(images, drawn, views.interpolation, outs, views.mean)
    for v, out in enumerate(outs):
        for b, image in enumerate(images):
            one = apply.apply(image, drawn, b, v, side, views.interpolation, None, views.mean)
            assert np.array_equal(out[b], one)


def test_a_view_is_the_same_whatever_else_is_in_its_batch(monkeypatch):
    """Alone, among others of its size, beside one of another size, and in parts of any length."""
    options = {"views": PRESETS["simclr-small"], "size": 32, "seed": 0, "rank": 0, "world": 1}

    def batch(source, **more):
        return Steps(source=source, order=Epochs(40, 40, 0), **options, **more).batch(0)

    used, real = [], many.apply
    monkeypatch.setattr(many, "apply", lambda *a: used.append(len(a[0])) or real(*a))
    monkeypatch.setattr(loader, "_CHUNK", 8)
    whole = batch(Small(40))
    assert used == [8, 32]
    odd = int(whole.index[20])
    mixed = batch(Small(40, odd=odd))
    assert used == [8, 32, 8]  # the part with the odd one is made one by one
    monkeypatch.setattr(many, "suits", lambda *_: False)
    alone = batch(Small(40))
    assert used == [8, 32, 8]
    for one, other, third in zip(whole.views, alone.views, mixed.views, strict=True):
        assert torch.equal(one, other)
        same = (one == third).flatten(1).all(1)
        assert same.tolist() == [place != 20 for place in range(40)]


def test_large_images_and_mixed_sizes_are_made_one_by_one():
    small, large = generated(0, 32, 32), generated(0, 49, 32)
    assert many.suits((small, small), 48)
    assert not many.suits((small, small), 49)
    assert not many.suits((large, large), 32)
    assert not many.suits((small, generated(0, 31, 32)), 32)
