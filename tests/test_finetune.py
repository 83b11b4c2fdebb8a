"""evaluate finetune: what is trained, on which labels, at which rates, and what is counted."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firstsight import cli, distributed, load_backbone
from firstsight.errors import UserError
from firstsight.evaluate import finetune
from firstsight.evaluate.finetune import TUNINGS, Part, Tuning, chosen, tuned
from firstsight.evaluate.protocols import PROTOCOLS
from firstsight.features import Reader, extract
from firstsight.loader import normalised
from firstsight.nets.heads import Heads, prepared
from firstsight.order import Epochs
from firstsight.sources import open_source
from firstsight.views import Views
from firstsight.views.apply import apply
from firstsight.views.draw import draw
from tests.tiny import NETWORK, Patches

ASKED = {"train": "scenes:train@40", "test": "scenes:test@20", "size": 32, "device": "cpu"}
HOW = Tuning(lr=0.002, head_lr=0.03, epochs=2, batch_size=5, min_scale=0.5, drops=(0.5,))


@pytest.mark.parametrize("representation", ["original", "norm"])
def test_two_epochs_are_plain_sgd_on_the_drawn_crops(representation):
    """Crops, forward pass, gradient and momentum written out; the drop is after the first epoch."""
    how = dataclasses.replace(HOW, representation=representation, weight_decay=0.01)
    part, reader = Part(Patches(30), np.arange(10) * 3 // 2), Reader(size=32)
    nets = [load_backbone(f"random:{NETWORK}") for _ in range(2)]
    start = [p.detach().clone() for p in nets[0].parameters()]
    heads = [
        Heads(1, nets[0].width, 3, seed=4, prepare=prepared(torch.empty(0), representation))
        for _ in nets
    ]
    for _ in tuned(nets[0], heads[0], part, how, reader, 7, set()):
        nets[0].eval()  # as a reading of the test images leaves it in the published code
    views = Views(counts=(1,), min_scale=(0.5,), jitter=0, gray=0, blur=(0,))
    order, velocity = Epochs(10, 5, 7), {}
    net, head = nets[1].train(), heads[1]
    for step in range(4):
        pictures, truth = [], []
        for i in order.indices(step):
            pixels = part.pixels(int(i))
            drawn = draw(views, [pixels.shape[1::-1]], seed=7, epoch=step // 2, index=[i])
            pictures.append(torch.from_numpy(apply(pixels, drawn, 0, 0, 32)).permute(2, 0, 1))
            truth.append(int(part.labels[i]))
        images = normalised(torch.stack(pictures), reader.mean, reader.std, torch.contiguous_format)
        features = net(images)
        if representation == "norm":
            features = features / features.norm(dim=1, keepdim=True)
        layer = head.heads[0]
        loss = F.cross_entropy(features @ layer.weight.T + layer.bias, torch.tensor(truth))
        every = [(p, 0.002) for p in net.parameters()] + [(p, 0.03) for p in head.parameters()]
        gradients = torch.autograd.grad(loss, [p for p, _ in every])
        with torch.no_grad():
            for (p, lr), g in zip(every, gradients, strict=True):
                velocity[p] = 0.9 * velocity.get(p, 0) + g + 0.01 * p
                p -= lr * (1.0 if step < 2 else 0.2) * velocity[p]
    # batch-norm over five images blows rounding up: what counts is how far off, of the way gone
    ways = [[p - q for p, q in zip(n.parameters(), start, strict=True)] for n in nets]
    moved, expected = (torch.cat([way.flatten() for way in of_net]) for of_net in ways)
    assert (moved - expected).norm() < 0.02 * expected.norm()
    for ours, by_hand in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        torch.testing.assert_close(ours, by_hand, atol=1e-3, rtol=1e-2)
    statistics = [[b for k, b in n.named_buffers() if "running_mean" in k][-1] for n in nets]
    torch.testing.assert_close(*statistics, atol=2e-3, rtol=1e-2)
    assert statistics[0].abs().sum() > 0  # the published code lets them rest after the first test


def test_rates_are_as_published():
    """SwAV's semi-supervised code drops at epochs 12 and 16, ssl-small's scripts at 40 and 70."""
    for name, drops in (("swav-10", (12, 16)), ("swav-1", (12, 16)), ("ssl-small", (40, 70))):
        how = TUNINGS[name]
        for epoch in range(how.epochs):
            expected = 0.2 ** sum(epoch >= drop for drop in drops)
            assert how.rate(epoch * 9 + 8, 9) == pytest.approx(expected)
    assert (TUNINGS["swav-1"].lr, TUNINGS["swav-1"].head_lr) == (0.02, 5.0)
    assert (TUNINGS["swav-10"].lr, TUNINGS["swav-10"].head_lr) == (0.01, 0.2)
    short = dataclasses.replace(TUNINGS["ssl-small"], epochs=10, schedule="cosine")
    assert short.rate(0, 3) == 1 and short.rate(15, 3) == pytest.approx(0.5)


def test_linear_transfer_is_as_published():
    how = PROTOCOLS["ssl-small"]
    assert (how.peaks, how.epochs, how.representation, how.min_scale) == ((1.5,), 60, "norm", 0.6)
    rates = [how.rate(epoch * 3, 3) for epoch in range(60)]
    assert rates[39] == 1.0 and rates[40] == pytest.approx(0.1) and min(rates) > 0.09


def test_labels_are_a_share_or_a_number_of_each_class():
    labels = np.array([0] * 100 + [1] * 40 + [2] * 3)
    of_ten = chosen(labels, "10%", 0)
    assert np.bincount(labels[of_ten]).tolist() == [10, 4, 1]
    assert np.bincount(labels[chosen(labels, "5", 0)]).tolist() == [5, 5, 3]
    assert np.array_equal(chosen(labels, "100%", 0), np.arange(143))
    assert np.array_equal(of_ten, chosen(labels, "10%", 0))
    assert not np.array_equal(of_ten, chosen(labels, "10%", 1))
    for wrong in ("0", "0%", "101%", "many", "-3", "1.5"):
        with pytest.raises(UserError, match="give a share such as 10%, or a number"):
            chosen(labels, wrong, 0)


def test_judged_says_the_mean_over_classes():
    heads = Heads(2, 3, 4, seed=0)
    with torch.no_grad():
        for head, order in zip(heads.heads, ([0, 1, 2], [1, 0, 2]), strict=True):
            head.weight.copy_(torch.eye(4)[:, :3][[*order, 3]])
    labels = torch.tensor([0, 0, 0, 0, 1, 2])  # no row of class 3
    rows = torch.eye(3)[[0, 0, 1, 0, 1, 2]]
    first, second = (one["mean_per_class"] for one in heads.judged(rows, labels))
    assert first == pytest.approx(100 * (3 / 4 + 1 + 1) / 3)
    assert second == pytest.approx(100 * (1 / 4 + 0 + 1) / 3)


def test_the_command_says_what_it_did(tmp_path):
    out = tmp_path / "f.json"
    asked = "--train scenes:train@40 --test scenes:test@20 --size 32 --device cpu --labels 3"
    asked += " --epochs 5 --batch-size 100 --mean-per-class --test-every 2"
    args = ["evaluate", "finetune", f"random:{NETWORK}", *asked.split()]
    cli.main([*args, "--json", str(out)])
    result = json.loads(out.read_text())
    source = open_source("scenes:train@40")
    assert result["images"]["train"] == sum(min(3, n) for n in np.bincount(source.labels))
    assert result["protocol"]["batch_size"] == result["images"]["train"]
    assert [one["epoch"] for one in result["curve"]] == [2, 4, 5]
    assert result["top1"] == result["curve"][-1]["top1"]
    assert result["best_top1"] == max(one["top1"] for one in result["curve"])
    assert result["best_chosen_on"] == "the test images" and "mean_per_class" in result


def test_training_that_runs_wild_is_said(capsys):
    """Its loss is finite, its accuracy that of guessing: silence would look like a bad backbone."""
    asked = ASKED | {"labels": "4", "epochs": 2, "batch_size": 10, "threads": 1}
    finetune(f"random:{NETWORK}", **asked, head_lr=1e3, lr=1e-6)
    assert "where guessing has 2.3: training ran wild" in capsys.readouterr().err
    finetune(f"random:{NETWORK}", **asked, head_lr=1e-6, lr=1e-6)
    assert "ran wild" not in capsys.readouterr().err


class Colours(Patches):
    """Noise with a cast of its class's own."""

    def pixels(self, index):
        pixels = super().pixels(index) // 2
        pixels[:, :, index % 3] += 100
        return pixels


