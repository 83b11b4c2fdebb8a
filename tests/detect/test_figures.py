"""COCO's and VOC's figures against plain loops, against COCO's own code, and where they end."""

import functools
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest

from firstsight.detect.annotations import open_annotated
from firstsight.detect.figures import figures, tabled
from firstsight.detect.masks import bitmap, encode
from firstsight.detect.voc_figures import voc_average_precision, voc_figures
from firstsight.errors import UserError
from tests.detect.sets import detections, drawn, images, objects

COCO = Path(__file__).resolve().parents[3] / "shared/data/coco"
SIZES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


# COCO's definition as loops over lists of objects: (box or bitmap, label, crowd, area)


def box_overlap(a, b, crowd):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    own = (a[2] - a[0]) * (a[3] - a[1])
    return shared / (own if crowd else own + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def mask_overlap(a, b, crowd):
    shared = (a & b).sum()
    total = a.sum() if crowd else (a | b).sum()
    return shared / total if total else 0.0


def matched(found, marked, overlap, limit, size):
    """(score, right, counted) of each detection of one class in one image; objects to be found."""
    low, high = size
    aside = [crowd or not low <= area <= high for _, crowd, area in marked]
    order = sorted(range(len(marked)), key=lambda i: aside[i])
    taken, rows = set(), []
    for shape, score, area in found:
        best, claimed = min(limit, 1 - 1e-10), None
        for i in order:
            crowd = marked[i][1]
            if i in taken and not crowd:
                continue
            if claimed is not None and not aside[claimed] and aside[i]:
                break
            value = overlap(shape, marked[i][0], crowd)
            if value >= best:
                best, claimed = value, i
        if claimed is None:
            rows.append((score, False, low <= area <= high))
        else:
            taken.add(claimed)
            rows.append((score, True, not aside[claimed]))
    return rows, len(marked) - sum(aside)


def average(rows, wanted):
    """AP and recall of one class at one overlap; None where there is nothing to be found."""
    if not wanted:
        return None
    rows = sorted((row for row in rows if row[2]), key=lambda row: -row[0])
    precision, recall, right = [], [], 0
    for n, (_, hit, _) in enumerate(rows, start=1):
        right += hit
        precision.append(right / n)
        recall.append(right / wanted)
    total = 0.0
    for at in np.linspace(0, 1, 101):
        total += max((p for p, r in zip(precision, recall, strict=True) if r >= at), default=0)
    return total / 101, recall[-1] if recall else 0.0


def by_loops(truth, found, kind):
    marks = [shapes(picture, kind) for picture in truth.pictures]
    finds = [detected(one, kind) for one in found]
    overlap = functools.cache(numbered_overlap(marks, finds, kind))

    def read(limits, size, most):
        each = []
        for label in range(len(truth.categories)):
            for limit in limits:
                rows, wanted = [], 0
                for i in range(len(found)):
                    marked = [((i, j), *m[2:]) for j, m in enumerate(marks[i]) if m[0] == label]
                    mine = [((i, n), *f[2:]) for n, f in enumerate(finds[i]) if f[0] == label]
                    mine = sorted(mine, key=lambda f: -f[1])[:most]
                    more, count = matched(mine, marked, overlap, limit, size)
                    rows, wanted = rows + more, wanted + count
                each.append(average(rows, wanted))
        return [pair for pair in each if pair is not None]

    def mean(pairs, which):
        return 100 * float(np.mean([pair[which] for pair in pairs])) if pairs else None

    limits = np.linspace(0.5, 0.95, 10)
    expected = {f"AP{name}": mean(read(limits, size, 100), 0) for name, size in SIZES.items()}
    expected |= {f"AR{name}": mean(read(limits, size, 100), 1) for name, size in SIZES.items()}
    del expected["AR"]
    expected |= {f"AR{most}": mean(read(limits, SIZES[""], most), 1) for most in (1, 10, 100)}
    expected |= {f"AP{n}": mean(read([n / 100], SIZES[""], 100), 0) for n in (50, 75)}
    return expected


def numbered_overlap(marks, finds, kind):
    function = box_overlap if kind == "bbox" else mask_overlap
    return lambda a, b, crowd: function(finds[a[0]][a[1]][1], marks[b[0]][b[1]][1], crowd)


def shapes(picture, kind):
    own = picture.objects
    drawn_ = [bitmap(m, picture.height, picture.width) for m in own.masks]
    which = own.boxes.astype(np.float64) if kind == "bbox" else drawn_
    aside = own.crowd | own.difficult
    return list(zip(own.labels, which, aside, own.area.astype(float), strict=True))


def detected(one, kind):
    if kind == "bbox":
        which = one.boxes.astype(np.float64)
        areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in which]
    else:
        which = [bitmap(m, *m["size"]) for m in one.masks]
        areas = [m.sum() for m in which]
    return list(zip(one.labels, which, one.scores.astype(float), areas, strict=True))


