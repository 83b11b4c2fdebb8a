"""The loop in rough weather: bad files, bad losses, full disks, signals, readings."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from firstsight import backbones, distributed, engine, loader, run
from firstsight.engine import folders, guards, update
from firstsight.errors import UserError
from firstsight.features import Reader, extract, subset
from firstsight.log import read_log
from firstsight.optim.schedule import due
from firstsight.order import Epochs
from firstsight.probe import KnnProbe
from tests.tiny import NETWORK, Patches, config


def train(folder, source=None, probe=None, **values):
    settings = config("simclr", folder, **values)
    folder.mkdir(exist_ok=True, parents=True)
    return engine.pretrain("simclr", settings, source or Patches(), probe, folder)


def steps_of(source, workers, count=3, size=32):
    settings = config("simclr", "unused")
    order = Epochs(len(source), 8, 0)
    steps = loader.Steps(
        source=source, views=settings.views, size=size, order=order, seed=0, rank=0, world=1
    )
    return list(loader.batches(steps, 0, count, workers))


def test_views_do_not_depend_on_the_number_of_workers():
    for one, other in zip(steps_of(Patches(), 0), steps_of(Patches(), 2), strict=True):
        assert torch.equal(one.index, other.index)
        for a, b in zip(one.views + one.crops, other.views + other.crops, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_out_the_batch_of_one_process(world):
    settings = config("simclr", "unused")
    order = Epochs(48, 8, 0)
    common = {"source": Patches(), "views": settings.views, "size": 32, "order": order, "seed": 0}
    whole = loader.Steps(**common, rank=0, world=1).batch(2)
    parts = [loader.Steps(**common, rank=r, world=world).batch(2) for r in range(world)]
    for v in range(2):
        assert torch.equal(whole.views[v], torch.cat([part.views[v] for part in parts]))
    assert torch.equal(whole.index, torch.cat([part.index for part in parts]))


@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_ranks_look_at_every_image_once(world, monkeypatch):
    """Also where there are fewer chunks than ranks, or the last is short."""
    monkeypatch.setattr(distributed, "world", lambda: world)
    for images in (1, 9, 26):
        chunks = loader.Chunks(source=Patches(30), index=np.arange(images), size=16, batch_size=4)
        seen = []
        for rank in range(world):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            seen += [i for _, found in loader.chunks(chunks, 0) for i in found.tolist()]
        assert sorted(seen) == list(range(images))


def test_a_bad_file_is_named_and_replaced_by_always_the_same_one():
    bad = Patches(unreadable=(5, 17))
    first, again = steps_of(bad, 0, count=6), steps_of(bad, 2, count=6)
    named = {name for batch in first for name in batch.bad}
    assert named == {"patch-5.png", "patch-17.png"}
    good = steps_of(Patches(), 0, count=6)
    for a, b, c in zip(first, again, good, strict=True):
        assert torch.equal(a.views[0], b.views[0])
        for slot, index in enumerate(a.index.tolist()):
            same = torch.equal(a.views[0][slot], c.views[0][slot])
            assert same == (index not in (5, 17))  # all others are as if nothing had happened


def test_the_label_is_that_of_the_image_that_is_seen():
    bad = Patches(unreadable=tuple(range(10, 20)))
    others = 0
    for batch in steps_of(bad, 0, count=6):
        for index, label in zip(batch.index.tolist(), batch.label.tolist(), strict=True):
            found, _ = loader.readable(bad, index, 0, [])
            assert label == bad.labels[found] and found not in bad.unreadable
            others += label != bad.labels[index]
    assert others


def test_too_many_bad_files_stop_the_run_and_are_counted(tmp_path, capsys):
    with pytest.raises(UserError, match=r"1 images cannot be decoded, .*--max-bad allows 0"):
        train(tmp_path / "a", Patches(unreadable=(3, 4, 5)))
    train(tmp_path / "b", Patches(unreadable=(3, 4)), max_bad=0.1)
    assert read_log(tmp_path / "b" / "log.jsonl")[-1]["bad_images"] == 2
    assert "cannot decode patch-3.png" in capsys.readouterr().err


def test_nothing_readable_at_all_is_one_sentence():
    with pytest.raises(UserError, match="cannot be decoded"):
        steps_of(Patches(unreadable=tuple(range(48))), 0, count=1)


def probe_of(source):
    reader = Reader(size=32, batch_size=16)
    return KnnProbe(
        train=source, test=source, reader=reader, k=3, temperature=0.07, images=12, seed=0
    )


def test_readings_leave_no_trace_in_the_run(tmp_path):
    train(tmp_path / "plain")
    train(tmp_path / "read", probe=probe_of(Patches()), probe_readings=3)
    plain, read = (
        torch.load(tmp_path / name / "checkpoints" / "last")["method"] for name in ("plain", "read")
    )
    assert all(torch.equal(plain[key], read[key]) for key in plain)
    records = read_log(tmp_path / "read" / "log.jsonl")
    assert [r["step"] for r in records if "knn" in r] == [0, 12]
    assert [r["step"] for r in records if "knn_quick" in r] == [0, 3, 6, 9]


def test_features_are_those_of_the_images_that_can_be_read():
    from firstsight.backbones import build

    torch.manual_seed(0)
    backbone = build("timm:test_resnet", size=32)
    reader = Reader(size=32, batch_size=7)
    whole = extract(backbone, Patches(20), reader)
    part = extract(backbone, Patches(20, unreadable=(4, 11)), reader)
    assert part.unreadable == 2 and whole.unreadable == 0
    assert part.index.tolist() == [i for i in range(20) if i not in (4, 11)]
    torch.testing.assert_close(part.values, whole.values[part.index], atol=1e-5, rtol=1e-4)
    some = extract(backbone, Patches(20), reader, np.array([9, 2]))
    assert some.index.tolist() == [2, 9]
    assert backbone.training
    assert len(set(subset(Patches(20), 5, 0).tolist())) == 5


def test_moments_of_a_run_are_evenly_spread():
    assert [d for d in range(1, 13) if due(d, 12, 4)] == [3, 6, 9, 12]
    assert [d for d in range(1, 8) if due(d, 7, 3)] == [3, 5, 7]
    assert [d for d in range(1, 4) if due(d, 3, 10)] == [1, 2, 3]
    assert not due(5, 5, 0)


def test_classes_are_matched_by_name_and_not_by_number(tmp_path):
    from PIL import Image

    from firstsight.sources import open_source
    from firstsight.sources.base import common_labels

    for split, names in (("train", "cat dog frog"), ("test", "cat frog"), ("odd", "cat newt")):
        for name in names.split():
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / split / name / "1.png")
    train, test, odd = (open_source(str(tmp_path / name)) for name in ("train", "test", "odd"))
    bank, asked = common_labels(train, test, "--train", "--test")
    assert bank.tolist() == [0, 1, 2] and asked.tolist() == [0, 2]
    with pytest.raises(UserError, match=r"--test .*odd has a class 'newt' that --train"):
        common_labels(train, odd, "--train", "--test")


def test_a_refused_command_changes_nothing_and_is_refused_again(tmp_path):
    settings = config("simclr", tmp_path, data="scenes:train@32", threads=2)
    run.pretrain("simclr", settings)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    other = dataclasses.replace(settings, epochs=3.0, lr=1.0)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"started otherwise: --lr 1.0 \(was unset\); use --lr unset to"
        ):
            run.pretrain("simclr", other)
        assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}


def test_more_epochs_extend_a_finished_run(tmp_path, capsys):
    """As people type it: the warm-up scales with the epochs, and must not stand in the way."""
    settings = config("simclr", tmp_path, data="scenes:train@32")
    assert settings.warmup_epochs > 0
    run.pretrain("simclr", settings)
    begins = "on cpu in fp32: 2 epochs of 32 images, 8 steps of 8"
    assert f"simclr, {NETWORK} {begins}; writing {tmp_path}\n" in capsys.readouterr().err
    run.pretrain("simclr", settings)
    assert "is finished" in capsys.readouterr().err
    run.pretrain("simclr", config("simclr", tmp_path, data="scenes:train@32", epochs=3.0))
    assert "extending" in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 12 and summary["images"] == 96
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(1, 13))


def test_a_mended_command_is_not_refused_for_the_mistake_before_it(tmp_path):
    few = config("simclr", tmp_path, data="scenes:train@32", batch_size=64)
    with pytest.raises(UserError, match="use --batch-size 32"):
        run.pretrain("simclr", few)
    run.pretrain("simclr", dataclasses.replace(few, batch_size=16))
    assert (tmp_path / "report.html").exists() and (tmp_path / "pictures" / "views.png").exists()


def test_bad_files_are_counted_over_the_whole_of_a_resumed_run(tmp_path, monkeypatch):
    source = Patches(unreadable=(3, 4, 5))
    real, calls = update.on_device, iter(range(100))

    def failing(*arguments):
        if next(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(update, "on_device", failing)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, source, max_bad=0.1)
    monkeypatch.setattr(update, "on_device", real)
    train(tmp_path, source, max_bad=0.1)
    counts = [r["bad_images"] for r in read_log(tmp_path / "log.jsonl")]
    assert counts == sorted(counts) and counts[-1] == 3


def _rank_of_a_run(rank, folder):
    values = {"probe_test": "scenes:test@20", "precision": "auto", "probe_readings": 1}
    values |= {"probe": "both", "probe_train": "scenes:train@21", "probe_every": 3}
    run.pretrain("mocov2", config("mocov2", folder, data="scenes:train@32", **values))


def test_two_ranks_walk_the_whole_road(tmp_path, on_ranks):
    """Trial, readings, log, checkpoints, pictures, report: nobody waits for anybody for ever."""
    on_ranks(_rank_of_a_run, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] == 8 and summary["knn"]["trained"] is not None
    assert {"linear", "linear_online"} <= summary.keys()
    assert [r["step"] for r in read_log(tmp_path / "log.jsonl")] == list(range(9))


@pytest.mark.parametrize(
    ("world", "values", "said"),
    [
        (4, {"batch_size": 10}, "does not divide over 4 ranks; use --batch-size 8 or 12"),
        (4, {"batch_size": 3}, "does not divide over 4 ranks; use --batch-size 8 or 12"),
        (2, {"batch_size": 8, "accumulate": 3}, "4 images a device .* use --accumulate 2"),
        (2, {"batch_size": 2}, "use --batch-size 4"),
    ],
)
def test_a_batch_that_ranks_and_chunks_cannot_share_is_refused(
    world, values, said, tmp_path, monkeypatch
):
    monkeypatch.setattr(distributed, "world", lambda: world)
    with pytest.raises(UserError, match=said):
        run._refuse_unequal_shares(config("simclr", tmp_path, **values))
    run._refuse_unequal_shares(config("simclr", tmp_path, batch_size=16, accumulate=2))


def _features_of_own_statistics(rank, folder):
    distributed.start("cpu")
    network = _network_with_statistics(rank)
    features = extract(network, Patches(8), Reader(size=32, batch_size=2))
    torch.save(features.values, folder / f"{rank}.pt")
    distributed.stop()


def _network_with_statistics(rank):
    torch.manual_seed(0)
    network = backbones.build("timm:resnet10t", "standard", 32)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(float(rank))
    return network


def test_ranks_with_other_batch_norm_statistics_judge_one_network(tmp_path, on_ranks):
    """Without DDP's broadcast each rank has statistics of its own: those of rank 0 are judged."""
    on_ranks(_features_of_own_statistics, tmp_path)
    alone = extract(_network_with_statistics(0), Patches(8), Reader(size=32)).values
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone, atol=1e-5, rtol=1e-5)


