"""Shards of a backbone are the backbone: the same steps, checkpoint and readings as whole."""

import copy

import pytest
import torch

from firstsight import distributed, engine, methods, optim, parallel
from firstsight.batch import Batch
from firstsight.engine import update
from firstsight.engine.trial import random_batch
from firstsight.errors import UserError
from firstsight.features import Reader, pooled
from tests.methods.test_all import batch_of
from tests.tiny import Patches, config


def settings_of(folder, kind="ddp", **values):
    """MoCo v3: a momentum copy, batch-norm over all ranks; AdamW, and both ways of clipping."""
    vit = {"backbone": "timm:test_vit", "optimizer": "adamw", "lr": 1e-3, "warmup_epochs": 0.0}
    clipped = {"clip_norm": 0.5, "clip_param": 0.2}
    return config("mocov3", folder, parallel=kind, **vit, **clipped, **values)


def doubles(step, rank, world):
    """This rank's share of the batch of a step."""
    whole = batch_of(8, 2, (32, 32), seed=step)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    return Batch(
        views=tuple(view[share].double() for view in whole.views),
        crops=tuple(crops[share] for crops in whole.crops),
        flips=tuple(flips[share] for flips in whole.flips),
        index=whole.index[share],
    )


def stepped(rank, folder, kind, steps, before=None):
    """States of method and optimiser (whole on rank 0), and what this rank holds, after steps."""
    distributed.start("cpu", threads=1)
    real, update.on_device = update.on_device, lambda batch, *_: batch  # made of floats already
    settings = settings_of(folder, kind)
    method = methods.build("mocov3", settings, 48).double()
    optimizer, scaler = optim.of(method, settings), update.scaler(settings)
    if before:
        method.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))  # ranks are sent one memory
    model = parallel.spread(method, optimizer, kind)
    try:
        for step in steps:
            batch = doubles(step, rank, distributed.world())
            update.gradients(model, batch, scaler, settings)
            update.apply(method, optimizer, scaler, settings, step / 4, 1e-3)
        held = {name: parallel.local(p).numel() for name, p in method.named_parameters()}
        moved = sum(p.numel() for p in parallel.members(optimizer))
        state = parallel.gathered(method.state_dict())
        reading = parallel.whole(method.backbone, 32).state_dict()
        return state, parallel.gathered_optimizer(optimizer), held, moved, reading
    finally:
        update.on_device = real
        distributed.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return stepped(0, tmp_path_factory.mktemp("alone"), "ddp", range(4))


@pytest.fixture(scope="module")
def cut(on_ranks, tmp_path_factory):
    """Two ranks in shards after the first two of those steps."""
    return on_ranks(stepped, tmp_path_factory.mktemp("cut"), "fsdp", range(2))


def assert_close(state, other, atol=1e-6, rtol=1e-5):
    """Of nested states: the same keys, shapes and types, and numbers up to rounding."""
    assert state.keys() == other.keys()
    for key, value in state.items():
        if isinstance(value, dict):
            assert_close(value, other[key], atol, rtol)
        elif isinstance(value, torch.Tensor) and "running" not in str(key):  # those of rank 0
            torch.testing.assert_close(other[key], value, atol=atol, rtol=rtol, msg=str(key))


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "one process"])
def test_what_shards_left_goes_on_in_any_way(kind, alone, cut, on_ranks, tmp_path):
    """Steps 2 and 3 after two in shards: all as one process would have done it, in float64."""
    before = cut[0][:2]
    if kind == "one process":
        method, optimizer, _, _, _ = stepped(0, tmp_path, "ddp", range(2, 4), before)
    else:
        method, optimizer, _, _, _ = on_ranks(stepped, tmp_path, kind, range(2, 4), before)[0]
    assert_close(alone[0], method)
    assert_close(alone[1]["state"], optimizer["state"])
    assert alone[1]["param_groups"] == optimizer["param_groups"]


def test_each_rank_keeps_its_part_of_backbone_and_momentum_copy(alone, cut):
    whole, (first, second) = alone[2], (cut[0][2], cut[1][2])
    sharded = {name for name in whole if "network." in name}
    assert {name.split(".")[0] for name in sharded} == {"backbone", "momentum_encoder"}
    for name, size in whole.items():
        assert first[name] + second[name] == (size if name in sharded else 2 * size), name
        assert "blocks" not in name or first[name] == size / 2  # cut along their first axis
    trained = sum(first[name] for name in first if "momentum_encoder" not in name)
    assert cut[0][3] == trained  # and with it what the optimiser keeps


