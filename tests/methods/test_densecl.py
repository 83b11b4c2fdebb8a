import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.densecl import Config, DenseCL, dense_info_nce, matches
from tests.methods.test_mocov2 import by_hand as image_loss_by_hand
from tests.methods.test_mocov2 import wave
from tests.methods.test_swav import batch_of
from tests.tiny import NETWORK


def method(**settings):
    torch.manual_seed(0)
    own = Config(dim=6, hidden=24, queue_size=20, **settings)
    return DenseCL(own, build(NETWORK, size=32), images=99)


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def matches_by_hand(queries, keys):
    """For each cell, the first of those with the highest cosine, in plain numbers."""
    found = []
    for query, key in zip(
        queries.transpose(1, 2).tolist(), keys.transpose(1, 2).tolist(), strict=True
    ):
        rows = [[cosine(q, k) for k in key] for q in query]
        found.append([max(range(len(row)), key=row.__getitem__) for row in rows])
    return found


def by_hand(queries, keys, match, negatives, temperature):
    """Equation 2 over all cells of all images."""
    total, count = 0.0, 0
    for i in range(len(queries)):
        for s in range(queries.shape[2]):
            query, key = queries[i, :, s], keys[i, :, match[i][s]]
            total += image_loss_by_hand(query[None], key[None], negatives, temperature)
            count += 1
    return total / count


def published():
    cells = [F.normalize(wave((2, 6, 9), phase), dim=1) for phase in (0.1, 1.1)]
    dense = [F.normalize(wave((2, 4, 9), phase), dim=1) for phase in (0.3, 1.7)]
    return cells, dense, F.normalize(wave((4, 5), 0.6), dim=0).T


def test_matches_and_loss_equal_the_published_vector():
    cells, (queries, keys), queue = published()
    match = matches(*cells)
    assert match[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4, 5]
    loss = dense_info_nce(queries, keys, match, queue, temperature=0.2)
    assert loss.item() == pytest.approx(0.435185, abs=1e-6)


def test_matches_and_loss_are_plain_loops():
    torch.manual_seed(0)
    cells = [torch.randn(3, 5, 4, dtype=torch.float64) * scale for scale in (0.3, 7.0)]
    assert matches(*cells).tolist() == matches_by_hand(*cells)
    queries, keys = (F.normalize(torch.randn(3, 6, 4).double(), dim=1) for _ in range(2))
    negatives = F.normalize(torch.randn(7, 6).double(), dim=1)
    match = matches(*cells)
    expected = by_hand(queries, keys, match.tolist(), negatives, 0.3)
    got = dense_info_nce(queries, keys, match, negatives, 0.3)
    assert got.item() == pytest.approx(expected, abs=1e-12)


def test_of_equally_similar_cells_the_first_is_taken():
    cells = torch.ones(1, 2, 3)
    assert matches(cells, cells).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("grid", [0, 2])
def test_forward_is_both_losses_on_the_old_queues(grid):
    """Maps of 3 x 3 cells, or pooled to 2 x 2; matched by the backbone, not by the projector."""
    dense = method(grid=grid, weight=0.25).double()
    with torch.no_grad():
        for parameter in dense.momentum_encoder.parameters():
            parameter.mul_(1.2)
    batch = batch_of(4, (96, 96))
    queues = dense.queue.read(), dense.dense_queue.read()
    with torch.no_grad():
        backbone, projectors = dense.momentum_encoder.copy
        sides = ((dense.backbone, dense.projectors), (backbone, projectors))
        seen = []
        for (network, heads), view in zip(sides, batch.views, strict=True):
            cells = network.feature_map(view)
            whole = heads.whole(cells.mean((2, 3)))
            if grid:
                cells = F.adaptive_avg_pool2d(cells, grid)
            seen.append((cells.flatten(2), whole, heads.dense(cells).flatten(2)))
    (query_cells, query, queries), (key_cells, key, keys) = seen
    assert queries.shape == (4, 6, grid**2 or 9)
    query, key, unit, unit_keys = (F.normalize(t, dim=1) for t in (query, key, queries, keys))
    whole = image_loss_by_hand(query, key, queues[0], 0.2)
    match = matches_by_hand(query_cells, key_cells)
    expected = 0.75 * whole + 0.25 * by_hand(unit, unit_keys, match, queues[1], 0.2)
    assert dense(batch).loss.item() == pytest.approx(expected, abs=1e-7)  # the weight is float32
    torch.testing.assert_close(dense.queue.read()[:4], key)
    pooled = F.normalize(keys.mean(2), dim=1)  # of dense keys before they are normalised
    torch.testing.assert_close(dense.dense_queue.read()[:4], pooled)


def test_the_dense_loss_counts_from_its_start():
    dense = method(start=0.5, weight=0.4).double()
    batch = batch_of(4, (64, 64))
    for progress, weight in (
        (0.0, 0.0),
        (0.25, 0.0),
        (0.5, 0.0),
        (0.75, 0.4),
    ):  # of the step before
        output = dense(batch)
        parts = output.scalars
        expected = (1 - weight) * parts["image_loss"] + weight * parts["dense_loss"]
        assert output.loss.item() == pytest.approx(expected.item())
        dense.after_step(progress, 0.1)
    assert method(weight=0.4).share.item() == pytest.approx(0.4)


def test_shuffled_keys_come_back_in_order():
    """Dealt out in splits, cells, embedding and dense embedding are still those of their image."""
    dense = method(splits=2).double()
    view = batch_of(8, (64, 64)).views[1]
    torch.manual_seed(3)
    order = torch.randperm(8)
    backbone, projectors = dense.momentum_encoder.copy
    with torch.no_grad():
        _, *expected = dense.encode(backbone, projectors, view[order])
    torch.manual_seed(3)
    got = dense.encode_keys(view, expected[0].shape)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one[order], other)


def test_the_momentum_encoder_follows_by_the_stated_share():
    dense = method(momentum=0.9)
    before = [p.clone() for p in dense.momentum_encoder.parameters()]
    online = [*dense.backbone.parameters(), *dense.projectors.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    dense.after_step(0.5, 0.1)
    for old, now, seen in zip(before, dense.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * seen)


def test_projectors_are_those_of_the_paper():
    dense = DenseCL(dataclasses.replace(Config(), queue_size=9), build("resnet18"), images=99)
    shapes = [tuple(p.shape) for p in dense.projectors.parameters()]
    whole = [(2048, 512), (2048,), (128, 2048), (128,)]
    assert shapes == whole + [s + (1, 1) * (len(s) > 1) for s in whole]
    first, last = dense.projectors.whole[0], dense.projectors.whole[2]
    for layer in (first, last):  # Kaiming's normal weights, by what enters
        expected = math.sqrt(2 / layer.in_features)
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
        assert not layer.bias.any()


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"weight": 1.5}, {"grid": -1}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
