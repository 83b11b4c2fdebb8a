import math

import pytest
import torch
import torch.nn.functional as F

from firstsight.methods.simclr import nt_xent


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