@pytest.fixture(scope="module")
def masked():
    return drawn(seed=3, count=5, masks=True)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_figures_are_those_of_plain_loops_and_of_pycocotools(masked, kind):
    truth, found = masked
    expected = by_loops(truth, found, kind)
    for official in (False, True):
        shown = figures(truth, found, official=official)[kind]
        assert list(shown) == NAMES
        for name, value in expected.items():
            assert shown[name] == pytest.approx(value, abs=1e-9), name


def test_a_class_has_the_figures_it_would_have_alone(masked):
    truth, found = masked
    rows = figures(truth, found)["per_class"]
    assert [row["name"] for row in rows] == list("abcd")
    for label, row in enumerate(rows[:3]):
        alone = figures(only(truth, label), [of_label(one, label) for one in found])
        for kind in ("bbox", "segm"):
            for name in ("AP", "AP50", "AP75", "AR100"):
                assert row[kind][name] == pytest.approx(alone[kind][name], abs=1e-9)
        marked = sum(((p.objects.labels == label) & ~p.objects.crowd).sum() for p in truth.pictures)
        assert row["objects"] == marked
    # found, and never there
    assert rows[3]["objects"] == 0 and set(rows[3]["bbox"].values()) == {None}


def only(truth, label):
    each = [p.objects for p in truth.pictures]
    kept = [np.flatnonzero(one.labels == label) for one in each]
    return images(
        *(
            objects(o.boxes[k], o.labels[k], crowd=o.crowd[k], masks=[o.masks[i] for i in k])
            for o, k in zip(each, kept, strict=True)
        ),
        classes=4,
    )


def of_label(one, label):
    k = np.flatnonzero(one.labels == label)
    masks = tuple(one.masks[i] for i in k)
    return detections(one.boxes[k], one.scores[k], one.labels[k], masks)


