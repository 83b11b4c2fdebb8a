"""One optimiser step: chunks, loss scaling, clipping, compiled backbones."""

import dataclasses
import shutil

import pytest
import torch

from firstsight import backbones, distributed, engine, methods, optim, parallel, run
from firstsight.engine import guards, update
from firstsight.engine.state import State
from firstsight.errors import UserError
from firstsight.log import read_log
from tests.methods.test_all import batch_of, built
from tests.tiny import Patches, config


def steps_of_moco(monkeypatch, tmp_path, **values):
    """State after three optimiser steps in float64 on the same batches; keys are not dealt out."""
    monkeypatch.setattr(update, "on_device", lambda batch, *_: batch)
    monkeypatch.setattr(distributed, "permutation", lambda rows: torch.arange(len(rows)))
    method, settings = built("mocov2", tmp_path, lr=0.5, **values)
    method.double().train()
    optimizer, scaler = optim.of(method, settings), update.scaler(settings)
    losses = []
    for step in range(3):
        batch = batch_of(8, 2, (32, 32), seed=step)
        batch = dataclasses.replace(batch, views=tuple(view.double() for view in batch.views))
        losses.append(update.gradients(method, batch, scaler, settings).loss)
        assert update.apply(method, optimizer, scaler, settings, progress=0.0, lr=0.5)
    return torch.stack(losses), method.state_dict()


@pytest.mark.parametrize(("symmetric", "length"), [(False, 20), (True, 48)])
def test_moco_in_chunks_is_moco_with_batch_norm_in_splits(symmetric, length, monkeypatch, tmp_path):
    """Losses, weights, momentum encoder and queue; running statistics alone are taken otherwise.

    The keys of both directions go in chunk by chunk, so there the queue is long enough not to turn
    over within three steps of 8.
    """
    own = {"momentum": 0.9, "symmetric": symmetric, "queue_size": length}
    chunked = steps_of_moco(monkeypatch, tmp_path, accumulate=2, method=own)
    split = steps_of_moco(monkeypatch, tmp_path, method={**own, "splits": 2})
    torch.testing.assert_close(chunked[0], split[0], rtol=1e-10, atol=0)
    for key, value in split[1].items():
        if key == "queue.keys" and symmetric:  # within a step, keys of view 1 and 2 by chunks
            got, value = chunked[1][key].sort(0)[0], value.sort(0)[0]
            torch.testing.assert_close(got, value, rtol=1e-8, atol=1e-10)
        elif "running" not in key and "batches" not in key:
            torch.testing.assert_close(chunked[1][key], value, rtol=1e-8, atol=1e-10, msg=key)


def _rank_of_two(rank, folder):
    distributed.start("cpu", threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "on_device", lambda batch, *_: batch)
        torch.save(_mean_gradients(folder, rank, 2, accumulate=2), f"{folder}/{rank}.pt")
    distributed.stop()


def _mean_gradients(folder, rank, world, **values):
    method = methods.build("mocov2", config("mocov2", folder, **values), images=48).double().eval()
    whole, share = batch_of(8, 2, (32, 32)), slice(rank * 8 // world, (rank + 1) * 8 // world)
    part = dataclasses.replace(
        whole,
        views=tuple(view[share].double() for view in whole.views),
        crops=tuple(crop[share] for crop in whole.crops),
        flips=tuple(flip[share] for flip in whole.flips),
        index=whole.index[share],
    )
    settings = config("mocov2", folder, **values)
    update.gradients(parallel.replica(method), part, update.scaler(settings), settings)
    return {key: p.grad for key, p in method.named_parameters() if p.grad is not None}


def test_two_ranks_in_chunks_are_one_process(tmp_path, monkeypatch, on_ranks):
    monkeypatch.setattr(update, "on_device", lambda batch, *_: batch)
    expected = _mean_gradients(tmp_path, 0, 1)
    on_ranks(_rank_of_two, tmp_path)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt")
        assert got.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(got[key], grad, rtol=1e-7, atol=1e-9, msg=key)


def test_a_method_that_couples_its_batch_says_what_chunks_change(tmp_path, capsys):
    for name, lost in (("simclr", "negatives and batch-norm"), ("mocov2", "2: batch-norm")):
        settings = config(name, tmp_path / name, data="scenes:train@32", accumulate=2, epochs=0.25)
        run.pretrain(name, settings)
        assert f"{lost} statistics come from 4 images at a time" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"8 images a device do not make 5 .*--accumulate 4"):
        run.pretrain(name, dataclasses.replace(settings, accumulate=5))


