import math

import pytest
import torch
import torch.nn.functional as F

from firstsight.backbones import build
from firstsight.methods.simclr import Config, SimCLR, nt_xent
from tests.methods.test_all import batch_of
from tests.tiny import NETWORK


def wave(shape, phase):
    count = math.prod(shape)
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


@pytest.mark.parametrize(("temperature", "published"), [(0.1, 0.764324), (0.5, 1.052845)])
def test_loss_equals_the_published_vector(temperature, published):
    loss = nt_xent(wave((4, 8), 0.1), wave((4, 8), 0.2), temperature)
    assert loss.item() == pytest.approx(published, abs=2e-6)


def test_loss_equals_the_double_loop_of_the_paper():
    torch.manual_seed(0)
    first, second = torch.randn(5, 7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    every = F.normalize(torch.cat([first, second]), dim=1)
    total = 0.0
    for i in range(10):
        pair = (i + 5) % 10
        others = sum(math.exp(float(every[i] @ every[k]) / 0.3) for k in range(10) if k != i)
        total -= math.log(math.exp(float(every[i] @ every[pair]) / 0.3) / others)
    assert nt_xent(first, second, 0.3).item() == pytest.approx(total / 10, abs=1e-12)


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


def test_detached_keys_send_no_gradient_as_in_pics_code():
    """The same loss; of its gradient, by a plain loop, the part of the embedding that asks."""
    torch.manual_seed(0)
    rows = torch.randn(6, 4, dtype=torch.float64)
    whole, half, byhand = (rows.clone().requires_grad_() for _ in range(3))
    losses = []
    for leaf, keys in ((whole, "learn"), (half, "detached")):
        losses.append(nt_xent(leaf[:3], leaf[3:], 0.5, keys))
        losses[-1].backward()
    queries = F.normalize(byhand, dim=1)
    total = torch.zeros(())
    for i in range(6):
        scores = [queries[i] @ queries[k].detach() / 0.5 for k in range(6) if k != i]
        asked = queries[i] @ queries[(i + 3) % 6].detach() / 0.5
        total = total - asked + torch.stack(scores).logsumexp(dim=0)
    (total / 6).backward()
    assert losses[0].item() == losses[1].item() == pytest.approx(total.item() / 6, abs=1e-12)
    torch.testing.assert_close(half.grad, byhand.grad, rtol=1e-10, atol=1e-12)
    assert (whole.grad - half.grad).norm() > 0.3 * whole.grad.norm()


def test_pics_simclr_has_a_plain_projector_and_blocks_that_begin_as_the_identity():
    backbone = build("resnet18", stem="small", size=32)
    simclr = SimCLR(Config(projector="mlp", zero_init=True, dim=8, keys="detached"), backbone, 9)
    shapes = [(tuple(layer.weight.shape), layer.bias is None) for layer in simclr.projector[::2]]
    assert shapes == [((2048, 512), False), ((8, 2048), False)] and len(simclr.projector) == 3
    last = [p for key, p in simclr.backbone.named_parameters() if key.endswith("bn2.weight")]
    assert len(last) == 8 and not any(p.any() for p in last)
    projected = SimCLR(Config(dim=8), build("resnet18", stem="small", size=32), 9).projector
    assert isinstance(projected[4], torch.nn.BatchNorm1d) and not projected[4].bias.requires_grad

    def gradient(keys):
        torch.manual_seed(0)
        simclr = SimCLR(Config(dim=8, hidden=16, keys=keys), build(NETWORK, size=32), 9)
        simclr(batch_of(4, 2, (32, 32))).loss.backward()
        return simclr.projector[0].weight.grad

    assert not torch.allclose(gradient("learn"), gradient("detached"))
