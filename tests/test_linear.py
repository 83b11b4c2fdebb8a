"""evaluate linear: what is trained, what chooses, what is counted, and what stays untouched."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from firstsight import cli, distributed, load_backbone
from firstsight.errors import UserError
from firstsight.evaluate import linear
from firstsight.evaluate.drifting import Drifting
from firstsight.evaluate.linear import (
    _choice,
    best_of,
    cached,
    held_out,
    prepared,
    trained,
    untouched,
)
from firstsight.evaluate.protocols import PROTOCOLS, Protocol, overridden
from firstsight.features import Reader, Seen, extract, pooled
from firstsight.metrics import places
from firstsight.nets.heads import Heads
from firstsight.sources.base import class_count
from firstsight.views.apply import eval_view
from tests.tiny import NETWORK, Patches


def clouds(images, classes=3, width=6, seed=0, overlap=1.0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(images, width, generator=generator)
    return (centres[labels] + overlap * noise).double(), labels


def batches_of(x, y, size):
    while True:
        yield from zip(x.split(size), y.split(size), strict=True)


def by_hand(x, y, size, weight, bias, how, lr, decay):
    """SGD on the cross-entropy of one linear layer, gradient and momentum written out, float64."""
    x, y = x.numpy(), y.numpy()
    w, b = weight.double().numpy().copy(), bias.double().numpy().copy()
    w_velocity, b_velocity = np.zeros_like(w), np.zeros_like(b)
    an_epoch = math.ceil(len(x) / size)
    for step in range(how.epochs * an_epoch):
        part = slice(step % an_epoch * size, step % an_epoch * size + size)
        rows, truth = x[part], y[part]
        gw, gb = decay * w, decay * b
        for row, label in zip(rows, truth, strict=True):
            logits = w @ row + b
            p = np.exp(logits - logits.max())
            p /= p.sum()
            p[label] -= 1
            gw = gw + np.outer(p, row) / len(rows)
            gb = gb + p / len(rows)
        rate = lr * 0.5 * (1 + math.cos(math.pi * step / (how.epochs * an_epoch)))
        for value, gradient, velocity in ((w, gw, w_velocity), (b, gb, b_velocity)):
            velocity *= how.momentum
            velocity += gradient
            value -= rate * (gradient + how.momentum * velocity if how.nesterov else velocity)
    return w, b


@pytest.mark.parametrize("nesterov", [False, True])
def test_heads_side_by_side_are_each_a_plain_loop_of_its_own(nesterov):
    x, y = clouds(22)
    how = Protocol(lr=(0.3, 1e-3, 2.0), weight_decay=(0.0, 0.01), epochs=4, augment=False)
    how = dataclasses.replace(how, batch_size=8, nesterov=nesterov)
    heads = Heads(6, 6, 3, seed=1, std=0.0).double()
    start = heads.heads[0].weight.detach().clone(), heads.heads[0].bias.detach().clone()
    assert len(list(trained(heads, how.settings, how, batches_of(x, y, 8), 3, ""))) == 4
    for head, (lr, decay) in zip(heads.heads, how.settings, strict=True):
        w, b = by_hand(x, y, 8, *start, how, lr, decay)
        np.testing.assert_allclose(head.weight.detach(), w, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(head.bias.detach(), b, rtol=1e-9, atol=1e-11)


def test_the_place_of_the_true_class_counts_ties_lowest_class_first():
    scores = torch.tensor([[3.0, 1, 3, 2], [3, 1, 3, 2], [3, 1, 3, 2], [1, 1, 1, 1], [0, 9, 9, 9]])
    labels = torch.tensor([0, 2, 1, 3, 0])
    expected = [
        sorted(range(4), key=lambda k: (-row[k], k)).index(label)
        for row, label in zip(scores.tolist(), labels.tolist(), strict=True)
    ]
    assert places(scores, labels).tolist() == expected == [0, 1, 3, 3, 3]
    assert places(torch.full((1, 4), torch.nan), labels[:1]).item() == 4  # never right


def test_accuracy_counts_every_row_once_and_top5_of_few_classes_is_all():
    heads = Heads(2, 6, 3, seed=0, std=1.0)
    with torch.no_grad():
        heads.heads[1].weight.neg_()
    x, y = clouds(31)
    x = x.float()
    for head, figures in zip(heads.heads, heads.judged(x, y), strict=True):
        logits = x @ head.weight.T + head.bias
        right = sum(int(logits[i].argmax()) == int(y[i]) for i in range(31))
        assert figures["top1"] == pytest.approx(100 * right / 31)
        assert figures["top5"] == 100.0
        assert figures["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-6)


def seen_of(train, test, **more):
    (x, y), (u, v) = train, test
    return Seen(x.float(), y, u.float(), v, **more)


SMALL = dataclasses.replace(PROTOCOLS["cached"], epochs=6, batch_size=16)


def test_the_test_images_choose_nothing():
    train, (u, v) = clouds(90, overlap=3.0), clouds(40, seed=1, overlap=3.0)
    right = cached(seen_of(train, (u, v)), 3, SMALL, seed=0)
    shuffled = v[torch.randperm(40, generator=torch.Generator().manual_seed(3))]
    wrong = cached(seen_of(train, (u * 7, shuffled)), 3, SMALL, seed=0)
    assert right["chosen"] == wrong["chosen"] and right["sweep"] == wrong["sweep"]
    assert right["top1"] != wrong["top1"]


def test_held_out_rows_are_not_trained_on_until_the_choice_is_made():
    """Labels of pure noise in many dimensions: they can be memorised, and only so be known."""
    x = torch.randn(100, 300, generator=torch.Generator().manual_seed(0))
    y = torch.arange(100) % 2
    how = dataclasses.replace(SMALL, lr=(0.1, 0.3))
    figures = cached(Seen(x, y, x, y), 2, how, seed=0)
    assert max(setting["held_out_top1"] for setting in figures["sweep"]) < 90  # of 10 rows
    assert figures["top1"] == 100  # trained again, on all of them


def test_a_tenth_is_held_out_of_every_class():
    labels = torch.arange(500).remainder(7).clamp(max=4)  # class 4 is three times as frequent
    held = held_out(labels, 0)
    assert int(held.sum()) == 50
    for k in range(5):
        share = (labels == k).sum() / 10
        assert abs(int(held[labels == k].sum()) - share) <= 1
    assert not held_out(labels, 1).equal(held) and held_out(labels, 0).equal(held)
    assert int(held_out(torch.tensor([0, 1]), 0).sum()) == 1
    with pytest.raises(UserError, match="at least two readable"):
        held_out(torch.tensor([0]), 0)


def test_of_equal_settings_the_lower_loss_wins_and_a_diverged_one_never():
    nan = math.nan
    judged = [(50.0, 2.0), (60.0, 3.0), (60.0, 1.0), (60.0, nan)]
    assert best_of([{"top1": a, "loss": b} for a, b in judged]) == 2


def test_a_sweep_survives_settings_that_diverge_and_one_alone_is_an_error():
    data = seen_of(clouds(60), clouds(30, seed=1))
    how = dataclasses.replace(SMALL, lr=(0.1, 1e30), weight_decay=(0.0, 1e10))
    result = cached(data, 3, how, seed=0)
    assert result["chosen"]["lr"] == 0.1 and result["chosen"]["weight_decay"] == 0.0
    with pytest.raises(UserError, match=r"diverged .* use a lower --lr"):
        cached(data, 3, dataclasses.replace(how, lr=(1e30,), weight_decay=(1e10,)), seed=0)


def test_features_are_prepared_as_named():
    x, _ = clouds(50)
    x[:, 2] = 0.7  # constant: no deviation to divide by
    standard = prepared(x, "standard")(x)
    assert standard[:, 2].abs().max() == 0
    rest = standard[:, [0, 1, 3, 4, 5]]
    assert rest.mean(0).abs().max() < 1e-12
    torch.testing.assert_close(rest.var(0, correction=0), torch.ones(5).double())
    torch.testing.assert_close(prepared(x, "norm")(x).norm(dim=1), torch.ones(50).double())
    assert prepared(x, "original")(x) is x


def test_features_that_cannot_be_read_from_are_said_so(capsys):
    data = seen_of(clouds(60), clouds(30, seed=1))
    broken = dataclasses.replace(data, train=data.train.clone().fill_(torch.nan))
    with pytest.raises(UserError, match="not numbers"):
        cached(broken, 3, SMALL, seed=0)
    flat = dataclasses.replace(data, train=torch.ones(60, 6), test=torch.ones(30, 6))
    assert cached(flat, 3, SMALL, seed=0)["top1"] == pytest.approx(100 / 3)
    assert "collapsed" in capsys.readouterr().err


def test_protocols_have_the_published_numbers():
    """Spec: lr and batch, weight decay, epochs, warm-up, and the rate at some steps."""

    def said(name):
        p = PROTOCOLS[name]
        return p.peaks, p.weight_decay, p.momentum, p.nesterov, p.batch_size, p.epochs, p.schedule

    assert said("moco") == ((30.0,), (0.0,), 0.9, False, 256, 100, "step")
    assert said("pic") == ((30.0,), (0.0,), 0.9, False, 256, 100, "cosine")
    assert said("byol") == ((0.8,), (0.0,), 0.9, True, 1024, 80, "cosine")
    assert said("scrl") == ((3.2,), (0.0,), 0.9, True, 4096, 80, "cosine")
    assert said("swav") == ((0.3,), (1e-6,), 0.9, False, 256, 100, "cosine")
    assert said("dino") == ((0.004,), (0.0,), 0.9, False, 1024, 100, "cosine")
    assert said("simclr") == ((1.6,), (1e-6,), 0.9, True, 4096, 90, "cosine")
    assert said("simsiam") == ((1.6,), (0.0,), 0.9, False, 4096, 90, "cosine")
    assert said("vicreg") == ((0.02,), (1e-6,), 0.9, False, 256, 100, "cosine")
    assert len(PROTOCOLS["cached"].settings) == 12
    assert [PROTOCOLS[n].warmup_epochs for n in ("pic", "scrl", "moco")] == [5, 5, 0]
    moco = [PROTOCOLS["moco"].rate(step, 10) for step in (0, 599, 600, 799, 800, 999)]
    assert moco == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    dino = [PROTOCOLS["dino"].rate(step, 10) for step in (0, 9, 10, 509)]
    cosine = [0.5 * (1 + math.cos(math.pi * epoch / 100)) for epoch in (0, 0, 1, 50)]
    assert dino == pytest.approx(cosine)
    assert [n for n, how in PROTOCOLS.items() if how.optimizer == "lars"] == ["scrl", "simsiam"]
    scrl = [PROTOCOLS["scrl"].rate(step, 10) for step in (0, 25, 50, 425)]
    assert scrl == pytest.approx([0, 0.5, 1, 0.5])


def test_fewer_epochs_move_the_drops_and_shorten_the_warm_up():
    short = overridden("moco", 10, {})
    assert [short.rate(step, 10) for step in (59, 60, 79, 80)] == pytest.approx([1, 0.1, 0.1, 0.01])
    assert overridden("scrl", 16, {}).warmup_epochs == 1
    assert overridden("scrl", 16, {"warmup_epochs": 2.0}).warmup_epochs == 2
    assert overridden("scrl", None, {"batch_size": 512}).peaks == (0.4,)
    assert overridden("moco", None, {"base_lr": 1.0, "batch_size": 512}).peaks == (2.0,)
    assert overridden("scrl", None, {"lr": (5.0,)}).peaks == (5.0,)
    assert overridden("moco", None, {"weight_decay": (0.1,), "schedule": None}).schedule == "step"


@pytest.mark.parametrize(
    ("name", "epochs", "given", "said"),
    [
        ("mocco", None, {}, "did you mean 'moco'"),
        ("moco", 0, {}, "--epochs must be above 0"),
        ("moco", None, {"lr": (1.0, 2.0)}, "use --protocol cached"),
        ("moco", None, {"representation": "standard"}, "--representation standard needs cached"),
        ("scrl", 4, {"warmup_epochs": 5.0}, "use --warmup-epochs 0.4"),
        ("byol", None, {"momentum": 0.0}, "--nesterov True needs"),
        ("cached", None, {"lr": (-1.0,)}, "--lr"),
        ("cached", None, {"weight_decay": (math.nan,)}, "--weight-decay"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(name, epochs, given, said):
    with pytest.raises(UserError, match=said):
        overridden(name, epochs, given)


NETWORK_SPEC = "random:" + NETWORK
SOURCES = {"train": "scenes:train@64", "test": "scenes:test@30"}


@pytest.mark.parametrize("protocol", ["cached", "moco"])
def test_the_backbone_is_the_same_bit_for_bit(protocol, monkeypatch):
    import firstsight.checkpoint as checkpoint

    kept = []
    real = checkpoint.load_backbone

    def remembered(spec):
        loaded = real(spec)
        kept.append((loaded[0], {k: v.clone() for k, v in loaded[0].state_dict().items()}))
        return loaded

    monkeypatch.setattr(checkpoint, "load_backbone", remembered)
    more = {} if protocol == "cached" else {"batch_size": 16}
    result = linear(
        NETWORK_SPEC,
        **SOURCES,
        protocol=protocol,
        size=32,
        epochs=3,
        device="cpu",
        threads=1,
        **more,
    )
    ((backbone, before),) = kept
    assert all(tensor.equal(before[name]) for name, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert result["images"] == {"train": 64, "test": 30}
    assert {"protocol", "top1", "top5", "best_top1", "best_epoch"} <= result.keys()
    assert 1 <= result["best_epoch"] <= 3 and result["best_top1"] >= result["top1"]
    assert json.loads(json.dumps(result)) == result
    again = linear(
        NETWORK_SPEC,
        **SOURCES,
        protocol=protocol,
        size=32,
        epochs=3,
        device="cpu",
        threads=1,
        **more,
    )
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_a_backbone_that_changes_is_a_bug_said_aloud():
    module = torch.nn.BatchNorm2d(3)
    with untouched(module):
        module.eval()(torch.randn(2, 3, 4, 4))
    with pytest.raises(RuntimeError, match="running_mean"), untouched(module):
        module.train()(torch.randn(2, 3, 4, 4))


class Marked(Patches):
    """Patches whose brightness is far from what running statistics expect."""

    def pixels(self, index):
        return super().pixels(index) // 4 + 180


def test_published_batch_norm_makes_another_network_of_the_backbone():
    """PIC's code: a feature depends on its batch, and the tested network is not the one given."""
    backbone, reader, source = load_backbone(NETWORK_SPEC), Reader(size=32), Marked(12)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    ours = extract(backbone, source, reader).values
    net = Drifting(backbone)
    tested = net.tested(source, reader, torch.arange(12))
    torch.testing.assert_close(tested()[0], ours)
    chunk = np.stack([eval_view(source.pixels(i), 32) for i in range(12)])
    pictures = torch.from_numpy(chunk).permute(0, 3, 1, 2)
    whole, half = pooled(net, pictures, reader), pooled(net, pictures[:6], reader)
    assert (whole[:6] - half).norm() > 0.1 * half.norm()  # of the same images
    rest = [pooled(backbone, part, reader) for part in (pictures, pictures[:6])]
    torch.testing.assert_close(rest[0][:6], rest[1], atol=1e-5, rtol=1e-4)
    later, labels = tested()
    assert (later - ours).norm() > 0.1 * ours.norm() and labels.tolist() == list(range(12))
    torch.testing.assert_close(tested()[0], later)  # testing moves nothing
    assert all(tensor.equal(before[name]) for name, tensor in backbone.state_dict().items())
    weights = zip(net.network.parameters(), backbone.parameters(), strict=True)
    assert all(ours.equal(given) for ours, given in weights)