def test_a_run_of_before_a_setting_existed_had_its_class_default(tmp_path):
    """Not what is asked for now, nor what the method has come to prefer."""
    earlier = tmp_path / "config.yaml"
    settings = config("barlow", tmp_path)
    values = run.plain(settings)
    assert values.pop("excluded_lr") == 0.024 and values["views"].pop("strength") == 1
    run.write_yaml(earlier, {"name": "barlow", **values})
    with pytest.raises(UserError, match=r"--excluded-lr 0.024 \(was 1.0\); use --excluded-lr 1.0"):
        folders.continued("barlow", settings, earlier)
    before = dataclasses.replace(settings, excluded_lr=1.0)
    assert folders.continued("barlow", before, earlier) == before


def test_a_run_that_goes_on_must_be_the_same_run(tmp_path):
    earlier = tmp_path / "config.yaml"
    settings = config("simclr", tmp_path)
    run.write_yaml(earlier, {"name": "simclr", **run.plain(settings)})
    auto = dataclasses.replace(settings, precision="auto", layout="auto", workers=3, log_every=7)
    assert folders.continued("simclr", auto, earlier).precision == "fp32"
    with pytest.raises(UserError, match=r"started otherwise: --size 48 \(was 32\)"):
        folders.continued("simclr", dataclasses.replace(settings, size=48), earlier)
    with pytest.raises(UserError, match=r"--device 'my gpu' \(was cpu\)"):
        raise folders.started_otherwise(tmp_path, {"device": ("cpu", "my gpu")})
    with pytest.raises(UserError, match="is a run of simclr"):
        folders.continued("mocov2", settings, earlier)
    longer = dataclasses.replace(settings, epochs=5.0)
    longer = folders.continued("simclr", longer, earlier)
    assert longer.epochs == 5.0
    folders.extend("simclr", longer, earlier)
    with pytest.raises(UserError, match="--epochs 2"):
        folders.continued("simclr", settings, earlier)


