"""What a report says of a run in a sentence, from files made by hand."""

import json

import pytest

from firstsight.report.answers import checkpoint, collapsed, learning
from firstsight.report.read import read_runs
from tests.test_report import PROTOCOL, make_run, report


def run_of(folder, untrained=31.25, trained=58.75, readings=(), **scalars):
    knn = {"untrained": untrained, "trained": trained, "protocol": PROTOCOL}
    records = [{"step": 0, "epoch": 0.0, "knn": untrained}]
    records.append({"step": 100, "epoch": 4.0, "loss": 3.0, "knn": trained, **scalars})
    make_run(folder, records, knn=knn)
    if readings:
        (folder / "readings").mkdir()
        points = [{"step": step, "top1": top1} for step, top1 in readings]
        (folder / "readings" / "knn.json").write_text(json.dumps(points))
    return read_runs([folder])[0]


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        (58.75, "Yes: k-NN went from 31.2 % untrained to 58.8 %."),
        (33.0, "Not visibly"),  # of 1,000 test images, 3 points are chance
        (20.0, "No, it unlearns"),
    ],
)
def test_learning_is_a_gain_beyond_chance(tmp_path, trained, said):
    assert learning(run_of(tmp_path / "run", trained=trained)).startswith(said)


def test_without_readings_learning_is_not_claimed(tmp_path):
    records = [{"step": 1, "epoch": 0.1, "loss": 5.0}, {"step": 9, "epoch": 0.9, "loss": 1.0}]
    run = read_runs([make_run(tmp_path / "run", records, finished=False)])[0]
    assert learning(run).startswith("Not measured") and collapsed(run).startswith("Not measured")


def test_collapse_is_told_by_the_spread_or_by_guessing(tmp_path):
    assert collapsed(run_of(tmp_path / "a", embedding_spread=0.001)).startswith("Yes")
    assert collapsed(run_of(tmp_path / "b", embedding_spread=0.9)).startswith("No: embeddings")
    assert collapsed(run_of(tmp_path / "c")).startswith("No: k-NN, 58.8 %")
    assert collapsed(run_of(tmp_path / "d", trained=11.0)).startswith("Perhaps")


def test_an_earlier_snapshot_is_advised_only_beyond_chance(tmp_path):
    better = run_of(tmp_path / "a", readings=[(20, 50.0), (60, 64.0), (100, 58.0)])
    assert checkpoint(better).startswith("The snapshot of step 60: k-NN at its best k is 64.0 %")
    assert "flatters" in checkpoint(better)
    alike = run_of(tmp_path / "b", readings=[(20, 50.0), (60, 59.0), (100, 58.0)])
    assert checkpoint(alike).startswith("The last: none of 3 snapshots")
    assert "--snapshots" in checkpoint(run_of(tmp_path / "c"))


def test_readings_of_snapshots_answer_where_nothing_was_read_beside_the_run(tmp_path):
    """Each by its own number of test images: two standard errors of 600 are 4 points, of 60 13."""

    def run(name, points, images):
        folder = make_run(tmp_path / f"{name}-{images}", [{"step": 100, "loss": 1.0}], False)
        results = [
            {
                "step": step,
                "top1": top1,
                "images": {"test": images},
                "protocol": {"test": "val"} if images == 600 else {},
            }
            for step, top1 in points
        ]
        (folder / "readings").mkdir()
        (folder / "readings" / f"{name}.json").write_text(json.dumps(results))
        return read_runs([folder])[0]

    points = [(10, 30.0), (50, 48.0), (100, 40.0)]
    many, few = run("linear", points, 600), run("linear", points, 60)
    assert learning(many) == "Yes: linear by evaluate on val went from 30.0 % at step 10 to 40.0 %."
    assert learning(few).startswith("Not visibly") and "12.6 points" in learning(few)
    assert checkpoint(many).startswith(
        "The snapshot of step 50: linear by evaluate on val is 48.0 %"
    )
    assert checkpoint(few).startswith("The last: none of 3 snapshots")
    # telling images apart is what was trained: that no label judges, so it answers nothing
    pretext = [{"step": step, "d-sd": {"1": 9.0 * step}} for step in (1, 5, 10)]
    folder = tmp_path / "linear-600"
    (folder / "readings" / "linear.json").unlink()
    (folder / "readings" / "instance.json").write_text(json.dumps(pretext))
    assert learning(read_runs([folder])[0]).startswith("Not measured")
    assert checkpoint(read_runs([folder])[0]).startswith("The last, for want")


def test_diagnose_answers_without_labels(tmp_path):
    folder = make_run(tmp_path / "run", [{"step": 100, "loss": 1.0}], finished=False)
    (folder / "readings" / "last").mkdir(parents=True)
    health = {"collapse": "none", "effective_rank": 31.25, "spectrum": [1.0] * 64}

    def over(*ranks):
        results = [{**health, "step": 10 * i, "effective_rank": r} for i, r in enumerate(ranks)]
        (folder / "readings" / "diagnose.json").write_text(json.dumps(results))
        return read_runs([folder])[0]

    run = over(10.0, 40.0, 31.25)
    assert collapsed(run).startswith("No: images differ, in about 31.2 of 64 dimensions, as")
    assert checkpoint(run).startswith("Perhaps the snapshot of step 10: its effective rank is 40")
    assert checkpoint(over(10.0, 34.0, 31.25)).startswith("The last: no snapshot has a clearly")
    said = {**health, "collapse": "complete: all images look alike (spread 0.001)", "step": 90}
    (folder / "readings" / "last" / "diagnose.json").write_text(json.dumps(said))
    assert collapsed(over(10.0, 12.0)).startswith("Yes, complete: all images look alike")


def test_the_page_says_once_what_holds_for_several_runs(tmp_path):
    _, page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert page.text.count("Has it collapsed?") == page.text.count("Yes: k-NN went from") == 1
    knn = {"untrained": 9.0, "trained": 9.0, "protocol": PROTOCOL}
    _, page = report(tmp_path / "a", tmp_path / "b", make_run(tmp_path / "c", knn=knn))
    assert "a, b: Yes: k-NN went from 31.2 % untrained" in page.text
    assert "c: Not visibly: k-NN stayed at 9.0 %, within" in page.text
