"""What a run would take, what would fit, and what it starts from."""

import dataclasses
import json
import sys

import pytest
import torch

from firstsight import checkpoint, cli, distributed, engine, methods, run
from firstsight.cli import flags
from firstsight.engine import trial
from firstsight.errors import UserError
from tests.tiny import NETWORK, Patches, config


def linear(fixed, each, full=None):
    """A device on which a step takes memory in proportion; `full` images are too many."""
    asked = []

    def peak(images):
        asked.append(images)
        if full and images >= full:
            raise torch.OutOfMemoryError("full")
        return fixed + each * images

    return peak, asked


def test_what_fits_is_read_off_a_line_through_two_smaller_batches():
    peak, asked = linear(1000, 10)
    assert trial.fitting(peak, tried=256, room=2500) == 125  # 1000 + 10 n <= 0.9 * 2500
    assert asked == [32, 64]
    assert trial.fitting(peak, tried=256, room=10**9) == 255  # it did not fit after all
    assert trial.fitting(peak, tried=256, room=1200) == 8
    assert trial.fitting(linear(1000, 10, full=64)[0], tried=256, room=2500) == 0
    assert trial.fitting(linear(1000, 10)[0], tried=256, room=500) == 0


def test_a_full_memory_is_answered_with_flags_that_fit(tmp_path, monkeypatch):
    settings = config("simclr", tmp_path, batch_size=256)
    gpu = torch.device("cuda:0")

    def told(fit, **values):
        return str(trial.told_what_fits(dataclasses.replace(settings, **values), gpu, fit))

    assert told(100) == (
        "256 images at a time do not fit into the memory of cuda:0; "
        "use --batch-size 100, or keep it with --accumulate 3"
    )
    assert "64 images at a time" in told(50, accumulate=4)
    assert "use --batch-size 200, or keep it with --accumulate 6" in told(50, accumulate=4)
    assert "use a smaller --size" in told(1)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    assert "128 images at a time" in told(100)
    assert "use --batch-size 200, or keep it with --accumulate 2" in told(100)


def test_a_run_out_of_memory_ends_in_that_sentence(tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "pretrain", full)
    settings = config("simclr", tmp_path, data="scenes:train@32")
    with pytest.raises(UserError, match=r"use --batch-size 4, or keep it with --accumulate 2"):
        run.pretrain("simclr", settings)
    monkeypatch.undo()
    run.pretrain("simclr", dataclasses.replace(settings, accumulate=2, epochs=0.5))  # as advised


def test_a_trial_says_memory_seconds_and_parameters(tmp_path):
    settings = config("mocov2", tmp_path, accumulate=2)
    found = trial.run("mocov2", settings, 8, 48)
    backbone = methods.build("mocov2", settings, 48).backbone
    assert found.parameters == sum(p.numel() for p in backbone.parameters())
    assert found.seconds > 0
    if sys.platform == "linux":
        with open("/proc/self/status") as file:
            (peak,) = [int(line.split()[1]) for line in file if line.startswith("VmHWM")]
        assert found.memory == pytest.approx(peak * 1024, rel=0.05)


def test_on_a_cpu_a_batch_that_takes_long_is_tried_in_part(monkeypatch, tmp_path):
    tried = []

    def timed(seconds):
        def run(name, config, images, source_images):
            tried.append((images, config.accumulate))
            return trial.Trial(seconds=seconds * images, memory=1000 + 10 * images, parameters=3)

        tried.clear()
        monkeypatch.setattr(trial, "run", run)
        settings = config("simclr", tmp_path, batch_size=256, accumulate=2)
        return trial.of_share("simclr", settings, 256, 1000)

    assert timed(1.0) == trial.Trial(seconds=256, memory=1000 + 10 * 128, parameters=3)
    assert tried == [(16, 1), (32, 1)]
    assert timed(0.01).seconds == pytest.approx(2.56)
    assert tried[-1] == (256, 2)  # as it is asked for


def test_workers_share_the_cores_of_a_cpu_and_not_a_gpu(monkeypatch):
    assert trial.seconds_per_step(2.0, 1.0, workers=0, cores=4) == 3.0
    assert trial.seconds_per_step(2.0, 1.0, workers=4, cores=4) == 2.25
    monkeypatch.setattr(distributed, "_device", torch.device("cuda"))
    assert trial.seconds_per_step(2.0, 12.0, workers=4, cores=8) == 3.0
    assert trial.seconds_per_step(2.0, 1.0, workers=4, cores=8) == 2.0
    assert trial.seconds_per_step(2.0, 12.0, workers=4, cores=2) == 6.0


