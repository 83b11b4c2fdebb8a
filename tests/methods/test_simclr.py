import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.simclr import Config, SimCLR, nt_xent
from tests.methods.test_mocov2 import batch_of
from tests.tiny import NETWORK


def wave(shape, phase):
    count = math.prod(shape)
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


@pytest.mark.parametrize(("temperature", "published"), [(0.1, 0.764324), (0.5, 1.052845)])
def test_loss_equals_the_published_vector(temperature, published):
    loss = nt_xent(wave((4, 8), 0.1), wave((4, 8), 0.2), temperature)
    assert loss.item() == pytest.approx(published, abs=2e-6)
    summed = {0.1: 1.528648, 0.5: 2.105690}[temperature]  # the authors' code adds the two views
    assert 2 * loss.item() == pytest.approx(summed, abs=2e-6)


def by_hand(first, second, temperature):
    """Equation 1, as a double loop."""
    every = F.normalize(torch.cat([first, second]), dim=1)
    total, count = 0.0, len(every)
    for i in range(count):
        pair = (i + count // 2) % count
        raised = [math.exp(float(every[i] @ every[k]) / temperature) for k in range(count)]
        total -= math.log(raised[pair] / (sum(raised) - raised[i]))
    return total / count


def test_loss_equals_the_double_loop_of_the_paper():
    torch.manual_seed(0)
    first, second = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    expected = by_hand(first, second, 0.3)
    assert nt_xent(first, second, 0.3).item() == pytest.approx(expected, abs=1e-12)


def test_without_the_gradient_of_keys_they_are_constants():
    """As PIC's code: the same loss; its gradient is that of the loss with a fixed copy as keys."""
    torch.manual_seed(0)
    first, second = torch.randn(2, 3, 4, dtype=torch.float64).requires_grad_()
    whole, half = nt_xent(first, second, 0.5), nt_xent(first, second, 0.5, key_gradient=False)
    assert whole.item() == half.item()
    unit = F.normalize(torch.cat([first, second]), dim=1)
    keys, total = unit.detach(), torch.zeros(())
    for i in range(6):
        logits = [unit[i] @ keys[k] / 0.5 for k in range(6)]
        others = torch.stack([logits[k] for k in range(6) if k != i])
        total = total + (others.logsumexp(0) - logits[(i + 3) % 6]) / 6
    (expected,) = torch.autograd.grad(total, first, retain_graph=True)
    (got,) = torch.autograd.grad(half, first, retain_graph=True)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(torch.autograd.grad(whole, first)[0], expected)


def test_gradient_flows_through_every_role():
    """Against finite differences: each embedding is query, positive and negative at once."""
    torch.manual_seed(0)
    first = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.5), (first, second))


def test_the_loss_is_computed_in_full_under_autocast():
    first, second = wave((4, 8), 0.1).float(), wave((4, 8), 0.2).float()
    with torch.autocast("cpu", torch.bfloat16):
        low = nt_xent(first, second, 0.1)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(0.764324, abs=1e-5)


def method(**settings):
    torch.manual_seed(0)
    return SimCLR(Config(dim=6, hidden=24, **settings), build(NETWORK, size=32), images=99)


@pytest.mark.parametrize("through", [True, False])
def test_forward_encodes_both_views_as_one_batch(through):
    """Batch-norm sees both; row i of both comes from image i; the features are the first view's."""
    simclr = method(temperature=0.3, key_gradient=through).double()
    batch = batch_of(5)
    batch = dataclasses.replace(batch, views=tuple(view.double() for view in batch.views))
    with torch.no_grad():
        features = simclr.backbone(torch.cat(batch.views))
        first, second = simclr.projector(features).split(5)
    output = simclr(batch)
    assert output.loss.item() == pytest.approx(by_hand(first, second, 0.3), abs=1e-10)
    torch.testing.assert_close(output.features, features[:5])
    output.loss.backward()
    gradient = simclr.projector[3].weight.grad
    whole = nt_xent(*simclr.projector(simclr.backbone(torch.cat(batch.views))).split(5), 0.3)
    (expected,) = torch.autograd.grad(whole, simclr.projector[3].weight)
    assert torch.allclose(gradient, expected) == through


def test_the_projector_is_that_of_the_authors_code():
    """Two layers without biases, batch-norm on both, the last one without offset."""
    projector = SimCLR(Config(), build("resnet18"), images=99).projector
    assert [type(m).__name__ for m in projector] == [
        *("Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d")
    ]
    assert projector[0].weight.shape == (2048, 512) and projector[3].weight.shape == (128, 2048)
    assert projector[0].bias is None and projector[3].bias is None
    offsets = [projector[i].bias.requires_grad for i in (1, 4)]
    assert offsets == [True, False] and not projector[4].bias.any()


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"hidden": -1}, {"temperature": 0.0}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)


def test_pics_simclr_has_a_plain_projector_and_blocks_that_begin_as_the_identity():
    backbone = build("resnet18", stem="small", size=32)
    simclr = SimCLR(Config(projector="mlp", zero_init=True, dim=8), backbone, 9)
    shapes = [(tuple(layer.weight.shape), layer.bias is None) for layer in simclr.projector[::2]]
    assert shapes == [((2048, 512), False), ((8, 2048), False)] and len(simclr.projector) == 3
    last = [p for key, p in simclr.backbone.named_parameters() if key.endswith("bn2.weight")]
    assert len(last) == 8 and not any(p.any() for p in last)
    projected = SimCLR(Config(dim=8), build("resnet18", stem="small", size=32), 9).projector
    assert isinstance(projected[4], torch.nn.BatchNorm1d) and not projected[4].bias.requires_grad
