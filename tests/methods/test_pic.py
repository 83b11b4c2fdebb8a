import dataclasses
import math

import pytest
import torch

from firstsight import engine, methods
from firstsight.backbones import build
from firstsight.engine import update
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.methods import pic as module
from firstsight.methods.pic import PIC, Config, cosines, pic_loss, prototype_gradient
from firstsight.nets import uncast
from firstsight.settings import preset_views
from tests.methods.test_all import batch_of, gradients, one_rank
from tests.tiny import NETWORK, Patches, config

Z = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.float64)
V = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([0, 2])


def method(images=30, **settings):
    torch.manual_seed(0)
    own = {"dim": 8, "hidden": 12} | settings
    return PIC(Config(**own), build(NETWORK, size=32), images=images).double()


def batch(count, sides=(32,), seed=0, index=None):
    made = batch_of(count, len(sides), sides, seed)
    index = torch.arange(count) if index is None else torch.tensor(index)
    return dataclasses.replace(made, views=tuple(v.double() for v in made.views), index=index)


def by_hand(embeddings, prototypes, index, temperature):
    """Plain numbers: minus the log of the own prototype's share, mean over images."""
    total = 0.0
    for z, y in zip(embeddings.tolist(), index, strict=True):
        shares = []
        for v in prototypes.tolist():
            dot = sum(a * b for a, b in zip(z, v, strict=True))
            shares.append(math.exp(dot / math.hypot(*z) / math.hypot(*v) / temperature))
        total -= math.log(shares[y] / sum(shares))
    return total / len(index)


def test_loss_logits_and_gradients_are_the_published_vector():
    z, v = Z.clone().requires_grad_(), V.clone().requires_grad_()
    expected = torch.tensor([[2.236068, 4.472136, 1.581139], [0, -5, -3.535534]])
    torch.testing.assert_close(cosines(Z, V).float() / 0.2, expected, atol=1e-6, rtol=0)
    loss = pic_loss(z, v, Y, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(2.978670, abs=1e-6)
    dz = torch.tensor([[-1.242234, 0.621117], [4.131437, 0]])
    dv = torch.tensor([[0, -4.443875], [0.961833, 0], [0.915658, 0.915658]])
    torch.testing.assert_close(z.grad.float(), dz, atol=1e-6, rtol=0)
    torch.testing.assert_close(v.grad.float(), dv, atol=1e-6, rtol=0)
    closed = prototype_gradient(Z, V, cosines(Z, V) / 0.2, Y, 0.2) / 2
    torch.testing.assert_close(closed, v.grad, atol=1e-12, rtol=0)


def test_loss_is_the_equation():
    torch.manual_seed(0)
    z, v = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    index = [3, 8, 0, 0, 5, 1]
    expected = by_hand(z, v, index, 0.1)
    assert pic_loss(z, v, torch.tensor(index), 0.1).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("classes", [2, 10, 300])
def test_no_loss_is_below_that_of_a_simplex(classes):
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    index = torch.arange(classes)
    for temperature in (0.07, 0.2):
        floor = math.log1p((classes - 1) * math.exp(-classes / (classes - 1) / temperature))
        assert pic_loss(simplex, simplex, index, temperature).item() == pytest.approx(floor)


@pytest.mark.parametrize(
    ("classes", "first", "floors"),
    [(1_281_167, 14.063, (0.588, 4.080, 9.063)), (65_536, 11.090, (0.040, 1.380, 6.093)),
     (50_000, 10.820, (0.031, 1.185, 5.823)), (1000, 6.908, (0.001, 0.044, 2.041))],
)  # fmt: skip
def test_the_published_table_of_first_and_lowest_losses(classes, first, floors):
    """One image of a simplex has cosine 1 with its own prototype and -1 / (C - 1) with others."""
    dim, index = 3, torch.zeros(1, dtype=torch.long)
    z = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64)
    across = torch.zeros(classes, dim, dtype=torch.float64)
    across[:, 1] = 1.0
    assert pic_loss(z, across, index, 0.2).item() == pytest.approx(first, abs=5e-4)
    share = -1 / (classes - 1)
    simplex = torch.tensor([[share, math.sqrt(1 - share**2), 0.0]]).double().repeat(classes, 1)
    simplex[0] = z[0]
    for temperature, floor in zip((0.07, 0.1, 0.2), floors, strict=True):
        lowest = pic_loss(z, simplex, index, temperature).item()
        assert lowest == pytest.approx(floor, abs=5e-4)


