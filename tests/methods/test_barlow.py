import dataclasses
import math

import pytest
import torch
from torch import nn

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.barlow import BarlowTwins, Config, barlow_loss, cross_correlation
from tests.methods.test_mocov2 import batch_of, wave
from tests.tiny import NETWORK


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    return BarlowTwins(Config(dim=6, hidden=24, **settings), build(network, size=32), images=99)


def correlation(first, second, d, e):
    """Equation 2 for one pair of dimensions, in plain numbers, with batch-norm's epsilon."""
    a, b = first[:, d].tolist(), second[:, e].tolist()
    n = len(a)
    a, b = [x - sum(a) / n for x in a], [y - sum(b) / n for y in b]
    va, vb = sum(x * x for x in a) / n + 1e-5, sum(y * y for y in b) / n + 1e-5
    return sum(x * y for x, y in zip(a, b, strict=True)) / n / math.sqrt(va * vb)


def by_hand(first, second, redundancy):
    """Equation 1, as a double loop over dimensions."""
    total = 0.0
    for d in range(first.shape[1]):
        for e in range(second.shape[1]):
            c = correlation(first, second, d, e)
            total += (1 - c) ** 2 if d == e else redundancy * c**2
    return total


def published():
    return wave((8, 6), 0.1), wave((8, 6), 0.9) + 0.05 * wave((8, 6), 2) ** 2


def test_loss_equals_the_published_vector_and_its_parts():
    first, second = published()
    assert barlow_loss(first, second).item() == pytest.approx(0.550070, abs=1e-6)
    c = cross_correlation(first, second)
    agreement = (c.diagonal() - 1).square().sum()
    assert agreement.item() == pytest.approx(0.472216, abs=1e-6)
    beside = c.square().sum() - c.diagonal().square().sum()
    assert beside.item() == pytest.approx(15.265425, abs=1e-5)


def test_loss_is_the_double_loop_of_the_paper():
    torch.manual_seed(0)
    first = torch.randn(7, 5, dtype=torch.float64) * 3 + 1
    second = first + torch.randn(7, 5, dtype=torch.float64)
    expected = by_hand(first, second, 0.3)
    assert barlow_loss(first, second, 0.3).item() == pytest.approx(expected, abs=1e-10)
    for d in range(5):
        for e in range(5):
            c = cross_correlation(first, second)[d, e].item()
            assert c == pytest.approx(correlation(first, second, d, e), abs=1e-12)


def test_the_gradient_flows_through_mean_and_deviation():
    rows = [x.requires_grad_() for x in published()]
    assert torch.autograd.gradcheck(barlow_loss, rows)


def test_the_loss_of_rounded_embeddings_is_computed_in_full():
    rounded = [rows.bfloat16() for rows in published()]
    with torch.autocast("cpu", torch.bfloat16):
        low = barlow_loss(*rounded)
    exact = barlow_loss(*(rows.double() for rows in rounded))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_forward_keeps_the_statistics_of_the_views_apart():
    barlow = method(redundancy=0.2).double()
    batch = batch_of(6)
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))
    with torch.no_grad():
        z1, z2 = (barlow.projector(barlow.backbone(view)) for view in batch.views)
    assert barlow(batch).loss.item() == pytest.approx(by_hand(z1, z2, 0.2), abs=1e-9)


def test_the_projector_is_that_of_the_paper():
    linear = [m for m in method().projector if isinstance(m, nn.Linear)]
    assert [m.weight.shape[0] for m in linear] == [24, 24, 6]
    assert all(m.bias is None for m in linear)
    assert (Config().hidden, Config().dim, Config().redundancy) == (8192, 8192, 0.0051)


@pytest.mark.parametrize("zero", [True, False])
def test_residual_blocks_begin_as_the_identity_where_asked(zero):
    assert (method("resnet18", zero_init=zero).backbone.layer1[0].bn2.weight == 0).all() == zero


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"hidden": -1}, {"redundancy": 0.0}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