def test_the_switch_is_off_unless_asked_for():
    asked = {**SOURCES, "size": 32, "device": "cpu", "threads": 1, "epochs": 1, "batch_size": 32}
    results = [
        linear(NETWORK_SPEC, protocol="pic", **asked, batch_norm=how)
        for how in (None, "rest", "batch")
    ]
    assert [one["protocol"]["batch_norm"] for one in results] == ["rest", "rest", "batch"]
    assert results[0]["confusion"] == results[1]["confusion"] != results[2]["confusion"]
    with pytest.raises(UserError, match="--batch-norm batch needs crops"):
        linear(NETWORK_SPEC, **asked, batch_norm="batch")


def test_on_crops_it_learns_what_the_features_hold(tmp_path):
    """Images, labels and crops keep together: three colours are told apart without a mistake."""
    for name, colour in (("red", (200, 40, 40)), ("green", (40, 200, 40)), ("blue", (40, 40, 200))):
        (tmp_path / name).mkdir()
        for i in range(8):
            picture = Image.new("RGB", (36 + i, 40), tuple(c + 4 * i for c in colour))
            picture.save(tmp_path / name / f"{i}.png")
    same = {
        "train": str(tmp_path),
        "test": str(tmp_path),
        "size": 32,
        "device": "cpu",
        "threads": 1,
    }
    result = linear(NETWORK_SPEC, **same, protocol="moco", lr=[3.0], batch_size=12, epochs=15)
    assert result["top1"] == 100


