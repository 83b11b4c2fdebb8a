"""How features lie: published vectors, plain float64 loops, what must not matter."""

import itertools
import math

import numpy as np
import pytest
import torch

from firstsight.metrics import (
    alignment,
    class_alignment,
    effective_rank,
    feature_std,
    instance_accuracy,
    instance_ranks,
    lidar,
    lie,
    sampled_uniformity,
    spectrum,
    uniformity,
)


def units(x):
    return x / x.norm(dim=1, keepdim=True)


def published():
    """Originals and two views of eight images, as the specification writes them."""
    i = torch.arange(32, dtype=torch.float64).reshape(8, 4)
    a = units(torch.sin(0.7 * i + 0.1))
    p = units(a + 0.6 * units(torch.cos(0.9 * i + 0.3)))
    return a, p, units(a + 0.6 * units(torch.sin(1.3 * i - 0.5)))


def cloud(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_alignment_and_uniformity_equal_the_published_values():
    d, sd, sd2 = published()
    labels = torch.arange(8) // 4
    assert alignment(d, sd) == pytest.approx(0.207813, abs=5e-7)
    assert alignment(sd, sd2) == pytest.approx(0.344916, abs=5e-7)
    assert class_alignment(d, labels) == pytest.approx(2.595992, abs=5e-7)
    assert class_alignment(sd, labels) == pytest.approx(2.632004, abs=5e-7)
    assert uniformity(d) == pytest.approx(-2.251557, abs=5e-7)
    assert uniformity(sd) == pytest.approx(-1.577721, abs=5e-7)


def test_instance_discrimination_equals_the_published_values():
    d, sd, sd2 = published()
    topk = (1, 2, 3, 4, 5)
    assert list(instance_accuracy(d, sd, topk).values()) == [100.0] * 5
    assert list(instance_accuracy(sd, sd2, topk).values()) == [25, 62.5, 75, 100, 100]
    assert instance_ranks(sd, sd2).tolist() == [2, 0, 0, 3, 1, 1, 1, 3]


def test_distances_are_those_of_plain_loops():
    x, y = cloud(11, 5), cloud(11, 5, seed=1)
    labels = torch.tensor([0, 0, 0, 0, 0, 2, 2, 2, 7, 7, 9])  # one class of a single image
    a, b = units(x), units(y)
    expected = np.mean([float((p - q).square().sum()) for p, q in zip(a, b, strict=True)])
    assert alignment(x, y) == pytest.approx(expected)
    of_classes = []
    for kind in (0, 2, 7):
        rows = a[labels == kind]
        pairs = itertools.combinations(rows, 2)
        of_classes.append(np.mean([float((p - q).square().sum()) for p, q in pairs]))
    assert class_alignment(x, labels) == pytest.approx(np.mean(of_classes))
    terms = [math.exp(-3 * float((p - q).square().sum())) for p, q in itertools.combinations(a, 2)]
    assert uniformity(x, temperature=3.0) == pytest.approx(math.log(np.mean(terms)))
    assert math.isnan(class_alignment(x, torch.arange(11))) and math.isnan(uniformity(x[:1]))


@pytest.mark.parametrize("distractors", ["published", "full"])
def test_ranks_are_those_of_a_plain_loop(distractors, monkeypatch):
    q, p = cloud(13, 4), cloud(13, 4, seed=1)
    expected = []
    for i in range(13):

        def near(x, i=i):
            return float(units(q)[i] @ x / x.norm())

        others = [q[j] for j in range(13) if j != i]
        if distractors == "full":
            others += [p[j] for j in range(13) if j != i]
        expected.append(sum(near(x) > near(p[i]) for x in others))
    assert instance_ranks(q, p, distractors).tolist() == expected
    monkeypatch.setattr(lie, "_BLOCK", 30)  # two rows at a time
    assert instance_ranks(q, p, distractors).tolist() == expected


def test_published_distractors_are_no_positives_of_others():
    """Another image's positive lies on the query: only the full variant sees it."""
    q = torch.eye(3)
    p = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.1, 0.0], [0.0, 0.0, 1.0]])
    assert instance_ranks(q, p, "published").tolist() == [0, 0, 0]
    assert instance_ranks(q, p, "full").tolist() == [1, 1, 0]
    elsewhere = p.clone()
    elsewhere[1] = torch.tensor([0.0, 1.0, 5.0])
    before, after = (instance_ranks(cloud(3, 3).float(), x) for x in (p, elsewhere))
    assert before[0] == after[0] and before[2] == after[2]


