"""Readings of two views of each image: which views, how they are read, what is left out."""

import json

import numpy as np
import pytest
import torch

from firstsight import cli, data, diagnose, embed, load_backbone, metrics
from firstsight.errors import UserError
from firstsight.evaluate import instance
from firstsight.features import Reader
from firstsight.loader import normalised
from firstsight.pairs import MODES, Drawn, see
from firstsight.sources import open_source
from firstsight.views import PRESETS
from firstsight.views.apply import apply, eval_view
from firstsight.views.draw import draw
from tests.tiny import Patches

CPU = {"device": "cpu", "size": 32}


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    for aug in ("moco", "easy"):
        data.views("scenes:train@12", out=str(folder / aug), aug=aug, size=32, workers=1)
    return folder


def features(backbone, picture):
    images = torch.from_numpy(np.ascontiguousarray(picture)).permute(2, 0, 1)[None]
    images = normalised(images, Reader.mean, Reader.std, torch.contiguous_format)
    with torch.no_grad():
        return backbone(images)[0]


def test_static_originals_are_cut_and_their_views_are_read_as_they_are(static):
    backbone, source = load_backbone("random:resnet18"), open_source(str(static / "easy"))
    seen = see(backbone, source, Reader(size=32), mode="rand-g-mask")
    for n in (0, 7):
        group = source.groups[n]
        original = features(backbone, eval_view(source.pixels(group[0]), 32))
        torch.testing.assert_close(seen.original[n], original, atol=1e-5, rtol=1e-4)
        for rows, number in ((seen.first, 5), (seen.second, 6)):
            view = features(backbone, source.pixels(group[number]))
            torch.testing.assert_close(rows[n], view, atol=1e-5, rtol=1e-4)
    assert torch.equal(seen.labels, torch.from_numpy(source.labels[source.groups[:, 0]]))


def test_large_views_are_not_cut_a_second_time():
    """From 96 px up evaluation cuts the middle out; a view is all that there is to see."""
    pixels = np.zeros((112, 112, 3), np.uint8)
    pixels[:5] = 255
    assert eval_view(pixels, 112, crop="whole") is pixels
    assert eval_view(pixels, 112).max() < 255
    assert eval_view(pixels, 96, crop="whole").shape == (96, 96, 3)
    assert Reader(size=112, crop="whole").protocol["view"].startswith("resize 112 x 112")


def test_drawn_views_are_those_of_the_preset_whatever_else_is_looked_at():
    backbone, source = load_backbone("random:resnet18"), Patches(9)
    seen = see(backbone, source, Reader(size=32), preset="simclr", seed=3)
    few = see(backbone, source, Reader(size=32), preset="simclr", seed=3, images=4)
    pixels = source.pixels(5)
    drawn = draw(PRESETS["simclr-small"], [pixels.shape[1::-1]], seed=3, epoch=0, index=[5])
    for rows, v in ((seen.first, 0), (seen.second, 1)):
        view = features(backbone, apply(pixels, drawn, 0, v, 32, "bicubic"))
        torch.testing.assert_close(rows[5], view, atol=1e-5, rtol=1e-4)
    assert len(few.first) == 4 and not torch.equal(few.first, seen.first[:4])
    for row in few.first:
        assert (seen.first - row).norm(dim=1).min() < 1e-4
    assert seen.protocol["views"] == "drawn, simclr"
    assert Drawn(source, PRESETS["mocov2"], 32, 0).identity(4) == "patch-1.png-1"


def test_images_that_cannot_be_read_are_left_out_of_all_three():
    seen = see(load_backbone("random:resnet18"), Patches(9, unreadable=(2, 6)), Reader(size=32))
    assert seen.unreadable == 2 and seen.labels.tolist() == [0, 1, 0, 1, 2, 1, 2]
    assert len(seen.original) == len(seen.first) == len(seen.second) == 7
    with pytest.raises(UserError, match="fewer than two images"):
        see(load_backbone("random:resnet18"), Patches(3, unreadable=(0, 1)), Reader(size=32))


def test_every_mode_reads_its_own_views_and_all_is_their_mean(static):
    asked = {"data": str(static / "easy"), "topk": 3, **CPU}
    one_by_one = {mode: instance("random:resnet18", dataset_mode=mode, **asked) for mode in MODES}
    every = instance("random:resnet18", dataset_mode="all", **asked)
    for mode, result in one_by_one.items():
        assert every["modes"][mode] == {pair: result[pair] for pair in ("d-sd", "sd-sd")}
        assert list(result["d-sd"]) == ["1", "2", "3"] and result["protocol"]["mode"] == mode
    mean = np.mean([result["sd-sd"]["2"] for result in one_by_one.values()])
    assert every["sd-sd"]["2"] == pytest.approx(mean)
    with pytest.raises(UserError, match=r"holds 2 views .* and --dataset-mode avg-mask needs 8"):
        instance("random:resnet18", data=str(static / "moco"), dataset_mode="avg-mask", **CPU)
    assert set(
        instance("random:resnet18", data=str(static / "moco"), dataset_mode="all", **CPU)["modes"]
    ) == {"normal"}
    with pytest.raises(UserError, match=r"--topk 12 of 12 images .* use --topk 11"):
        instance("random:resnet18", **(asked | {"topk": 12}))
    for mode in ("all", "g-mask"):
        with pytest.raises(UserError, match="static views"):
            instance("random:resnet18", data="scenes:test@9", dataset_mode=mode, **CPU)


