import itertools
import statistics

import numpy as np
import pytest
import torch

from firstsight import metrics
from firstsight.metrics import knn_accuracy, knn_predict, nearest, neighbours, represented


def published():
    scale = torch.linspace(0.5, 2, 12, dtype=torch.float64)[:, None]
    train = torch.sin(0.61 * torch.arange(36, dtype=torch.float64) + 0.2).reshape(12, 3) * scale
    test = torch.cos(0.47 * torch.arange(18, dtype=torch.float64) - 0.1).reshape(6, 3)
    return train, torch.arange(12) % 3, test


@pytest.mark.parametrize(
    ("k", "expected"),
    [(1, "122011"), (3, "120010"), (5, "120010"), (7, "100011")],
)
def test_plain_votes_by_euclidean_distance_equal_the_published_vector(k, expected):
    train, labels, test = published()
    got = knn_predict(train, labels, test, k, weighting="uniform", metric="euclidean")
    assert "".join(map(str, got.tolist())) == expected


@pytest.mark.parametrize(("k", "expected"), [(1, "120011"), (3, "120012"), (5, "120011")])
def test_plain_votes_by_cosine_equal_the_published_vector_of_unit_vectors(k, expected):
    train, labels, test = published()
    got = knn_predict(train, labels, test, k, weighting="uniform", metric="cosine")
    assert "".join(map(str, got.tolist())) == expected


def test_weighted_votes_equal_the_published_accuracy():
    def wave(count, phase):
        x = torch.sin(0.37 * torch.arange(count * 6, dtype=torch.float64) + phase)
        return x.reshape(count, 6)

    figures = knn_accuracy(
        wave(12, 0.1), torch.arange(12) % 6, wave(100, 0.7), torch.arange(100) % 6, [5]
    )
    assert figures[5]["top1"] == 15.0


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("weighting", ["softmax", "distance", "uniform"])
def test_votes_equal_a_plain_loop(metric, weighting):
    generator = np.random.default_rng(0)
    train, test = generator.normal(size=(40, 5)), generator.normal(size=(25, 5))
    labels = generator.integers(0, 4, 40)
    expected = []
    for query in test:
        if metric == "cosine":
            near = train @ query / np.linalg.norm(train, axis=1) / np.linalg.norm(query)
            distance = 1 - near
        else:
            distance = np.linalg.norm(train - query, axis=1)
            near = -distance
        summed = np.zeros(4)
        for i in np.argsort(-near)[:7]:
            weight = {"softmax": np.exp(near[i] / 0.07), "distance": 1 / distance[i], "uniform": 1}
            summed[labels[i]] += weight[weighting]
        expected.append(int(np.argmax(summed)))
    got = knn_predict(
        torch.tensor(train), torch.tensor(labels), torch.tensor(test), 7, weighting, 0.07, metric
    )
    assert got.tolist() == expected


def test_equal_votes_go_to_the_lowest_label():
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    got = knn_predict(train, torch.tensor([2, 1, 0]), torch.tensor([[1.0, 0.0]]), 3, "uniform")
    assert got.tolist() == [0]


def test_blocks_do_not_change_what_is_near(monkeypatch):
    torch.manual_seed(0)
    train, test = torch.randn(50, 4), torch.randn(33, 4)
    whole = torch.cat([index for _, index in nearest(train, test, 5)])
    monkeypatch.setattr(neighbours, "_CHUNK_BYTES", 4 * 50 * 2)  # two rows at a time
    monkeypatch.setattr(neighbours, "_ROWS", 1)
    blocks = [index for _, index in nearest(train, test, 5)]
    assert max(map(len, blocks)) == 2
    assert torch.equal(torch.cat(blocks), whole)


def test_every_k_in_one_pass_is_each_k_alone():
    torch.manual_seed(0)
    train, test = torch.randn(60, 4), torch.randn(30, 4)
    labels, truth = torch.arange(60) % 7, torch.arange(30) % 7
    together = knn_accuracy(train, labels, test, truth, [1, 5, 20])
    for k in (1, 5, 20):
        assert knn_accuracy(train, labels, test, truth, [k])[k] == together[k]
    assert together[20]["top5"] >= together[20]["top1"]


def test_few_images_few_classes_and_a_large_k_work():
    train = torch.eye(3)
    figures = knn_accuracy(train, torch.tensor([0, 1, 1]), train, torch.tensor([0, 1, 1]), [200])
    assert figures[200]["top5"] == 100.0


def test_a_small_temperature_does_not_overflow():
    train, test = torch.eye(3), torch.eye(3)
    got = knn_predict(train, torch.arange(3), test, 3, temperature=1e-4)
    assert got.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("k", "expected"), [(1, "011"), (3, "012"), (5, "011"), (7, "011")])