def test_readings_are_taken_of_the_whole_backbone_on_every_rank(cut):
    state = {k.removeprefix("backbone."): v for k, v in cut[0][0].items() if "backbone." in k}
    for _, _, _, _, reading in cut:
        assert_close(reading, {key: state[key].float() for key in reading})


def read(rank, folder):
    """Features as linear probes of other images than the batch's read them: in shards."""
    distributed.start("cpu", threads=1)
    try:
        settings = settings_of(folder, "fsdp")
        method = methods.build("mocov3", settings, 48)
        model = parallel.spread(method, optim.of(method, settings), "fsdp")
        images = torch.full((2, 3, 32, 32), 60 + rank, dtype=torch.uint8)
        first = pooled(method.backbone, images, Reader(size=32))
        update.gradients(model, random_batch(settings, 4), update.scaler(settings), settings)
        second = pooled(method.backbone, images, Reader(size=32))
        whole = pooled(parallel.whole(method.backbone, 32), images, Reader(size=32))
        return [(features - whole).abs().max().item() for features in (first, second)]
    finally:
        distributed.stop()


def test_shards_can_be_read_before_and_between_steps(on_ranks, tmp_path):
    assert max(apart for each in on_ranks(read, tmp_path) for apart in each) < 1e-5


def without_blocks(rank, folder):
    distributed.start("cpu", threads=1)
    try:
        settings = config("simclr", folder, optimizer="sgd")
        method = methods.build("simclr", settings, 48)
        with pytest.raises(UserError, match="for timm:test_resnet use --parallel ddp"):
            parallel.spread(method, optim.of(method, settings), "fsdp")
    finally:
        distributed.stop()


def test_what_cannot_be_cut_is_refused(on_ranks, tmp_path):
    on_ranks(without_blocks, tmp_path)
    numbers = [{"precision": "fp16"}, {"skip_nonfinite": 1}]
    for values in ({"optimizer": "lars"}, {"compile": True}, *numbers):
        with pytest.raises(UserError, match="--parallel fsdp"):
            config("mocov3", tmp_path, parallel="fsdp", **values)


def some_steps(rank, folder, kind, until):
    """Train on from where the run in `folder` stands; before step `until` stop without saving."""
    distributed.start("cpu", threads=1)
    calls, real = iter(range(until)), update.on_device

    def limited(*arguments):
        if next(calls, None) is None:
            raise ConnectionAbortedError
        return real(*arguments)

    update.on_device = limited
    try:
        settings = settings_of(folder, kind)
        return engine.pretrain("mocov3", settings, Patches(48), None, folder).done
    except ConnectionAbortedError:
        return None
    finally:
        update.on_device = real
        distributed.stop()


@pytest.mark.slow
def test_a_run_goes_from_shards_to_replicas_to_one_process(on_ranks, tmp_path):
    """Through the engine: interrupted in steps 4 and 7 and 10, each time resumed otherwise."""
    (tmp_path / "whole").mkdir()
    some_steps(0, tmp_path / "whole", "ddp", 99)
    for kind, world in (("fsdp", 4), ("ddp", 2), ("fsdp", 2)):
        assert on_ranks(some_steps, tmp_path / "run", kind, 4, world=world) == [None] * world
    assert some_steps(0, tmp_path / "run", "ddp", 99) == 12
    last = "checkpoints/last"
    whole, other = (torch.load(tmp_path / name / last) for name in ("whole", "run"))
    began = methods.build("mocov3", settings_of(tmp_path), 48).state_dict()
    assert whole["method"].keys() == other["method"].keys()
    names = [name for name in began if "network." in name]

    def apart(state, reference):
        return sum((state[n] - reference[n]).square().sum() for n in names).sqrt()

    # AdamW makes whole steps of gradients that are nothing but rounding
    assert apart(other["method"], whole["method"]) < 0.15 * apart(whole["method"], began)
    snapshots = [sorted((tmp_path / n / "snapshots").iterdir()) for n in ("whole", "run")]
    assert [p.name for p in snapshots[0]] == [p.name for p in snapshots[1]]
