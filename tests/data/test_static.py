"""Static views: what each kind is, that they are the same for a seed, and how writing goes on."""

import itertools
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from firstsight import cli, data, open_source
from firstsight.data import static
from firstsight.errors import UserError
from firstsight.sources.static import StaticViews
from firstsight.views import PRESETS, Views
from firstsight.views.apply import apply
from firstsight.views.draw import draw
from tests.sources.pictures import encoded, noise

KINDS = ["moco", "nointer", "super-hard", "hard", "easy"]


@pytest.fixture
def photos(tmp_path):
    for number, name in enumerate(["b/x-1.png", "b/y.z.png", "a/x.png", "a/x.bmp", "a/w.png"]):
        smooth = cv2.resize(noise(6, 8, number), (70, 50), interpolation=cv2.INTER_CUBIC)
        file = tmp_path / "photos" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(Image.fromarray(smooth), file.suffix[1:].upper()))
    return tmp_path / "photos"


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("aug", KINDS)
def test_the_folder_is_a_source_of_originals_and_views(photos, tmp_path, aug):
    out, count = tmp_path / "v", 10 if aug in static.OVERLAPS else 2
    done = data.views(str(photos), out=str(out), aug=aug, size=32, seed=4, workers=2)
    assert done["images"] == 5 and done["views"] == count and done["written"] + done["missed"] >= 5
    source, originals = open_source(str(out)), open_source(str(photos))
    assert isinstance(source, StaticViews) and source.groups.shape == (5, count + 1)
    assert source.classes == ("a", "b") and source.labels[source.groups[:, 3 % count]].tolist() == [
        0, 0, 0, 1, 1,
    ]  # fmt: skip
    names = [source.identity(group[0]) for group in source.groups]
    assert names == ["a/w-0.png", "a/x-0.png", "a/x.png-0.png", "b/x-1-0.png", "b/y.z-0.png"]
    for group, index in zip(source.groups, range(5), strict=True):
        assert (source.pixels(group[0]) == originals.pixels(index)).all()
        pictures = [source.pixels(i) for i in group[1:]]
        assert {p.shape for p in pictures} == {(32, 32, 3)}
        assert len({p.tobytes() for p in pictures}) > 1
    first = contents(out)
    data.views(str(photos), out=str(tmp_path / "w"), aug=aug, size=32, seed=4, workers=1)
    assert contents(tmp_path / "w") == first
    data.views(str(photos), out=str(tmp_path / "o"), aug=aug, size=32, seed=5, workers=1)
    assert contents(tmp_path / "o")["a/w-1.png"] != first["a/w-1.png"]


def test_it_goes_on_where_it_stopped_and_refuses_other_settings(photos, tmp_path, monkeypatch):
    out, save, calls = tmp_path / "v", static._save, []

    def failing(place, picture):
        calls.append(place)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save(place, picture)

    monkeypatch.setattr(static, "_save", failing)
    with pytest.raises(KeyboardInterrupt):
        data.views(str(photos), out=str(out), size=32, workers=1)
    with pytest.raises(UserError, match="not all written"):
        open_source(str(out))
    monkeypatch.setattr(static, "_save", save)
    with pytest.raises(UserError, match=r"another seed \(0, not 1\)"):
        data.views(str(photos), out=str(out), size=32, seed=1)
    done = data.views(str(photos), out=str(out), size=32, workers=1)
    assert done["images"] == 5 and done["written"] < 5
    data.views(str(photos), out=str(tmp_path / "w"), size=32, workers=1)
    assert contents(out) == contents(tmp_path / "w")
    assert data.views(str(photos), out=str(out), size=32)["written"] == 0
    with pytest.raises(UserError, match="is not empty"):
        data.views(str(photos), out=str(photos))


@pytest.mark.parametrize("aug", list(static.OVERLAPS))
@pytest.mark.parametrize("iou", ["exact", "published"])
def test_crops_overlap_as_the_kind_says(aug, iou):
    """Against the area counted pixel by pixel."""
    low, high, _ = static.OVERLAPS[aug]
    pixels, found = noise(60, 80), 0
    for index in range(12):
        (a, b), hit = static.overlapping(pixels, aug, iou, 0, index)
        masks = np.zeros((2, 60, 80), bool)
        for mask, (x1, y1, x2, y2) in zip(masks, (a, b), strict=True):
            assert 0 <= x1 < x2 <= 80 and 0 <= y1 < y2 <= 60
            mask[y1:y2, x1:x2] = True
        common, areas = (masks[0] & masks[1]), masks.sum((1, 2))
        inner = common.sum()
        if iou == "published":
            sides = [min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1 for k in (0, 1)]
            inner = max(0, sides[0]) * max(0, sides[1])
        assert hit == bool(low <= inner / (areas.sum() - inner) <= high)
        assert not hit or common.sum() < areas.min()
        found += hit
    assert found >= 8
    apart = np.array([[0, 0, 4, 4]]), np.array([[9, 9, 12, 12]])
    assert static.overlap_of(*apart, plus=0) == static.overlap_of(*apart, plus=1) == 0
    (box, _), hit = static.overlapping(noise(1, 1), "hard", "exact", 0, 0)
    assert not hit and box.tolist() == [0, 0, 1, 1]


