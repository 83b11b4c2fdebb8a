"""Grids of foreground: exact cells, the published pooling, files, and how much masks differ."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from firstsight.errors import UserError
from firstsight.localize import masks, published
from firstsight.localize.grids import cell_means, constant_cells, entropy
from firstsight.sources.masks import flat_name, foreground, foreground_order, read_masks

TIED = np.array([[3, 1, 2, 2], [5, 4, 4, 0], [7, 6, 2, 1], [1, 1, 9, 8]], float)


def test_published_vector_of_ranks_with_ties():
    cells = [divmod(int(c), 4) for c in foreground_order(TIED)[:8]]
    assert cells == [(3, 2), (3, 3), (2, 0), (2, 1), (1, 0), (1, 1), (1, 2), (0, 0)]
    assert {(int(y), int(x)) for y, x in np.argwhere(foreground(TIED))} == set(cells)
    assert foreground(np.arange(9.0).reshape(3, 3)).sum() == 4  # floor of a half
    assert (foreground(3 * TIED + 100) == foreground(TIED)).all()


def test_published_vector_of_the_pooling():
    columns = torch.arange(7.0).expand(1, 1, 7, 7)
    assert published.pooled_grid(columns)[0, 0].tolist() == [0, 2, 4, 6]
    features = torch.randn(1, 5, 7, 7)
    rows = [[0], [1, 2], [3, 4], [5, 6]]
    found = published.pooled_grid(features)[0]
    for i in range(4):
        for j in range(4):
            cells = [features[0, :, y, x] for y in rows[i] for x in rows[j]]
            expected = torch.stack(cells).max(dim=0).values.double().sum()
            assert found[i, j].item() == pytest.approx(expected.item())


@pytest.mark.parametrize("side", [1, 3, 4, 7, 10])
def test_cells_are_means_by_area_whatever_the_grid(side):
    values = torch.randn(2, 7, 5, dtype=torch.float64)
    fine = values.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)  # (2, 7s, 5s)
    expected = fine.reshape(2, side, 7, side, 5).mean(dim=(2, 4))
    assert torch.allclose(cell_means(values, side), expected)


def test_entropy_and_constant_cells_tell_masks_that_never_change():
    fixed = np.array([[0.0, 1.0], [0.0, 1.0]])
    assert entropy(fixed) == 0.0 and constant_cells(fixed) == 1.0
    mixed = np.array([[0.5, 0.25], [0.01, 0.99]])
    bits = [1.0] + [-(p * math.log2(p) + (1 - p) * math.log2(1 - p)) for p in (0.25, 0.01, 0.99)]
    assert entropy(mixed) == pytest.approx(sum(bits) / 4) and constant_cells(mixed) == 0.5


@pytest.fixture
def photographs(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ("cats", "dogs"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 256, (50, 40 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / folder / f"{i}.png")
    return tmp_path / "photos"


ASKED = {"checkpoint": "random:timm:test_resnet", "input_size": 64, "device": "cpu", "threads": 1}


def test_a_file_of_ours_says_what_made_it_and_is_the_same_again(photographs, tmp_path):
    out = tmp_path / "m.json"
    asked = {**ASKED, "data": str(photographs), "out": str(out)}
    result = masks(**asked, grid=3)
    grids, meta = read_masks(out)
    assert list(grids) == [f"{c}/{i}.png" for c in ("cats", "dogs") for i in range(3)]
    assert meta["seed"] == 0 and meta["input_size"] == 64 and meta["grid"] == 3
    assert len(meta["weights_sha256"]) == 64 and result["images"] == 6
    shares = np.mean([foreground(grid) for grid in grids.values()], axis=0)
    assert np.allclose(result["foreground"], shares)
    first = out.read_bytes()
    masks(**asked, grid=3, batch_size=2)
    again, _ = read_masks(out)
    assert all(np.allclose(again[name], grids[name], rtol=1e-5) for name in grids)
    masks(**asked, grid=3)
    assert out.read_bytes() == first
    masks(**asked, grid=3, seed=1)
    assert read_masks(out)[1]["weights_sha256"] != meta["weights_sha256"]


def test_the_published_layout_is_flat_and_is_read_too(photographs, tmp_path):
    out = tmp_path / "m.json"
    asked = {**ASKED, "checkpoint": "random:resnet18", "data": str(photographs), "out": str(out)}
    asked |= {"compat": True, "input_size": 224}
    result = masks(**asked)
    assert result["layout"] == "published" and result["protocol"]["last_stride"] == 2
    held = json.loads(out.read_text())
    assert next(iter(held)) == "cats/0.png" and np.shape(held["cats/0.png"]) == (4, 4)
    grids, meta = read_masks(out)
    assert meta == {} and grids["dogs/2.png"].tolist() == held["dogs/2.png"]
    with pytest.raises(UserError, match="use --grid 4, or leave out --compat"):
        masks(**asked, grid=5)
    assert flat_name("a/b/c.png") == "b/c.png"
    masks(**{**ASKED, "data": str(photographs), "out": str(out)}, layout="published")
    assert list(read_masks(out)[0]) == list(grids)


def test_keys_that_two_images_would_share_are_refused(photographs, tmp_path):
    (photographs / "more").mkdir()
    (photographs / "cats").rename(photographs / "more" / "cats")
    (photographs / "old").mkdir()
    (photographs / "old" / "cats").mkdir()
    Image.new("RGB", (40, 40)).save(photographs / "old" / "cats" / "0.png")
    asked = {**ASKED, "data": str(photographs), "out": str(tmp_path / "m.json")}
    with pytest.raises(UserError, match="use --layout ours"):
        masks(**asked, layout="published")
    assert masks(**asked)["images"] == 7


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "holds no masks"),
        ("{}", "holds no masks"),
        ('{"a/b.png": [[1, 2]]}', "no square grid"),
        ('{"a/b.png": [[1, 2], [3]]}', "no square grid"),
        ('{"a/b.png": [[1, 2], [3, 4]], "a/c.png": [[1]]}', "mask of a/c.png"),
        ('{"a/b.png": [[1, NaN], [3, 4]]}', "not finite"),
    ],
)
def test_a_file_that_is_no_masks_is_one_sentence(text, said, tmp_path):
    file = tmp_path / "m.json"
    file.write_text(text)
    with pytest.raises(UserError, match=said):
        read_masks(file)
    with pytest.raises(UserError, match="cannot read"):
        read_masks(tmp_path / "nothing.json")


def test_maps_that_explode_are_refused(photographs, tmp_path):
    asked = {**ASKED, "data": str(photographs), "out": str(tmp_path / "m.json")}
    asked |= {"checkpoint": "random:resnet50"}
    with pytest.raises(UserError, match="holds NaN or infinity; use --bn batch"):
        masks(**asked, init="normal:5")
    assert not (tmp_path / "m.json").exists()
