import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight import distributed, methods
from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.instdisc import Config, InstDisc, instance_nce, instance_softmax
from tests.methods.test_all import batch_of, one_rank
from tests.tiny import NETWORK, config


def method(images=30, **settings):
    torch.manual_seed(0)
    own = {"dim": 8, "hidden": 12, "negatives": 20} | settings
    return InstDisc(Config(**own), build(NETWORK, size=32), images=images).double()


def one_view(count, seed=0):
    batch = batch_of(count, 1, (32,), seed)
    return dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))


def unit_rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dots(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True))


def by_hand(embeddings, own, negatives, temperature):
    """Softmax over the own row and K negatives, plain numbers."""
    total = 0.0
    for v, f in zip(embeddings.tolist(), own.tolist(), strict=True):
        right = math.exp(dots(v, f) / temperature)
        wrong = sum(math.exp(dots(v, n) / temperature) for n in negatives.tolist())
        total -= math.log(right / (right + wrong))
    return total / len(embeddings)


def nce_by_hand(embeddings, own, negatives, temperature, z, images):
    """Equations 5 to 7 of Wu et al. with the code's epsilon."""
    total, noise = 0.0, len(negatives) / images
    for v, f in zip(embeddings.tolist(), own.tolist(), strict=True):
        p = math.exp(dots(v, f) / temperature) / z
        total -= math.log(p / (p + noise + 1e-7))
        for n in negatives.tolist():
            p = math.exp(dots(v, n) / temperature) / z
            total -= math.log(noise / (p + noise + 1e-7))
    return total / len(embeddings)


def test_both_losses_are_their_equations():
    v, f, negatives = unit_rows(5, 7), unit_rows(5, 7, seed=1), unit_rows(9, 7, seed=2)
    expected = by_hand(v, f, negatives, 0.07)
    assert instance_softmax(v, f, negatives, 0.07).item() == pytest.approx(expected, rel=1e-12)
    expected = nce_by_hand(v, f, negatives, 0.07, 31.5, 40)
    got = instance_nce(v, f, negatives, 0.07, torch.tensor(31.5), 40)
    assert got.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["softmax", "nce"])
def test_forward_is_the_equation_on_the_bank_as_it_was(loss):
    instdisc, batch = method(loss=loss), one_view(6)
    rows, drawn = instdisc.rows.clone(), instdisc.drawn.clone()
    with torch.no_grad():
        v = F.normalize(instdisc.projector(instdisc.backbone(batch.views[0])), dim=1)
    f, negatives = rows[batch.index], rows[drawn]
    if loss == "softmax":
        expected = by_hand(v, f, negatives, 0.07)
    else:  # Z is N times the mean over the first batch
        every = [math.exp(dots(a, b) / 0.07) for a in v.tolist() for b in negatives.tolist()]
        every += [math.exp(dots(a, b) / 0.07) for a, b in zip(v.tolist(), f.tolist(), strict=True)]
        z = 30 * sum(every) / len(every)
        expected = nce_by_hand(v, f, negatives, 0.07, z, 30)
    assert instdisc(batch).loss.item() == pytest.approx(expected, rel=1e-9)
    assert torch.equal(instdisc.rows, rows)
    instdisc.after_step(0.0, 0.1)
    torch.testing.assert_close(instdisc.rows[:6], F.normalize(0.5 * f + 0.5 * v, dim=1))
    assert torch.equal(instdisc.rows[6:], rows[6:])  # nobody saw these
    if loss == "nce":  # fixed from the first batch on
        instdisc(one_view(6, seed=1))
        assert instdisc.normaliser.item() == pytest.approx(z, rel=1e-9)


