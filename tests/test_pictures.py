"""Neighbours found in features made by hand, and the pictures of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from firstsight import pictures
from firstsight.backbones import Backbone
from firstsight.features import Features, Reader
from firstsight.probe import KnnProbe
from firstsight.settings import Pretrain
from firstsight.sources.base import Pixels, Source, UnreadableImage
from firstsight.views import Views


class Colours(Source):
    """Images of one colour each; image i belongs to class i % classes."""

    def __init__(self, spec: str, colours: list[tuple[int, int, int]], classes: int = 0) -> None:
        self.spec, self.colours = spec, colours
        self.bad: set[int] = set()
        if classes:
            self.labels = np.arange(len(colours)) % classes
            self.classes = tuple(map(str, range(classes)))

    def __len__(self) -> int:
        return len(self.colours)

    def identity(self, index: int) -> str:
        return f"{index}.png"

    def pixels(self, index: int) -> Pixels:
        if index in self.bad:
            raise UnreadableImage("cut off")
        return np.full((40, 50, 3), self.colours[index], np.uint8)


class MeanColour(Backbone):
    """Features are the mean colour, less `ignored` channels."""

    name, stem, width, stride = "colour", "standard", 3, 1

    def __init__(self, keep: tuple[float, float, float] = (1, 1, 1)) -> None:
        super().__init__()
        self.keep = torch.nn.Parameter(torch.tensor(keep, dtype=torch.float32))

    def feature_map(self, images: Tensor) -> Tensor:
        return images * self.keep.view(3, 1, 1)

    def features(self, images: Tensor) -> Tensor:
        return self.feature_map(images).mean(dim=(2, 3))


def features(values: list[list[float]], index: list[int]) -> Features:
    return Features(torch.tensor(values, dtype=torch.float32), torch.tensor(index), 0)


def config(**settings: Any) -> Pretrain:
    views = Views(mean=(0, 0, 0), std=(1, 1, 1))
    return Pretrain(data="", size=32, workers=0, precision="fp32", views=views, **settings)


def a_probe(bank: Source, asked: Source) -> KnnProbe:
    reader = Reader(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    return KnnProbe(train=bank, test=asked, reader=reader, k=1, temperature=0.1, images=9, seed=0)


def test_the_nearest_come_first_by_their_position_in_the_source() -> None:
    bank = features([[1, 0], [1, 1], [0, 1], [-1, 0]], [10, 20, 30, 40])
    asked = features([[2, 0.1], [-1, 0.5]], [5, 6])
    rows = pictures.nearest_others(asked, bank, 3, same=False)
    assert rows.index.tolist() == [[10, 20, 30], [40, 30, 20]]
    assert rows.queries.tolist() == [5, 6]


def test_an_image_is_not_its_own_neighbour() -> None:
    bank = features([[1, 0], [1, 0.1], [0, 1], [-1, 0]], [10, 20, 30, 40])
    asked = features([[1, 0.1], [1, 0.05]], [20, 99])  # 99 is not in the bank
    rows = pictures.nearest_others(asked, bank, 2, same=True)
    assert rows.index.tolist() == [[10, 30], [10, 20]] or rows.index.tolist() == [
        [10, 30],
        [20, 10],
    ]
    alone = pictures.nearest_others(features([[1.0, 0]], [3]), features([[1.0, 0]], [3]), 8, True)
    assert alone.index.numel() == 0


def test_queries_are_fixed_by_seed_and_of_different_classes() -> None:
    source = Colours("a", [(i, i, i) for i in range(60)], classes=4)
    assert source.labels is not None
    picked = pictures.spread(source, 6, seed=1)
    assert len(set(picked.tolist())) == 6
    assert set(source.labels[picked].tolist()) == {0, 1, 2, 3}
    assert picked.tolist() == pictures.spread(source, 6, seed=1).tolist()
    assert picked.tolist() != pictures.spread(source, 6, seed=2).tolist()
    assert len(pictures.spread(Colours("b", [(0, 0, 0)] * 3), 6, seed=1)) == 3


def test_frames_and_captions_say_which_neighbours_are_alike(tmp_path: Path) -> None:
    red, green = (200, 10, 10), (10, 200, 10)
    bank = Colours("bank", [red, green] * 10, classes=2)
    asked = Colours("asked", [red, green], classes=2)
    blind = MeanColour((0, 0, 1))  # sees one channel, in which all images are the same
    pictures.save(tmp_path, config(), bank, a_probe(bank, asked), blind, MeanColour())
    captions = json.loads((tmp_path / "pictures" / "captions.json").read_text())
    assert "16 of 16 are of the query's class" in captions["neighbours-trained"]
    assert "among 20 images of bank" in captions["neighbours-trained"]
    assert "16 of 16" not in captions["neighbours-untrained"]

    seen = cv2.imread(str(tmp_path / "pictures" / "neighbours-trained.png"), cv2.IMREAD_UNCHANGED)
    assert seen.shape[2] == 4
    side = pictures._CELL + 2 * pictures._FRAME
    left = side + 4 * pictures._GAP  # of the first neighbour
    assert tuple(seen[1, left + 1, 2::-1]) == pictures._SAME
    middle = side // 2
    assert tuple(seen[middle, left + middle, 2::-1]) in (red, green)
    assert tuple(seen[middle, left + middle]) == tuple(seen[middle, middle])  # the query's colour
    assert seen[middle, side + pictures._GAP, 3] == 0  # nothing between the images


def test_another_class_bears_its_own_frame_and_a_cross() -> None:
    cell = np.zeros((pictures._CELL,) * 2 + (3,), np.uint8)
    alike, other, unknown = (pictures.judged(cell, a) for a in (True, False, None))
    assert tuple(alike[0, 0]) == pictures._SAME and tuple(other[0, 0]) == pictures._OTHER
    assert tuple(unknown[0, 0]) == pictures._NEUTRAL
    assert (other[:20, -20:] == 255).all(axis=2).any() and not (alike == 255).any()


def test_without_a_probe_neighbours_come_from_the_source(tmp_path: Path) -> None:
    source = Colours("photos", [(i * 8, 255 - i * 8, 40) for i in range(30)])
    source.bad = {3, 4}
    pictures.save(tmp_path, config(), source, None, MeanColour(), MeanColour())
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {
        "views.png",
        "neighbours-untrained.png",
        "neighbours-trained.png",
        "captions.json",
    }
    captions = json.loads((tmp_path / "pictures" / "captions.json").read_text())
    assert "class" not in captions["neighbours-trained"]
    search = pictures.Search.of(config(), source, None)
    rows = search.neighbours(MeanColour())
    assert not (rows.index == rows.queries[:, None]).any()
    assert not {3, 4} & {*rows.index.flatten().tolist(), *rows.queries.tolist()}
    for query, near in zip(rows.queries.tolist(), rows.index.tolist(), strict=True):
        others = sorted({*range(30)} - {3, 4, query}, key=lambda i: abs(i - query))
        assert max(abs(i - query) for i in near) <= abs(others[9] - query)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_images_are_enough(tmp_path: Path, count: int) -> None:
    source = Colours("few", [(i * 40, 90, 255 - i * 40) for i in range(count)])
    pictures.save(tmp_path, config(), source, None, MeanColour(), MeanColour())
    assert (tmp_path / "pictures" / "views.png").exists()
    assert (tmp_path / "pictures" / "neighbours-trained.png").exists() == (count > 1)
