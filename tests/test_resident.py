"""A source held on the device gives the batches of the loader."""

import dataclasses

import numpy as np
import pytest
import torch

from firstsight import engine
from firstsight.cli import flags
from firstsight.engine import folders
from firstsight.errors import UserError
from firstsight.loader import Steps, on_device, resident
from firstsight.loader.resident import Resident, ResidentSteps
from firstsight.log import read_log
from firstsight.order import Epochs
from firstsight.settings import Pretrain, plain, write_yaml
from firstsight.sources.base import Source, UnreadableImage
from firstsight.views import PRESETS
from tests import tiny
from tests.views.pictures import generated

CPU = torch.device("cpu")


class Pictures(Source):
    spec = "pictures"
    labels = np.arange(10)

    def __init__(self, sizes, bad=()):
        self._sizes, self._bad = sizes, bad

    def __len__(self):
        return 10

    def identity(self, index):
        return f"{index}"

    def pixels(self, index):
        if index in self._bad:
            raise UnreadableImage("no image")
        return generated(index, *self._sizes[index % len(self._sizes)])


@pytest.mark.parametrize("bad", [(), (3, 7)])
@pytest.mark.parametrize("sizes", [[(32, 32)], [(50, 40), (40, 50), (17, 90)]])
@pytest.mark.parametrize("preset", ["mocov2", "simclr-small"])
def test_a_batch_is_that_of_the_loader(sizes, bad, preset):
    source, views = Pictures(sizes, bad), PRESETS[preset]
    options = {"views": views, "size": 32, "order": Epochs(10, 10, 0), "seed": 0}
    usual = Steps(source=source, rank=0, world=1, views_on="device", **options)
    held = ResidentSteps(source=Resident(source, CPU), rank=0, world=1, **options)
    a, b = usual.batch(0), held.batch(0)
    assert a.bad == b.bad and len(a.bad) == len(bad)
    for one in ("crops", "flips"):
        assert all(map(torch.equal, getattr(a, one), getattr(b, one)))
    assert torch.equal(a.index, b.index) and torch.equal(a.label, b.label)
    assert torch.equal(a.sizes, b.sizes)
    assert {tuple(size) for size in a.sizes.tolist()} <= {tuple(size) for size in sizes}
    # workers round a small crop between its rows and its columns, as Pillow does
    largest = 6 if views.interpolation == "bicubic" else 2
    for v in range(2):
        distance = (a.views[v].float() - b.views[v].float()).abs()
        assert distance.mean() < 0.3 and distance.max() <= largest
    floats = on_device(b, views, CPU, torch.contiguous_format)
    expected = on_device(
        dataclasses.replace(usual, views_on="worker").batch(0), views, CPU, torch.contiguous_format
    )
    level = 1 / 255 / torch.tensor(views.std).view(3, 1, 1)
    for v in range(2):
        distance = ((floats.views[v] - expected.views[v]) / level).abs()
        assert distance.median() < 1 and distance.mean() < 1


def test_what_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(resident, "_free", lambda device: 32 * 32 * 3 * 19)
    with pytest.raises(UserError, match="more than half of the free memory of cpu; leave out"):
        Resident(Pictures([(32, 32)]), CPU)


def losses(out, **values):
    out.mkdir()
    config = tiny.config("simclr", out, epochs=0.5, **values)
    engine.pretrain("simclr", config, tiny.Patches(), None, out)
    return [record["loss"] for record in read_log(out / "log.jsonl") if "loss" in record]


def test_a_run_trains_alike_wherever_its_views_are_made(tmp_path):
    usual = losses(tmp_path / "a")
    assert len(usual) == 3
    other = losses(tmp_path / "b", views_on="device")
    assert other[0] == pytest.approx(usual[0], rel=0.01)  # before weights drift apart
    assert other == pytest.approx(usual, rel=0.05)
    assert losses(tmp_path / "c", resident=True) == usual  # on a CPU: the very same views
    assert losses(tmp_path / "d", resident=True, seed=1)[0] != pytest.approx(usual[0], rel=0.01)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_run_is_cut_out_where_it_is_held(tmp_path, monkeypatch, kind):
    """Workers share the memory of a CPU; the copy on another device is for the main process."""
    monkeypatch.setattr(resident, "Resident", lambda source, device: Resident(source, CPU))
    source = Pictures([(32, 32)])
    settings = tiny.config("simclr", tmp_path, resident=True)
    maker = resident.maker_of(settings, source, Epochs(10, 10, 0), torch.device(kind), 0)
    assert isinstance(maker, ResidentSteps) == (not maker.by_workers) == (kind == "cuda")
    assert maker.batch(0).views[0].shape == (10, 3, 32, 32)
    plain = tiny.config("simclr", tmp_path)
    assert resident.maker_of(plain, source, Epochs(10, 10, 0), CPU, 0).source is source


@pytest.mark.parametrize(
    ("free", "values", "fits"),
    [
        (3 * 30_720, {}, True),  # ten images of 32 x 32 x 3 bytes are just a third
        (3 * 30_719, {}, False),
        (1 << 30, {"views": {"hide": 0.5}}, False),
    ],
)
def test_auto_holds_what_a_third_of_the_memory_does(
    tmp_path, monkeypatch, capsys, free, values, fits
):
    monkeypatch.setattr(resident, "_free", lambda device: free)
    settings = tiny.config("simclr", tmp_path, resident="auto", **values)
    assert resident.settled(settings, Pictures([(32, 32)], bad=(3,))).resident is fits
    assert ("held in memory" if fits else "not held") in capsys.readouterr().err
    for chosen in (True, False):
        settings = tiny.config("simclr", tmp_path, resident=chosen)
        assert resident.settled(settings, Pictures([(32, 32)])) is settings


def test_what_auto_took_stays_when_the_run_goes_on(tmp_path):
    begun = tiny.config("simclr", tmp_path, resident=True)
    write_yaml(tmp_path / "config.yaml", {"name": "simclr", **plain(begun)})
    again = tiny.config("simclr", tmp_path, resident="auto")
    assert folders.continued("simclr", again, tmp_path / "config.yaml").resident is True


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ([], False),
        (["--resident"], True),
        (["--resident", "no"], False),
        (["--resident", "auto"], "auto"),
        (["--resident=auto"], "auto"),
        (["--resident", "--size", "32"], True),
    ],
)
def test_the_flag(tmp_path, typed, expected):
    start = tiny.config("simclr", tmp_path)
    assert flags.flagged(Pretrain, typed, "pretrain simclr", "", start).resident == expected
