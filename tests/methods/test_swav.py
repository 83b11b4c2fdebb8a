import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight import methods
from firstsight.backbones import build
from firstsight.batch import Batch
from firstsight.errors import UserError
from firstsight.methods.swav import Config, SwAV, sinkhorn, swav_loss
from tests.methods.test_mocov2 import wave
from tests.tiny import NETWORK, config


def method(**settings):
    torch.manual_seed(0)
    own = Config(dim=16, hidden=24, **{"prototypes": 10, **settings})
    return SwAV(own, build(NETWORK, size=32), images=99)


def batch_of(count, sides=(32, 32, 16, 16, 16), seed=0):
    generator = torch.Generator().manual_seed(seed)
    views = tuple(
        torch.randn(count, 3, s, s, generator=generator, dtype=torch.float64) for s in sides
    )
    none = (torch.zeros(count),) * len(sides)
    return Batch(views=views, crops=none, flips=none, index=torch.arange(count))


def published():
    rows = F.normalize(wave((8, 16), 0.1), dim=1)
    return rows @ F.normalize(wave((10, 16), 0.2), dim=1).T  # (8, 10)


def by_hand(scores, iterations=3, epsilon=0.05):
    """Sinkhorn's rounds on numbers, as the paper's code has them: (K, B), marginals 1/K and 1/B."""
    q = [[math.exp(x / epsilon) for x in column] for column in scores.T.tolist()]
    prototypes, images = len(q), len(q[0])
    total = sum(map(sum, q))
    q = [[x / total for x in row] for row in q]
    for _ in range(iterations):
        q = [[x / sum(row) / prototypes for x in row] for row in q]
        sums = [sum(row[b] for row in q) for b in range(images)]
        q = [[x / sums[b] / images for b, x in enumerate(row)] for row in q]
    codes = [[row[b] * images for row in q] for b in range(images)]
    return torch.tensor(codes, dtype=torch.float64)


def loss_by_hand(scores, codes, temperature):
    """Equation 2 over all pairs, in plain numbers."""
    total = 0.0
    for i, code in enumerate(codes):
        others = [v for v in range(len(scores)) if v != i]
        for v in others:
            for b, row in enumerate(scores[v].tolist()):
                below = sum(math.exp(x / temperature) for x in row)
                terms = zip(code[b].tolist(), row, strict=True)
                cross = sum(q * math.log(math.exp(x / temperature) / below) for q, x in terms)
                total -= cross / len(scores[v]) / len(others) / len(codes)
    return total


def test_codes_equal_the_published_vector():
    codes = sinkhorn(published())
    assert codes[0, :4].tolist() == pytest.approx(
        [0.733466, 0.255107, 0.011374, 0.000053], abs=1e-6
    )
    assert codes.sum(dim=1).tolist() == pytest.approx([1] * 8)
    shares = codes.sum(dim=0)
    assert [shares[0], shares[9]] == pytest.approx([0.884831, 0.485029], abs=1e-6)


def test_loss_equals_the_published_vector():
    scores = published().split(4)
    loss = swav_loss(scores, [sinkhorn(s) for s in scores], temperature=0.1)
    assert loss.item() == pytest.approx(8.210992, abs=2e-6)


@pytest.mark.parametrize("iterations", [1, 3, 9])
def test_codes_are_the_rounds_of_the_paper(iterations):
    expected = by_hand(published(), iterations)
    torch.testing.assert_close(sinkhorn(published(), 0.05, iterations), expected)


