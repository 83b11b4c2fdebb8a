import math

import pytest
import torch
import torch.nn.functional as F

from firstsight import engine, methods
from firstsight.backbones import build
from firstsight.batch import Batch
from firstsight.errors import UserError
from firstsight.methods.mocov2 import Config, MoCoV2, info_nce
from firstsight.nets.projectors import contrastive
from tests.tiny import NETWORK, Patches, config


def wave(shape, phase):
    count = math.prod(shape)
    return torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + phase).reshape(shape)


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = tuple(torch.randn(count, 3, 32, 32, generator=generator) for _ in range(2))
    none = torch.zeros(count)
    return Batch(views=views, crops=(none, none), flips=(none, none), index=torch.arange(count))


def method(**settings):
    torch.manual_seed(0)
    config = Config(dim=16, queue_size=24, **settings)
    return MoCoV2(config, build(NETWORK, size=32), images=99)


@pytest.mark.parametrize(("temperature", "published"), [(0.07, 0.990808), (0.2, 1.356116)])
def test_loss_equals_the_published_vector(temperature, published):
    queries, keys = F.normalize(wave((4, 8), 0.1), dim=1), F.normalize(wave((4, 8), 0.2), dim=1)
    queue = F.normalize(wave((8, 16), 0.3), dim=0).T
    loss = info_nce(queries, keys, queue, temperature)
    assert loss.item() == pytest.approx(published, abs=2e-6)


@pytest.mark.parametrize(
    ("temperature", "published"), [(0.07, 1.627002), (0.1, 1.396517), (0.2, 1.210582)]
)
def test_loss_equals_the_second_published_vector(temperature, published):
    i = torch.arange(32, dtype=torch.float64).reshape(8, 4)
    anchor = F.normalize(torch.sin(0.7 * i + 0.1), dim=1)
    positive = F.normalize(anchor + 0.6 * F.normalize(torch.cos(0.9 * i + 0.3), dim=1), dim=1)
    j = torch.arange(24, dtype=torch.float64).reshape(6, 4)
    queue = F.normalize(torch.cos(0.37 * j + 0.2), dim=1)
    loss = info_nce(anchor[:4], positive[:4], queue, temperature)
    assert loss.item() == pytest.approx(published, abs=2e-6)


def by_hand(queries, keys, negatives, temperature):
    """Equation 1 of He et al., as loops."""
    total = 0.0
    for i in range(len(queries)):
        good = math.exp(float(queries[i] @ keys[i]) / temperature)
        others = sum(math.exp(float(queries[i] @ n) / temperature) for n in negatives)
        total -= math.log(good / (good + others))
    return total / len(queries)


@pytest.mark.parametrize("symmetric", [False, True])
def test_forward_is_the_equation_on_the_old_queue(symmetric):
    moco = method(symmetric=symmetric).double()
    batch = batch_of(6)
    batch = Batch(
        views=tuple(v.double() for v in batch.views),
        crops=batch.crops,
        flips=batch.flips,
        index=batch.index,
    )
    queue = moco.queue.read()
    with torch.no_grad():
        moco.train()
        first, second = batch.views
        q1 = F.normalize(moco.projector(moco.backbone(first)), dim=1)
        q2 = F.normalize(moco.projector(moco.backbone(second)), dim=1)
        k1 = F.normalize(moco.momentum_encoder(first), dim=1)
        k2 = F.normalize(moco.momentum_encoder(second), dim=1)
    expected = by_hand(q1, k2, queue, 0.2) + (by_hand(q2, k1, queue, 0.2) if symmetric else 0)
    assert moco(batch).loss.item() == pytest.approx(expected, abs=1e-10)
    pushed = torch.cat([k1, k2]) if symmetric else k2
    torch.testing.assert_close(moco.queue.read()[: len(pushed)], pushed, atol=1e-12, rtol=0)