def test_the_first_loss_is_the_log_of_the_number_of_images():
    """Of random directions, and half the variance of the logits, 1 / (2 D temperature^2), more."""
    rows = method(images=2000, dim=128).prototypes.weight
    assert torch.std(rows).item() == pytest.approx(0.01, rel=0.02)
    z, index = torch.randn(1000, 128, dtype=torch.float64), torch.arange(1000)
    for temperature in (0.2, 0.5):
        expected = math.log(2000) + 1 / (2 * 128 * temperature**2)
        assert pic_loss(z, rows, index, temperature).item() == pytest.approx(expected, abs=0.05)


def test_the_loss_is_computed_in_full_under_autocast():
    low = [z.bfloat16() for z in (Z, V)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = pic_loss(*low, Y, 0.2)
    with uncast(Z):
        exact = pic_loss(*(z.double() for z in low), Y, 0.2)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=1e-5)


def stepped(pic, made, lr=0.1):
    """The loss and what a step makes of the prototypes."""
    loss = pic(made).loss
    loss.backward()
    pic.after_step(0.0, lr)
    return loss.item(), pic.prototypes.weight.clone()


def expected_step(pic, made, lr=0.1):
    """Loss, and prototypes by autograd and plain SGD: all classes; small crops hold them fixed."""
    v = pic.prototypes.weight.clone().requires_grad_()
    index, losses = made.index, []
    with torch.no_grad():
        rows = [pic.projector(pic.backbone(view)) for view in made.views]
    for z, view in zip(rows, made.views, strict=True):
        held = v if view.shape[-1] == made.views[0].shape[-1] else v.detach()
        losses.append(pic_loss(z, held, index, 0.2))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = v.grad + 1e-4 * v.detach()
    return loss.item(), v.detach() - lr * gradient


@pytest.mark.parametrize("sides", [(32,), (32, 32), (32, 16, 16, 16)])
def test_prototypes_learn_from_large_crops_alone_and_every_crop_weighs_the_same(sides):
    made = batch(5, sides, index=[3, 11, 29, 0, 7])
    loss, prototypes = expected_step(method(), made)
    got, moved = stepped(method(), made)
    assert got == pytest.approx(loss, rel=1e-10)
    torch.testing.assert_close(moved, prototypes, rtol=0, atol=1e-12)