def test_no_epsilon_and_no_precision_makes_codes_that_are_no_numbers():
    """exp(1 / .001) overflows even float64, and rows of zeros divide by zero."""
    for scores in (published(), published().float(), published().bfloat16()):
        codes = sinkhorn(scores, epsilon=0.001)
        assert codes.dtype != torch.bfloat16 and codes.isfinite().all()
        assert codes.sum(dim=1).tolist() == pytest.approx([1] * 8, abs=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = sinkhorn(published().float())
    torch.testing.assert_close(low.double(), sinkhorn(published()), atol=1e-5, rtol=1e-4)


def test_more_prototypes_than_images_have_codes_that_agree():
    """Two images, ten prototypes: each image is whole, and the loss of certain guesses is small."""
    codes = sinkhorn(published()[:2])
    assert codes.sum(dim=1).tolist() == pytest.approx([1, 1])
    certain = codes.clamp_min(1e-30).log()
    entropy = -(codes * certain).sum(dim=1).mean()
    assert swav_loss([certain] * 2, [codes] * 2, 1.0).item() == pytest.approx(entropy.item())


def test_the_loss_is_a_double_loop_over_views():
    torch.manual_seed(0)
    scores = [torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]
    codes = [torch.rand(3, 4, dtype=torch.float64) for _ in range(2)]
    expected = loss_by_hand(scores, codes, 0.3)
    assert swav_loss(scores, codes, 0.3).item() == pytest.approx(expected, abs=1e-12)


def test_no_gradient_flows_into_codes():
    scores, codes = published().requires_grad_(), published().softmax(1).requires_grad_()
    swav_loss([scores, scores], [codes], 0.1).backward()
    assert scores.grad.abs().sum() > 0 and codes.grad is None
    assert not sinkhorn(scores).requires_grad


def scores_of(swav, batch):
    """Scores and embeddings of each view: a pass of the backbone for each size, one head pass."""
    with torch.no_grad():
        large = swav.backbone(torch.cat(batch.views[:2]))
        small = swav.backbone(torch.cat(batch.views[2:]))
        embeddings = F.normalize(swav.projector(torch.cat([large, small])), dim=1)
        prototypes = F.normalize(swav.prototypes.weight, dim=1)
        return (embeddings @ prototypes.T).chunk(5), embeddings.chunk(5), prototypes


def test_forward_is_one_pass_for_each_size_and_codes_of_the_first_two():
    swav = method().double()
    batch = batch_of(6)
    scores, _, _ = scores_of(swav, batch)
    codes = [by_hand(s) for s in scores[:2]]
    expected = loss_by_hand(scores, codes, 0.1)
    output = swav(batch)
    assert output.loss.item() == pytest.approx(expected, abs=1e-10)
    lengths = swav.prototypes.weight.norm(dim=1)  # normalised before the forward, and kept so
    assert lengths.tolist() == pytest.approx([1] * 10)


def test_a_queue_counts_once_it_is_full_and_is_read_before_it_is_pushed():
    swav = method(queue_size=8).double()
    batches = [batch_of(4, seed=seed) for seed in range(3)]
    past = []
    for number, batch in enumerate(batches):
        scores, embeddings, prototypes = scores_of(swav, batch)
        codes = []
        for i in range(2):
            rows = scores[i]
            if number == 2:  # eight embeddings were pushed before
                rows = torch.cat([torch.cat([p[i] for p in past]) @ prototypes.T, rows])
            codes.append(by_hand(rows)[-4:])
        expected = loss_by_hand(scores, codes, 0.1)
        assert swav(batch).loss.item() == pytest.approx(expected, abs=1e-10)
        swav.after_step(number / 3, 0.1)
        past.append(embeddings[:2])
    alone = loss_by_hand(scores, [sinkhorn(s) for s in scores[:2]], 0.1)
    assert abs(expected - alone) > 1e-3


def test_a_queue_begins_to_fill_at_its_start():
    swav = method(queue_size=4, queue_start=0.5).double()
    for step in range(4):
        swav(batch_of(4, seed=step))
        swav.after_step(step / 4, 0.1)
        filled = [queue.keys.abs().sum() > 0 for queue in swav.queues]
        assert all(filled) if step >= 2 else not any(filled)
    assert not torch.equal(swav.queues[0].keys, swav.queues[1].keys)


def test_prototypes_stay_as_drawn_at_the_start():
    swav = method(freeze=0.25).double()
    for progress, frozen in ((0.0, True), (0.24, True), (0.25, False), (0.9, False)):
        swav(batch_of(4)).loss.backward()
        swav.before_step(progress)
        assert (swav.prototypes.weight.grad is None) == frozen
        assert swav.projector[0].weight.grad is not None
        swav.zero_grad()


def test_networks_are_those_of_the_paper():
    swav = SwAV(Config(), build(NETWORK, size=32), images=99)
    assert len(swav.projector.state_dict()) == 9 and len(swav.prototypes.state_dict()) == 1
    assert swav.prototypes.weight.shape == (3000, 128) and not list(swav.queues)


@pytest.mark.parametrize("views", [{"counts": (1, 3)}, {"counts": (1,), "sizes": (32,)}])
def test_fewer_than_two_global_views_are_refused(views, tmp_path):
    few = {"blur": (0.0,), "min_scale": (0.2,), "max_scale": (1.0,), **views}
    settings = config("swav", tmp_path, views=few)
    with pytest.raises(UserError, match="2 or more views of the first size"):
        methods.build("swav", settings, images=48)


def test_a_network_that_cannot_take_small_views_is_refused(tmp_path):
    settings = config("swav", tmp_path, backbone="timm:test_vit", views={"sizes": (32, 14)})
    with pytest.raises(UserError, match=r"takes no views of 14 pixels.*--views\.sizes"):
        methods.build("swav", settings, images=48)
    settings = dataclasses.replace(
        settings, views=dataclasses.replace(settings.views, sizes=(32, 16))
    )
    method = methods.build("swav", settings, images=48)
    sides = settings.views.sides(32)
    batch = batch_of(2, sides)
    assert method.double()(batch).loss.isfinite()


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0.0}, {"epsilon": 0.0}, {"freeze": 2.0}, {"queue_size": -1}]
)
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name.replace('_', '-')} must be"):
        Config(**wrong)
