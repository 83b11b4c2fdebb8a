"""Linear probes beside a run: what they learn, and that the run does not notice."""

import json

import numpy as np
import pytest
import torch

from firstsight import engine, loader, run
from firstsight.backbones import build
from firstsight.engine import update
from firstsight.errors import UserError
from firstsight.evaluate import linear
from firstsight.evaluate.linear import Protocol
from firstsight.features import Reader
from firstsight.log import read_log
from firstsight.order import Epochs
from firstsight.probe import KnnProbe, Online
from tests.test_linear import by_hand
from tests.tiny import NETWORK, Patches, config


def probe_of(train, test=None):
    common = {"reader": Reader(size=32, batch_size=16), "k": 3, "temperature": 0.07}
    return KnnProbe(train=train, test=test or Patches(30), images=12, seed=0, **common)


def online_of(tmp_path, source, probe, width=6, **values):
    settings = config("simclr", tmp_path, probe="both", **values)
    return Online(probe, settings, source, width, torch.device("cpu"))


def heads_of(online):
    return online.state_dict()["heads"]


def fed(online, x, y, steps):
    for step in range(steps):
        online.learn(step, steps, build(NETWORK, size=32), x[step], y[step])


def test_a_probe_is_a_plain_loop_of_gradient_descent(tmp_path):
    """On the features it is given, each with its own learning rate, several as each alone."""
    source, steps = Patches(), 10
    x = torch.randn(steps, 8, 6, generator=torch.Generator().manual_seed(0))
    y = torch.randint(3, (steps, 8), generator=torch.Generator().manual_seed(1))
    online = online_of(tmp_path, source, probe_of(source), probe_lrs=(0.5, 0.05))
    start = {name: tensor.clone() for name, tensor in heads_of(online).items()}
    fed(online, x, y, steps)
    for number, lr in enumerate((0.5, 0.05)):
        names = [f"heads.{number}.{part}" for part in ("weight", "bias")]
        how = Protocol(lr=(lr,), epochs=1, batch_size=8)
        rows = x.flatten(0, 1).double(), y.flatten()
        expected = by_hand(*rows, 8, *(start[n] for n in names), how, lr, 0.0)
        alone = online_of(tmp_path, source, probe_of(source), probe_lrs=(lr,))
        fed(alone, x, y, steps)
        for name, value, part in zip(names, expected, ("weight", "bias"), strict=True):
            got = heads_of(online)[name]
            np.testing.assert_allclose(got, value, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(got, heads_of(alone)[f"heads.0.{part}"])


def test_no_gradient_leaves_a_probe(tmp_path):
    source = Patches()
    features = torch.randn(8, 6, requires_grad=True)
    online = online_of(tmp_path, source, probe_of(source))
    before = {name: tensor.clone() for name, tensor in heads_of(online).items()}
    online.learn(0, 9, build(NETWORK, size=32), features, torch.arange(8) % 3)
    assert features.grad is None
    assert not heads_of(online)["heads.2.weight"].equal(before["heads.2.weight"])


def test_a_labelled_source_of_its_own_leaves_no_trace_in_the_backbone(tmp_path):
    backbone = build(NETWORK, size=32).train()
    online = online_of(
        tmp_path, Patches(), probe_of(Patches(20)), backbone.width, probe_every=3, batch_size=8
    )
    online.begin(0, 12)
    state = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    changed = []
    for step in range(12):
        weights = heads_of(online)["heads.0.weight"].clone()
        online.learn(step, 12, backbone, torch.zeros(8, backbone.width), None)
        changed.append(not weights.equal(heads_of(online)["heads.0.weight"]))
    assert [step for step, moved in enumerate(changed) if moved] == [2, 5, 8, 11]
    assert all(tensor.equal(state[name]) for name, tensor in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())
    assert all(module.training for module in backbone.modules())


def test_labelled_batches_are_a_function_of_their_number_and_shared_out():
    bad = Patches(20, unreadable=(3, 4, 7))
    common = {"source": bad, "size": 32, "order": Epochs(20, 8, 0), "seed": 0}
    whole = loader.Labelled(**common, rank=0, world=1)
    parts = [loader.Labelled(**common, rank=rank, world=2)[3] for rank in range(2)]
    for number, (pixels, labels) in enumerate(loader.labelled(whole, 2, 4, workers=1), start=2):
        again = whole[number]
        assert torch.equal(pixels, again[0]) and torch.equal(labels, again[1])
    for one, other in zip(whole[3], zip(*parts, strict=True), strict=True):
        assert torch.equal(one, torch.cat(other))
    for index, label in zip(common["order"].indices(3), whole[3][1].tolist(), strict=True):
        assert label == bad.labels[loader.readable(bad, int(index), 0, [])[0]]
    hopeless = loader.Labelled(
        **common | {"source": Patches(20, tuple(range(20)))}, rank=0, world=1
    )
    with pytest.raises(UserError, match="cannot be decoded"):
        next(loader.labelled(hopeless, 0, 1, workers=1))


def trained(folder, own, **values):
    """A run of 12 steps; its probes learn from its own batches or from a source of their own."""
    source = Patches()
    settings = config("simclr", folder, probe_every=2, probe_readings=3, **values)
    folder.mkdir()
    probe = probe_of(source if own else Patches(24))
    engine.pretrain("simclr", settings, source, probe, folder)
    return torch.load(folder / "checkpoints" / "last")


@pytest.fixture(scope="module", params=[True, False], ids=["own labels", "labels aside"])
def whole(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return request.param, folder, trained(folder, request.param, probe="both")


def test_the_run_does_not_notice_its_probes(whole, tmp_path):
    """Weights, batch-norm statistics, optimiser and losses, bit for bit."""
    own, folder, probed = whole
    plain = trained(tmp_path / "plain", own, probe="none")
    assert probed["method"].keys() == plain["method"].keys()
    assert all(tensor.equal(plain["method"][key]) for key, tensor in probed["method"].items())
    for key, slots in probed["optimizer"]["state"].items():
        for slot, value in slots.items():
            other = torch.as_tensor(plain["optimizer"]["state"][key][slot])
            assert torch.equal(torch.as_tensor(value), other), (key, slot)
    probed_log, plain_log = (read_log(path / "log.jsonl") for path in (folder, tmp_path / "plain"))
    losses = [[r["loss"] for r in log if "loss" in r] for log in (probed_log, plain_log)]
    assert losses[0] == losses[1]
    assert [r["step"] for r in probed_log if "linear_quick_0.1" in r] == [3, 6, 9]
    assert [r["step"] for r in probed_log if "linear_0.1" in r] == [12]
    assert not any(name.startswith(("knn", "linear")) for r in plain_log for name in r)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("at", [5, 8])
def test_probes_go_on_where_they_stopped_bit_for_bit(whole, at, tmp_path, monkeypatch):
    own, folder, expected = whole
    calls, real = iter(range(100)), update.on_device

    def failing(*arguments):
        if next(calls) == at:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(update, "on_device", failing)
    with pytest.raises(Interrupted):
        trained(tmp_path / "cut", own, probe="both")
    monkeypatch.setattr(update, "on_device", real)
    source = Patches()
    settings = config("simclr", tmp_path / "cut", probe_every=2, probe_readings=3, probe="both")
    probe = probe_of(source if own else Patches(24))
    engine.pretrain("simclr", settings, source, probe, tmp_path / "cut")
    resumed = torch.load(tmp_path / "cut" / "checkpoints" / "last")
    for name, tensor in expected["probes"]["heads"].items():
        assert tensor.equal(resumed["probes"]["heads"][name]), name
    for key, slots in expected["probes"]["optimizer"]["state"].items():
        velocity = resumed["probes"]["optimizer"]["state"][key]["momentum_buffer"]
        assert slots["momentum_buffer"].equal(velocity)
    figures = [
        [{k: v for k, v in r.items() if "linear" in k} for r in read_log(path / "log.jsonl")]
        for path in (folder, tmp_path / "cut")
    ]
    assert figures[0] == figures[1] and any(figures[0])


VALUES = {"data": "scenes:train@48", "probe_test": "scenes:test@30", "probe_k": 5}


def test_the_linear_reading_of_a_run_is_that_of_the_command(tmp_path):
    out = run.pretrain("simclr", config("simclr", tmp_path, **VALUES, probe="both"))
    summary = json.loads((out / "summary.json").read_text())
    sources = {"train": "scenes:train@48", "test": "scenes:test@30"}
    result = linear(str(out), **sources, device="cpu", threads=1)
    for key in ("top1", "top5", "best_top1", "best_epoch"):
        assert summary["linear"][key] == pytest.approx(result[key])
    said = summary["linear"]["protocol"]
    assert said["chosen"] == result["chosen"]
    for key in ("lr", "weight_decay", "epochs", "batch_size", "representation", "seed", "view"):
        assert said[key] == result["protocol"][key]
    last = read_log(out / "log.jsonl")[-1]
    assert summary["linear_online"]["learning rate 0.1"] == last["linear_0.1"]
    assert "batches of the run" in summary["linear_online"]["protocol"]["learnt_from"]
    page = (out / "report.html").read_text()
    assert "Linear probes, by learning rate" in page and "Linear classifier on frozen" in page


def test_what_is_not_asked_for_is_not_read(tmp_path):
    out = run.pretrain("simclr", config("simclr", tmp_path, **VALUES, probe="none", linear=False))
    summary = json.loads((out / "summary.json").read_text())
    assert not {"knn", "linear", "linear_online"} & summary.keys()
    assert not any("knn" in r for r in read_log(out / "log.jsonl"))


def test_a_run_whose_features_cannot_be_classified_still_ends(tmp_path, monkeypatch, capsys):
    def refusing(*arguments):
        raise UserError("some features are not numbers")

    monkeypatch.setattr(run, "cached", refusing)
    out = run.pretrain("simclr", config("simclr", tmp_path, **VALUES, probe="knn"))
    summary = json.loads((out / "summary.json").read_text())
    assert "knn" in summary and "linear" not in summary
    assert "no linear classifier: some features are not numbers" in capsys.readouterr().err


def test_probes_without_labels_are_refused_before_anything_is_written(tmp_path):
    nowhere = tmp_path / "run"
    with pytest.raises(UserError, match=r"--probe linear needs labelled .* --probe-test"):
        run.pretrain("simclr", config("simclr", nowhere, data="scenes:train@48", probe="linear"))
    assert not nowhere.exists()
    for lrs in ((), (0.1, -1.0), (float("nan"),)):
        with pytest.raises(UserError, match="--probe-lrs takes numbers above 0"):
            config("simclr", nowhere, probe_lrs=lrs)