@pytest.mark.slow
def test_it_learns_its_labels():
    backbone, source, reader = load_backbone(f"random:{NETWORK}"), Colours(30), Reader(size=32)
    heads = Heads(1, backbone.width, 3, seed=0)
    how = Tuning(lr=0.003, head_lr=0.01, epochs=20, batch_size=10)
    before = heads.judged(extract(backbone, source, reader).values, torch.arange(30) % 3)
    for _ in tuned(backbone, heads, Part(source, np.arange(30)), how, reader, 0, set()):
        pass
    after = heads.judged(extract(backbone, source, reader).values, torch.arange(30) % 3)
    assert after[0]["top1"] > max(80, before[0]["top1"])


def test_the_same_seed_is_the_same_and_another_is_not():
    """Seeds draw the labelled images, the head, the crops."""
    weights = []
    for seed in (0, 0, 1):
        backbone, part = load_backbone(f"random:{NETWORK}"), Part(Patches(30), np.arange(10))
        heads = Heads(1, backbone.width, 3, seed=seed)
        for _ in tuned(backbone, heads, part, HOW, Reader(size=32), seed, set()):
            pass
        weights.append(next(backbone.parameters()).detach())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    once, again = (finetune(f"random:{NETWORK}", labels="2", epochs=1, **ASKED) for _ in range(2))
    assert once | {"seconds": 0} == again | {"seconds": 0} and "mean_per_class" not in once


