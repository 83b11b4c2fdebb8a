"""Reports of run folders made by hand."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from firstsight.errors import UserError
from firstsight.report import write_report
from firstsight.report.curves import Series, chart, decimated, round_ticks, smoothed

VOID = {"meta", "link", "img", "br", "input", "hr"}
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)
PROTOCOL = {
    "k": 20,
    "temperature": 0.07,
    "weighting": "softmax",
    "classes": 10,
    "train": {"source": "scenes:train", "images": 4000},
    "test": {"source": "scenes:test", "images": 1000},
}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps the text and what the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data


def make_run(
    folder: Path,
    records: list[dict[str, Any]] | None = None,
    finished: bool = True,
    knn: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    folder.mkdir(parents=True)
    config = {"name": "simclr", "data": "scenes:train", "epochs": 4, "batch_size": 32, "size": 64}
    config |= {"probe_images": 500, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    if records is None:
        records = [{"step": 0, "epoch": 0.0, "knn": 31.25}]
        records += [
            {"step": s, "epoch": s / 25, "loss": 5 - s / 50, "lr": 0.1, "odd_scalar": s / 100}
            for s in range(10, 101, 10)
        ]
        records[6]["knn_quick"] = 44.5
        records[-1]["knn"] = 58.75
    (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    if finished:
        summary = {"method": "simclr", "steps": 100, "images": 123456, "seconds": 185.0}
        summary |= {"images_per_second": 667.3, "bad_images": 3}
        summary["knn"] = knn or {"untrained": 31.25, "trained": 58.75, "protocol": PROTOCOL}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(*runs: Path) -> tuple[str, Page]:
    out = write_report(list(runs), runs[0].parent / "report.html")
    text = out.read_text()
    return text, Page(text)


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_a_run_of_one_step_shows_a_point_and_claims_no_change(tmp_path: Path) -> None:
    knn = {"untrained": 12.5, "trained": 12.5, "protocol": PROTOCOL}
    records = [{"step": 1, "epoch": 1.0, "loss": 3.92, "lr": 0.1}]
    text, page = report(make_run(tmp_path / "a", records, finished=False))
    assert "→" not in page.text and "Loss, logged once so far." in page.text
    assert text.count('class="dot') == 2  # of the loss, of the learning rate
    records.append({"step": 2, "epoch": 2.0, "loss": 3.92, "lr": 0.1})
    text, page = report(make_run(tmp_path / "b", records, knn=knn))
    assert "→" not in page.text and "12.5\N{NO-BREAK SPACE}% no change" in page.text
    assert text.count('class="dot') == 4


def test_the_figures_of_a_finished_run_are_there_to_the_digit(tmp_path: Path) -> None:
    _, page = report(make_run(tmp_path / "run"))
    said = words(page)
    for figure in ("31.2 → 58.8 %", "+27.5 points", "123,456", "3 min 5 s", "667"):
        assert figure in said
    for figure in ("31.25", "58.75", "44.50"):  # the table has them in full
        assert figure in said
    assert "its 20 nearest neighbours among 4,000 labelled images of scenes:train" in said
    assert "Guessing would get 10 %" in said
    assert "Not finished" not in said
    assert said.count("Unreadable") == 1 and "Unreadable3" in said.replace(" ", "")


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data="http://example.org/x.zip")
    (run / "pictures").mkdir()
    (run / "pictures" / "views.png").write_bytes(PIXEL)
    text, page = report(run)
    for _, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "xlink:href"):
            assert (attributes.get(name) or "data:").startswith("data:")
    style = re.search(r"<style>(.*)</style>", text, re.S)
    assert style and "url(" not in style[1] and "@import" not in style[1]
    assert not {"script", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert any(tag == "img" and attributes.get("alt") for tag, attributes in page.tags)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    evil = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'&"
    knn = {"untrained": 1.0, "trained": 2.0, "protocol": {evil: evil, "k": evil, "test": evil}}
    records = [{"step": 1, "epoch": 0.1, "loss": 1.0, evil: 2.0}]
    run = make_run(tmp_path / "a<b>&c", records, knn=knn, data=evil, name=evil, backbone=evil)
    (run / "pictures").mkdir()
    (run / "pictures" / "views.png").write_bytes(PIXEL)
    (run / "pictures" / "x<y>.png").write_bytes(PIXEL)
    (run / "pictures" / "captions.json").write_text(json.dumps({"views": evil}))
    (run / "backbone.json").write_text(json.dumps({"width": evil, "mean": [evil], "std": [1]}))
    for runs in ([run], [run, make_run(tmp_path / "other")]):
        text, page = report(*runs)
        assert "<script" not in text
        assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
        assert {tag for tag, _ in page.tags}.isdisjoint({"script", "b>", "y"})
        assert "alert(1)" in page.text


def test_a_run_in_progress_says_how_far_it_is(tmp_path: Path) -> None:
    records = [{"step": 0, "epoch": 0.0, "knn": 31.25}]
    records += [
        {"step": s, "epoch": s / 25, "loss": 4.0, "images_per_second": 50.0}
        for s in range(5, 41, 5)
    ]
    records[-1]["knn_quick"] = 40.0
    run = make_run(tmp_path / "run", records, finished=False)
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 45, "lo')  # being written right now
    said = words(report(run)[1])
    assert "Not finished: step 40 of 100" in said
    assert "31.2 → 40.0 %" in said and "a quick reading" in said
    assert "points" not in said  # two protocols: no gain is claimed
    assert "1,280" in said  # images: 40 steps of 32


@pytest.mark.parametrize(
    "records",
    [
        [],
        [{"step": 0, "epoch": 0.0, "knn": 12.5}],
        [{"step": 7, "epoch": 0.0, "loss": 3.0}],
        [{"step": s, "epoch": s, "loss": math.nan, "lr": None} for s in range(3)],
        [{"step": s, "epoch": s, "loss": [1.0, math.nan, 2.0, math.inf][s]} for s in range(4)],
        [{"step": 5, "epoch": 0.1, "loss": "much", "lr": True, "x": {}}],
        ["no record", {"loss": 1.0}, {"step": None}],
    ],
)
def test_odd_logs_still_give_a_page(tmp_path: Path, records: list[Any]) -> None:
    run = make_run(tmp_path / "run", records, finished=False)
    text, _ = report(run)
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"<style>.*</style>", "", text, flags=re.S))
    report(run, make_run(tmp_path / "other"))


def test_two_runs_compare(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    knn = {"untrained": 31.25, "trained": 71.25, "protocol": PROTOCOL}
    second = make_run(tmp_path / "second", batch_size=64, knn=knn)
    text, page = report(first, second)
    said = words(page)
    assert "2 runs compared" in said and "+40.0" in said
    assert "<strong>71.2</strong>" in text and "<strong>58.8</strong>" not in text
    differing = text[
        text.index("Settings that differ") : text.index("<details>", text.index("Settings that"))
    ]
    assert re.findall(r'<th scope="row"><code>([^<]*)', differing) == ["batch-size"]
    loss = text[text.index("<h3>Loss") : text.index("<h3>k-NN")]
    assert 'class="line c0"' in loss and 'class="line c1"' in loss
    assert "do not compare" not in said


def test_several_runs_compare_by_the_clock_and_reading_against_reading(tmp_path: Path) -> None:
    """Step 100 of 32 images is done after 3,200 / 667.3 seconds; half as fast, twice as late."""
    runs = [make_run(tmp_path / name) for name in ("quick", "slow")]
    for run, linear, rate in zip(runs, (61.5, 64.25), (667.3, 333.65), strict=True):
        summary = json.loads((run / "summary.json").read_text())
        summary |= {"linear": {"top1": linear, "protocol": {}}, "images_per_second": rate}
        (run / "summary.json").write_text(json.dumps(summary))
    text, page = report(*runs)
    assert "k-NN accuracy by the clock" in text and "Linear classifier against k-NN" in text
    assert "quick, second 5: 58.8" in text and "slow, second 10: 58.8" in text
    assert "quick, k-NN percent 59: 61.5" in text and "slow, k-NN percent 59: 64.2" in text
    assert "Linear, %" in words(page) and "64.2" in words(page)
    alone, _ = report(runs[0])
    assert "by the clock" not in alone and "against k-NN" not in alone


def test_the_worst_classes_of_the_last_snapshot_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    worst = {"class": "<cat>", "images": 8, "top1": 12.5, "taken_for": "dog", "times": 7}
    last = {"step": 90, "top1": 55.0, "worst_classes": [worst]}
    last["confusion"] = {"classes": ["<cat>", "dog"], "table": [[1, 7], [0, 8]]}
    (run / "readings").mkdir()
    (run / "readings" / "knn.json").write_text(json.dumps([{"step": 10, "top1": 30.0}, last]))
    text, page = report(run)
    said = words(page)
    assert "Classes found least often, knn at step 90" in said and "<cat>" not in text
    assert "<cat> 12.5 8 dog (7)" in " ".join(re.sub("<[^>]+>", " ", text).split()).replace(
        "&lt;cat&gt;", "<cat>"
    )
    assert "Confusion of knn" in said and "88%, transparent" in text  # 7 of 8


def keep(run: Path, name: str, **result: Any) -> None:
    folder = run / "readings" / "last"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"protocol": {}, "step": 100, **result}))


def test_readings_of_runs_stand_in_one_table_and_against_each_other(tmp_path: Path) -> None:
    """Those of training and those taken since; what was read differently is marked."""
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run, top1, rank in zip(runs, (51.5, 62.25), (20.5, 33.75), strict=True):
        keep(run, "linear", top1=top1, sweep=[1, 2], protocol={"checkpoint": str(run)})
        keep(run, "diagnose", effective_rank=rank, uniformity={"d": -2.5}, alignment={"d-sd": 0.5})
    keep(runs[0], "dense", linear={"mean_iou": 12.25}, protocol={"checkpoint": "a"})
    text, page = report(*runs)
    table = text[text.index("<caption>All readings") : text.index("</table>", text.index("All r"))]
    rows = re.findall(r'<th scope="row">([^<]*).*?</th>(.*?)</tr>', table)
    found = {name: re.findall(r"<td[^>]*>([^<]*)", cells) for name, cells in rows}
    assert found["linear by evaluate"] == ["51.5", "62.2"] and found["k-NN"] == ["58.8", "58.8"]
    assert found["effective rank"] == ["20.5", "33.8"]
    assert found["mean IoU of cells, linear"] == ["12.2", "\N{EN DASH}"]
    assert "differs" not in table
    assert "a, k-NN percent 59: 51.5" in text and "b, k-NN percent 59: 62.2" in text
    assert "Effective rank against k-NN" in text and "IoU of cells, linear against" not in text
    assert "All of diagnose" in words(page)
    keep(runs[1], "linear", top1=62.25, protocol={"checkpoint": str(runs[1]), "epochs": 5})
    assert re.search(r"linear by evaluate <span class=.mark.>differs", report(*runs)[0])
    alone, _ = report(runs[0])
    assert '<th scope="row">linear by evaluate</th>' in alone and "against k-NN" not in alone
    assert "All readings" not in report(make_run(tmp_path / "c"))[0]


def test_readings_of_snapshots_compare_by_the_clock(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    for run, scale in zip(runs, (1, 2), strict=True):
        (run / "readings").mkdir()
        ranks = [{"step": s, "effective_rank": scale * s / 10} for s in (50, 100)]
        (run / "readings" / "diagnose.json").write_text(json.dumps(ranks))
    text, _ = report(*runs)
    assert "<h3>Effective rank by the clock</h3>" in text and "b, second 5: 20.0" in text
    assert "Effective rank by the clock" not in report(runs[0])[0]


def test_the_newest_reading_counts_wherever_it_lies(tmp_path: Path) -> None:
    """Of the run itself, unless snapshots were read later; of equal steps that of the run."""
    run = make_run(tmp_path / "run")
    keep(run, "linear", step=100, top1=51.5)
    shown = '<th scope="row">linear by evaluate</th><td class="n">'
    for step, top1, expected in ((90, 40.25, "51.5"), (100, 40.25, "51.5"), (110, 40.25, "40.2")):
        over = [{"step": step, "top1": top1}]
        (run / "readings" / "linear.json").write_text(json.dumps(over))
        assert shown + expected in report(run)[0]
    (run / "readings" / "last" / "linear.json").write_text("{}")
    with pytest.raises(UserError, match=r"last/linear.json is damaged \(no step"):
        report(run)


def test_the_worst_classes_of_a_plain_reading_are_shown_of_each_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    worst = {"class": "cat", "images": 8, "top1": 12.5, "taken_for": "dog", "times": 7}
    for run in runs:
        table = {"classes": ["cat", "dog"], "table": [[1, 7], [0, 8]]}
        keep(run, "finetune", top1=55.0, worst_classes=[worst], confusion=table)
    said = words(report(*runs)[1])
    for name in ("a", "b"):
        assert f"Classes found least often, {name}, finetune at step 100" in said
        assert f"Confusion of {name}, finetune" in said
    assert "Classes found least often, finetune at step 100" in words(report(runs[0])[1])


def test_runs_read_by_different_protocols_are_not_compared_silently(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first")
    knn = {"untrained": 1.0, "trained": 2.0, "protocol": {**PROTOCOL, "k": 200}}
    said = words(report(first, make_run(tmp_path / "second", knn=knn))[1])
    assert "The protocols differ (k), so the figures do not compare directly" in said
    assert "where the runs differProtocolfirstsecond k differs20200 How k-NN was read" in said
    assert said.count("temperature0.07") == 1 and "ProtocolAll runs temperature0.07" in said


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    said = words(report(one, two)[1])
    assert str(one) in said and str(two) in said


def test_only_what_differs_from_the_defaults_is_on_top(tmp_path: Path) -> None:
    text, _ = report(make_run(tmp_path / "run", weight_decay=1e-6, views={"flip": 0.25}, workers=7))
    top = text[text.index("<h2>Settings") : text.index("<details>", text.index("<h2>Settings"))]
    names = re.findall(r'<th scope="row"><code>([^<]*)', top)
    assert names == ["batch-size", "data", "epochs", "probe-images", "size", "views.flip"]
    assert "<code>0.25</code></td><td><code>0.5</code>" in top


def test_each_unknown_scalar_gets_a_curve(tmp_path: Path) -> None:
    text, _ = report(make_run(tmp_path / "run"))
    assert "<h3>Odd scalar</h3>" in text and "<h3>Epoch</h3>" not in text


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder .*config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
    run = make_run(tmp_path / "run")
    (run / "summary.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        write_report([run], tmp_path / "report.html")
    assert list(tmp_path.glob("*.html")) == []


def test_a_report_does_not_wait_for_torch() -> None:
    code = "import sys, firstsight.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def figures_of(drawn: str) -> list[tuple[float, float]]:
    """The points of the last curve, read back from the drawing through two ticks of its axis."""
    ticks = re.findall(r'<span class="y" style="top:([\d.]+)%">([^<]*)', drawn)
    (top, high), (bottom, low) = [(float(p) / 100, float(t)) for p, t in (ticks[0], ticks[-1])]
    x_ticks = re.findall(r'<span class="x[^"]*" style="left:([\d.]+)%">([\d,]+)', drawn)
    place, step = float(x_ticks[-1][0]) / 100, float(x_ticks[-1][1].replace(",", ""))
    path = re.findall(r'<path class="line c\d" d="([^"]*)"', drawn)[-1]
    pairs = re.findall(r"[ML]([\d.]+) ([\d.]+)", path)
    return [
        (
            float(x) / 1000 / place * step,
            high + (float(y) / 1000 - top) / (bottom - top) * (low - high),
        )
        for x, y in pairs
    ]


def test_a_curve_lies_where_its_numbers_say() -> None:
    points = [(0.0, 31.25), (500.0, 44.0), (1860.0, 58.75)]
    drawn = chart("k-NN", [Series(label="r", colour=0, points=points)], marked=True)
    for (x, y), (step, value) in zip(figures_of(drawn), points, strict=True):
        assert x == pytest.approx(step, abs=1.0)
        assert y == pytest.approx(value, abs=0.05)
    assert drawn.count('class="dot') == 3 and drawn.count('class="hole"') == 0


def test_a_gap_is_left_where_a_value_is_not_a_number() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, math.nan), (4.0, 2.0), (5.0, 1.0)]
    drawn = chart("x", [Series(label="r", colour=0, points=points)])
    assert re.search(r'class="line c0" d="M[^M]*M[^M]*"', drawn)


def test_decimating_keeps_the_ends_the_spikes_and_the_gaps() -> None:
    points = [(float(i), 1.0 + (i == 5003) * 9 - (i == 700) * 5) for i in range(10_000)]
    points[2001] = (2001.0, math.nan)
    kept = decimated(points)
    assert len(kept) <= 402
    assert (
        kept[0] == points[0] and kept[-1] == points[-1] and kept == sorted(kept, key=lambda p: p[0])
    )
    assert {10.0, -4.0} <= {value for _, value in kept}
    assert any(math.isnan(value) for _, value in kept)


def test_the_trend_does_not_bend_a_straight_line() -> None:
    line = [(float(i), 3.0 * i) for i in range(200)]
    assert [v for _, v in smoothed(line)] == pytest.approx([v for _, v in line])


def test_the_trend_of_a_long_log_is_short_and_keeps_its_level() -> None:
    noisy = [(float(i), 2.0 + (-1) ** i) for i in range(50_000)]
    trend = smoothed(noisy)
    assert len(trend) < 1000
    assert all(value == pytest.approx(2.0, abs=0.02) for _, value in trend)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (31.2, 58.2, [30, 40, 50, 60]),
        (0, 0.015, [0, 0.005, 0.01, 0.015]),
        (2.1, 4.9, [2, 3, 4, 5]),
        (0, 1e-5, [0, 2.5e-6, 5e-6, 7.5e-6, 1e-5]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(ticks)


def test_a_flat_curve_has_an_axis() -> None:
    for value in (0.0, 5.0, -3.0, 1e-9):
        ticks = round_ticks(value, value)
        assert ticks[0] < value < ticks[-1]
