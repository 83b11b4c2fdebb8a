"""Which classes are taken for which: by a plain loop, by scikit-learn, and in results."""

import json

import pytest
import torch
from sklearn.metrics import confusion_matrix, jaccard_score

from firstsight.evaluate import finetune, knn, linear
from firstsight.metrics import class_ious, confused, confusion, worst_classes
from tests.tiny import NETWORK

GENERATOR = torch.Generator().manual_seed(0)
TRUTH = torch.randint(0, 5, (200,), generator=GENERATOR)
FOUND = torch.where(
    torch.rand(200, generator=GENERATOR) < 0.5,
    TRUTH,
    torch.randint(0, 5, (200,), generator=GENERATOR),
)


def test_a_confusion_is_that_of_a_plain_loop_and_of_scikit_learn():
    table = confusion(TRUTH, FOUND, 6)  # of class 5 there is nothing
    for i in range(6):
        for j in range(6):
            pairs = zip(TRUTH.tolist(), FOUND.tolist(), strict=True)
            assert table[i, j] == sum(pair == (i, j) for pair in pairs)
    assert table[:5, :5].tolist() == confusion_matrix(TRUTH, FOUND).tolist()
    ious = class_ious(table)
    expected = 100 * jaccard_score(TRUTH, FOUND, average=None)
    assert ious[:5].tolist() == pytest.approx(expected.tolist()) and ious[5].isnan()


def test_the_worst_classes_come_first_with_what_they_are_taken_for():
    table = torch.tensor([[3, 1, 0, 0], [0, 0, 2, 5], [0, 0, 0, 0], [0, 0, 0, 4]])
    worst = worst_classes(table, ("ant", "bee", "cow", "dog"))
    assert [(w["class"], w["images"], w["top1"], w["taken_for"], w["times"]) for w in worst] == [
        ("bee", 7, 0.0, "dog", 5),
        ("ant", 4, 75.0, "bee", 1),
        ("dog", 4, 100.0, "", 0),
    ]
    assert [w["class"] for w in worst_classes(table, (), most=1)] == ["1"]
    assert confused(table, ())["confusion"] == {
        "classes": ["0", "1", "2", "3"],
        "table": table.tolist(),
    }
    assert "confusion" not in confused(torch.zeros(101, 101), ())


@pytest.mark.parametrize("reading", [knn, linear, finetune])
def test_the_result_of_a_reading_has_its_confusion(reading):
    """Its diagonal is the accuracy; its rows are the images of each class."""
    more = {"k": [5, 9]} if reading is knn else {"epochs": 2}
    more |= {"batch_size": 40} if reading is finetune else {}
    sources = {"train": "scenes:train@40", "test": "scenes:test@30"}
    result = reading(f"random:{NETWORK}", **sources, size=32, device="cpu", **more)
    table = torch.tensor(result["confusion"]["table"])
    top1 = result["best"]["top1"] if reading is knn else result["top1"]
    assert 100 * table.diagonal().sum() / 30 == pytest.approx(top1)
    assert table.sum(dim=1).tolist() == [3] * 10
    worst = [one["top1"] for one in result["worst_classes"]]
    assert worst == sorted(worst) and len(worst) == 10
    assert json.loads(json.dumps(result)) == result