def test_checkpoints_without_their_settings_are_not_gone_on_with(tmp_path):
    settings = config("simclr", tmp_path, data="scenes:train@32", epochs=0.5)
    run.pretrain("simclr", settings)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"config.yaml is gone; use another --out"):
        run.pretrain("simclr", settings)


def test_a_demo_of_any_length_has_a_warm_up_that_fits_and_ends_with_objects(
    monkeypatch, tmp_path, capsys
):
    asked, written = [], []
    monkeypatch.setattr(run, "pretrain", lambda name, config: asked.append(config) or tmp_path)
    monkeypatch.setattr(run.localize, "run", lambda where, **how: {"notes": ["", where]})
    monkeypatch.setattr(run, "write_report", lambda runs, page: written.append((runs, page)))
    for epochs in (0, 20, 0.07):
        run.demo(out="", epochs=epochs, seed=0, device="cpu", threads=1)
    assert [config.epochs for config in asked] == [7.0, 20, 0.07]
    assert [config.warmup_epochs for config in asked] == pytest.approx([0.3, 0.3, 0.003])
    assert written == 3 * [([tmp_path], tmp_path / "report.html")]
    assert f"objects in scenes:test@200: {tmp_path}" in capsys.readouterr().err


def test_without_a_folder_the_same_command_finds_its_own_unfinished_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(config("simclr", tmp_path), out="")
    first = tmp_path / "runs" / "simclr-001"

    def found(values=settings, name="simclr"):
        return folders.of(name, values).name

    assert found() == "simclr-001"
    (first / "checkpoints").mkdir(parents=True)
    run.write_yaml(first / "config.yaml", {"name": "simclr", **run.plain(settings)})
    assert found() == "simclr-002"  # nothing to go on with
    (first / "checkpoints" / "last").touch()
    assert found() == found(dataclasses.replace(settings, precision="auto")) == "simclr-001"
    assert found(dataclasses.replace(settings, seed=1)) == "simclr-002"
    assert found(dataclasses.replace(settings, epochs=9.0)) == "simclr-002"
    assert found(name="mocov2") == "mocov2-001"
    (first / "summary.json").touch()
    assert found() == "simclr-002"  # finished
    (first / "summary.json").unlink()
    other = "from pathlib import Path; from firstsight.engine import folders; import sys\n"
    other += (
        f"with folders.only_writer(Path({str(first)!r})): print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", other], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:
        assert writer.stdout.readline() == b"1\n"
        assert found() == "simclr-002"  # at work
        writer.stdin.close()
    assert found() == "simclr-001"


