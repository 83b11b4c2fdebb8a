"""Semantic segmentation: dilated maps, the loss, what is shown, runs, and mean IoU by loops."""

import dataclasses
import json
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from firstsight import backbones, checkpoint, cli, distributed
from firstsight.detect import inputs, judging, segmentation, segmenters, training
from firstsight.detect.segmentation_data import open_segmented
from firstsight.detect.settings import Eval
from firstsight.errors import UserError
from firstsight.log import read_log
from tests.detect import squares
from tests.detect.test_training import interrupted

COLOURS = np.array([[120, 120, 120], [220, 40, 40], [40, 60, 220]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight images of 48 x 40 with a red and a blue rectangle on grey, and their index masks."""
    root = tmp_path_factory.mktemp("marked")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    (root / "masks/classes.txt").write_text("ground\nred\nblue\n")
    for i in range(8):
        random = np.random.default_rng(i)
        mask = np.zeros((40, 48), np.uint8)
        for k in (1, 2):
            x, y = random.integers(0, 24), random.integers(0, 16)
            mask[y : y + 20, x : x + 20] = k
        image = COLOURS[mask] + random.integers(-20, 20, (40, 48, 3))
        mask[0] = 255
        cv2.imwrite(str(root / f"images/{i}.png"), image[..., ::-1])
        cv2.imwrite(str(root / f"masks/{i}.png"), mask)
    return str(root / "images"), str(root / "masks")


def config(out="none", folders=("", ""), **values):
    images, masks = folders
    small = {"detector": "fcn", "data": images, "annotations": masks, "test_data": images}
    small |= {"test_annotations": masks, "short_sides": (40, 48), "crop": 32, "test_side": 40}
    return squares.config(out, **{**small, "batch_size": 2, "group_shapes": False, **values})


def test_a_dilated_map_holds_the_old_one_at_every_fourth_cell():
    torch.manual_seed(0)
    backbone = backbones.build("resnet18").double().eval()
    x = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    with torch.no_grad():
        old = backbone.feature_map(x)
        segmenters.dilate(backbone)
        new = backbone.feature_map(x)
    assert new.shape == (1, 512, 12, 8)
    torch.testing.assert_close(new[..., ::4, ::4], old)


def test_blocks_of_three_are_dilated_as_torchvision_dilates_them():
    with torch.device("meta"):
        theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
        ours = backbones.build("resnet50")
        segmenters.dilate(ours)
    known = dict(theirs.named_modules())
    for name, one in ours.named_modules():
        if isinstance(one, nn.Conv2d):
            same = [(m.stride, m.dilation, m.padding) for m in (one, known[name])]
            assert same[0] == same[1], name


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit"])
@pytest.mark.parametrize("head", ["fcn", "deeplab"])
def test_every_parameter_learns_and_each_pixel_gets_a_score(name, head):
    """A ResNet at stride 8 and a transformer at its own; several ranks would wait for a gradient
    that never comes."""
    torch.manual_seed(0)
    backbone = backbones.build(name, size=64)
    network = segmenters.build(backbone, 3, config(detector=head), (0.5,) * 3, (0.2,) * 3)
    images = [torch.rand(3, 40, 90), torch.rand(3, 64, 50)]
    targets = [{"indices": torch.ones(one.shape[1:], dtype=torch.uint8)} for one in images]
    network.train()(images, targets)["loss_pixels"].backward()
    for key, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key
    with torch.no_grad():
        assert [tuple(one.shape) for one in network.eval()(images)] == [(3, 40, 90), (3, 64, 50)]
        assert network.network[0](torch.zeros(1, 3, 64, 96)).shape[2:] == (
            (8, 12) if "resnet" in name else (4, 6)
        )


def test_the_loss_is_that_of_plain_loops_and_padding_is_of_no_class():
    """Two images of other sizes in one batch, through a network of one 1x1 convolution."""
    torch.manual_seed(0)
    network = segmenters.Segmenter(nn.Conv2d(3, 4, 1), [], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    images = [torch.rand(3, 5, 7), torch.rand(3, 6, 3)]
    indices = [torch.randint(0, 4, one.shape[1:]).to(torch.uint8) for one in images]
    indices[0][2, 3:] = 255
    loss = network(images, [{"indices": one} for one in indices])["loss_pixels"]
    total, count = 0.0, 0
    weight, bias = (p.detach().double() for p in network.network.parameters())
    weight = weight[:, :, 0, 0]
    for image, marks in zip(images, indices, strict=True):
        for y in range(image.shape[1]):
            for x in range(image.shape[2]):
                if marks[y, x] == 255:
                    continue
                pixel = (image[:, y, x].double() - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor(
                    [0.2, 0.3, 0.4]
                )
                scores = weight @ pixel + bias
                total += float(scores.exp().sum().log() - scores[int(marks[y, x])])
                count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    nothing = segmenters.pixel_loss(torch.randn(1, 4, 2, 2), torch.full((1, 2, 2), 255))
    assert nothing.item() == 0


def test_indices_move_with_the_image_and_squares_are_cut_from_both():
    """Each pixel's value is its class, so that both can be compared after all that was done."""
    indices = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4), np.ones((8, 8), np.uint8))
    pixels = np.repeat(20 * indices[..., None], 3, axis=2)
    for flip in (False, True):
        one = inputs.marked(pixels, indices, (64, 48), flip)
        expected = np.kron(indices, np.ones((2, 2), np.uint8))
        expected = expected[:, ::-1] if flip else expected
        assert (one.target["indices"].numpy() == expected).all()
        seen = (one.image[0].float() / 20).round()
        assert (seen == one.target["indices"]).float().mean() > 0.9  # edges are smooth
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    one = inputs.Shown(torch.stack([rows, columns, 0 * rows]), {"indices": 64 * rows + columns})
    values, corners = config(crop=20, seed=3), []
    for epoch in range(100):
        part = inputs.cut(one, values, epoch, 5)
        assert part.image.shape == (3, 20, 20)
        assert torch.equal(64 * part.image[0] + part.image[1], part.target["indices"])
        assert torch.equal(inputs.cut(one, values, epoch, 5).image, part.image)
        corners.append(part.image[:2, 0, 0].tolist())
    found = np.array(corners)  # of 29 rows and 45 columns, all about as often
    assert (found.min(0) <= 1).all() and (found.max(0) >= (27, 43)).all()
    assert np.abs(found.mean(0) - (14, 22)).max() < 3
    whole = inputs.cut(one, config(crop=100), 0, 5)
    assert torch.equal(whole.image, one.image)


