import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.pixpro import (
    Config,
    PixPro,
    agreement,
    pixpro_loss,
    positives,
    propagated,
)
from tests.methods.test_mocov2 import wave
from tests.methods.test_swav import batch_of
from tests.tiny import NETWORK


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    return PixPro(Config(dim=6, hidden=24, **settings), build(network, size=32), images=99)


def crops_of(count, seed):
    """Random boxes and flips, in pixels of an image of 100 by 60."""
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(count, 2, generator=generator) * 90).sort(dim=1).values
    y = (torch.rand(count, 2, generator=generator) * 50).sort(dim=1).values
    crops = torch.stack([x[:, 0], y[:, 0], x[:, 1] + 10, y[:, 1] + 10], dim=1)
    return crops.double(), torch.rand(count, generator=generator) < 0.5


def placed(batch):
    crops, flips = zip(*(crops_of(len(batch), seed) for seed in (1, 2)), strict=True)
    sizes = torch.tensor([[100.0, 60.0]]).repeat(len(batch), 1).double()
    return dataclasses.replace(batch, crops=crops, flips=flips, sizes=sizes)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def rows(cells):
    """Cells of each image as lists of numbers, row by row."""
    return cells.flatten(2).transpose(1, 2).tolist()


def places(crop, flip, height, width):
    """Centre of each cell, and the diagonal of one."""
    x1, y1, x2, y2 = crop
    if flip:
        x1, x2 = x2, x1  # as in the paper's code: widths go negative
    centres = [
        (x1 + (column + 0.5) * (x2 - x1) / width, y1 + (row + 0.5) * (y2 - y1) / height)
        for row in range(height)
        for column in range(width)
    ]
    return centres, math.hypot((x2 - x1) / width, (y2 - y1) / height)


def positives_by_hand(crops, flips, height, width, distance):
    found = []
    for c1, c2, f1, f2 in zip(*map(torch.Tensor.tolist, (*crops, *flips)), strict=True):
        (first, one), (second, other) = places(c1, f1, height, width), places(c2, f2, height, width)
        unit = max(one, other)
        found.append([[math.dist(a, b) / unit < distance for b in second] for a in first])
    return found


def propagated_by_hand(cells, said, sharpness):
    """Equations 3 and 4, cell by cell."""
    result = []
    for feature, value in zip(rows(cells), rows(said), strict=True):
        image = []
        for mine in feature:
            total = [0.0] * len(value[0])
            for theirs, says in zip(feature, value, strict=True):
                similar = max(cosine(mine, theirs), 0) + 1e-6 * (sharpness < 1)
                weight = similar**sharpness / math.hypot(*says)
                total = [t + weight * s for t, s in zip(total, says, strict=True)]
            image.append([t / math.hypot(*total) for t in total])
        result.append(image)
    return result


def agreement_by_hand(queries, keys, positive):
    """queries as rows of numbers; mean over pairs, then over images."""
    total = 0.0
    for query, key, near in zip(queries, rows(keys), positive, strict=True):
        pairs = [
            cosine(query[i], key[j])
            for i in range(len(query))
            for j in range(len(key))
            if near[i][j]
        ]
        total += sum(pairs) / (len(pairs) + 1e-6)
    return total / len(queries)


PUBLISHED_CROPS = (
    torch.tensor([[0, 0, 0.6, 0.6], [0.1, 0.2, 0.9, 0.8]]).double(),
    torch.tensor([[0.3, 0.3, 1, 1], [0.2, 0.1, 0.9, 0.7]]).double(),  # the last is mirrored
)
PUBLISHED_FLIPS = (torch.tensor([False, False]), torch.tensor([False, True]))


def test_propagation_and_loss_equal_the_published_vector():
    cells, target = wave((2, 4, 3, 3), 0.1), F.normalize(wave((2, 4, 3, 3), 0.8), dim=1)
    smoothed = propagated(cells, cells, 2.0)
    expected = [0.43269, -0.488064, 0.526164, -0.545642]
    assert smoothed[0, :, 0, 0].tolist() == pytest.approx(expected, abs=1e-6)
    positive = positives(PUBLISHED_CROPS, PUBLISHED_FLIPS, 3, 3, 0.7)
    one_way = -2 * agreement(smoothed, target, positive)
    assert one_way.item() == pytest.approx(-0.324913, abs=1e-6)


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.0, 3.5])
def test_propagation_is_a_plain_loop(sharpness):
    torch.manual_seed(0)
    cells, said = torch.randn(2, 5, 2, 3).double() * 3, torch.randn(2, 5, 2, 3).double()
    got = rows(propagated(cells, said, sharpness))
    for image, expected in zip(got, propagated_by_hand(cells, said, sharpness), strict=True):
        for row, other in zip(image, expected, strict=True):
            assert row == pytest.approx(other, abs=1e-12)


@pytest.mark.parametrize("distance", [0.3, 0.7, 2.0])
def test_positives_are_near_in_the_image(distance):
    crops, flips = zip(*(crops_of(20, seed) for seed in (1, 2)), strict=True)
    got = positives(crops, flips, 3, 4, distance)
    assert got.tolist() == positives_by_hand(crops, flips, 3, 4, distance)
    assert 0 < got.sum() < got.numel()


def test_a_crop_and_its_mirror_image_match_column_by_column():
    crop = torch.tensor([[10, 20, 130, 60]])
    got = positives((crop, crop), (torch.tensor([False]), torch.tensor([True])), 1, 3, 0.7)
    assert got[0].tolist() == torch.eye(3).flip(0).bool().tolist()


