"""Runs of detectors: they go on bit for bit, ranks average, they learn; figures are right."""

import dataclasses
import json
import multiprocessing
from unittest import mock

import numpy as np
import pytest
import torch

from firstsight import checkpoint, cli, distributed, load_backbone, parallel
from firstsight.detect import comparing, inputs, judging, models, training
from firstsight.detect.figures import figures
from firstsight.detect.masks import decode
from firstsight.detect.settings import Eval
from firstsight.errors import UserError
from firstsight.log import read_log
from tests.detect.squares import config, squares


@pytest.fixture
def sets(monkeypatch):
    """`squares` names images to train on, `tests` others; both without files."""
    known = {"squares": squares(24), "tests": squares(2, 1000), "other": squares(2, 2000)}
    names = dataclasses.replace(known["other"], categories=("red", "green"))
    known["other"] = names
    for module in (training, judging):
        monkeypatch.setattr(module, "opened", lambda data, *_: known[data])
    monkeypatch.setattr(judging, "figures", lambda *_, **__: {"bbox": {"AP": 1.0, "AP50": None}})
    return known


JUDGED = {"test_data": "tests", "test_annotations": "tests"}


def interrupted(monkeypatch, step):
    """Let a run believe that a signal came after so many steps."""
    calls = []
    monkeypatch.setattr(distributed, "anyone", lambda flag: calls.append(0) or len(calls) == step)


HEAVY = {"detector": "mask-rcnn", "box_head": "4conv1fc", "norm_also": ("neck", "heads")}
HEAVY |= {"precision": "bf16", "optimizer": "adamw", "base_lr": 1e-3}


@pytest.mark.parametrize("more", [{}, pytest.param(HEAVY, marks=pytest.mark.slow)], ids=str)
def test_an_interrupted_run_goes_on_bit_for_bit(more, sets, tmp_path, monkeypatch, capsys):
    values = {
        "steps": 4,
        "precise_norm": 1,
        "short_sides": (32, 40),
        "rois": 8,
        "batch_size": 2,
        "test_side": 32,
        **JUDGED,
        **more,
    }
    whole = training.train(config(tmp_path / "whole", **values))
    assert whole["steps"] == 4 and whole["test"]["bbox"]["AP"] == 1.0
    parts = config(tmp_path / "parts", **values)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        interrupted(patch, 2)
        training.train(parts)
    assert read_log(tmp_path / "parts/log.jsonl")[-1]["step"] == 2
    with pytest.raises(UserError, match=r"started otherwise: --base-lr 0.5 \(was 0.0"):
        training.train(dataclasses.replace(parts, base_lr=0.5))
    with pytest.raises(UserError, match=r"otherwise: CHECKPOINT .*; use CHECKPOINT .* to go on"):
        training.train(dataclasses.replace(parts, checkpoint="elsewhere"))
    again = training.train(dataclasses.replace(parts, log_every=2))
    states = [checkpoint.read(tmp_path / run / "checkpoints/last") for run in ("whole", "parts")]
    for one, other in zip(*(state["detector"].values() for state in states), strict=True):
        assert torch.equal(one, other)
    records = [read_log(tmp_path / run / "log.jsonl")[-1] for run in ("whole", "parts")]
    assert records[0]["loss"] == records[1]["loss"] and again["steps"] == 4
    assert training.train(parts) == json.loads((tmp_path / "parts/summary.json").read_text())
    assert "is finished" in capsys.readouterr().err

    read = judging.evaluate(Eval(run=str(tmp_path / "parts"), device="cpu", threads=1))
    assert read["bbox"] == again["test"]["bbox"] and read["images"] == 2
    assert read["images_per_second"] > 0 and read["peak_memory_gib"] > 0
    detector, trained, categories = judging.load(str(tmp_path / "parts"))
    assert categories == ("red", "blue") and trained.short_sides == (32, 40)
    assert all(torch.equal(v, states[0]["detector"][k]) for k, v in detector.state_dict().items())
    with pytest.raises(UserError, match="other has other categories than the detector learnt"):
        judging.evaluate(
            Eval(run=str(tmp_path / "parts"), data="other", annotations="other", device="cpu")
        )
    for spec in ("parts", "parts/checkpoints/last"):
        with pytest.raises(UserError, match="is of a detector; give the CHECKPOINT"):
            load_backbone(str(tmp_path / spec))


