import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight import engine, methods, metrics
from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.byol import BYOL, Config, byol_loss
from tests.methods.test_mocov2 import batch_of, wave
from tests.tiny import NETWORK, Patches, config


def method(**settings):
    torch.manual_seed(0)
    return BYOL(Config(dim=16, hidden=24, **settings), build(NETWORK, size=32), images=99)


def distance(x, y):
    """Equation 2 for one image, in plain numbers."""
    x, y = x.tolist(), y.tolist()
    long, other = math.hypot(*x), math.hypot(*y)
    return sum((a / long - b / other) ** 2 for a, b in zip(x, y, strict=True))


def by_hand(p1, p2, z1, z2):
    rows = range(len(p1))
    return sum(distance(p1[i], z2[i]) + distance(p2[i], z1[i]) for i in rows) / len(p1)


def test_loss_equals_the_published_vector():
    loss = byol_loss(*(wave((4, 8), phase) for phase in (0.1, 0.5, 0.2, 0.9)))
    assert loss.item() == pytest.approx(0.630304, abs=1e-6)


def test_loss_of_the_example_by_hand():
    """One term is 0.08; both directions are summed, not averaged."""
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert byol_loss(a, b, a, b).item() == pytest.approx(0.16)
    assert byol_loss(a, a, -a, -a).item() == pytest.approx(8)
    assert byol_loss(a, b, b, a).item() == pytest.approx(0)
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert byol_loss(east, east, north, north).item() == pytest.approx(4)


def test_loss_is_the_squared_distance_of_unit_vectors():
    torch.manual_seed(0)
    rows = [torch.randn(5, 7, dtype=torch.float64) * scale for scale in (1, 3, 0.2, 9)]
    assert byol_loss(*rows).item() == pytest.approx(by_hand(*rows), abs=1e-12)


def test_no_gradient_flows_into_what_is_predicted():
    p1, p2, z1, z2 = (wave((4, 8), 0.1 * i).requires_grad_() for i in range(4))
    byol_loss(p1, p2, z1, z2).backward()
    assert p1.grad.abs().sum() > 0 and p2.grad.abs().sum() > 0
    assert z1.grad is None and z2.grad is None


def test_the_loss_of_rounded_embeddings_is_computed_in_full():
    rounded = [rows.bfloat16() for rows in (wave((4, 8), phase) for phase in (0.1, 0.5, 0.2, 0.9))]
    with torch.autocast("cpu", torch.bfloat16):
        low = byol_loss(*rounded)
    exact = byol_loss(*(rows.double() for rows in rounded))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("together", [False, True])
def test_forward_crosses_the_views_and_keeps_or_shares_their_statistics(together):
    byol = method(views_together=together, start="independent").double()
    batch = batch_of(6)
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))

    def encoded(network):
        if together:
            return network(torch.cat(batch.views)).split(6)
        return [network(view) for view in batch.views]

    with torch.no_grad():
        p1, p2 = encoded(lambda v: byol.predictor(byol.projector(byol.backbone(v))))
        z1, z2 = encoded(byol.momentum_encoder)
    output = byol(batch)
    assert output.loss.item() == pytest.approx(by_hand(p1, p2, z1, z2), abs=1e-10)
    assert output.features.shape == (6, byol.backbone.width)
    expected = metrics.spread(torch.cat([z1, z2]))
    assert output.scalars["embedding_spread"].item() == pytest.approx(expected.item())


def test_heads_are_those_of_the_paper():
    byol = BYOL(Config(), build(NETWORK, size=32), images=99)
    for head, width in ((byol.projector, byol.backbone.width), (byol.predictor, 256)):
        first, norm, _, last = head
        assert first.weight.shape == (4096, width) and first.bias is not None
        assert isinstance(norm, torch.nn.BatchNorm1d) and norm.num_features == 4096
        assert last.weight.shape == (256, 4096) and last.bias is None


@pytest.mark.parametrize(
    ("step", "momentum"), [(0, 0.97), (1, 0.970734), (5, 0.985), (9, 0.999266)]
)
def test_momentum_rises_along_half_a_cosine(step, momentum):
    byol = method(momentum=0.97, start="independent")
    before = [p.clone() for p in byol.momentum_encoder.parameters()]
    byol.after_step(step / 10, 0.1)
    online = [*byol.backbone.parameters(), *byol.projector.parameters()]
    for old, now, seen in zip(before, byol.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * seen, atol=1e-6, rtol=0)


def test_the_momentum_encoder_moves_after_the_optimiser_and_keeps_its_own_statistics(tmp_path):
    """One step of the engine: what it moves towards are the weights after that step."""
    settings = config(
        "byol", tmp_path, epochs=1.0, warmup_epochs=0.0, base_lr=8.0, method={"momentum": 0.6}
    )
    begun = methods.build("byol", settings, 8)
    engine.pretrain("byol", settings, Patches(8), None, tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last")["method"]
    online = methods.build("byol", settings, 8)
    online.load_state_dict(state)
    followed = [*online.backbone.parameters(), *online.projector.parameters()]
    start = [*begun.backbone.parameters(), *begun.projector.parameters()]
    moved = 0.0
    for old, new, slow in zip(start, followed, online.momentum_encoder.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.6 * old + 0.4 * new, atol=1e-6, rtol=1e-5)
        moved += (new - old).abs().sum().item()
    assert moved > 1
    # equal weights saw equal views: equal statistics, not averages with those of before
    norms = [m for m in online.projector.modules() if isinstance(m, torch.nn.BatchNorm1d)]
    (slow_norm,) = [
        m for m in online.momentum_encoder.modules() if isinstance(m, torch.nn.BatchNorm1d)
    ]
    torch.testing.assert_close(slow_norm.running_mean, norms[0].running_mean)
    assert slow_norm.num_batches_tracked == 2  # train mode, one pass for each view


def test_an_independent_start_has_other_weights_of_the_same_kind():
    byol = method(start="independent")
    online = [*byol.backbone.parameters(), *byol.projector.parameters()]
    for own, other in zip(byol.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(own.flatten().sort().values, other.flatten().sort().values)
        if other.unique().numel() > 9:
            angle = F.cosine_similarity(own.flatten() - own.mean(), other.flatten(), dim=0)
            assert abs(angle) < 5 / own.numel() ** 0.5
    copied = method()
    online = [*copied.backbone.parameters(), *copied.projector.parameters()]
    for own, other in zip(copied.momentum_encoder.parameters(), online, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"hidden": -1}, {"momentum": 1.5}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