def pixels_of(settings, seed=0):
    batch, generator = batch_of(8, 2, (32, 32)), torch.Generator().manual_seed(seed)
    shape = (8, 3, 32, 32)
    views = tuple(torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in "12")
    return dataclasses.replace(batch, views=views)


def test_float16_gradients_are_those_of_float32_and_not_scaled(tmp_path):
    got = {}
    for precision in ("fp32", "fp16"):
        method, settings = built("mocov2", tmp_path, precision=precision)
        scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=precision == "fp16")
        update.gradients(method, pixels_of(settings), scaler, settings)
        scaler.unscale_(optim.of(method, settings))
        trained = [p for p in method.projector.parameters() if p.requires_grad]
        got[precision] = torch.cat([p.grad.flatten() for p in trained])
    difference = (got["fp16"] - got["fp32"]).norm() / got["fp32"].norm()
    assert 0 < difference < 0.05


def test_an_overflow_skips_the_optimiser_and_halves_the_scale(tmp_path):
    method, settings = built("mocov2", tmp_path, precision="fp16", method={"momentum": 0.5})
    optimizer = optim.of(method, settings)
    scaler = torch.amp.GradScaler("cpu", 2.0**60)
    before = {key: p.clone() for key, p in method.named_parameters()}
    with torch.no_grad():
        for p in method.momentum_encoder.parameters():
            p.add_(1.0)
    update.gradients(method, pixels_of(settings), scaler, settings)
    assert not update.apply(method, optimizer, scaler, settings, progress=0.0, lr=0.1)
    assert scaler.get_scale() == 2.0**59
    for key, p in method.named_parameters():
        moved = 0.5 if key.startswith("momentum_encoder") else 0.0  # what follows goes on
        torch.testing.assert_close(p, before[key] + moved)
    assert all(p.grad is None for p in method.parameters())


def test_the_loss_is_scaled_in_float16_and_not_otherwise(tmp_path):
    for precision in ("fp32", "bf16", "fp16"):
        scaler = update.scaler(config("simclr", tmp_path, precision=precision))
        assert scaler.is_enabled() == (precision == "fp16")


@pytest.mark.parametrize("kind", ["sgd", "adamw", "lars"])
def test_a_skipped_first_step_leaves_nothing_behind(kind):
    """A fused SGD of torch would go on with a momentum that nobody wrote."""
    ends = []
    for skipping in (False, True):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(300, 300))
        optimizer = optim.build(kind, [{"params": [weight]}], 0.1)
        optim.set_rate(optimizer, 0.1)
        scaler = torch.amp.GradScaler("cpu", 4.0)
        for value in (*[float("inf")] * skipping, 1.0, 2.0):
            torch.full((300, 300), torch.nan)  # what memory may hold
            scaler.scale((weight * value).sum()).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_float16_counts_the_steps_that_it_skips(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "scaler", lambda config: torch.amp.GradScaler("cpu", 2.0**60))
    settings = config("mocov2", tmp_path, precision="fp16")
    engine.pretrain("mocov2", settings, Patches(), None, tmp_path)
    counts = [record["skipped_steps"] for record in read_log(tmp_path / "log.jsonl")]
    assert counts == list(range(1, 13))
    state = torch.load(tmp_path / "checkpoints" / "last")
    assert state["skipped"] == 12 and state["scaler"]["scale"] == 2.0**48


def test_the_log_says_how_long_gradients_are_before_they_are_clipped(tmp_path, monkeypatch):
    real, lengths = update.apply, []

    def measured(method, *arguments):
        squares = [p.grad.square().sum() for p in method.parameters() if p.grad is not None]
        lengths.append(sum(squares).sqrt().item())
        return real(method, *arguments)

    monkeypatch.setattr(update, "apply", measured)
    settings = config("simclr", tmp_path, epochs=0.5, clip_norm=0.01, log_every=2)
    engine.pretrain("simclr", settings, Patches(), None, tmp_path)
    told = [record["gradient_norm"] for record in read_log(tmp_path / "log.jsonl")]
    assert told == pytest.approx([lengths[1], lengths[2]], rel=1e-5) and min(told) > 0.01