def test_a_run_of_pretraining_is_no_detector(tmp_path):
    with pytest.raises(UserError, match="holds no run of firstsight detect train"):
        judging.load(str(tmp_path))
    checkpoint.save(tmp_path / "checkpoints", 1, {"method": {}, "about": {}}, 1)
    with pytest.raises(UserError, match="is a run of pretraining, not of a detector"):
        judging.load(str(tmp_path))


def test_what_does_not_fit_is_refused_before_anything_is_written(sets, tmp_path):
    out = tmp_path / "run"
    for values, said in [
        ({"data": ""}, "which images"),
        ({"test_data": "tests"}, "go together"),
        ({"norm": "split", "splits": 3}, "4 images a device do not make 3 parts"),
        ({"test_data": "other", "test_annotations": "other"}, "other categories"),
    ]:
        with pytest.raises(UserError, match=said):
            training.train(config(out, **values))
    assert not out.exists()


def test_the_schedule_and_the_rate_are_those_of_16_images():
    assert config(base_lr=0.02, batch_size=8).peak_lr == 0.01
    assert config(lr=0.3, batch_size=8).peak_lr == 0.3


def test_precise_norms_are_means_over_whole_batches():
    """Of a norm that sees images alone: mean and variance of all pixels of both batches."""
    images, values = squares(8), config(precise_norm=2, short_sides=(64,), flip=0.0)
    detector = models.build(load_backbone(values.checkpoint), 2, values, (0,) * 3, (1,) * 3)
    detector.train()
    shows = inputs.Steps(
        images=images,
        chosen=np.arange(8),
        order=inputs.order_of(images, np.arange(8), dataclasses.replace(values, batch_size=2)),
        config=values,
        rank=0,
        world=1,
    )
    seen = []
    conv = detector.network.backbone.body.backbone.network.conv1[0]
    conv.register_forward_hook(lambda module, given, out: seen.append(out.detach()))
    norm = detector.network.backbone.body.backbone.network.conv1[1]
    training.precise_norms(detector, shows, values, 0)
    means = torch.stack([x.mean((0, 2, 3)) for x in seen])
    # batch-norm keeps unbiased variances
    squares_ = torch.stack([x.var((0, 2, 3)) + x.mean((0, 2, 3)) ** 2 for x in seen])
    assert len(seen) == 2 and norm.momentum == 0.1
    assert torch.allclose(norm.running_mean, means.mean(0), atol=1e-5)
    assert torch.allclose(norm.running_var, squares_.mean(0) - means.mean(0) ** 2, atol=1e-4)


def test_perfect_detections_come_back_to_the_original_and_get_100(monkeypatch):
    """A detector that says what is marked, in pixels of the resized image, masks as 28 x 28."""
    images, asked = squares(5), []

    class Knowing(torch.nn.Module):
        def forward(self, shown):
            return [self.one(image) for image in shown]

        def one(self, image):
            picture = images.pictures[len(asked)]
            asked.append(picture.name)
            height, width = image.shape[1:]
            scale = np.array([width / picture.width, height / picture.height] * 2)
            n = len(picture.objects)
            return {
                "boxes": torch.from_numpy(picture.objects.boxes * scale),
                "scores": torch.linspace(0.9, 0.5, n),
                "labels": torch.from_numpy(picture.objects.labels),
                "masks": torch.ones(n, 1, 28, 28),
            }

    values = config(detector="mask-rcnn", test_side=100, long_side=130, batch_size=2)
    found, took = judging.find(Knowing(), images, values)
    assert took["unreadable"] == 0 and len(found) == 5
    for picture, one in zip(images.pictures, found, strict=True):
        assert one.boxes == pytest.approx(picture.objects.boxes, abs=0.01)
        for mask, box in zip(one.masks, picture.objects.boxes.astype(int), strict=True):
            drawn = np.zeros((picture.height, picture.width), bool)
            drawn[box[1] : box[3], box[0] : box[2]] = True
            pasted = decode(mask, picture.height, picture.width)
            # torchvision pastes to whole pixels, the last ones included
            assert (pasted & drawn).sum() == drawn.sum() and pasted.sum() < 1.2 * drawn.sum()
    result = figures(images, found)
    assert result["bbox"]["AP"] == pytest.approx(100)
    assert result["segm"]["AP50"] == pytest.approx(100)


def _of_a_rank(rank, world, port, queue):
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0",
                   "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}  # fmt: skip
    distributed.start("cpu", 1)
    queue.put((rank, _gradients(rank, world)))
    distributed.stop()