def test_a_dry_run_says_what_the_run_takes_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = f"pretrain simclr --data scenes:train@50 --backbone {NETWORK} --size 32 --epochs 3"
    args += " --batch-size 8 --precision fp32 --layout contiguous --device cpu --threads 1"
    cli.main([*args.split(), "--dry-run", "--json", "said.json"])
    said = json.loads((tmp_path / "said.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["said.json"]
    assert said["steps"] == 18 and said["images"] == 144
    total = said["steps"] * said["seconds_per_step"] / 3600
    assert said["hours"] == pytest.approx(total, abs=1e-3)
    assert said["seconds_per_step"] >= said["seconds_network"] > 0
    assert said["parameters"] > 100_000 and said["memory_gib"] > 0
    printed = capsys.readouterr().out
    assert "18" in printed and "nothing written" in printed


def test_switches_need_no_value():
    start = config("mocov2", "unused")
    for args, wanted in (
        (["--dry-run"], (True, False, False)),
        (["--dry_run", "--compile", "False"], (True, False, False)),
        (["--compile", "--epochs", "3"], (False, True, False)),
        (["--method.symmetric", "True", "--compile=True"], (False, True, True)),
        (["--method/symmetric"], (False, False, True)),
    ):
        got = flags.flagged(type(start), args, "pretrain", "", start)
        assert (got.dry_run, got.compile, got.method.symmetric) == wanted, args


def trained(folder, name="mocov2", **values):
    """A short run, and the method at its end."""
    folder.mkdir()
    settings = config(name, folder, epochs=0.5, **values)
    return engine.pretrain(name, settings, Patches(), None, folder)[0].state_dict()


def test_a_run_starts_from_the_backbone_of_another(tmp_path):
    old = trained(tmp_path / "old", seed=3)
    fresh = methods.build("mocov2", config("mocov2", tmp_path), 48).state_dict()
    for spec in (tmp_path / "old", tmp_path / "old" / "checkpoints" / "last"):
        method = methods.build("mocov2", config("mocov2", tmp_path, init=str(spec)), 48)
        for key, value in method.state_dict().items():
            if key.startswith("backbone."):
                assert torch.equal(value, old[key]), key
            elif key.startswith("momentum_encoder.copy.0."):  # a copy of that, not of the old copy
                followed = key.replace("momentum_encoder.copy.0", "backbone")
                assert torch.equal(value, old[followed]), key
        assert not torch.equal(method.queue.keys, old["queue.keys"])
    first = "backbone.network.layer1.0.conv1.weight"
    assert not torch.equal(fresh[first], old[first])


def test_all_of_a_run_of_the_same_method_can_be_started_from(tmp_path):
    old = trained(tmp_path / "old", seed=3)
    settings = config("mocov2", tmp_path, init=str(tmp_path / "old"), init_policy="all")
    got = methods.build("mocov2", settings, 48).state_dict()
    assert got.keys() == old.keys() and all(torch.equal(got[key], old[key]) for key in old)
    other = config("simclr", tmp_path, init=str(tmp_path / "old"), init_policy="all")
    with pytest.raises(UserError, match=r"is a run of mocov2: --init-policy all takes .* simclr"):
        methods.build("simclr", other, 48)
    with pytest.raises(UserError, match="is no run of ours"):
        published = {"init": f"random:{NETWORK}", "init_policy": "all"}
        methods.build("mocov2", config("mocov2", tmp_path, **published), 48)
    with pytest.raises(UserError, match="add --init RUN"):
        config("mocov2", tmp_path, init_policy="all")


def test_published_and_random_weights_start_a_run_too(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.get_model_weights("resnet18").DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.manual_seed(7)
    weights = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(weights, file)
    settings = config("simclr", tmp_path, backbone="resnet18", init="torchvision:resnet18")
    backbone = methods.build("simclr", settings, 48).backbone
    assert all(torch.equal(value, weights[key]) for key, value in backbone.state_dict().items())
    other = checkpoint.load_backbone("random:resnet18")[0].state_dict()
    backbone = methods.build(
        "simclr", dataclasses.replace(settings, init="random:resnet18", seed=9), 48
    ).backbone
    assert all(torch.equal(value, other[key]) for key, value in backbone.state_dict().items())
    with pytest.raises(UserError, match=r"random:resnet34 is of another architecture"):
        methods.build("simclr", dataclasses.replace(settings, init="random:resnet34"), 48)
    with pytest.raises(UserError, match="no checkpoint nowhere"):
        methods.build("simclr", dataclasses.replace(settings, init="nowhere"), 48)


def test_names_of_timm_and_torchvision_fit_each_other(tmp_path):
    settings = config("simclr", tmp_path, backbone="resnet18", init="random:timm:resnet18")
    timm = checkpoint.load_backbone("random:timm:resnet18")[0].network.state_dict()
    backbone = methods.build("simclr", settings, 48).backbone
    assert all(torch.equal(value, timm[key]) for key, value in backbone.state_dict().items())


def test_auto_takes_the_device_there_is(monkeypatch):
    for cuda, mps, best in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert distributed._best_device() == best