def test_each_image_weighs_the_same_however_many_are_of_its_class():
    """The published mean over blocks of a class lets the last image count as much as four."""
    _, sd, sd2 = published()
    ranks = instance_ranks(sd[:5], sd2[:5])
    right = (ranks < 1).double()
    theirs = 100 * float(torch.stack([right[:4].mean(), right[4:].mean()]).mean())
    assert instance_accuracy(sd[:5], sd2[:5])[1] == pytest.approx(100 * float(right.mean()))
    assert theirs != pytest.approx(100 * float(right.mean()))


def test_blocks_change_nothing(monkeypatch):
    x = cloud(50, 6)
    whole = uniformity(x)
    monkeypatch.setattr(lie, "_TILE", 7)
    assert uniformity(x) == pytest.approx(whole, rel=1e-12)


def test_collapse_and_an_even_cloud():
    same = torch.ones(9, 6, dtype=torch.float64) * torch.arange(1, 10)[:, None]
    assert uniformity(same) == pytest.approx(0, abs=1e-12)
    assert alignment(same, 2 * same) == pytest.approx(0, abs=1e-12)
    assert effective_rank(same) == pytest.approx(1, abs=1e-6)
    assert feature_std(same) == pytest.approx(0, abs=1e-12)
    assert effective_rank(torch.eye(6)) == pytest.approx(6)
    assert effective_rank(torch.zeros(4, 3)) == 0
    assert feature_std(cloud(20_000, 16)) == pytest.approx(1 / 4, abs=0.002)
    assert uniformity(cloud(2000, 200)) == pytest.approx(-4, abs=0.05)


def test_turning_all_features_changes_nothing():
    x, y = cloud(20, 6), cloud(20, 6, seed=1)
    turn = torch.linalg.qr(cloud(6, 6, seed=2)).Q
    for read in (alignment, lambda a, b: uniformity(a), lambda a, b: effective_rank(a)):
        assert read(x @ turn, y @ turn) == pytest.approx(read(x, y), rel=1e-9)
    assert torch.equal(instance_ranks(x @ turn, y @ turn), instance_ranks(x, y))


def test_three_random_parts_scatter_and_all_pairs_do_not():
    x = cloud(2000, 8)
    parts = [sampled_uniformity(x, seed=seed) for seed in range(8)]
    assert sampled_uniformity(x, seed=3) == parts[3] and len(set(parts)) == 8
    assert np.std(parts) > 0.005 and np.mean(parts) == pytest.approx(uniformity(x), abs=0.03)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    of_one = [uniformity(x[order[k : k + 128]]) for k in (0, 128, 256)]
    assert parts[0] == pytest.approx(np.mean(of_one))


@pytest.mark.parametrize("shape", [(300, 7), (5, 9), (29, 7)])
def test_effective_rank_is_the_entropy_of_singular_values(shape):
    x = cloud(*shape) * torch.arange(1, shape[1] + 1)
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    torch.testing.assert_close(spectrum(x), torch.from_numpy(values))
    shares = [v / sum(values) for v in values]
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(x) == pytest.approx(expected)
    assert effective_rank(x + 100) < effective_rank(x) and effective_rank(3 * x) == (
        pytest.approx(expected)
    )


def test_lidar_is_the_rank_of_what_differs_between_images_beyond_their_views():
    views = cloud(40, 1, 6) * torch.arange(1, 7) + 0.3 * cloud(40, 5, 6, seed=1)
    x = views.numpy()
    centres = x.mean(axis=1)
    between, within = np.zeros((6, 6)), np.zeros((6, 6))
    for n in range(40):
        between += np.outer(centres[n] - centres.mean(0), centres[n] - centres.mean(0)) / 40
        for v in range(5):
            within += np.outer(x[n, v] - centres[n], x[n, v] - centres[n]) / 200
    within += 0.01 * np.eye(6)
    value, vector = np.linalg.eigh(within)
    root = vector @ np.diag(value**-0.5) @ vector.T
    shares = np.linalg.eigvalsh(root @ between @ root)
    shares /= shares.sum()
    assert lidar(views, delta=0.01) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    one_axis = torch.arange(8.0)[:, None, None] * torch.tensor([1.0, 0, 0]) + cloud(8, 4, 3) * 1e-3
    assert lidar(one_axis) == pytest.approx(1, abs=0.05)