@pytest.mark.parametrize("name", ["simclr", "mocov2"])
def test_bfloat16_and_channels_last_give_nearly_the_same_loss(name, tmp_path):
    first = {}
    for precision, layout in (
        ("fp32", "contiguous"),
        ("fp32", "channels_last"),
        ("bf16", "channels_last"),
    ):
        folder = tmp_path / f"{precision}-{layout}"
        folder.mkdir()
        settings = config(name, folder, precision=precision, layout=layout, epochs=0.5)
        engine.pretrain(name, settings, Patches(), None, folder)
        first[precision, layout] = read_log(folder / "log.jsonl")[0]["loss"]
        state = torch.load(folder / "checkpoints" / "last")["method"]
        assert all(t.dtype == torch.float32 for t in state.values() if t.is_floating_point())
    exact = first["fp32", "contiguous"]
    assert first["fp32", "channels_last"] == pytest.approx(exact, rel=1e-4)
    assert first["bf16", "channels_last"] == pytest.approx(exact, rel=0.02)


def test_adamw_and_the_step_schedule_train_too(tmp_path):
    train(tmp_path, optimizer="adamw", lr=1e-3, schedule="step", warmup_epochs=0.0)
    rates = [r["lr"] for r in read_log(tmp_path / "log.jsonl")]
    assert rates == pytest.approx([1e-3] * 8 + [1e-4] * 2 + [1e-5] * 2)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that go away")
def test_a_terminal_that_goes_away_asks_to_stop_unless_nohup_says_otherwise():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, expected in ((signal.SIG_IGN, False), (signal.SIG_DFL, True)):
            signal.signal(signal.SIGHUP, handler)
            with guards.stop_signal() as stopped:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stopped() == expected
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)
