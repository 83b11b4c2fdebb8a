"""The sliding window: what it must hold for any numbers, and the released windows beside it."""

import dataclasses
import itertools

import numpy as np
import pytest

from firstsight import engine, run
from firstsight.errors import UserError
from firstsight.loader import Steps
from firstsight.loader.cache import Shares
from firstsight.loader.windows import RandomWindows, Windows, order_of
from firstsight.log import read_log
from firstsight.order import Epochs
from tests.tiny import Patches, config

SIZES = [(1000, 128, 16), (1000, 96, 32), (37, 10, 3), (64, 64, 8)]  # N, W, S


def sliding(images, window, stride, batch=8, seed=0):
    return Windows(images, batch, seed, window, stride)


@pytest.mark.parametrize(("images", "window", "stride"), SIZES)
def test_all_images_are_seen_once_the_window_has_come_round(images, window, stride):
    order = sliding(images, window, stride)
    seen = {i for k in range(-(-images // stride)) for i in order.members(k).tolist()}
    assert seen == set(range(images))


@pytest.mark.parametrize(("images", "window", "stride"), SIZES)
def test_neighbours_share_all_but_a_stride(images, window, stride):
    order = sliding(images, window, stride)
    for k in range(3 * images // stride):
        one, next_one = set(order.members(k).tolist()), set(order.members(k + 1).tolist())
        assert len(one) == len(next_one) == window
        assert len(one & next_one) == max(window - stride, 2 * window - images)


@pytest.mark.parametrize(("images", "window", "stride"), SIZES)
def test_no_image_is_ever_more_than_one_stay_ahead_of_another(images, window, stride):
    order, counts = sliding(images, window, stride), np.zeros(images, int)
    for k in range(5 * images // stride):
        counts[order.members(k)] += 1
        assert counts.max() - counts.min() <= -(-window // stride)


def test_an_image_stays_for_w_over_s_passes_and_then_rests():
    order = sliding(1024, 128, 16)
    inside = [0 in order.members(k) for k in range(128)]
    stays = [(key, len(list(group))) for key, group in itertools.groupby(inside)]
    assert [n for key, n in stays[1:-1] if key] == [8, 8]
    assert all(n == (1024 - 128) / 16 for key, n in stays[1:-1] if not key)


def test_a_pass_visits_its_window_once_in_an_order_of_its_own():
    order = sliding(1000, 128, 16)
    passes = [[i for s in range(16) for i in order.indices(16 * k + s)] for k in range(3)]
    for k, visited in enumerate(passes):
        assert sorted(visited) == sorted(order.members(k)) and order.epoch(16 * k + 15) == k
    places = [[order.members(k).tolist().index(i) for i in passes[k]] for k in range(3)]
    assert places[0] != places[1] != places[2] != places[0]


@pytest.mark.parametrize("kind", [Windows, RandomWindows])
def test_a_step_has_no_memory(kind):
    order, fresh = kind(100, 8, 3, 40, 10), kind(100, 8, 3, 40, 10)
    for step in range(60):
        order.indices(step)
    for step in (17, 3, 59, 0):
        np.testing.assert_array_equal(order.indices(step), fresh.indices(step))
    assert (kind(100, 8, 4, 40, 10).indices(3) != fresh.indices(3)).any()


@pytest.mark.parametrize(
    ("epochs", "windows", "warm_up", "steps"),
    [(100, 978, 20, 500_736), (200, 1955, 49, 1_000_960), (400, 3910, 98, 2_001_920),
     (1600, 15_640, 391, 8_007_680)],
)  # fmt: skip
def test_epochs_of_imagenet_are_the_published_numbers_of_windows(epochs, windows, warm_up, steps):
    order = Windows(1_281_167, 256, 0, 131_072, 16_384)
    assert order.steps_per_pass == 512 and order.steps(epochs) == steps == windows * 512
    assert order.steps(epochs // 40) == warm_up * 512
    assert round(order.steps_per_epoch, 6) == round(512 * 1_281_167 / 131_072, 6)


def test_a_window_longer_than_the_source_is_the_source():
    order = sliding(48, 131_072, 16_384)
    epochs = [np.concatenate([order.indices(6 * k + s) for s in range(6)]) for k in range(2)]
    assert all(sorted(epoch) == list(range(48)) for epoch in epochs)
    assert (epochs[0] != epochs[1]).any()
    assert (order.steps(2), order.steps_per_epoch) == (12, Epochs(48, 8, 0).steps_per_epoch)


def test_the_released_windows_are_random_and_every_eighth_repeats_the_one_before():
    order = RandomWindows(10_000, 32, 0, 1024, 128)
    sets = [set(order.members(k).tolist()) for k in range(400)]
    shared = np.array([len(a & b) for a, b in itertools.pairwise(sets)]) / 1024
    repeats = np.arange(1, 400) % 8 == 0
    assert (shared[repeats] == 1).all()
    assert shared[~repeats].mean() == pytest.approx(1024 / 10_000, abs=0.002)
    assert shared[~repeats].max() < 0.15


def test_the_released_window_that_is_never_drawn_anew_sees_no_other_image():
    order = RandomWindows(10_000, 32, 0, 1024, 1024)
    assert len({i for k in range(50) for i in order.members(k).tolist()}) == 1024


def test_a_run_takes_the_order_that_it_is_told(tmp_path):
    asked = {"order": "sliding", "window_size": 16, "window_stride": 4, "save_every": 100}
    settings = config("simclr", tmp_path, **asked)
    tmp_path.mkdir(exist_ok=True)
    assert isinstance(order_of(settings, 48), Windows)
    engine.pretrain("simclr", settings, Patches(), None, tmp_path)
    records = read_log(tmp_path / "log.jsonl")
    assert len(records) == 12 and records[-1]["epoch"] == 2.0 and records[1]["epoch"] == 1 / 3


def test_a_dry_run_counts_windows_and_says_when_they_hold_all(tmp_path, capsys):
    asked = {"data": "scenes:train@32", "order": "sliding", "window_stride": 4, "epochs": 1.1}
    said = run.dry_run("simclr", config("simclr", tmp_path, window_size=16, **asked))
    assert said["steps"] == 6  # three windows of two steps
    assert "window" not in capsys.readouterr().err
    run.dry_run("simclr", config("simclr", tmp_path, window_size=64, **asked))
    assert "--window-size 64: each pass visits all 32 images" in capsys.readouterr().err


def test_an_image_has_other_views_in_each_pass():
    settings = config("simclr", "unused", order="sliding", window_size=16, window_stride=4)
    order = order_of(settings, 48)
    steps = Steps(source=Patches(), views=settings.views, size=32, order=order, seed=0, rank=0,
                  world=1)  # fmt: skip
    crops = {}
    for step in range(4):  # two passes
        batch = steps.batch(step)
        for index, crop in zip(batch.index.tolist(), batch.crops[0].tolist(), strict=True):
            crops.setdefault(index, []).append(crop)
    twice = [pair for pair in crops.values() if len(pair) == 2]
    assert len(twice) == 12 and all(a != b for a, b in twice)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"window_stride": 20}, "--window-stride must be from 1 to the 16 of --window-size"),
        ({"window_stride": 0}, "--window-stride must be from 1 to the 16"),
        ({"window_size": 0}, "--window-size must be above 0"),
    ],
)
def test_windows_that_cannot_be_are_refused(values, said, tmp_path):
    with pytest.raises(UserError, match=said):
        config("simclr", tmp_path, **{"order": "sliding", "window_size": 16} | values)


def test_a_window_that_fills_no_batch_names_the_flag():
    with pytest.raises(UserError, match="window of 4 images does not fill a batch of 8; use --w"):
        sliding(48, 4, 2)
    with pytest.raises(UserError, match="7 images do not fill a batch of 8"):
        sliding(7, 16, 4)


def test_a_window_and_a_share_of_the_images_exclude_each_other(tmp_path):
    shared = config("simclr", tmp_path, cache="part")
    assert isinstance(order_of(shared, 64), Shares)
    with pytest.raises(UserError, match="use --cache shared or --order epochs"):
        order_of(dataclasses.replace(shared, order="sliding"), 64)