def folders(root, classes):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), np.uint8)
            Image.fromarray(noise).save(root / name / f"{i}.png")
    return str(root)


def test_classes_that_differ_are_named_or_matched(tmp_path):
    train = folders(tmp_path / "train", ["cat", "dog", "frog"])
    test = folders(tmp_path / "test", ["cat", "frog"])
    odd = folders(tmp_path / "odd", ["cat", "newt"])
    bare = str(tmp_path / "train" / "cat")
    common = {"size": 32, "epochs": 2, "device": "cpu", "threads": 1}
    assert linear(NETWORK_SPEC, train=train, test=test, **common)["images"]["test"] == 8
    with pytest.raises(UserError, match=r"--test .*'newt' that --train"):
        linear(NETWORK_SPEC, train=train, test=odd, **common)
    with pytest.raises(UserError, match=r"--train .* has no labels"):
        linear(NETWORK_SPEC, train=bare, test=test, **common)
    with pytest.raises(UserError, match="use --batch-size 12"):
        linear(NETWORK_SPEC, train=train, test=test, protocol="moco", **common)


def test_one_class_alone_is_refused():
    lone = Patches(9)
    assert class_count(lone) == 3
    lone.labels = np.full(9, 2)
    with pytest.raises(UserError, match="patches has images of one class only"):
        class_count(lone)


