import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.vicreg import Config, VICReg, vicreg_loss
from tests.methods.test_mocov2 import batch_of, wave
from tests.tiny import NETWORK


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    return VICReg(Config(dim=6, hidden=24, **settings), build(network, size=32), images=99)


def by_hand(first, second, weights=(25, 25, 1)):
    """Equations 1 to 6 in plain numbers; the two variance terms are averaged."""
    n, width = first.shape
    x, y = first.tolist(), second.tolist()
    distance = sum((x[i][d] - y[i][d]) ** 2 for i in range(n) for d in range(width)) / n / width
    missing = mutual = 0.0
    for rows in (x, y):
        columns = list(zip(*rows, strict=True))
        means = [sum(column) / n for column in columns]
        for d in range(width):
            missing += max(0, 1 - math.sqrt(statistics.variance(columns[d]) + 1e-4)) / width / 2
            for e in range(width):
                if d != e:
                    both = zip(columns[d], columns[e], strict=True)
                    products = ((a - means[d]) * (b - means[e]) for a, b in both)
                    mutual += (sum(products) / (n - 1)) ** 2 / width
    return weights[0] * distance + weights[1] * missing + weights[2] * mutual


def published():
    return wave((8, 6), 0.1), wave((8, 6), 0.9) + 0.05 * wave((8, 6), 2) ** 2


@pytest.mark.parametrize(
    ("weights", "value"),
    [((25, 25, 1), 14.813767), ((1, 0, 0), 0.286485), ((0, 1, 0), 0.234487), ((0, 0, 1), 1.789454)],
)
def test_loss_and_each_term_equal_the_published_vector(weights, value):
    assert vicreg_loss(*published(), *weights).item() == pytest.approx(value, abs=1e-6)


def test_loss_is_the_loops_of_the_paper():
    torch.manual_seed(0)
    first = torch.randn(7, 5, dtype=torch.float64) * torch.linspace(0.3, 3, 5) + 1
    second = first + torch.randn(7, 5, dtype=torch.float64)
    expected = by_hand(first, second, (3, 5, 7))
    assert vicreg_loss(first, second, 3, 5, 7).item() == pytest.approx(expected, abs=1e-10)


def test_the_gradient_flows_through_all_terms():
    rows = [x.requires_grad_() for x in published()]
    assert torch.autograd.gradcheck(vicreg_loss, rows)


def test_the_loss_of_rounded_embeddings_is_computed_in_full():
    rounded = [rows.bfloat16() for rows in published()]
    with torch.autocast("cpu", torch.bfloat16):
        low = vicreg_loss(*rounded)
    exact = vicreg_loss(*(rows.double() for rows in rounded))
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_forward_keeps_the_statistics_of_the_views_apart():
    vicreg = method(invariance=3.0, variance=5.0, covariance=7.0).double()
    batch = batch_of(6)
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))
    with torch.no_grad():
        z1, z2 = (vicreg.projector(vicreg.backbone(view)) for view in batch.views)
    assert vicreg(batch).loss.item() == pytest.approx(by_hand(z1, z2, (3, 5, 7)), abs=1e-9)


def test_the_projector_is_that_of_the_paper():
    linear = [m for m in method().projector if isinstance(m, nn.Linear)]
    assert [m.weight.shape[0] for m in linear] == [24, 24, 6]
    assert [m.bias is not None for m in linear] == [True, True, False]
    own = Config()
    assert (own.hidden, own.dim) == (8192, 8192)
    assert (own.invariance, own.variance, own.covariance) == (25, 25, 1)


@pytest.mark.parametrize("zero", [True, False])
def test_residual_blocks_begin_as_the_identity_where_asked(zero):
    assert (method("resnet18", zero_init=zero).backbone.layer1[0].bn2.weight == 0).all() == zero


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"hidden": -1}, {"covariance": -1.0}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must"):
        Config(**wrong)