def test_what_is_painted_over_is_the_overlap_or_as_much_elsewhere():
    pixels = np.full((64, 64, 3), 200, np.uint8)
    boxes = np.array([[0, 0, 32, 32], [16, 24, 48, 56]])
    made = static._painted(pixels, boxes, 64, seed=1, index=2)
    assert len(made) == 10
    changed = [(view != 200).any(-1) for view in made]
    assert not changed[0].any() and not changed[1].any()
    for k in range(2, 10):
        rows, columns = np.flatnonzero(changed[k].any(1)), np.flatnonzero(changed[k].any(0))
        box = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        assert (box[1] - box[0], box[3] - box[2]) == (16, 32)  # 8 x 16 pixels, doubled
        if k in (2, 3, 6, 7):  # where they overlap, perhaps mirrored
            assert box[:2] == ((48, 64), (0, 16))[k % 2] and box[2] in (0, 32)
        inside = made[k][box[0] : box[1], box[2] : box[3]].reshape(-1, 3)
        if k >= 6:
            assert (inside == static.MEAN_COLOUR).all()
        else:
            assert 100 < inside.mean() < 156 and inside.std() > 60
    places = {np.flatnonzero(c.any(1))[0] for k in range(6)
              for c in [(static._painted(pixels, boxes, 64, 1, k)[4] != 200).any(-1)]}  # fmt: skip
    assert len(places) > 2
    sides = {np.flatnonzero(c.any(0))[0] for k in range(6)
             for c in [(static._painted(pixels, boxes, 64, 1, k)[2] != 200).any(-1)]}  # fmt: skip
    assert sides == {0, 32}  # some are mirrored, some not


def test_moco_views_are_the_two_of_mocov2():
    pixels = noise(50, 70)
    drawn = draw(PRESETS["mocov2"], [(70, 50)], seed=3, epoch=0, index=[5])
    for v, view in enumerate(static._plain(pixels, "moco", 32, seed=3, index=5)):
        assert np.array_equal(view, apply(pixels, drawn, 0, v, 32))


def test_views_without_intersection_come_from_different_corners(monkeypatch):
    """Each corner has one colour, and the views keep it."""
    monkeypatch.setattr(static, "_CORNER", Views(jitter=0, gray=0, blur=(0,), min_scale=(0.4,)))
    corners = np.zeros((40, 60, 3), np.uint8)
    corners[20:] += 60
    corners[:, 30:] += 120
    pairs = set()
    for index in range(120):
        views = static._plain(corners, "nointer", 16, 0, index)
        assert all(view.shape == (16, 16, 3) and view.std() == 0 for view in views)
        pairs.add(tuple(int(view[0, 0, 0]) for view in views))
    assert pairs == set(itertools.permutations((0, 60, 120, 180), 2))


def test_an_unreadable_image_is_left_out_and_named(photos, tmp_path, capsys):
    (photos / "a" / "x.png").write_bytes(b"no image")
    done = data.views(str(photos), out=str(tmp_path / "v"), size=16, workers=1)
    assert done["left_out"] == 1 and len(open_source(str(tmp_path / "v"))) == 12
    assert "left out a/x.png" in capsys.readouterr().err


def test_the_first_of_each_class_and_other_manifests(photos, tmp_path):
    data.views(str(photos), out=str(tmp_path / "v"), size=16, images_per_class=1, format="jpeg")
    source = open_source(str(tmp_path / "v"))
    assert [source.identity(i) for i in source.groups[:, 0]] == ["a/w-0.jpeg", "b/x-1-0.jpeg"]
    file = tmp_path / "v" / "views.json"
    for text in ("", "[]", json.dumps({"complete": True})):
        file.write_text(text)
        with pytest.raises(UserError, match=r"views\.json"):
            open_source(str(tmp_path / "v"))


def test_the_command(photos, tmp_path, capsys):
    out = str(tmp_path / "v")
    cli.main(["data", "views", str(photos), "--out", out, "--size", "16", "--aug", "easy"])
    assert "easy" in capsys.readouterr().out and len(open_source(out)) == 55
