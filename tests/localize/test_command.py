"""The command as people use it: bad input, figures that do not depend on batches, a run's curve."""

import json

import numpy as np
import pytest
from PIL import Image

from firstsight import cli
from firstsight.localize import run

NETWORK = "random:timm:test_resnet"
ASKED = {"input_size": 64, "device": "cpu", "threads": 1}


def failing(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli.main([*args, "--device", "cpu"])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def photographs(tmp_path):
    """Six images in two classes with a bright square each, and boxes.csv beside them."""
    lines = ["path,x1,y1,x2,y2"]
    generator = np.random.default_rng(0)
    for c, name in enumerate(("cats", "dogs")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 60, (60, 80 + i, 3), dtype=np.uint8)
            x, y = 10 + 20 * c, 8 * i
            pixels[y : y + 30, x : x + 40] = generator.integers(0, 256, (30, 40, 3))
            Image.fromarray(pixels).save(tmp_path / f"photos/{name}/{i}.png")
            lines.append(f"{name}/{i}.png,{x},{y},{x + 39},{y + 29}")
    (tmp_path / "boxes.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_result_has_scores_controls_and_protocol_and_is_written_and_shown(photographs, capsys):
    out = photographs / "l.json"
    args = ["localize", NETWORK, "--data", str(photographs / "photos"), "--input-size", "64"]
    args += ["--boxes", str(photographs / "boxes.csv"), "--seeds", "2", "--json", str(out)]
    cli.main([*args, "--out", str(photographs / "seen"), "--device", "cpu", "--threads", "1"])
    result = json.loads(out.read_text())
    assert set(result["corloc"]) == {"0.3", "0.5", "0.7"} == set(result["corloc_over_classes"])
    names = {"full_image", "centre_box", "noise", "noise_divided", "constant_mask"}
    assert set(result["controls"]) == names and result["images"] == 6
    assert result["fallbacks"] == 0 and result["protocol"]["seeds"] == 2
    said = capsys.readouterr().out
    assert "map of noise" in said and "the best control" in said
    boxes = json.loads((photographs / "seen/boxes.json").read_text())
    assert len(boxes) == 6
    for box in boxes.values():
        x1, y1, x2, y2 = box
        assert 0 <= x1 < x2 <= 82 and 0 <= y1 < y2 <= 60
    assert Image.open(photographs / "seen/objects.png").size[0] > 900


def test_figures_do_not_depend_on_batches_and_repeat(photographs):
    asked = {"data": str(photographs / "photos"), "boxes": str(photographs / "boxes.csv")}
    found = [run(NETWORK, **asked, **ASKED, batch_size=size) for size in (1, 4, 4)]
    for one in found:
        del one["seconds"]
    assert found[1] == found[2]
    assert found[0]["mean_iou"] == pytest.approx(found[1]["mean_iou"], abs=1e-6)


def test_boxes_of_scenes_are_their_own(tmp_path):
    result = run(NETWORK, data="scenes:test@20", **ASKED)
    assert result["images"] == 20 and result["controls"]["full_image"]["mean_iou"] < 0.6


def test_without_boxes_there_are_boxes_and_pictures_but_no_scores(photographs, capsys):
    args = ["localize", NETWORK, "--data", str(photographs / "photos"), "--input-size", "64"]
    cli.main([*args, "--out", str(photographs / "seen"), "--device", "cpu"])
    assert "6 images, nothing to score by" in capsys.readouterr().out
    assert len(json.loads((photographs / "seen/boxes.json").read_text())) == 6


def test_an_exploding_init_is_counted_and_said(photographs, capsys):
    asked = {"data": str(photographs / "photos"), "boxes": str(photographs / "boxes.csv")}
    result = run("random:resnet50", **asked, **ASKED, init="normal:5", out=str(photographs / "o"))
    assert result["fallbacks"] == result["non_finite"] == 6
    assert result["controls"]["noise"]["fallbacks"] == 1
    assert result["controls"]["noise_divided"]["fallbacks"] == 6
    assert result["corloc"] == result["controls"]["full_image"]["corloc"]
    assert "6 maps show nothing above the threshold, 6 of them because" in result["notes"][0]
    assert set(json.loads((photographs / "o/boxes.json").read_text()).values()) == {None}
    mended = run("random:resnet50", **asked, **ASKED, init="normal:5", bn="batch")
    assert mended["fallbacks"] == 0


def test_bad_images_and_bad_boxes_are_counted_not_silent(photographs):
    photos = photographs / "photos"
    Image.new("L", (50, 50), 128).save(photos / "cats/grey.png")
    (photos / "cats/broken.png").write_bytes(b"no image")
    Image.new("RGB", (30, 30)).save(photos / "dogs/unmarked.png")
    with open(photographs / "boxes.csv", "a") as file:
        file.write("cats/grey.png,5,5,60,40\ncats/broken.png,1,1,5,5\n")
        file.write("dogs/0.png,7,7,7,30\nelsewhere/x.png,1,1,5,5\n")
        file.write("dogs/2.png,100,100,120,120\n")
    asked = {"data": str(photos), "boxes": str(photographs / "boxes.csv")}
    result = run(NETWORK, **asked, **ASKED)
    assert result["images"] == 7 and result["unreadable"] == 1
    assert result["outside_boxes"] == 2 and result["degenerate_boxes"] == 2
    assert result["annotated_elsewhere"] == 1
    assert len(result["notes"]) == 5
    flat = run(NETWORK, **asked, **ASKED, padding="replicate")
    assert (
        flat["images"] == 7 and flat["fallbacks"] == 1 and flat["non_finite"] == 0
    )  # the grey one


def test_what_a_user_can_mend_is_one_sentence(photographs, capsys):
    base = ["localize", NETWORK, "--data", str(photographs / "photos")]
    boxes = ["--boxes", str(photographs / "boxes.csv")]
    (photographs / "empty").mkdir()
    said = failing(capsys, "localize", NETWORK, "--data", str(photographs / "empty"))
    assert "no images in" in said
    (photographs / "other.csv").write_text("path,x1,y1,x2,y2\nzebra.png,1,1,5,5\n")
    said = failing(capsys, *base, "--boxes", str(photographs / "other.csv"))
    assert "marks no image of" in said and "zebra.png" in said
    (photographs / "flat.csv").write_text("path,x1,y1,x2,y2\ncats/0.png,1,1,1,5\n")
    said = failing(capsys, *base, "--boxes", str(photographs / "flat.csv"))
    assert "has a box inside it" in said
    assert "--threshold is mean" in failing(capsys, *base, "--threshold", "median")
    assert "needs random:NAME" in failing(capsys, "localize", "x", *base[2:], "--seeds", "2")
    assert "--seeds must be above 0" in failing(capsys, *base, "--seeds", "0")
    assert "no option --box" in failing(capsys, *base, "--box", "x")
    said = failing(capsys, *base, *boxes, "--snapshots")
    assert "holds no snapshots" in said


def test_a_run_is_read_over_its_snapshots_and_its_report_shows_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = "pretrain simclr --data scenes:train@16 --backbone timm:test_resnet --size 64 --epochs 2"
    text += " --batch-size 8 --out run --workers 0 --threads 1 --precision fp32 --device cpu"
    cli.main([*text.split(), "--layout", "contiguous", "--probe", "none", "--warmup-epochs", "0"])
    args = ["localize", "run", "--data", "scenes:test@8", "--device", "cpu", "--threads", "1"]
    cli.main([*args, "--snapshots"])
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    said = failing(capsys, "localize", "run", "--data", ".", "--snapshots")
    assert "--boxes says what is marked" in said
    kept = json.loads((tmp_path / "run/readings/localize.json").read_text())
    assert kept[0]["step"] < kept[-1]["step"] and "noise" in kept[0]["controls"]
    cli.main(args)
    cli.main(["report", "run", "--out", "report.html"])
    page = (tmp_path / "report.html").read_text()
    assert "CorLoc .5, of the snapshots" in page and "with the box found (green)" in page
    assert "Of 8 images: CorLoc .5 is" in page  # and what the controls explain of it