def test_momentum_decay_and_rate_are_those_asked_for():
    asked = {"prototype_momentum": 0.5, "prototype_decay": 0.1, "prototype_rate": 3.0}
    pic, velocity = method(**asked), 0.0
    for seed in range(2):
        pic(batch(4, seed=seed)).loss.backward()
        ((_, gradient),) = pic._parts
        velocity = 0.5 * velocity + gradient / 4 + 0.1 * pic.prototypes.weight
        expected = pic.prototypes.weight - 0.3 * velocity
        pic.after_step(0.0, 0.1)
    torch.testing.assert_close(pic.prototypes.velocity, velocity, rtol=1e-12, atol=0)
    torch.testing.assert_close(pic.prototypes.weight, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("negatives", [30, 999])
def test_as_many_negatives_as_images_are_the_full_softmax(negatives):
    made = batch(5)
    loss, prototypes = stepped(method(), made)
    got, moved = stepped(method(negatives=negatives), made)
    assert got == loss and torch.equal(moved, prototypes)


def test_a_queue_that_holds_all_images_is_the_full_softmax():
    """The sampled road itself, with every class in it, over several steps."""
    whole, sampled = method(), method(negatives=29, rate_tolerance=0.0)
    sampled.recent.index.copy_(torch.arange(29))
    for step in range(4):
        made = batch(5, seed=step, index=[29, 0, 1, 2, 3])  # the last one is never crowded out
        one, other = stepped(whole, made), stepped(sampled, made)
        sampled.recent.index.copy_(torch.arange(29))
        assert other[0] == pytest.approx(one[0], rel=1e-12)
        torch.testing.assert_close(other[1], one[1], rtol=0, atol=1e-14)


def test_negatives_are_the_images_seen_last():
    pic = method(negatives=6)
    for seed, index in enumerate([[0, 1, 2, 3], [10, 11, 12, 13], [20, 21, 22, 23]]):
        members, own = pic.classes(torch.tensor(index))
        assert members[own].tolist() == index
        stepped(pic, batch(4, seed=seed, index=index))
    members, own = pic.classes(torch.tensor([21, 5, 7]))  # one of them is among the last
    assert members.tolist() == [5, 7, 12, 13, 20, 21, 22, 23] and own.tolist() == [5, 0, 1]
    prototypes = pic.prototypes.weight[members]
    made = batch(3, index=[21, 5, 7])
    with torch.no_grad():
        z = pic.projector(pic.backbone(made.views[0]))
    pic.prototypes.catch_up(members)
    expected = by_hand(z, pic.prototypes.weight[members], [5, 0, 1], 0.2)
    assert pic(made).loss.item() == pytest.approx(expected, rel=1e-10)
    assert not torch.equal(prototypes, pic.prototypes.weight[members])  # some had to catch up


def test_classes_that_take_no_part_move_as_if_all_rows_had():
    """The correction, through the method: dense SGD with zero gradients for the others."""
    pic = method(negatives=4, rate_tolerance=0.0, prototype_decay=0.01)
    w, u = pic.prototypes.weight.clone(), torch.zeros(30, 8, dtype=torch.float64)
    for step in range(12):
        index = [(7 * step + k) % 30 for k in range(3)]
        made, lr = batch(3, seed=step, index=index), 0.1 if step < 6 else 0.02
        pic(made).loss.backward()
        ((members, gradient),) = pic._parts
        torch.testing.assert_close(pic.prototypes.weight[members], w[members], rtol=0, atol=1e-12)
        dense = torch.zeros_like(w)
        dense[members] = gradient / 3
        pic.after_step(0.0, lr)
        u = 0.9 * u + dense + 0.01 * w
        w = w - lr * u
    pic.prototypes.catch_up(torch.arange(30))
    torch.testing.assert_close(pic.prototypes.weight, w, rtol=0, atol=1e-12)


def test_chunks_of_a_sampled_batch_reach_the_prototypes_of_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "on_device", lambda batch, *_: batch)
    pic = method(negatives=6)
    settings = config("pic", tmp_path, accumulate=2)
    made = batch(8, index=[20, 21, 22, 23, 24, 25, 26, 27])
    update.gradients(pic, made, update.scaler(settings), settings)
    parts = [members for members, _ in pic._parts]
    assert len(parts) == 2 and pic._crops == 8
    pic.after_step(0.0, 0.1)
    everyone = torch.cat(parts).unique()
    assert (pic.prototypes.velocity.any(dim=1)).nonzero().flatten().tolist() == everyone.tolist()
    assert set(range(22, 28)) == set(pic.recent.index.tolist())


def test_two_ranks_draw_their_negatives_from_both(tmp_path, on_ranks):
    """Sampled: same classes, same prototypes on both ranks, those of one process on all images."""
    on_ranks(one_rank, 2, "pic", str(tmp_path), {"method": {"negatives": 10}})
    asked = {"method": {"negatives": 10, "splits": 2}}
    loss, grads, buffers = gradients("pic", str(tmp_path), asked)
    for rank in range(2):
        got_loss, got_grads, got = torch.load(tmp_path / f"rank-{rank}.pt")
        assert got_loss == pytest.approx(loss, rel=1e-10)
        for key in grads:
            torch.testing.assert_close(got_grads[key], grads[key], atol=1e-9, rtol=1e-7, msg=key)
        for key in buffers:
            torch.testing.assert_close(got[key], buffers[key], atol=1e-10, rtol=1e-8, msg=key)


def test_a_sampled_run_in_small_windows_resumes_bit_for_bit(tmp_path, monkeypatch):
    asked = {"order": "sliding", "window_size": 16, "window_stride": 4, "epochs": 2.0}
    asked |= {"method": {"negatives": 12}}
    source, real, calls = Patches(48), update.on_device, iter(range(100))

    def ended(folder):
        folder.mkdir(exist_ok=True)
        engine.pretrain("pic", config("pic", folder, **asked), source, None, folder)
        return torch.load(folder / "checkpoints" / "last")["method"]

    def failing(*arguments):
        assert next(calls) != 7, "interrupted"
        return real(*arguments)

    whole = ended(tmp_path / "whole")
    monkeypatch.setattr(update, "on_device", failing)
    with pytest.raises(AssertionError, match="interrupted"):
        ended(tmp_path / "broken")
    monkeypatch.setattr(update, "on_device", real)
    broken = ended(tmp_path / "broken")
    assert all(torch.equal(tensor, broken[key]) for key, tensor in whole.items())
    records = read_log(tmp_path / "whole" / "log.jsonl")
    lengths = {f"{of}_norm{kind}" for of in ("embedding", "prototype") for kind in ("", "_median")}
    assert lengths | {"prototype_gradient_norm", "gradient_norm"} < set(records[-1])
    assert records[-1]["prototype_steps_left_out"] == 0
    assert len(records) == 12 and records[-1]["epoch"] == 2


