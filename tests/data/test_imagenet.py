"""ILSVRC's validation images find their classes, are never lost, and nothing is guessed."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from firstsight import cli, open_source
from firstsight.data import imagenet, sort_imagenet_val
from firstsight.errors import UserError

CLASSES = ["n03", "n01", "n02", "n01", "n03"]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "raw"
    folder.mkdir()
    for i in range(5):
        picture = np.full((4, 5, 3), 40 * i, np.uint8)
        Image.fromarray(picture).save(folder / f"ILSVRC2012_val_{i + 1:08d}.JPEG")
    return folder


@pytest.fixture
def truth(tmp_path):
    lines = ["ImageId,PredictionString"]
    lines += [f"ILSVRC2012_val_{i + 1:08d},{c} 1 2 3 4 {c} 5 6 7 8" for i, c in enumerate(CLASSES)]
    file = tmp_path / "LOC_val_solution.csv"
    file.write_text("\n".join(lines) + "\n")
    return file


def sorted_classes(out):
    source = open_source(f"imagenet:val@{out.parent}")
    by_name = {source.identity(i).split("/")[1]: i for i in range(len(source))}
    grey = [int(source.pixels(by_name[name])[0, 0, 0]) for name in sorted(by_name)]
    assert np.allclose(grey, [0, 40, 80, 120, 160], atol=2)
    return [source.classes[source.labels[by_name[name]]] for name in sorted(by_name)]


@pytest.mark.parametrize("by", ["link", "copy", "move"])
def test_each_image_lands_in_its_class(images, truth, tmp_path, by):
    out = tmp_path / "root" / "val"
    done = sort_imagenet_val(str(images), truth=str(truth), out=str(out), by=by)
    assert (done["images"], done["classes"], done["placed"]) == (5, 3, 5)
    assert sorted_classes(out) == CLASSES
    assert len(list(images.iterdir())) == (0 if by == "move" else 5)
    assert all(path.is_symlink() == (by == "link") for path in out.glob("*/*"))
    again = sort_imagenet_val(str(images), truth=str(truth), out=str(out), by=by)
    assert again["placed"] == 0 and sorted_classes(out) == CLASSES


@pytest.mark.parametrize("by", ["link", "copy", "move"])
def test_it_goes_on_where_it_was_interrupted(images, truth, tmp_path, by, monkeypatch):
    out = tmp_path / "root" / "val"
    place, count = imagenet._place, []

    def failing(image, target, how):
        if len(count) == 2:
            raise KeyboardInterrupt
        count.append(image)
        place(image, target, how)

    monkeypatch.setattr(imagenet, "_place", failing)
    with pytest.raises(KeyboardInterrupt):
        sort_imagenet_val(str(images), truth=str(truth), out=str(out), by=by)
    monkeypatch.setattr(imagenet, "_place", place)
    assert sort_imagenet_val(str(images), truth=str(truth), out=str(out), by=by)["placed"] == 3
    assert sorted_classes(out) == CLASSES


def test_numbers_of_the_development_kit(images, tmp_path):
    (tmp_path / "truth.txt").write_text("2\n3\n1\n3\n2\n")
    (tmp_path / "names.txt").write_text("n02 a cat\nn03 a dog\nn01 a tench\n")
    asked = {"truth": str(tmp_path / "truth.txt"), "out": str(tmp_path / "root" / "val")}
    with pytest.raises(UserError, match="add --classes FILE"):
        sort_imagenet_val(str(images), **asked)
    sort_imagenet_val(str(images), **asked, classes=str(tmp_path / "names.txt"))
    assert sorted_classes(tmp_path / "root" / "val") == CLASSES
    (tmp_path / "truth.txt").write_text("2\n4\n1\n3\n2\n")
    with pytest.raises(UserError, match="'4' is none of the 3 classes"):
        sort_imagenet_val(str(images), **asked, classes=str(tmp_path / "names.txt"))


def test_what_is_unknown_or_missing_is_refused_before_anything_is_placed(images, truth, tmp_path):
    out = tmp_path / "out"
    asked = {"truth": str(truth), "out": str(out)}
    (images / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"not named in .*holiday.jpg first"):
        sort_imagenet_val(str(images), **asked)
    os.remove(images / "holiday.jpg")
    os.remove(images / "ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(UserError, match=r"1 images that .* names are not in .*00000004.JPEG first"):
        sort_imagenet_val(str(images), **asked)
    truth.write_text("ILSVRC2012_val_00000001,../../etc 1\n")
    with pytest.raises(UserError, match="gives no class"):
        sort_imagenet_val(str(images), **asked)
    assert not out.exists()


def test_the_command(images, truth, tmp_path, capsys):
    out, file = tmp_path / "val", tmp_path / "r.json"
    args = ["data", "sort-imagenet-val", str(images), "--truth", str(truth), "--out", str(out)]
    cli.main([*args, "--by", "copy", "--json", str(file)])
    assert json.loads(file.read_text())["placed"] == 5
    with pytest.raises(SystemExit):
        cli.main(["data", "sort-imagenet-vall"])
    assert "did you mean 'sort-imagenet-val'" in capsys.readouterr().err
