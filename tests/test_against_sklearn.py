"""The readings beside scikit-learn's own: neighbours, their votes, and logistic regression."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from firstsight.evaluate.linear import cached, prepared, trained
from firstsight.evaluate.protocols import Protocol
from firstsight.features import Seen
from firstsight.metrics import knn_accuracy, knn_predict, nearest
from firstsight.nets.heads import Heads


def clouds(images, seed, classes=4, width=6):
    random = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    centres = np.random.default_rng(99).normal(size=(classes, width))
    return centres[labels] + 1.5 * random.normal(size=(images, width)), labels


TRAIN, TEST = clouds(130, 0), clouds(70, 1)
TENSORS = [torch.from_numpy(part) for part in (*TRAIN, *TEST)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("weighting", ["uniform", "distance", "softmax"])
@pytest.mark.parametrize("k", [1, 4, 25])
def test_neighbours_and_votes_are_those_of_scikit_learn(metric, weighting, k):
    temperature = 0.3

    def softmax(distance):
        closeness = 1 - distance if metric == "cosine" else -distance
        return np.exp(closeness / temperature)

    weights = softmax if weighting == "softmax" else weighting
    other = KNeighborsClassifier(k, weights=weights, metric=metric, algorithm="brute").fit(*TRAIN)
    x, y, u, v = TENSORS
    ((_, index),) = nearest(x, u, k, metric)
    np.testing.assert_array_equal(index.numpy(), other.kneighbors(TEST[0])[1])
    found = knn_predict(x, y, u, k, weighting, temperature, metric)
    np.testing.assert_array_equal(found.numpy(), other.predict(TEST[0]))
    figures = knn_accuracy(x, y, u, v, [k], weighting, temperature, metric)
    assert figures[k]["top1"] == pytest.approx(100 * other.score(*TEST))


def test_a_linear_head_reaches_the_optimum_of_logistic_regression():
    """Ours decays the bias too, as SGD does: there, a column of ones among the features.

    Ours: mean loss + decay / 2 |w|^2; theirs: 1 / 2 |w|^2 + C * sum of losses.
    """
    (x, y, u, v), decay = TENSORS, 0.02
    how = Protocol(augment=False, lr=(0.5,), weight_decay=(decay,), epochs=800, batch_size=len(x))
    heads = Heads(1, x.shape[1], 4, seed=0).double()
    rows = iter(lambda: (x, y), None)
    for _ in trained(heads, how.settings, how, rows, 1, ""):
        pass

    def with_ones(rows):
        return np.hstack([rows, np.ones((len(rows), 1))])

    other = LogisticRegression(
        C=1 / (decay * len(x)), fit_intercept=False, tol=1e-10, max_iter=5000
    ).fit(with_ones(TRAIN[0]), TRAIN[1])
    layer = heads.heads[0]
    ours = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach().numpy()
    np.testing.assert_allclose(ours, other.coef_, atol=1e-6)
    top1 = heads.judged(u, v)[0]["top1"]
    assert top1 == pytest.approx(100 * other.score(with_ones(TEST[0]), TEST[1]))


def test_the_reading_as_it_is_typed_is_logistic_regression_on_standard_features():
    """`evaluate linear` with one setting: 100 epochs of SGD answer as the optimum does."""
    x, y, u, v = TENSORS
    how = Protocol(
        augment=False,
        lr=(0.3,),
        weight_decay=(0.01,),
        epochs=100,
        batch_size=26,
        representation="standard",
    )
    figures = cached(Seen(x.float(), y, u.float(), v), 4, how, seed=0)
    standard = prepared(x, "standard")
    other = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000)
    other.fit(standard(x).numpy(), TRAIN[1])
    expected = 100 * other.score(standard(u).numpy(), TEST[1])
    assert figures["top1"] == pytest.approx(expected, abs=100 / len(u) + 1e-9)  # one test image