def test_views_that_share_nothing_count_as_zero():
    crops = torch.tensor([[0, 0, 10, 10]]), torch.tensor([[200, 200, 210, 210]])
    flips = (torch.tensor([False]),) * 2
    positive = positives(crops, flips, 2, 2, 0.7)
    cells = wave((1, 4, 2, 2), 0.1).requires_grad_()
    loss = pixpro_loss(cells, cells, cells, cells, positive)
    loss.backward()
    assert loss.item() == 0 and not cells.grad.any()


@pytest.mark.parametrize(("layers", "instance"), [(0, 0.0), (1, 0.0), (2, 0.0), (1, 0.5)])
def test_forward_is_the_equation_both_ways(layers, instance):
    pixpro = method(transform_layers=layers, instance=instance).double()
    with torch.no_grad():
        for parameter in pixpro.momentum_encoder.parameters():
            parameter.mul_(1.2)
    batch = placed(batch_of(4, (96, 96)))
    with torch.no_grad():
        maps = [pixpro.backbone.feature_map(view) for view in batch.views]
        cells = [pixpro.projector(m) for m in maps]
        smoothed = [propagated_by_hand(c, pixpro.transform(c), 2.0) for c in cells]
        backbone, projector, *rest = pixpro.momentum_encoder.copy
        key_maps = [backbone.feature_map(view) for view in batch.views]
        keys = [projector(m) for m in key_maps]
    near = positives_by_hand(batch.crops, batch.flips, 3, 3, 0.7)
    mirrored = [list(zip(*image, strict=True)) for image in near]
    expected = -2 * agreement_by_hand(smoothed[0], keys[1], near)
    expected -= 2 * agreement_by_hand(smoothed[1], keys[0], mirrored)
    if instance:
        own, predictor = pixpro.instance_heads
        with torch.no_grad():
            ones = [predictor(own(m)).mean((2, 3)).tolist() for m in maps]
            others = [rest[0](m).mean((2, 3)).tolist() for m in key_maps]
        for v in range(2):
            pairs = zip(ones[v], others[1 - v], strict=True)
            expected -= instance * 2 * sum(cosine(x, y) for x, y in pairs) / 4
    output = pixpro(batch)
    assert output.loss.item() == pytest.approx(expected, abs=1e-9)
    pairs = sum(sum(map(sum, image)) for image in near) / 4
    assert output.scalars["positive_pairs"].item() == pytest.approx(pairs)


def test_distances_may_be_in_shares_as_in_the_authors_code():
    """Of images of 100 by 60: x over 100, y over 60, and diagonals with them."""
    batch = placed(batch_of(8, (96, 96)))
    wide, high = 100.0, 60.0
    crops = [
        torch.tensor([[a / wide, b / high, c / wide, d / high] for a, b, c, d in boxes])
        for boxes in map(torch.Tensor.tolist, batch.crops)
    ]
    near = positives_by_hand(crops, batch.flips, 3, 3, 0.7)
    plain = positives_by_hand(batch.crops, batch.flips, 3, 3, 0.7)
    assert near != plain
    batch.sizes[3:] += 50  # other images than these have other sizes, also in chunks
    assert torch.equal(torch.cat([part.sizes for part in batch.chunks(3)]), batch.sizes)
    batch.sizes[3:] -= 50
    for shares, expected in ((True, near), (False, plain)):
        output = method(shares=shares).double()(batch)
        pairs = sum(sum(map(sum, image)) for image in expected) / 8
        assert output.scalars["positive_pairs"].item() == pytest.approx(pairs)


def test_gradients_reach_every_head_and_no_key():
    pixpro = method(instance=1.0, transform_layers=2).double()
    pixpro(placed(batch_of(4, (96, 96)))).loss.backward()
    for key, parameter in pixpro.named_parameters():
        if key.startswith("momentum_encoder"):
            assert parameter.grad is None
        elif not key.startswith("backbone"):
            assert parameter.grad is not None, key


def test_no_gradient_flows_into_targets():
    first, second, key, other = (wave((2, 4, 2, 2), 0.3 * i).requires_grad_() for i in range(4))
    pixpro_loss(first, second, key, other, torch.ones(2, 4, 4).bool()).backward()
    assert first.grad.abs().sum() > 0 and second.grad.abs().sum() > 0
    assert key.grad is None and other.grad is None


@pytest.mark.parametrize(("progress", "momentum"), [(0, 0.97), (0.1, 0.970734), (0.9, 0.999266)])
def test_momentum_rises_along_half_a_cosine(progress, momentum):
    pixpro = method(momentum=0.97, instance=1.0)
    before = [p.clone() for p in pixpro.momentum_encoder.parameters()]
    online = [*pixpro.backbone.parameters(), *pixpro.projector.parameters()]
    online += pixpro.instance_heads[0].parameters()
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    pixpro.after_step(progress, 0.1)
    for old, now, seen in zip(before, pixpro.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * seen, atol=1e-6, rtol=0)


def test_heads_are_those_of_the_paper():
    pixpro = PixPro(Config(), build("resnet18"), images=99)
    shapes = [tuple(p.shape) for p in pixpro.projector.parameters()]
    assert shapes == [(4096, 512, 1, 1), (4096,), (4096,), (4096,), (256, 4096, 1, 1), (256,)]
    assert [tuple(p.shape) for p in pixpro.transform.parameters()] == [(256, 256, 1, 1), (256,)]
    assert not list(pixpro.instance_heads)
    assert (pixpro.backbone.layer1[0].bn2.weight == 0).all()
    assert (method("resnet18", zero_init=False).backbone.layer1[0].bn2.weight == 1).all()


@pytest.mark.parametrize("wrong", [{"distance": 0.0}, {"sharpness": 0.0}, {"instance": -1.0}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