def test_diagnose_says_the_figures_of_its_features(static, tmp_path, capsys):
    out = tmp_path / "health.json"
    args = ["diagnose", "random:resnet18", "--data", str(static / "moco"), "--size", "32"]
    cli.main([*args, "--device", "cpu", "--json", str(out)])
    result = json.loads(out.read_text())
    seen = see(load_backbone("random:resnet18"), open_source(str(static / "moco")), Reader(size=32))
    d, sd, sd2 = seen.original, seen.first, seen.second
    assert result["alignment"] == pytest.approx(
        {"d-sd": metrics.alignment(d, sd), "sd-sd": metrics.alignment(sd, sd2)}
    )
    assert result["uniformity"] == pytest.approx(
        {"d": metrics.uniformity(d), "sd": metrics.uniformity(sd)}
    )
    assert result["class_alignment"]["sd"] == pytest.approx(
        metrics.class_alignment(sd, seen.labels)
    )
    assert result["effective_rank"] == pytest.approx(metrics.effective_rank(d))
    assert result["instance_accuracy"]["sd-sd"]["5"] == metrics.instance_accuracy(sd, sd2)[5]
    assert result["lidar"] == pytest.approx(metrics.lidar(torch.stack([sd, sd2], dim=1)))
    assert result["feature_std"] * 512**0.5 == pytest.approx(result["spread"])
    assert result["protocol"]["views"] == "static, moco" and len(result["spectrum"]) == 12
    assert "alignment" in capsys.readouterr().out
    published = diagnose.run(
        "random:resnet18", data=str(static / "moco"), uniformity="published", **CPU
    )
    assert published["protocol"]["uniformity"] == "published"
    assert published["uniformity"] == pytest.approx(result["uniformity"])  # one part of 12 images


def test_diagnose_needs_no_labels_and_says_what_it_drew(tmp_path):
    from PIL import Image

    for i in range(6):
        Image.fromarray(Patches().pixels(i)).save(tmp_path / f"{i}.png")
    result = diagnose.run("random:resnet18", data=str(tmp_path), **CPU)
    assert "class_alignment" not in result and result["images"] == 6
    assert result["protocol"]["views"] == "drawn, mocov2"
    with pytest.raises(UserError, match="draws one view"):
        diagnose.run("random:resnet18", data=str(tmp_path), preset="instdisc", **CPU)


def test_collapse_is_named():
    torch.manual_seed(0)
    cloud = torch.randn(300, 64)
    assert diagnose.collapse(cloud) == "none"
    assert diagnose.collapse(torch.ones(300, 64) + 1e-3 * cloud).startswith("complete: all images")
    line = torch.randn(300, 1) * torch.ones(64) + 1e-3 * cloud
    said = diagnose.collapse(line)
    assert said.startswith("dimensional: images differ in about 1.") and "of 64" in said


def test_embedded_features_are_those_that_are_read(tmp_path):
    out = tmp_path / "features.npz"
    result = embed.run("random:resnet18", data="scenes:test@7", out=str(out), **CPU)
    with np.load(out) as file:  # nothing in it needs pickle
        found = dict(file)
    source, backbone = open_source("scenes:test@7"), load_backbone("random:resnet18")
    expected = features(backbone, eval_view(source.pixels(4), 32))
    torch.testing.assert_close(
        torch.from_numpy(found["features"][4]), expected, atol=1e-5, rtol=1e-4
    )
    assert found["features"].dtype == np.float32 and found["index"].tolist() == list(range(7))
    assert found["image"].tolist() == [source.identity(i) for i in range(7)]
    assert np.array_equal(found["label"], source.labels)
    assert found["class"].tolist() == [source.classes[k] for k in source.labels]
    assert json.loads(str(found["protocol"]))["size"] == 32
    assert (result["images"], result["width"]) == (7, 512)


def test_an_embedding_goes_into_npz_or_parquet_only(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"use a name in .npz or .parquet"):
        embed.run("random:resnet18", data="scenes:test@7", out="x.csv", **CPU)
    with pytest.raises(UserError, match="there is no folder"):
        embed.run("random:resnet18", data="scenes:test@7", out=str(tmp_path / "a/b.npz"), **CPU)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'firstsight\[parquet\]', or use .npz"):
        embed.run("random:resnet18", data="scenes:test@7", out=str(tmp_path / "a.parquet"), **CPU)


def test_parquet_holds_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for suffix in ("npz", "parquet"):
        embed.run("random:resnet18", data="scenes:test@7", out=str(tmp_path / f"f.{suffix}"), **CPU)
    table = parquet.read_table(tmp_path / "f.parquet")
    with np.load(tmp_path / "f.npz") as file:
        assert np.array_equal(np.stack(table["features"].to_numpy()), file["features"])
        assert table["class"].to_pylist() == file["class"].tolist()
    assert json.loads(table.schema.metadata[b"firstsight"])["size"] == 32