def test_the_momentum_encoder_follows_by_the_stated_share():
    moco = method(momentum=0.9)
    before = [p.clone() for p in moco.momentum_encoder.parameters()]
    statistics = [b.clone() for b in moco.momentum_encoder.buffers()]
    online = [*moco.backbone.parameters(), *moco.projector.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
        for buffer in moco.backbone.buffers():
            buffer.add_(3)
    moco.after_step(0.5, 0.1)
    for old, now, seen in zip(before, moco.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * seen)
    for old, now in zip(statistics, moco.momentum_encoder.buffers(), strict=True):
        assert torch.equal(old, now)  # batch-norm statistics do not follow


def test_shuffling_changes_which_images_share_statistics_and_nothing_else():
    """With splits the keys come back in order, from other company than the queries were in."""
    moco = method(splits=2)
    view = batch_of(8).views[1]
    moco.momentum_encoder.train()
    torch.manual_seed(3)
    order = torch.randperm(8)
    expected = F.normalize(moco.momentum_encoder(view[order]), dim=1)
    torch.manual_seed(3)
    keys = moco.encode_keys(view)
    torch.testing.assert_close(keys[order], expected)
    unshuffled = F.normalize(moco.momentum_encoder(view), dim=1)
    assert not torch.allclose(keys, unshuffled, atol=1e-4)


def test_the_projector_of_version_one_is_a_single_layer():
    moco = method(projector="linear")
    assert isinstance(moco.projector, torch.nn.Linear) and moco.projector.out_features == 16


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"momentum": 1.5}, {"queue_size": 0}, {"splits": 0}]
)
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name.replace('_', '-')} must be"):
        Config(**wrong)


def test_no_key_is_a_negative_of_its_own_step():
    """The queue that the loss sees must not hold this step's keys."""
    moco = method()
    with torch.no_grad():
        moco.queue.keys.zero_()
    batch = batch_of(4)
    twin = Batch(
        views=(batch.views[0],) * 2, crops=batch.crops, flips=batch.flips, index=batch.index
    )
    # queries equal keys at the start, similarity 1; all negatives have similarity 0
    expected = -math.log(math.exp(5) / (math.exp(5) + 24))
    assert moco(twin).loss.item() == pytest.approx(expected, abs=1e-4)


def test_a_queue_longer_than_the_source_holds_earlier_keys_of_the_same_images(tmp_path):
    """16 images in two epochs: 32 keys; a row that none has reached stays as it was drawn."""
    settings = config("mocov2", tmp_path, method={"queue_size": 40})
    drawn = methods.build("mocov2", settings, 16).queue.keys
    queue = engine.pretrain("mocov2", settings, Patches(16), None, tmp_path).method.queue
    assert queue.position == 32 and torch.equal(queue.keys[32:], drawn[32:])
    assert not torch.isin(queue.keys[:32], drawn).any()
    assert len(queue.keys[:32].unique(dim=0)) == 32


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("linear", [(7, 5)]),
        ("none", [(7, 5)]),
        ("mlp", [(7, 7), (7, 5)]),
        ("simple", [(7, 7), (7, 5)]),
        ("deep", [(7, 7), (7, 7), (7, 5)]),
        ("dropout", [(7, 7), (7, 5)]),
        ("wide", [(7, 14), (14, 5)]),
    ],
)
def test_projectors_are_those_of_moco_and_ssl_small(kind, sizes):
    """What each computes, from its own weights, layer by layer."""
    torch.manual_seed(0)
    head, x = contrastive(kind, 7, 5), torch.randn(4, 7)
    layers = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    assert [(m.in_features, m.out_features) for m in layers] == sizes
    assert all(layer.bias is not None for layer in layers)
    expected = x
    for layer in layers[:-1]:
        expected = (expected @ layer.weight.T + layer.bias).clamp_min(0)
    expected = expected @ layers[-1].weight.T + layers[-1].bias
    torch.testing.assert_close(head.eval()(x), expected)
    head.train()
    torch.manual_seed(1)
    assert torch.allclose(head(x), expected) == (kind != "dropout")
    dropped = [m.p for m in head.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropped == ([0.5] if kind == "dropout" else [])


def test_the_wide_head_has_the_published_size():
    for width, total in (
        (1024, 2_361_472),
        (1280, 3_607_168),
        (512, 656_512),
        (192, 123_392),
        (2048, 8_917_120),
    ):
        assert sum(p.numel() for p in contrastive("wide", width, 128).parameters()) == total