@pytest.mark.parametrize(("first", "last", "allowed"), [(4, 5, 1), (4, 5, 2), (4, 4, 0)])
def test_steps_that_are_not_finite_are_left_out(first, last, allowed, tmp_path, monkeypatch):
    """Steps 4 (and 5) of 12 have numbers that are none: as many as allowed change nothing."""
    real, steps, weights = module.cosines, iter(range(1, 100)), {}

    def faulty(*arguments):
        logits = real(*arguments)
        return logits * math.nan if first <= next(steps) <= last else logits

    def watched(self, progress, lr):
        after_step(self, progress, lr)
        weights[len(weights) + 1] = self.projector[0].weight.detach().clone()

    after_step = PIC.after_step
    monkeypatch.setattr(module, "cosines", faulty)
    monkeypatch.setattr(PIC, "after_step", watched)
    settings = config("pic", tmp_path, method={"negatives": 12}, skip_nonfinite=allowed)
    if last - first + 1 > allowed:
        with pytest.raises(UserError, match=r"the loss is nan|2 steps in a row, step 5 the last"):
            engine.pretrain("pic", settings, Patches(48), None, tmp_path)
        return
    engine.pretrain("pic", settings, Patches(48), None, tmp_path)
    saved = torch.load(tmp_path / "checkpoints" / "last")
    assert saved["skipped"] == 2 and saved["method"]["prototypes.broken"] == 2
    assert read_log(tmp_path / "log.jsonl")[-1]["skipped_steps"] == 2
    assert torch.equal(weights[3], weights[5]) and not torch.equal(weights[5], weights[6])
    assert all(tensor.isfinite().all() for tensor in saved["method"].values())


def test_every_image_is_told_from_all_after_some_steps():
    """An optimisation smoke: 16 images by heart."""
    pic, made = method(images=16, dim=32).train(), batch(16)
    sgd = torch.optim.SGD(pic.parameters(), lr=0.5, momentum=0.9)
    for _ in range(60):
        output = pic(made)
        sgd.zero_grad()
        output.loss.backward()
        sgd.step()
        pic.after_step(0.0, 0.5)
    assert output.scalars["instance_accuracy"] > 90


def test_prototypes_have_a_least_and_a_greatest_length_or_one():
    """Of so short ones as at the start those that are moved fly off; the others are stretched."""
    for bounds in ((0.3, 5.0), (0.3, 0.3)):
        pic = method(shortest=bounds[0], longest=bounds[1])
        stepped(pic, batch(4))
        norms = pic.prototypes.weight.norm(dim=1)
        assert (norms.min().item(), norms.max().item()) == pytest.approx(bounds)


def test_the_gradient_of_prototypes_is_told_and_cut():
    moves, told = [], 0.0
    for share in (0.0, 0.25):
        pic = method(prototype_decay=0.0, prototype_clip=share * told)
        before = pic.prototypes.weight.clone()
        assert pic(batch(5)).scalars["prototype_gradient_norm"] == 0  # that of the step before
        pic.after_step(0.0, 0.1)
        moves.append(pic.prototypes.weight - before)
        told = pic(batch(5)).scalars["prototype_gradient_norm"].item()
    assert moves[0].norm().item() == pytest.approx(0.1 * told, rel=1e-12)
    torch.testing.assert_close(moves[1], moves[0] / 4, rtol=1e-9, atol=1e-15)


def test_the_published_settings():
    _, defaults, own = methods.describe("pic")
    assert (own.temperature, own.dim, own.hidden, own.projector) == (0.2, 128, 2048, "mlp")
    assert (own.prototype_momentum, own.prototype_decay, own.negatives) == (0.9, 1e-4, 0)
    assert defaults.order == "sliding" and defaults.batch_norm == "local"
    views = preset_views("pic-multicrop", 160)
    assert views.sides(224) == (160, 96, 96, 96)
    assert views.scales == ((0.14, 1.0),) + ((0.08, 0.14),) * 3
    assert isinstance(method(projector="linear").projector, torch.nn.Linear)


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 0}, {"negatives": -1}, {"shortest": -1.0}, {"prototype_momentum": 1.5},
     {"prototype_decay": math.nan}],
)  # fmt: skip
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name.replace('_', '-')} must"):
        Config(**wrong)
    with pytest.raises(UserError, match=r"--method\.longest must be 2.0 or more, not 1.0"):
        Config(shortest=2.0, longest=1.0)
