"""Parts of a source: how many of what, the same for a seed, whole or not there at all."""

import errno
import json

import numpy as np
import pytest

from firstsight import cli, data, open_source
from firstsight.data import subsets as module
from firstsight.errors import UserError
from tests.data.test_zipped import folder

COUNTS = {"ant": 4, "bee": 7, "cat": 9, "dog": 5}


@pytest.fixture
def photos(tmp_path):
    names = [f"{name}/{i}.png" for name, count in COUNTS.items() for i in range(count)]
    return folder(tmp_path / "photos", *names)


def drawn(photos, out, **rule):
    done = data.subset(str(photos), out=str(out), **rule)
    return done, [(name, name.split("/")[0]) for name in done["identities"]]


def counts(pairs):
    names, numbers = np.unique([name for _, name in pairs], return_counts=True)
    return dict(zip(names.tolist(), numbers.tolist(), strict=True))


def test_so_many_over_all_images(photos, tmp_path):
    picked = [0] * 25
    everything = [name for name, _ in drawn(photos, tmp_path / "all", images=25)[1]]
    for seed in range(40):
        done, pairs = drawn(photos, tmp_path / f"s{seed}", images=6, seed=seed)
        assert len(pairs) == len(set(pairs)) == done["images"] == 6
        assert counts(pairs) == done["classes"]
        for name, _ in pairs:
            picked[everything.index(name)] += 1
    assert min(picked) >= 2 and max(picked) <= 21  # 9.6 of each expected


def test_so_many_of_each_class(photos, tmp_path):
    assert counts(drawn(photos, tmp_path / "x", per_class=3)[1]) == dict.fromkeys(COUNTS, 3)
    with pytest.raises(UserError, match="there are 4 images of class 'ant', fewer than the 5"):
        drawn(photos, tmp_path / "y", per_class=5)
    assert not (tmp_path / "y").exists()


def test_so_many_classes_with_so_many_images_in_all(photos, tmp_path):
    seen = set()
    for seed in range(12):
        even, pairs = drawn(photos, tmp_path / f"e{seed}", classes=3, images=11, seed=seed)
        assert sorted(even["classes"].values()) == [3, 4, 4] and counts(pairs) == even["classes"]
        rule = {"classes": 3, "images": 11, "rest": "dropped", "seed": seed}
        published, fewer = drawn(photos, tmp_path / f"p{seed}", **rule)
        assert sorted(published["classes"].values()) == [3, 3, 3] and set(fewer) < set(pairs)
        seen.add(tuple(even["classes"]))
    assert len(seen) > 2


@pytest.mark.parametrize("how", ["link", "copy", "list"])
def test_what_is_written_is_a_source_of_the_same_images(photos, tmp_path, how):
    out = tmp_path / "deep" / ("part.txt" if how == "list" else "part")
    done, pairs = drawn(photos, out, per_class=2, how=how, seed=3)
    source, whole = open_source(str(out)), open_source(str(photos))
    position = {whole.identity(i): i for i in range(len(whole))}
    assert source.classes == whole.classes and source.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, (name, _) in enumerate(pairs):
        assert (source.pixels(i) == whole.pixels(position[name])).all()
    kept = out.with_name("part.txt.json") if how == "list" else out / "subset.json"
    manifest = json.loads(kept.read_text())
    assert manifest == {key: value for key, value in done.items() if key != "out"}
    assert manifest["fingerprint"] == whole.fingerprint() and manifest["seed"] == 3
    again, _ = drawn(photos, out.with_name(f"b{out.name}"), per_class=2, how=how, seed=3)
    assert again["identities"] == done["identities"]
    if how == "link":
        assert all(path.is_symlink() for path in out.glob("*/*.png"))


def test_archives_are_copied_from_and_labels_become_folders(photos, tmp_path):
    data.zip_up(str(photos), out=str(tmp_path / "x.zip"))
    with pytest.raises(UserError, match="no files of their own; use --how copy"):
        data.subset(str(tmp_path / "x.zip"), out=str(tmp_path / "a"), images=5)
    assert not (tmp_path / "a").exists()
    data.subset(str(tmp_path / "x.zip"), out=str(tmp_path / "b"), images=5, how="copy")
    assert len(open_source(str(tmp_path / "b"))) == 5
    data.subset("scenes:train@40", out=str(tmp_path / "c"), per_class=2, how="copy")
    source = open_source(str(tmp_path / "c"))
    assert len(source) == 20 and sorted(source.classes) == sorted(
        open_source("scenes:train@40").classes
    )


@pytest.mark.parametrize("rule", [{}, {"classes": 2}, {"images": 3, "per_class": 1}])
def test_other_rules_are_refused(photos, tmp_path, rule):
    with pytest.raises(UserError, match="give --images N, or --per-class n, or --classes c"):
        drawn(photos, tmp_path / "x", **rule)


def test_a_full_disk_leaves_nothing_that_looks_whole(photos, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "encoded", full)
        with pytest.raises(UserError, match="No space left"):
            drawn(photos, tmp_path / "x", images=3, how="copy")
    assert not (tmp_path / "x").exists()
    drawn(photos, tmp_path / "x", images=3, how="copy")
    assert len(open_source(str(tmp_path / "x"))) == 3


def test_the_command(photos, tmp_path, capsys):
    args = ["data", "subset", str(photos), "--out", str(tmp_path / "x"), "--per-class", "2"]
    cli.main(args)
    assert "8" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        cli.main(args)
    assert caught.value.code == 2 and "is there already" in capsys.readouterr().err