@pytest.mark.parametrize("loss", ["softmax", "nce"])
def test_as_published_each_image_has_negatives_of_its_own(loss):
    instdisc, batch = method(loss=loss, draws="image"), one_view(3)
    rows, drawn = instdisc.rows, torch.tensor([[0, 5, 5, 9], [1, 2, 3, 4], [29, 28, 27, 1]])
    with torch.no_grad():
        v = F.normalize(instdisc.projector(instdisc.backbone(batch.views[0])), dim=1)
    every = [(v[i : i + 1], rows[i : i + 1], rows[drawn[i]]) for i in range(3)]
    if loss == "softmax":
        expected = sum(by_hand(*one, 0.07) for one in every) / 3
        got = instance_softmax(v, rows[:3], rows[drawn], 0.07)
    else:
        expected = sum(nce_by_hand(*one, 0.07, 31.5, 30) for one in every) / 3
        got = instance_nce(v, rows[:3], rows[drawn], 0.07, torch.tensor(31.5), 30)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    torch.manual_seed(3)
    loss_of_three = instdisc(batch).loss.item()
    torch.manual_seed(3)
    drawn = torch.randint(30, (3, 20))
    assert len(drawn.unique(dim=0)) == 3
    if loss == "softmax":
        expected = instance_softmax(v, rows[:3], rows[drawn], 0.07).item()
        assert loss_of_three == pytest.approx(expected, rel=1e-12)


def test_the_bank_keeps_the_stated_share():
    instdisc, batch = method(momentum=0.8), one_view(4)
    before = instdisc.rows[:4].clone()
    with torch.no_grad():
        v = F.normalize(instdisc.projector(instdisc.backbone(batch.views[0])), dim=1)
    instdisc(batch)
    instdisc.after_step(0.0, 0.1)
    torch.testing.assert_close(instdisc.rows[:4], F.normalize(0.8 * before + 0.2 * v, dim=1))


def test_negatives_are_drawn_anew_from_all_images_with_replacement():
    instdisc = method(negatives=3000)
    first = instdisc.drawn.clone()
    counts = torch.bincount(first, minlength=30)
    assert len(counts) == 30 and ((counts - 100.0) ** 2 / 100).sum() < 59  # chi square, p .001
    instdisc.after_step(0.0, 0.1)
    assert (instdisc.drawn != first).float().mean() > 0.9


def test_the_bank_begins_with_unit_rows_and_as_published_with_unit_columns():
    torch.testing.assert_close(method().rows.norm(dim=1), torch.ones(30).double())
    published = method(bank="published").rows
    torch.testing.assert_close(published.norm(dim=0), torch.ones(8).double())


def test_a_published_bank_hears_of_its_own_images_alone(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda rows: torch.cat([rows, rows.flip(0)]))
    instdisc = method(bank="published")
    before = instdisc.rows.clone()
    instdisc(one_view(3))
    instdisc.after_step(0.0, 0.1)
    changed = (instdisc.rows != before).any(dim=1)
    assert changed.nonzero().flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(instdisc.rows[:3].norm(dim=1), torch.ones(3).double())


def test_two_ranks_keep_one_bank(tmp_path, on_ranks):
    """All rows of both ranks' images move, on both ranks alike."""
    on_ranks(one_rank, 2, "instdisc", str(tmp_path), {})
    (_, _, one), (_, _, other) = (torch.load(tmp_path / f"rank-{r}.pt") for r in range(2))
    assert torch.equal(one["rows"], other["rows"]) and torch.equal(one["drawn"], other["drawn"])
    built = methods.build("instdisc", config("instdisc", tmp_path), images=48).double()
    moved = (one["rows"] != built.rows).any(dim=1)
    assert moved.nonzero().flatten().tolist() == list(range(8))  # four images of each


@pytest.mark.parametrize("counts", [2, 3])
def test_more_than_one_view_is_refused(counts):
    with pytest.raises(UserError, match=f"one view of each image, not {counts}; use --views.co"):
        method()(batch_of(4, counts, (32,) * counts))


def test_the_published_settings():
    _, defaults, own = methods.describe("instdisc")
    assert (own.temperature, own.momentum, own.negatives) == (0.07, 0.5, 65_536)
    assert (own.projector, own.hidden, own.dim, own.loss) == ("mlp", 2048, 128, "softmax")
    assert defaults.batch_norm == "local" and defaults.warmup_epochs == 5
    assert isinstance(method(projector="linear").projector, torch.nn.Linear)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"negatives": 0}, {"momentum": 1.5}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must"):
        Config(**wrong)