def test_gradients_in_the_log_are_not_scaled_and_finite():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    sgd, scaler = torch.optim.SGD([weight]), torch.amp.GradScaler("cpu", 8.0)
    for value, told in (
        (1.0, {"gradient_norm": 5.0, "loss_scale": 8.0}),
        (1e38, {"loss_scale": 8.0}),
    ):
        weight.grad = 8 * value * weight.detach()
        assert guards.steepness(sgd, scaler) == told
    weight.grad = weight.detach()
    assert guards.steepness(sgd, torch.amp.GradScaler("cpu", enabled=False)) == {"gradient_norm": 5}


def test_views_are_coloured_in_full_precision_and_seen_in_bfloat16(tmp_path, monkeypatch):
    """Under autocast blur would be a product of bfloat16 matrices: levels have 8 bits."""
    method, settings = built("simclr", tmp_path, precision="bf16", compile=True)
    within, options = [], []
    real = method.forward
    noted = lambda batch: within.append(torch.is_autocast_enabled("cpu")) or real(batch)  # noqa: E731
    monkeypatch.setattr(method, "forward", noted)

    def on_device(batch, *rest):
        within.append(torch.is_autocast_enabled("cpu"))
        options.append(rest[-1])
        return batch

    monkeypatch.setattr(update, "on_device", on_device)
    update.gradients(method, batch_of(8, 2, (32, 32), seed=0), update.scaler(settings), settings)
    assert within == [False, True] and options == [True]  # --compile reaches the colours


def test_clipping_bounds_what_the_optimiser_sees(tmp_path):
    low = {"clip_norm": 0.01, "precision": "fp16"}  # and the loss is scaled
    for values, norm in (({"clip_norm": 0.01}, 0.01), (low, 0.01), ({}, None)):
        method, settings = built("mocov2", tmp_path, weight_decay=0.0, **values)
        optimizer, on = optim.of(method, settings), settings.precision == "fp16"
        scaler = torch.amp.GradScaler("cpu", 2.0**10, enabled=on)
        trained = [p for p in method.parameters() if p.requires_grad]
        before = torch.cat([p.detach().flatten() for p in trained])
        update.gradients(method, pixels_of(settings), scaler, settings)
        update.apply(method, optimizer, scaler, settings, progress=0.0, lr=1.0)
        moved = (torch.cat([p.detach().flatten() for p in trained]) - before).norm().item()
        assert moved == pytest.approx(norm, rel=1e-3) if norm else moved > 0.1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")
def test_a_compiled_backbone_trains_the_same_run_under_the_same_keys(tmp_path):
    ends = {}
    for compiled in (False, True):
        folder = tmp_path / f"{compiled}"
        folder.mkdir()
        settings = config("mocov2", folder, compile=compiled, epochs=0.5)
        engine.pretrain("mocov2", settings, Patches(), None, folder)
        ends[compiled] = torch.load(folder / "checkpoints" / "last")["method"]
        if compiled:  # a run that goes on finds its keys again
            longer = dataclasses.replace(settings, epochs=1.0)
            assert engine.pretrain("mocov2", longer, Patches(), None, folder).done == 6
    assert ends[False].keys() == ends[True].keys()
    for key, value in ends[False].items():
        torch.testing.assert_close(ends[True][key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_compiled_backbone_keeps_its_keys_and_is_compiled_wherever_it_is(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/" + name)
    method, _ = built("mocov2", tmp_path)
    backbones.compile_all(method)
    assert compiled == [method.backbone, method.momentum_encoder.copy[0]]


def test_a_checkpoint_holds_the_scaler_and_what_was_skipped(tmp_path):
    def state_of(scale):
        method, settings = built("mocov2", tmp_path, precision="fp16")
        optimizer = optim.of(method, settings)
        scaler = torch.amp.GradScaler("cpu", scale)
        return State(
            out=tmp_path,
            name="mocov2",
            config=settings,
            source=Patches(),
            method=method,
            optimizer=optimizer,
            scaler=scaler,
        )

    saved = state_of(2.0**7)
    saved.step, saved.skipped, saved.seconds, saved.bad = 3, 2, 1.5, {"x"}
    saved.save()
    saved.settle()
    again = state_of(2.0**16)
    again.resume()
    assert again.scaler.state_dict() == saved.scaler.state_dict()
    assert (again.step, again.skipped, again.seconds, again.bad) == (3, 2, 1.5, {"x"})


def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        backbones.compile_all(torch.nn.Linear(1, 1))
