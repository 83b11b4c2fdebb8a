import dataclasses
import math

import pytest
import torch
from torch import nn

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.simsiam import Config, SimSiam, simsiam_loss
from tests.methods.test_mocov2 import batch_of, wave
from tests.tiny import NETWORK


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    return SimSiam(Config(dim=16, hidden=8, **settings), build(network, size=32), images=99)


def cosine(x, y):
    x, y = x.tolist(), y.tolist()
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def by_hand(p1, p2, z1, z2):
    """Equation 4 for each image, as loops."""
    rows = range(len(p1))
    return sum(-cosine(p1[i], z2[i]) / 2 - cosine(p2[i], z1[i]) / 2 for i in rows) / len(p1)


def test_loss_equals_the_published_vector():
    loss = simsiam_loss(*(wave((4, 8), phase) for phase in (0.1, 0.5, 0.2, 0.9)))
    assert loss.item() == pytest.approx(-0.842424, abs=1e-6)


def test_loss_is_the_negative_cosine_of_both_directions():
    torch.manual_seed(0)
    rows = [torch.randn(5, 7, dtype=torch.float64) * scale for scale in (1, 3, 0.2, 9)]
    assert simsiam_loss(*rows).item() == pytest.approx(by_hand(*rows), abs=1e-12)
    one = rows[0]
    assert simsiam_loss(one, one, 2 * one, one).item() == pytest.approx(-1)
    assert simsiam_loss(one, one, -one, -one).item() == pytest.approx(1)


def test_the_gradient_stops_at_what_is_predicted():
    p1, p2, z1, z2 = (wave((4, 8), 0.1 * i).requires_grad_() for i in range(4))
    simsiam_loss(p1, p2, z1, z2).backward()
    assert p1.grad.abs().sum() > 0 and p2.grad.abs().sum() > 0
    assert z1.grad is None and z2.grad is None


def test_the_loss_of_rounded_embeddings_is_computed_in_full():
    rounded = [rows.bfloat16() for rows in (wave((4, 8), phase) for phase in (0.1, 0.5, 0.2, 0.9))]
    with torch.autocast("cpu", torch.bfloat16):
        low = simsiam_loss(*rounded)
    exact = simsiam_loss(*(rows.double() for rows in rounded))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_forward_crosses_the_views_and_keeps_their_statistics_apart():
    simsiam = method().double()
    batch = batch_of(6)
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))
    with torch.no_grad():
        z1, z2 = (simsiam.projector(simsiam.backbone(view)) for view in batch.views)
        p1, p2 = simsiam.predictor(z1), simsiam.predictor(z2)
    output = simsiam(batch)
    assert output.loss.item() == pytest.approx(by_hand(p1, p2, z1, z2), abs=1e-10)
    # the spread of standardised embeddings is about 1; of collapsed ones it would be 0
    assert output.scalars["embedding_spread"].item() == pytest.approx(1, abs=0.1)


def test_heads_are_those_of_the_paper():
    simsiam = SimSiam(Config(), build(NETWORK, size=32), images=99)
    width = simsiam.backbone.width
    linear = [m for m in simsiam.projector if isinstance(m, nn.Linear)]
    assert [m.weight.shape for m in linear] == [(width, width), (width, width), (2048, width)]
    assert linear[0].bias is None and linear[1].bias is None
    assert not linear[2].bias.requires_grad
    last = simsiam.projector[-1]
    assert isinstance(last, nn.BatchNorm1d) and not last.affine
    first, _, _, second = simsiam.predictor
    assert first.weight.shape == (512, 2048) and first.bias is None
    assert second.weight.shape == (2048, 512) and second.bias is not None


@pytest.mark.parametrize("zero", [True, False])
def test_residual_blocks_begin_as_the_identity_where_asked(zero):
    assert (method("resnet18", zero_init=zero).backbone.layer1[0].bn2.weight == 0).all() == zero


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"hidden": -1}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
