import dataclasses

import pytest
import torch
import torch.nn.functional as F

from firstsight import methods
from firstsight.backbones import build
from firstsight.methods.mocov1 import Config, MoCoV1, info_nce
from firstsight.optim.schedule import Schedule
from firstsight.settings import begun
from tests.methods.test_mocov2 import batch_of, by_hand, wave
from tests.tiny import NETWORK


def method(**settings):
    torch.manual_seed(0)
    return MoCoV1(Config(dim=16, queue_size=24, **settings), build(NETWORK, size=32), images=99)


@pytest.mark.parametrize(("temperature", "published"), [(0.07, 0.990808), (0.2, 1.356116)])
def test_loss_equals_the_published_vector(temperature, published):
    queries, keys = F.normalize(wave((4, 8), 0.1), dim=1), F.normalize(wave((4, 8), 0.2), dim=1)
    queue = F.normalize(wave((8, 16), 0.3), dim=0).T
    loss = info_nce(queries, keys, queue, temperature)
    assert loss.item() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_forward_is_the_equation_on_the_old_queue(symmetric):
    moco = method(symmetric=symmetric).double()
    batch = batch_of(6)
    first, second = (view.double() for view in batch.views)
    batch = dataclasses.replace(batch, views=(first, second))
    queue = moco.queue.read()
    with torch.no_grad():
        q1, q2 = (F.normalize(moco.projector(moco.backbone(v)), dim=1) for v in (first, second))
        k1, k2 = (F.normalize(moco.momentum_encoder(v), dim=1) for v in (first, second))
    expected = by_hand(q1, k2, queue, 0.07) + (by_hand(q2, k1, queue, 0.07) if symmetric else 0)
    assert moco(batch).loss.item() == pytest.approx(expected, abs=1e-10)
    pushed = torch.cat([k1, k2]) if symmetric else k2
    torch.testing.assert_close(moco.queue.read()[: len(pushed)], pushed, atol=1e-12, rtol=0)


def test_keys_are_encoded_among_others_and_come_back_in_order():
    moco = method(splits=2)
    view = batch_of(8).views[1]
    torch.manual_seed(3)
    order = torch.randperm(8)
    expected = F.normalize(moco.momentum_encoder(view[order]), dim=1)
    torch.manual_seed(3)
    keys = moco.encode_keys(view)
    torch.testing.assert_close(keys[order], expected)
    assert not torch.allclose(keys, F.normalize(moco.momentum_encoder(view), dim=1), atol=1e-4)


def test_the_momentum_encoder_follows_by_the_stated_share():
    moco = method(momentum=0.9)
    before = [p.clone() for p in moco.momentum_encoder.parameters()]
    online = [*moco.backbone.parameters(), *moco.projector.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    moco.after_step(0.5, 0.1)
    for old, now, seen in zip(before, moco.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * seen)


def test_the_published_run():
    """Head, temperature, queue, views and rates of the authors' first version."""
    _, defaults, own = methods.describe("mocov1")
    assert (own.temperature, own.momentum, own.queue_size) == (0.07, 0.999, 65_536)
    assert defaults.views == "mocov1" and defaults.batch_norm == "local"
    assert isinstance(method().projector, torch.nn.Linear)
    config = begun(defaults, own, {}, "test")
    rates = [
        Schedule(steps=200, peak=0.03, shape=config.schedule, drops=config.drops).rate(epoch)
        for epoch in (0, 119, 120, 159, 160, 199)
    ]
    assert config.peak_lr == 0.03
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])