class Watched(Part):
    """Notes which images were decoded."""

    def __init__(self, *given):
        super().__init__(*given)
        self.seen = []

    def pixels(self, index):
        self.seen.append(index)
        return super().pixels(index)


def _on_rank(rank):
    distributed.start("cpu", 1)
    part, asked = Watched(Patches(30), np.arange(12)), Watched(Patches(30), np.arange(12, 23))
    backbone, reader = load_backbone(f"random:{NETWORK}"), Reader(size=32, batch_size=3)
    heads = Heads(1, backbone.width, 3, seed=4)
    how = dataclasses.replace(HOW, batch_size=4)
    for _ in tuned(backbone, heads, part, how, reader, 7, set()):
        found = extract(backbone, asked, reader)
    whole = finetune(f"random:{NETWORK}", **ASKED, epochs=1, batch_size=8, threads=1)
    weights = torch.cat(
        [p.detach().flatten() for p in [*backbone.parameters(), *heads.parameters()]]
    )
    distributed.stop()
    return part.seen, asked.seen, found.index.tolist(), weights.numpy(), whole


def test_each_rank_learns_from_its_share_and_each_test_image_counts_once(on_ranks):
    """Every step's images once, half on each rank; one network comes out, and one figure."""
    (learnt, asked, index, weights, whole), other = on_ranks(_on_rank)
    assert len(learnt) == len(other[0]) == 12  # two epochs of 12 images, over two ranks
    order = Epochs(12, 4, 7)
    for step in range(6):
        shares = [ranks[2 * step : 2 * step + 2] for ranks in (learnt, other[0])]
        assert [*shares[0], *shares[1]] == order.indices(step).tolist()
    assert sorted(asked + other[1]) == sorted([*range(11)] * 2)  # after each of two epochs
    assert index == other[2] == list(range(11))
    np.testing.assert_array_equal(weights, other[3])
    assert whole["images"] == other[4]["images"] == {"train": 40, "test": 20}
    assert {k: v for k, v in whole.items() if k != "seconds"} == {
        k: v for k, v in other[4].items() if k != "seconds"
    }