def test_figures_are_those_of_plain_loops_at_the_size_of_the_masks(folders, tmp_path, monkeypatch):
    """A network that gives each image of 40 x 80 random scores; two ranks see half each."""
    images = open_segmented(*folders)
    answers = {
        number: torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(number))
        for number in range(len(images))
    }
    known = {inputs.resized(images.pixels(i), 48, 40).sum().item(): i for i in answers}

    class Fixed(nn.Module):
        def forward(self, shown):
            return [answers[known[int((image * 255).round().sum())]] for image in shown]

    values = config(batch_size=2)
    result = segmentation.judged(Fixed(), images, values, tmp_path)
    right, either, pixels = np.zeros(3), np.zeros(3), np.zeros(3)
    total = np.zeros(2)
    for i, scores in answers.items():
        whole = F.interpolate(scores[None], (40, 48), mode="bilinear", align_corners=False)[0]
        marks, best = images.indices(i).tolist(), whole.argmax(0).tolist()
        for y in range(40):
            for x in range(48):
                truth, found = marks[y][x], best[y][x]
                if truth == 255:
                    continue
                total += (truth == found, 1)
                pixels[truth] += 1
                right[truth] += truth == found
                either[[truth] if truth == found else [truth, found]] += 1
    assert result["semantic"]["mIoU"] == pytest.approx(100 * np.mean(right / either))
    assert result["semantic"]["accuracy"] == pytest.approx(100 * total[0] / total[1])
    rows = result["per_class"]
    assert [row["name"] for row in rows] == ["ground", "red", "blue"]
    assert [row["pixels"] for row in rows] == pixels.tolist()
    assert [row["IoU"] for row in rows] == pytest.approx((100 * right / either).tolist())
    assert [row["recall"] for row in rows] == pytest.approx((100 * right / pixels).tolist())
    assert (result["images"], result["unreadable"]) == (8, 0)
    sheet = cv2.imread(str(tmp_path / "pictures/segmentation.png"))
    assert sheet.shape[0] > 280 and "left what is marked" in str(
        json.loads((tmp_path / "pictures/captions.json").read_text())
    )
    tables = []
    for rank in (0, 1):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world", lambda: 2)
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            patch.setattr(distributed, "collect", lambda one: tables.append(one) or [one])
            segmentation.judged(Fixed(), images, values)
    halves = [one for one in tables if isinstance(one, np.ndarray)]
    assert np.diag(sum(halves)).tolist() == right.tolist() and (halves[0] != sum(halves)).any()


BOTH = [{}, pytest.param({"detector": "deeplab", "precision": "bf16"}, marks=pytest.mark.slow)]


