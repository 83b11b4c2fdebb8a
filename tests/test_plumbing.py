"""Order, keys, nets, optimiser rates: the small parts, each against what it states."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from firstsight import keyed, optim
from firstsight.errors import UserError
from firstsight.nets import MomentumEncoder, Queue
from firstsight.nets.norms import SplitBatchNorm, split_batch_norm
from firstsight.nets.projectors import mlp
from firstsight.optim.schedule import Schedule
from firstsight.order import Epochs


def test_keyed_numbers_are_uniform_and_independent_of_company():
    alone = [float(keyed.uniform(7, i, 3)) for i in range(1000)]
    together = keyed.uniform(7, np.arange(1000), 3)
    np.testing.assert_array_equal(alone, together)
    many = keyed.uniform(0, np.arange(100_000))
    assert abs(many.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 0.01
    counts = np.histogram(many, 20, (0, 1))[0]
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # chi square, 19 degrees, p .001


def test_keyed_parts_do_not_commute():
    assert keyed.hashed(1, 2) != keyed.hashed(2, 1)
    assert keyed.hashed(0) != keyed.hashed(0, 0)
    assert len({int(keyed.hashed(a, b)) for a in range(100) for b in range(100)}) == 10_000


def test_an_epoch_visits_every_image_once():
    order = Epochs(20, 5, seed=1)
    epoch = np.concatenate([order.indices(step) for step in range(4)])
    assert sorted(epoch) == list(range(20))
    again = np.concatenate([order.indices(step) for step in range(4, 8)])
    assert sorted(again) == list(range(20)) and (epoch != again).any()


def test_the_order_of_a_step_has_no_memory():
    order, fresh = Epochs(23, 4, seed=1), Epochs(23, 4, seed=1)
    for step in range(12):
        order.indices(step)
    np.testing.assert_array_equal(order.indices(3), fresh.indices(3))
    assert order.steps_per_epoch == 5 and order.epoch(9) == 1


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="too few to learn from"):
        Epochs(1, 2, seed=0)


def test_fewer_images_than_a_batch_are_refused_with_the_flag():
    with pytest.raises(UserError, match="7 images do not fill a batch of 8; use --batch-size 7"):
        Epochs(7, 8, seed=0)


def test_the_queue_is_first_in_first_out_and_wraps_around():
    queue = Queue(5, 2)
    start = queue.read()
    torch.testing.assert_close(start.norm(dim=1), torch.ones(5))
    keys = torch.arange(14.0).reshape(7, 2)
    queue.push(keys[:3])
    assert torch.equal(queue.read(), torch.cat([keys[:3], start[3:]]))
    queue.push(keys[3:7])
    assert torch.equal(queue.read(), torch.stack([keys[5], keys[6], keys[2], keys[3], keys[4]]))


def test_a_batch_longer_than_the_queue_leaves_its_last_keys():
    queue = Queue(3, 1)
    queue.push(torch.arange(1.0))
    queue.push(torch.arange(10.0, 18.0)[:, None])
    assert sorted(queue.read().flatten().tolist()) == [15, 16, 17]
    queue.push(torch.tensor([[20.0]]))  # the oldest of the three gives way
    assert sorted(queue.read().flatten().tolist()) == [16, 17, 20]


def test_reading_the_queue_is_a_snapshot():
    queue = Queue(4, 2)
    seen = queue.read()
    before = seen.clone()
    queue.push(torch.zeros(4, 2))
    assert torch.equal(seen, before)


def test_split_batch_norm_is_batch_norm_of_each_part():
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 3) * 3 + 1
    split = SplitBatchNorm(nn.BatchNorm2d(4), 2)
    parts = [nn.BatchNorm2d(4), nn.BatchNorm2d(4)]
    expected = torch.cat([norm(part) for norm, part in zip(parts, x.chunk(2), strict=True)])
    torch.testing.assert_close(split(x), expected)
    mean = (parts[0].running_mean + parts[1].running_mean) / 2
    torch.testing.assert_close(split.running_mean, mean)
    split.eval()
    one = nn.BatchNorm2d(4).eval()
    one.load_state_dict(split.state_dict())
    torch.testing.assert_close(split(x), one(x))


def test_splitting_reaches_every_norm_and_keeps_frozen_ones_frozen():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)), nn.BatchNorm2d(4))
    net[2].weight.requires_grad_(False)
    split_batch_norm(net, 2)
    assert isinstance(net[1][0], SplitBatchNorm) and isinstance(net[2], SplitBatchNorm)
    assert not net[2].weight.requires_grad and net[1][0].weight.requires_grad


def test_parts_that_do_not_divide_differ_by_one_row_and_too_many_are_refused():
    x = torch.randn(7, 4, 2, 2)
    split = SplitBatchNorm(nn.BatchNorm2d(4), 3)
    expected = [nn.BatchNorm2d(4)(part) for part in (x[:3], x[3:5], x[5:])]
    torch.testing.assert_close(split(x), torch.cat(expected))
    with pytest.raises(UserError, match=r"use --method\.splits 2"):
        split(x[:5])


def test_a_norm_with_an_activation_inside_is_refused_not_stripped():
    import timm

    net = timm.create_model("test_efficientnet", num_classes=0)
    with pytest.raises(UserError, match="BatchNormAct2d"):
        split_batch_norm(net, 2)


def test_a_momentum_encoder_starts_equal_and_moves_by_its_share():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    slow = MomentumEncoder(net)
    x = torch.randn(5, 3)
    torch.testing.assert_close(slow(x), net(x))
    old = [p.clone() for p in slow.parameters()]
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(2).add_(1)
    slow.follow(net, momentum=0.75)
    for before, now, seen in zip(old, slow.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(now, 0.75 * before + 0.25 * seen)


@pytest.mark.parametrize("hidden_bias", [True, False])
def test_a_head_normalises_all_layers_but_its_last(hidden_bias):
    kinds = [type(layer).__name__ for layer in mlp(3, 5, 7, 2)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    linear = mlp(3, 5, 7, 2, hidden_bias=hidden_bias)[::3]
    assert [layer.weight.shape for layer in linear] == [(5, 3), (7, 5), (2, 7)]
    assert [layer.bias is not None for layer in linear] == [hidden_bias, hidden_bias, False]


def test_weight_decay_is_excluded_by_the_type_of_the_owner():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    both = optim.groups(net, ("norm", "bias"))
    assert [len(group["params"]) for group in both] == [2, 4]
    assert both[1]["weight_decay"] == 0.0 and "weight_decay" not in both[0]
    assert [len(g["params"]) for g in optim.groups(net, ())] == [6]
    assert [len(g["params"]) for g in optim.groups(net, ("norm",))] == [4, 2]


def test_the_cosine_and_its_warm_up_at_named_steps():
    rate = {
        step: Schedule(steps=110, peak=2.0, warmup=10).rate(step) for step in (0, 5, 10, 60, 109)
    }
    assert rate[0] == 0 and rate[5] == 1.0 and rate[10] == 2.0
    assert rate[60] == pytest.approx(1.0)
    assert rate[109] == pytest.approx(1 + math.cos(math.pi * 0.99))


def test_half_a_cosine_is_the_momentum_of_the_papers():
    dino = [optim.cosine(step / 70, 0.996, 1.0) for step in (0, 35, 69)]
    assert dino == pytest.approx([0.996, 0.998, 0.99999799], abs=5e-9)
    scrl = [optim.cosine(step / 10, 0.97, 1.0) for step in (0, 1, 5, 9)]
    assert scrl == pytest.approx([0.97, 0.970734, 0.985, 0.999266], abs=5e-7)


def test_the_step_schedule_drops_where_told():
    rates = [
        Schedule(steps=200, peak=1.0, shape="step", drops=(0.6, 0.8)).rate(s)
        for s in (0, 119, 120, 159, 160, 199)
    ]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_optimisers_decay_as_told(kind):
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = optim.build(kind, [{"params": [weight]}], weight_decay=0.1)
    optim.set_rate(optimizer, 0.5)
    weight.grad = torch.tensor([0.0])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.5 * 0.1 * 2.0)


def test_normalising_is_value_over_255_minus_mean_over_std():
    from firstsight.loader import normalised

    pixels = torch.randint(0, 256, (2, 3, 5, 5), dtype=torch.uint8)
    mean, std = (0.4, 0.5, 0.6), (0.1, 0.2, 0.3)
    expected = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        got = normalised(pixels, mean, std, layout)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert got.is_contiguous(memory_format=layout)


def test_unit_vectors_of_zero_stay_finite():
    assert F.normalize(torch.zeros(1, 3), dim=1).isfinite().all()
