"""Sources that change or cannot be written, workers that die, a clock that is set back."""

import os
import signal
import sys
import time

import pytest
import torch
from PIL import Image

from benchmarks.rough_weather import children, same, weights
from firstsight import data, engine, loader, run
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.sources import open_source
from tests.rough_weather.small import train
from tests.sources.pictures import encoded, noise
from tests.tiny import Patches, config


@pytest.mark.slow
def test_a_worker_that_is_killed_is_replaced(tmp_path, whole, capsys):
    source, made = Patches(), []
    steps = loader.Steps(
        source=source, views=config("simclr", tmp_path).views, size=32,
        order=engine.order_of(config("simclr", tmp_path), 48), seed=0, rank=0, world=1,
    )  # fmt: skip
    others = set(children(os.getpid()))  # ranks of other tests, trackers of what is shared
    for number, batch in enumerate(loader.batches(steps, 0, 12, 1)):
        made.append(batch)
        if number == 2:
            (worker,) = set(children(os.getpid())) - others
            os.kill(worker, signal.SIGKILL)
            time.sleep(0.3)  # amid a step nothing is raised
    assert "was killed before step" in capsys.readouterr().err
    for one, other in zip(made, loader.batches(steps, 0, 12, 0), strict=True):
        assert torch.equal(one.views[0], other.views[0])


def test_other_images_are_gone_on_with_where_that_is_allowed(stopped, capsys):
    with pytest.raises(UserError, match=r"\(48 then, 50 now\); use --allow-changed-data"):
        train(stopped, Patches(50))
    assert train(stopped, Patches(50), allow_changed_data=True).done == 12
    assert "(48 then, 50 now); going on with these" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", pytest.param("zip", marks=pytest.mark.slow), "pack"])
def test_other_pictures_of_the_same_names_are_told(kind, tmp_path, capsys):
    spec = spec_of(kind, photographs(tmp_path / "photos"))
    train(tmp_path / "run", open_source(spec), epochs=0.5)
    for path in (tmp_path / "photos").rglob("03.png"):
        path.write_bytes(encoded(Image.fromarray(noise(21, 33, 99)), "PNG"))
    spec = spec_of(kind, tmp_path / "photos")
    with pytest.raises(
        UserError, match=r"trained on \(the names are the same, their files are oth"
    ):
        train(tmp_path / "run", open_source(spec), epochs=1.0)
    values = {"epochs": 1.0, "allow_changed_data": True}
    assert train(tmp_path / "run", open_source(spec), **values).done == 2
    assert "are others); going on with these" in capsys.readouterr().err
    train(tmp_path / "run", open_source(spec), epochs=1.5)  # of those it knows now


def photographs(folder):
    """Sixteen small pictures."""
    folder.mkdir()
    for number in range(16):
        encoding = encoded(Image.fromarray(noise(24, 30, number)), "PNG")
        (folder / f"{number:02}.png").write_bytes(encoding)
    return folder


def spec_of(kind, photos):
    """They, or what is made of them."""
    made = photos.with_suffix(f".{kind}")
    made.unlink(missing_ok=True)
    if kind == "zip":
        data.zip_up(str(photos), out=str(made))
    if kind == "pack":
        data.pack(str(photos), out=str(made), side=16)
    return str(photos if kind == "folder" else made)


@pytest.mark.slow
def test_a_clock_that_is_set_back_changes_nothing(stopped, whole, monkeypatch):
    """Neither that of now nor that of the files: what counts is the number of steps."""
    now = iter(range(10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    for age, path in enumerate(sorted((stopped / "checkpoints").glob("step-*"))):
        os.utime(path, (10**9 - age * 1000,) * 2)  # the newest seems the oldest
    train(stopped)
    assert [r["step"] for r in read_log(stopped / "log.jsonl")] == [10, 11, 12]
    assert same(weights(stopped), weights(whole))


# a process cannot get rid of an audit hook: it rests until it is asked to look
_LOOKING = {"at": None}


def _hook(event, arguments):
    if event == "open" and _LOOKING["at"] and isinstance(arguments[0], str):
        path, _, flags = arguments
        writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if path.startswith(_LOOKING["at"]) and writing:
            raise PermissionError(30, "Read-only file system", path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_source_that_cannot_be_written_is_enough(kind, tmp_path):
    photos = photographs(tmp_path / "photos")
    spec = spec_of(kind, photos)
    for file in photos.iterdir():
        file.chmod(0o444)
    photos.chmod(0o555)
    sys.addaudithook(_hook)
    _LOOKING["at"] = str(photos)
    try:
        run.pretrain("simclr", config("simclr", tmp_path / "run", data=spec, epochs=1.0))
    finally:
        _LOOKING["at"] = None
        photos.chmod(0o755)
    assert (tmp_path / "run" / "summary.json").exists()