@pytest.mark.parametrize("more", BOTH, ids=str)
def test_an_interrupted_run_goes_on_bit_for_bit(more, folders, tmp_path, monkeypatch):
    values = {"steps": 3, "precise_norm": 1, "short_sides": (32, 40), "crop": 24, **more}
    whole = training.train(config(tmp_path / "whole", folders, **values))
    parts = config(tmp_path / "parts", folders, **values)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 1)
        training.train(parts)
    again = training.train(parts)
    states = [checkpoint.read(tmp_path / run / "checkpoints/last") for run in ("whole", "parts")]
    for one, other in zip(*(state["detector"].values() for state in states), strict=True):
        assert torch.equal(one, other)
    assert again["test"]["semantic"] == whole["test"]["semantic"]
    records = read_log(tmp_path / "whole/log.jsonl")
    assert records[-1]["semantic_mIoU"] == whole["test"]["semantic"]["mIoU"]
    assert records[-1]["loss"] == records[-1]["loss_pixels"]
    read = judging.evaluate(Eval(run=str(tmp_path / "parts"), device="cpu", threads=1))
    assert read["semantic"] == again["test"]["semantic"]
    assert read["protocol"]["detector"] == parts.detector and read["protocol"]["crop"] == 24


def _of_a_rank(rank, folders, out, values):
    with mock.patch.object(nn.Dropout, "forward", lambda self, x: x):  # each rank draws its own
        try:
            return training.train(config(out, folders, **values))
        finally:
            distributed.stop()


@pytest.mark.slow
def test_two_ranks_train_and_judge_what_one_does(folders, tmp_path, on_ranks):
    """Means over ranks, and statistics over all, are those of the whole batch; both see half."""
    values = {"steps": 3, "batch_size": 4, "norm": "sync", "crop": 0, "short_sides": (40,)}
    values |= {"save_every": 1, "base_lr": 0.1}
    both = on_ranks(_of_a_rank, folders, tmp_path / "two", values)
    alone = _of_a_rank(0, folders, tmp_path / "one", values)
    assert both[0]["test"]["per_class"] == both[1]["test"]["per_class"]
    assert read_log(tmp_path / "two/log.jsonl")[-1]["step"] == 3
    for name, value in alone["test"]["semantic"].items():
        assert both[0]["test"]["semantic"][name] == pytest.approx(value, abs=0.2)
    states = [checkpoint.read(tmp_path / run / "checkpoints/last") for run in ("one", "two")]
    for one, other in zip(*(state["detector"].values() for state in states), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_it_learns_eight_images_by_heart(folders, tmp_path):
    values = {"steps": 60, "batch_size": 4, "base_lr": 0.2, "crop": 0, "flip": 0.0}
    result = training.train(config(tmp_path / "run", folders, log_every=20, **values))
    assert result["test"]["semantic"]["mIoU"] > 75


def test_the_command_trains_judges_and_reports(folders, tmp_path, capsys):
    images, masks = folders
    out = str(tmp_path / "run")
    words = f"detect train random:timm:test_resnet --detector fcn --data {images} --annotations "
    words += f"{masks} --test-data {images} --test-annotations {masks} --out {out} --steps 1 "
    words += "--short-sides 40 --test-side 40 --batch-size 2 --device cpu --threads 1"
    cli.main(words.split())
    said = capsys.readouterr()
    assert "mIoU" in said.out and "IoU, blue" in said.out
    assert "--warmup-steps 500: the rate rises in all 1 steps" in said.err
    page = (tmp_path / "run/report.html").read_text()
    for text in ("Mean IoU on the test images", "pixels that are right", "blue", "data:image/png"):
        assert text in page
    with pytest.raises(SystemExit):
        cli.main([*words.replace("--detector fcn", "--detector mask-rcnn").split()])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"box_head": "4conv1fc"}, "fcn has its own head"),
        ({"detector": "faster-rcnn"}, "--crop and --categories are for segmentation"),
        ({"detector": "deeplab", "batch_size": 1}, "--batch-size of two or more a device"),
        ({"annotations": "nowhere"}, "nowhere is no folder of index masks"),
        ({"test_data": "nowhere"}, "'nowhere' is not a folder"),
    ],
)
def test_what_does_not_fit_is_one_sentence(values, said, folders, tmp_path):
    with pytest.raises(UserError, match=said):
        training.train(config(tmp_path / "run", folders, **values))
    assert not (tmp_path / "run").exists()


def test_a_test_set_is_read_by_the_classes_that_were_learnt(folders):
    images = judging.opened(*folders, config(), ("a", "b", "c"))
    assert images.categories == ("a", "b", "c")
    named = dataclasses.replace(config(), categories=("x", "y", "z"))
    assert judging.opened(*folders, named).categories == ("x", "y", "z")


def test_a_run_does_not_go_on_with_other_masks(folders, tmp_path):
    images = open_segmented(*folders)
    first = dataclasses.replace(images.pictures[0], sum=images.pictures[0].sum ^ 1)
    other = dataclasses.replace(images, pictures=(first, *images.pictures[1:]))
    run = training.started(config(tmp_path, folders), images, tmp_path)
    run.save()
    assert training.started(config(tmp_path, folders), images, tmp_path).images == run.images
    with pytest.raises(UserError, match=r"masks no longer holds what .* was trained on"):
        training.started(config(tmp_path, folders), other, tmp_path)