def test_official_is_what_pycocotools_itself_summarizes(masked, tmp_path):
    """From files, as people use it: our rows are not involved."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, found = masked
    rows = []
    for picture in truth.pictures:
        o = picture.objects
        for box, label, crowd, area in zip(o.boxes, o.labels, o.crowd, o.area, strict=True):
            x1, y1, x2, y2 = box.astype(float).tolist()
            rows.append({"id": len(rows) + 1, "image_id": picture.image_id, "area": float(area),
                         "category_id": int(label) + 1, "iscrowd": int(crowd),
                         "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    results = []
    for i, one in enumerate(found):
        for box, label, score in zip(one.boxes, one.labels, one.scores, strict=True):
            x1, y1, x2, y2 = box.astype(float).tolist()
            results.append({"image_id": i, "category_id": int(label) + 1, "score": float(score),
                            "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    sizes = [{"id": p.image_id, "width": p.width, "height": p.height} for p in truth.pictures]
    names = [{"id": i + 1, "name": name} for i, name in enumerate(truth.categories)]
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"images": sizes, "annotations": rows, "categories": names}))
    with redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    shown = figures(truth, found, official=True)["bbox"]
    assert [shown[name] / 100 for name in NAMES] == pytest.approx(judge.stats.tolist(), abs=1e-12)


@pytest.mark.parametrize("official", [False, True])
def test_without_detections_figures_are_0_and_without_objects_none(official):
    truth = images(objects([(0, 0, 20, 20)], [0]), objects([], []))
    nothing = detections([], [], [])
    shown = figures(truth, [nothing, nothing], official=official)
    assert {name for name, value in shown["bbox"].items() if value is None} == {
        *("APm", "APl", "ARm", "ARl")
    }
    assert {v for v in shown["bbox"].values() if v is not None} == {0}
    bare = images(objects([], []))
    assert set(figures(bare, [nothing], official=official)["bbox"].values()) == {None}
    assert voc_average_precision(truth, [nothing, nothing]) == {
        "AP07": 0, "per_class": {"a": 0, "b": None}}  # fmt: skip
    assert voc_average_precision(bare, [nothing], points=None)["AP10"] is None


def test_crowds_and_difficult_objects_are_no_fault_to_find_or_to_miss():
    alone = objects([(0, 0, 40, 40)], [0])
    for mark in ("crowd", "difficult"):
        both = objects([(0, 0, 40, 40), (60, 60, 160, 160)], [0, 0], **{mark: [False, True]})
        missed = detections([(0, 0, 40, 40)], [0.5], [0])
        found = detections([(0, 0, 40, 40), (62, 62, 160, 160)], [0.5, 0.9], [0, 0])
        wrong = detections([(0, 0, 40, 40), (62, 0, 160, 40)], [0.5, 0.9], [0, 0])
        for one, precision in ((missed, 100), (found, 100), (wrong, 50)):
            assert figures(images(both), [one])["bbox"]["AP"] == pytest.approx(precision)
            for points in (11, None):
                shown = voc_average_precision(images(both), [one], points=points)
                assert next(iter(shown.values())) == pytest.approx(precision)
    # where nothing is marked, the same detection is a fault
    assert figures(images(alone), [found])["bbox"]["AP"] == pytest.approx(50)
    many = detections(
        [(0, 0, 40, 40), (60, 60, 90, 90), (70, 70, 99, 99)], [0.1, 0.9, 0.8], [0] * 3
    )
    both = objects([(0, 0, 40, 40), (60, 60, 160, 160)], [0, 0], crowd=[False, True])
    assert figures(images(both), [many])["bbox"]["AP"] == pytest.approx(100)  # all inside the crowd


def test_curves_are_the_precision_at_each_recall():
    truth = images(objects([(0, 0, 40, 40), (50, 0, 90, 40)], [0, 0]))
    found = detections([(0, 0, 40, 40), (0, 90, 9, 99), (50, 0, 90, 40)], [0.9, 0.8, 0.7], [0] * 3)
    curves = figures(truth, [found])["curves"]["bbox"]
    assert curves["classes"] == {"a": [100] * 51 + [66.7] * 50}
    assert curves["means"]["0.50"] == curves["classes"]["a"]
    assert tabled(truth, [found], "bbox").precision.shape == (10, 101, 2, 4, 3)


def test_detections_that_do_not_belong_to_the_images_are_refused():
    truth = images(objects([(0, 0, 9, 9)], [0]))
    good = detections([(0, 0, 9, 9)], [0.5], [0])
    for bad in (
        [],
        [good, good],
        [detections([(0, 0, 9, 9)], [0.5, 0.4], [0])],
        [detections([(0, 0, 9, 9)], [0.5], [2])],
        [detections([(0, 0, 9, np.nan)], [0.5], [0])],
        [detections([(0, 0, 9, 9)], [0.5], [0], masks=())],
    ):
        with pytest.raises(ValueError):
            figures(truth, bad)


def test_a_missing_evaluator_is_one_sentence(monkeypatch):
    truth, found = images(objects([(0, 0, 9, 9)], [0])), [detections([], [], [])]
    for name, official in (("faster_coco_eval", False), ("pycocotools.coco", True)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(UserError, match=r"firstsight\[detect\]"):
                figures(truth, found, official=official)


def test_pycocotools_prints_nothing(capsys, masked):
    figures(*masked, official=True)
    assert capsys.readouterr().out == ""


# Pascal VOC


def voc_by_loops(truth, found, limit, points):
    each = []
    for label in range(len(truth.categories)):
        rows, wanted, taken = [], 0, set()
        for i, one in enumerate(found):
            own = truth.pictures[i].objects
            aside = own.crowd | own.difficult
            wanted += sum(1 for j in range(len(own)) if own.labels[j] == label and not aside[j])
            for n in range(len(one.scores)):
                if one.labels[n] == label:
                    rows.append((-float(one.scores[n]), len(rows), i, n))
        if not wanted:
            continue
        right = wrong = 0
        curve = []
        for _, _, i, n in sorted(rows):
            own, best, which = truth.pictures[i].objects, 0.0, -1
            for j in range(len(own)):
                value = box_overlap(
                    found[i].boxes[n].astype(float), own.boxes[j].astype(float), False
                )
                if own.labels[j] == label and value > best:
                    best, which = value, j
            if best >= limit and (own.crowd[which] or own.difficult[which]):
                continue
            if best >= limit and (i, which) not in taken:
                taken.add((i, which))
                right += 1
            else:
                wrong += 1
            curve.append((right, right / (right + wrong)))
        if points is None:
            area = 0.0
            for k in range(1, right + 1):
                area += max(p for r, p in curve if r >= k) / wanted
            each.append(area)
        else:
            best = [
                max((p for r, p in curve if 10 * r >= t * wanted), default=0) for t in range(11)
            ]
            each.append(sum(best) / 11)
    return 100 * float(np.mean(each))


def test_voc_figures_are_those_of_plain_loops():
    truth, found = drawn(seed=5, count=6)
    for points, name in ((11, "AP07"), (None, "AP10")):
        for limit in (0.5, 0.75):
            shown = voc_average_precision(truth, found, iou=limit, points=points)
            expected = voc_by_loops(truth, found, limit, points)
            assert shown[name] == pytest.approx(expected, abs=1e-9)
            there = [value for value in shown["per_class"].values() if value is not None]
            assert len(there) == 3 and shown[name] == pytest.approx(np.mean(there))
            both = voc_figures(truth, found)[name]
            assert both[f"AP{limit * 100:.0f}"] == pytest.approx(expected, abs=1e-9)
        each = [voc_by_loops(truth, found, (50 + 5 * i) / 100, points) for i in range(10)]
        assert both["AP"] == pytest.approx(np.mean(each), abs=1e-9)


def test_voc_2007_has_eleven_points_and_2010_the_whole_curve():
    """Two of four found, one error between them: precision 1 to recall 1/4, 2/3 to 1/2."""
    boxes = [(40 * i, 0, 40 * i + 30, 30) for i in range(4)]
    truth = images(objects(boxes, [0] * 4))
    found = [detections([boxes[0], (0, 90, 30, 120), boxes[1]], [0.9, 0.8, 0.7], [0] * 3)]
    eleven = 100 * (3 * 1 + 3 * 2 / 3) / 11  # 0, .1, .2; .3, .4, .5
    assert voc_average_precision(truth, found)["AP07"] == pytest.approx(eleven)
    whole = 100 * (1 / 4 + 2 / 3 / 4)
    assert voc_average_precision(truth, found, points=None)["AP10"] == pytest.approx(whole)
    # the object claimed twice is an error the second time
    twice = [detections([boxes[0], boxes[0]], [0.9, 0.8], [0, 0])]
    assert voc_average_precision(truth, twice, points=None)["AP10"] == pytest.approx(25)


def test_voc_counts_an_overlap_at_the_limit():
    truth = images(objects([(0, 0, 40, 40)], [0]))
    half = [detections([(0, 0, 40, 20)], [0.9], [0])]
    assert voc_average_precision(truth, half, points=None)["AP10"] == pytest.approx(100)


@pytest.mark.slow
@pytest.mark.photos
@pytest.mark.parametrize("official", [False, True])
def test_what_people_marked_in_real_coco_gets_100(official):
    """Boxes and masks, crowds in run lengths and empty images among them, found as marked."""
    if not COCO.is_dir():
        pytest.skip("no photographs in ../shared/data/coco beside the repository")
    truth = open_annotated(str(COCO / "val2017"), str(COCO / "annotations/instances_val2017.json"))
    found = []
    for i, picture in enumerate(truth.pictures):
        own = picture.objects
        kept = ~own.crowd
        runs = tuple(encode(one) for one in truth.bitmaps(i)[kept])
        found.append(detections(own.boxes[kept], np.ones(kept.sum()), own.labels[kept], runs))
    assert not all(len(one.scores) for one in found)
    result = figures(truth, found, official=official)
    for kind in ("bbox", "segm"):
        assert result[kind]["AP"] == pytest.approx(100) == result[kind]["AR100"]
    assert result["per_class"][0]["objects"] > 100