def _gradients(rank, world):
    """Of the rank's share of a batch, averaged where there are others."""
    torch.manual_seed(0)
    values = config(norm="frozen", seed=3)
    images = squares(12)
    detector = models.build(load_backbone(values.checkpoint), 2, values, (0.5,) * 3, (0.2,) * 3)
    shows = inputs.Steps(
        images=images,
        chosen=np.arange(12),
        order=inputs.order_of(images, np.arange(12), values),
        config=values,
        rank=rank,
        world=world,
    )
    model = parallel.replica(detector.train())
    training.gradients(model, shows[0], values, 0)
    return [p.grad.numpy() for p in detector.parameters() if p.requires_grad]


@pytest.mark.slow
def test_ranks_average_their_gradients(monkeypatch):
    """Both hold the same, and it is the mean of what each has alone."""
    from tests.conftest import free_port

    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    workers = [context.Process(target=_of_a_rank, args=(r, 2, port, queue)) for r in range(2)]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    alone = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        alone.append(_gradients(rank, 2))
    for one, other, first, second in zip(found[0], found[1], *alone, strict=True):
        assert np.array_equal(one, other)
        assert one == pytest.approx((first + second) / 2, abs=1e-5)


def _rank_of_a_run(rank, folder):
    known = {"squares": squares(24), "tests": squares(5, 1000)}
    with mock.patch.object(training, "opened", lambda data, *_: known[data]):
        try:
            values = {"steps": 2, "save_every": 1, "detector": "mask-rcnn", **JUDGED}
            return training.train(config(folder, norm="sync", precise_norm=1, **values))
        finally:
            distributed.stop()


@pytest.mark.slow
def test_two_ranks_walk_the_whole_road(tmp_path, on_ranks):
    """Steps, checkpoints, statistics, figures of boxes and masks: nobody waits for ever."""
    one, other = on_ranks(_rank_of_a_run, tmp_path)
    assert all(one["test"][k] == other["test"][k] for k in ("bbox", "segm", "voc", "per_class"))
    assert one["test"]["images"] == 5 and (tmp_path / "checkpoints/step-00000002.pt").exists()
    assert one["test"]["bbox"]["AP"] is not None and (tmp_path / "curves.json").exists()


@pytest.mark.slow
def test_it_learns(sets, tmp_path, monkeypatch):
    """Squares of two colours, from an untrained network: 90 steps are enough to find them."""
    monkeypatch.setattr(judging, "figures", figures)
    sets["squares"] = squares(120, masks=False)
    values = {"epochs": 3.0, "base_lr": 0.04, "clip_norm": 5.0, "warmup_steps": 10, **JUDGED}
    result = training.train(config(tmp_path / "run", log_every=30, **values))
    assert result["test"]["bbox"]["AP50"] > 30


def test_a_comparison_is_runs_over_seeds(sets, tmp_path, monkeypatch, capsys):
    asked = []

    def train(config):
        asked.append((config.checkpoint, config.seed, config.out))
        ap = {"a": 10.0, "b/c.pt": 20.0}[config.checkpoint] + config.seed
        return {"test": {"bbox": {"AP": ap, "AP50": 2 * ap, "AP75": None}}}

    monkeypatch.setattr(comparing, "train", train)
    out = tmp_path / "many"
    out.mkdir()
    cli.main(
        f"detect compare a b/c.pt --seeds 2 --seed 3 --data d --annotations d --test-data t "
        f"--test-annotations t --out {out} --json {tmp_path / 'c.json'}".split()
    )
    assert asked == [
        (spec, seed, str(out / f"{n}-{name}-seed-{seed}"))
        for n, (spec, name) in enumerate([("a", "a"), ("b/c.pt", "b-c.pt")])
        for seed in (3, 4)
    ]
    result = json.loads((tmp_path / "c.json").read_text())
    first, second = result["results"]
    assert first["bbox"]["AP"] == {"mean": 13.5, "least": 13.0, "most": 14.0, "each": [13.0, 14.0]}
    assert second["bbox"]["AP50"]["mean"] == 47 and "AP75" not in second["bbox"]
    assert "13.5 (13.0 to 14.0)" in capsys.readouterr().out


def test_segmenters_are_compared_by_their_own_figures():
    tests = [{"semantic": {"mIoU": value, "accuracy": None}, "per_class": []} for value in (4.0, 8)]
    spread = comparing.spread(tests)
    assert spread == {"semantic": {"mIoU": {"mean": 6, "least": 4, "most": 8, "each": [4, 8]}}}