def _rank(rank, folder):
    results = [
        linear(NETWORK_SPEC, **SOURCES, size=32, epochs=3, device="cpu", threads=1, **more)
        for more in ({}, {"protocol": "moco", "batch_size": 16})
    ]
    (folder / f"{rank}.json").write_text(json.dumps(results))
    distributed.stop()


def test_two_ranks_read_what_one_process_reads(tmp_path, on_ranks):
    alone = [
        linear(NETWORK_SPEC, **SOURCES, size=32, epochs=3, device="cpu", threads=1, **more)
        for more in ({}, {"protocol": "moco", "batch_size": 16})
    ]
    on_ranks(_rank, tmp_path)
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        for one, other in zip(alone, results, strict=True):
            assert other["images"] == one["images"] == {"train": 64, "test": 30}
            assert other["top1"] == pytest.approx(one["top1"], abs=4)  # one image is 3.3 points


def test_the_command_writes_what_it_prints(tmp_path, capsys):
    out = tmp_path / "linear.json"
    args = f"evaluate linear {NETWORK_SPEC} --train scenes:train@64 --test scenes:test@30 --size 32"
    args += " --threads 1"
    cli.main([*args.split(), "--epochs", "3", "--lr", "0.1", "0.01", "--json", str(out)])
    result = json.loads(out.read_text())
    assert f"{result['top1']:.2f}" in capsys.readouterr().out
    assert (result["sweep"][0]["lr"], result["sweep"][0]["weight_decay"]) == (0.1, 0.0)
    assert result["protocol"]["lr"] == [0.1, 0.01] and result["protocol"]["name"] == "cached"
    for key in ("size", "view", "epochs", "seed", "versions", "weight_decay", "representation"):
        assert key in result["protocol"]


