"""--cache: the same images in the same order, nothing left behind, refused if it does not fit."""

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import types

import numpy as np
import pytest

from firstsight import data, distributed, run
from firstsight.engine import folders
from firstsight.errors import UserError
from firstsight.loader import Steps, batches, cache
from firstsight.log import read_log
from firstsight.order import Epochs
from firstsight.sources import UnreadableImage, open_source
from firstsight.views import PRESETS
from tests.sources.pictures import encoded, noise
from tests.tiny import config


@pytest.fixture
def photos(tmp_path):
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(24):
        picture = Image.fromarray(noise(20 + number, 30, number))
        (folder / f"{number:02}.png").write_bytes(encoded(picture, "PNG"))
    return folder


def left_behind():
    return list(cache.MEMORY.glob("firstsight-*"))


def test_images_come_from_memory_once_the_block_is_entered(photos):
    source = open_source(str(photos))
    expected = [source.pixels(index) for index in range(24)]
    with cache.held(source, "shared") as held:
        assert left_behind() == []  # without a name from the start
        for file in photos.iterdir():
            file.unlink()
        assert all((held.pixels(i) == expected[i]).all() for i in range(24))
        assert held.fingerprint() == source.fingerprint() and held.spec == source.spec
        maker = Steps(source=held, views=PRESETS["simclr-small"], size=32,
                      order=Epochs(24, 8, 0), seed=0, rank=0, world=1)  # fmt: skip
        made = list(batches(maker, 0, 3, workers=1))  # a forked worker shares the segment
        assert [batch.bad for batch in made] == [()] * 3
        with pytest.raises(UnreadableImage):
            pickle.loads(pickle.dumps(held)).pixels(0)  # a copy reads the files itself
    assert left_behind() == []


def test_what_could_not_be_held_is_read_when_its_turn_comes(photos, monkeypatch):
    source = open_source(str(photos))
    (photos / "03.png").unlink()
    size = type(source).size
    monkeypatch.setattr(type(source), "size", lambda self, i: size(self, i) - (i == 5))
    with cache.held(source, "shared") as held:
        with pytest.raises(UnreadableImage):
            held.pixels(3)
        assert (held.pixels(5) == source.pixels(5)).all()
        assert (held.pixels(4) == source.pixels(4)).all()


def test_what_would_not_fit_is_refused_in_one_sentence(photos, monkeypatch):
    source = open_source(str(photos))
    small = types.SimpleNamespace(f_bavail=10, f_frsize=100)
    monkeypatch.setattr(cache.os, "statvfs", lambda path: small)
    with (
        pytest.raises(UserError, match=r"take 0\.0 GiB .* 0\.0 GiB are free; use --cache none"),
        cache.held(source, "shared"),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(cache, "MEMORY", photos / "missing")
    with pytest.raises(UserError, match="No such file"), cache.held(source, "shared"):
        pass
    assert left_behind() == []


def test_sources_without_files_are_left_as_they_are(photos, tmp_path, capsys):
    data.pack(str(photos), out=str(tmp_path / "x.pack"))
    for spec in ("scenes:train@4", str(tmp_path / "x.pack")):
        source = open_source(spec)
        with cache.held(source, "shared") as held:
            assert held is source
        assert f"{spec} has none: its pixels are at hand already" in capsys.readouterr().err


def test_nothing_is_left_after_a_crash(photos):
    script = (
        "import sys\nfrom firstsight import open_source\nfrom firstsight.loader import cache\n"
        f"with cache.held(open_source({str(photos)!r}), 'shared') as held:\n"
        "    print('here', flush=True)\n    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"here\n"
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    assert left_behind() == []


@pytest.mark.parametrize(("images", "batch", "machines"), [(23, 8, 2), (24, 6, 3), (9, 4, 1)])
def test_each_machine_visits_its_own_images_once_an_epoch(images, batch, machines):
    order, length = cache.Shares(images, batch, 5, machines), images // machines
    steps, each = order.steps(1), batch // machines
    assert steps == length // each
    for epoch in range(2):
        found = np.array([order.indices(epoch * steps + step) for step in range(steps)])
        for machine in range(machines):
            own = found[:, machine * each : (machine + 1) * each].ravel().tolist()
            assert len(set(own)) == len(own) == steps * each
            assert all(index % machines == machine and index < images for index in own)
    assert not (order.indices(0) == order.indices(steps)).all()
    assert (cache.Shares(images, batch, 5, machines).indices(1) == order.indices(1)).all()


def test_one_machine_has_the_usual_order_and_batches_must_divide():
    one, usual = cache.Shares(23, 4, 7, 1), Epochs(23, 4, 7)
    assert all((one.indices(step) == usual.indices(step)).all() for step in range(12))
    with pytest.raises(UserError, match="--batch-size 9"):
        cache.Shares(24, 10, 0, 3)


def _rank(rank, photos):
    distributed.start("cpu", 1)
    source = open_source(photos)
    with cache.held(source, "shared") as held:
        here = [bool(held._map[held._flags + i]) for i in range(24)]
        same = all((held.pixels(i) == source.pixels(i)).all() for i in range(24))
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # from here on each rank is a machine of its own
    with cache.held(source, "part") as held:
        part = [i for i in range(24) if held._map[held._flags + i]]
        same &= all((held.pixels(i) == source.pixels(i)).all() for i in range(24))
    order = cache.Shares(24, 6, 0, distributed.machines())
    mine = [np.array_split(order.indices(step), 2)[rank].tolist() for step in range(4)]
    distributed.stop()
    return all(here), same, part, sorted(i for step in mine for i in step)


def test_two_ranks_share_a_segment_and_two_machines_hold_their_parts(photos, on_ranks):
    found = on_ranks(_rank, str(photos))
    evens, odds = list(range(0, 24, 2)), list(range(1, 24, 2))
    assert found == [(True, True, evens, evens), (True, True, odds, odds)]
    assert left_behind() == []


def test_a_run_is_the_same_with_the_cache_and_can_go_on_without(photos, tmp_path, monkeypatch):
    logs, sources, train = {}, [], run.engine.pretrain

    def noted(name, config, source, *others):
        sources.append(type(source).__name__)
        return train(name, config, source, *others)

    monkeypatch.setattr(run.engine, "pretrain", noted)
    for kind in ("none", "shared"):
        out = tmp_path / kind
        run.pretrain("simclr", config("simclr", out, data=str(photos), cache=kind, epochs=1.0))
        logs[kind] = [(r["step"], r["loss"]) for r in read_log(out / "log.jsonl")]
    assert logs["none"] == logs["shared"] and len(logs["none"]) == 3
    assert sources == ["Folder", "Cached"]
    settings = config("simclr", tmp_path / "none", data=str(photos), epochs=1.0)
    earlier = tmp_path / "none" / "config.yaml"
    settings = dataclasses.replace(settings, cache="shared")
    assert folders.continued("simclr", settings, earlier).cache == "shared"
    with pytest.raises(UserError, match=r"--cache part \(was none\)"):
        folders.continued("simclr", dataclasses.replace(settings, cache="part"), earlier)
