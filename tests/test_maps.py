"""Maps of features: where points lie, what the page holds, and that it asks nobody for anything."""

import base64
import json
import re
from hashlib import sha256

import cv2
import numpy as np
import pytest
import torch

from firstsight import diagnose, load_backbone
from firstsight.errors import UserError
from firstsight.features import Reader
from firstsight.maps import page, place
from firstsight.pairs import see
from tests.test_report import Page, make_run, report
from tests.tiny import NETWORK, Patches


def clouds(classes=3, each=20):
    generator = torch.Generator().manual_seed(0)
    centres = 4 * torch.eye(8)[:classes]
    labels = torch.arange(classes).repeat_interleave(each)
    return centres[labels] + 0.3 * torch.randn(len(labels), 8, generator=generator), labels


def test_principal_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA

    x, _ = clouds()
    units = x.double() / x.double().norm(dim=1, keepdim=True)
    ours, theirs = place.principal(units, 3).numpy(), PCA(3).fit(units.numpy())
    expected = theirs.transform(units.numpy())
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-9)
    points = place.placed(x, "pca")
    assert points.shape == (60, 2) and np.abs(points).max() == pytest.approx(1)
    scaled = ours[:, :2] - (ours[:, :2].max(0) + ours[:, :2].min(0)) / 2
    np.testing.assert_allclose(points, scaled / np.abs(scaled).max(), atol=1e-9)
    np.testing.assert_allclose(place.placed(x * 7, "pca"), points, atol=1e-6)  # directions only


@pytest.mark.parametrize("how", ["tsne", pytest.param("umap", marks=pytest.mark.slow)])
def test_neighbours_stay_together(how):
    pytest.importorskip("umap" if how == "umap" else "sklearn")
    x, labels = clouds()
    points = torch.from_numpy(place.placed(x, how, seed=3))
    distance = torch.cdist(points, points) + 9 * torch.eye(60)
    assert (labels[distance.argmin(dim=1)] == labels).all()
    assert place.placed(x, how, seed=3).tolist() == points.tolist()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.manifold", None)
    with pytest.raises(UserError, match=r"firstsight\[maps\]"):
        place.placed(torch.randn(9, 4), "tsne")
    with pytest.raises(UserError, match="a map of 3 points"):
        place.placed(torch.randn(3, 4), "pca")


@pytest.fixture(scope="module")
def drawn():
    """A map of images of which one cannot be read."""
    source = Patches(12, unreadable=(1,))
    seen = see(load_backbone(f"random:{NETWORK}"), source, Reader(size=32))
    return seen, place.drawn(seen, "pca", 7, ("a", "</script><b>", "c"))


def test_triangles_join_an_image_and_its_views(drawn):
    """Point n, n + N, n + 2 N are image n and its views: positions, pictures and labels agree."""
    seen, made = drawn
    images = [int(re.match(r"patch-(\d+)\.png-0", name)[1]) for name in made["names"]]
    assert images == sorted(set(images)) and len(images) == 7 and 1 not in images
    some = [[0, *range(2, 12)].index(i) for i in images]
    assert some != list(range(7))  # not the first: these may be of one class
    values = torch.cat([part[some] for part in (seen.original, seen.first, seen.second)])
    expected = np.round(place.placed(values, "pca"), 4)
    assert made["points"] == pytest.approx(expected)
    assert made["labels"] == [i % 3 for i in images]
    text = page.figure(made)
    circles = dict(re.findall(r'<circle data-n="(\d+)".*? cx="([\d.]+)"', text))
    for n, path in enumerate(re.findall(r'<path d="([^"]+)"', text)):
        corners = [corner.split()[0] for corner in re.findall(r"[ML]([\d. ]+)", path)]
        assert corners == [circles[str(n + 7 * view)] for view in range(3)]
    for n, view in ((2, 0), (2, 1)):
        data = made["thumbnails"][n + 7 * view].partition(",")[2]
        shown = cv2.imdecode(np.frombuffer(base64.b64decode(data), np.uint8), cv2.IMREAD_COLOR)
        whole = seen.source.pixels(int(seen.positions[some[n], view]))[..., ::-1]
        small = cv2.resize(whole, shown.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - shown).mean() < 40 and max(shown.shape) == 40


def test_the_page_runs_its_own_script_and_nothing_else(drawn):
    text = page.page(drawn[1], "a <map>", "protocol")
    parsed = Page(text)
    policy = next(a["content"] for t, a in parsed.tags if t == "meta" and "content" in a)
    scripts = re.findall(r"<script>(.*?)</script>", text, flags=re.DOTALL)
    digest = base64.b64encode(sha256(scripts[0].encode()).digest()).decode()
    assert len(scripts) == 1 and policy.endswith(f"script-src 'sha256-{digest}'")
    assert policy.startswith("default-src 'none'") and "http" not in text.replace("http-equiv", "")
    assert "<b>" not in text and "&lt;/script&gt;&lt;b&gt;" in text  # a hostile class
    data = re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1]
    assert json.loads(data) == drawn[1]["thumbnails"]


def test_diagnose_draws_a_map_and_the_report_of_the_run_shows_it(tmp_path, drawn):
    out = tmp_path / "map.html"
    result = diagnose.run(
        f"random:{NETWORK}", data="scenes:test@9", size=32, map_images=5, out=str(out), device="cpu"
    )
    assert result["map"] == {"how": "pca", "images": 5, "out": str(out)}
    assert out.read_text().count("<circle") == 15
    with pytest.raises(UserError, match="use another --out"):
        diagnose.run(f"random:{NETWORK}", data="scenes:test@9", size=32, out=str(tmp_path))
    run = make_run(tmp_path / "run")
    text, _ = report(run)
    assert "<circle" not in text and "script-src" not in text
    (run / "pictures").mkdir()
    (run / "pictures" / "map.json").write_text(json.dumps(drawn[1]))
    text, _ = report(run)
    assert text.count("<circle") == 21 and text.count("<script>") == 1
    assert page.script_policy() in text
    (run / "pictures" / "map.json").write_text("{}")
    with pytest.raises(UserError, match=r"map.json is damaged"):
        report(run)