def test_a_choice_that_rests_on_few_images_says_so(capsys):
    judged = [{"top1": top1, "loss": 1.0} for top1 in (30.0, 24.0, 10.0)]
    settings = [(0.01, 0.0), (0.1, 0.0), (1.0, 0.0)]
    said = _choice(settings, judged, 0, images=50)["chosen"]
    assert said["standard_error"] == 6.48  # sqrt(.3 * .7 / 50)
    assert "50 held-out images: 2 of 3 settings" in capsys.readouterr().err
    _choice(settings, judged, 0, images=5000)
    assert "held-out images" not in capsys.readouterr().err


def test_a_head_under_lars_makes_the_published_step():
    """Trust .001, nothing excluded, no decay: both tensors move by a thousandth of themselves."""
    x, y = clouds(20, classes=2)
    heads = Heads(1, x.shape[1], 2, seed=0, std=0.0)
    before = [p.detach().clone() for p in heads.heads[0].parameters()]
    how = Protocol(augment=False, lr=(2.0,), optimizer="lars", momentum=0.0, epochs=1)
    rows = iter([(x.float(), y)])
    list(trained(heads, how.settings, how, rows, 1, "one"))
    for old, new in zip(before, heads.heads[0].parameters(), strict=True):
        moved = (new.detach() - old).norm() / old.norm()
        assert moved.item() == pytest.approx(2.0 * 0.001, rel=1e-4)