def test_unit_vectors_by_euclidean_distance_equal_the_published_vector(k, expected):
    train, labels, test = published()
    train, test = represented(train, test, "norm")
    got = knn_predict(train, labels, test, k, weighting="uniform", metric="euclidean")
    assert "".join(map(str, got.tolist())) == "120" + expected


@pytest.mark.parametrize(
    ("k", "expected"), [(1, "120011"), (3, "120012"), (5, "120011"), (7, "100011")]
)
def test_shifted_by_the_mean_of_one_batch_equals_the_published_vector(k, expected):
    train, labels, test = published()
    shifted = represented(train, test, "shift-norm", batch_size=12)
    got = knn_predict(shifted[0], labels, shifted[1], k, weighting="uniform", metric="euclidean")
    assert "".join(map(str, got.tolist())) == expected


def test_shifted_by_the_mean_of_the_training_set_no_batch_matters():
    """The published mean of the batch makes a figure of batch size and seed; ours has neither."""
    train, _, test = published()
    ours = represented(train, test, "shift-norm", seed=5)
    mean = train.mean(dim=0)
    for got, x in zip(ours, (train, test), strict=True):
        by_hand = [(row - mean) / (row - mean).norm() for row in x]
        torch.testing.assert_close(got, torch.stack(by_hand))
    theirs = [
        represented(train, test, "shift-norm", size, seed)[0] for size in (3, 4) for seed in (0, 1)
    ]
    assert not any(torch.equal(x, y) for x, y in itertools.combinations(theirs, 2))


def test_only_unit_vectors_do_not_care_for_scale():
    train, labels, test = published()
    scale = torch.linspace(3, 0.1, 12, dtype=torch.float64)[:, None]

    def read(x, representation):
        x, y = represented(x, test, representation)
        return knn_predict(x, labels, y, 3, "uniform", metric="euclidean").tolist()

    assert read(train, "norm") == read(train * scale, "norm")
    assert read(train, "original") != read(train * scale, "original")


def test_of_equally_near_rows_the_first_are_taken_and_come_first():
    train = torch.tensor([[1.0, 0.0]] * 30 + [[0.0, 1.0]] * 30)[torch.arange(60) * 7 % 60]
    closeness, index = next(iter(nearest(train, torch.tensor([[1.0, 0.0]]), 4)))
    first = [i for i in range(60) if train[i, 0] == 1][:4]
    assert index.tolist() == [first] and closeness.tolist() == [[1.0] * 4]
    assert next(iter(nearest(train, train[:1], 60)))[1][0].tolist() == sorted(
        range(60), key=lambda i: (-train[i] @ train[0], i)
    )


@pytest.mark.parametrize("columns", [7, 61, 403])
def test_the_largest_of_long_rows_are_those_of_a_plain_sort(columns):
    """Few values, so that equals lie at every place; and values that are all different."""
    generator = torch.Generator().manual_seed(columns)
    few = torch.randint(0, 9, (20, columns), generator=generator).float()
    for rows in (few, torch.rand(20, columns, generator=generator), few * 0):
        for k in (1, 6, columns):
            values, index = neighbours._first(rows, k)
            for row, value, place in zip(
                *map(torch.Tensor.tolist, (rows, values, index)), strict=True
            ):
                expected = sorted(range(columns), key=lambda i: (-row[i], i))[:k]
                assert place == expected and value == [row[i] for i in expected]


def test_a_row_that_must_not_find_itself_finds_the_others():
    torch.manual_seed(0)
    x = torch.randn(9, 3)
    found = next(iter(nearest(x, x[[4, 2]], 20, own=torch.tensor([4, 2]))))[1]
    assert found.shape == (2, 8)
    assert sorted(found[0].tolist()) == [i for i in range(9) if i != 4]
    assert 2 not in found[1]


def test_spread_tells_collapse_from_an_even_cloud():
    torch.manual_seed(0)
    assert metrics.spread(torch.randn(20_000, 16)).item() == pytest.approx(1, abs=0.01)
    assert metrics.spread(torch.ones(9, 16) * torch.rand(9, 1)).item() == pytest.approx(0, abs=1e-6)
    x = torch.tensor([[3.0, 4.0], [4.0, 3.0], [5.0, 0.0]], dtype=torch.float64)
    units = [[0.6, 0.8], [0.8, 0.6], [1.0, 0.0]]
    by_hand = sum(statistics.stdev(row[d] for row in units) for d in range(2)) / 2 * 2**0.5
    assert metrics.spread(x).item() == pytest.approx(by_hand, abs=1e-12)
