"""Numbers that are none, and features that become alike."""

import dataclasses

import pytest
import torch

from benchmarks.rough_weather import same, weights
from firstsight import checkpoint, run
from firstsight.engine import guards, state, update
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.optim.schedule import Schedule
from tests.rough_weather.small import newest, train
from tests.tiny import Patches, config


def poison(monkeypatch, steps, value=torch.nan):
    """Spoil the batch of each of these calls."""
    real, calls = update.on_device, iter(range(1000))

    def poisoned(*arguments):
        batch = real(*arguments)
        if next(calls) in steps:
            return dataclasses.replace(batch, views=(batch.views[0] * value, batch.views[1]))
        return batch

    monkeypatch.setattr(update, "on_device", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "skipped"), [([7], 0), ([6, 7], 1)])
def test_a_run_goes_back_from_numbers_that_are_none(steps, skipped, tmp_path, monkeypatch, capsys):
    """To its last checkpoint, and on with other views; the log is cut back with it.

    As well where a step may be left out, and it comes again.
    """
    values = {"data": "scenes:train@32", "epochs": 3.0, "skip_nonfinite": skipped}
    settings = config("simclr", tmp_path / "a", **values)
    plain = dataclasses.replace(settings, out=str(tmp_path / "b"))
    poison(monkeypatch, steps)
    run.pretrain("simclr", settings)
    said = capsys.readouterr().err
    why = "2 steps in a row, step 8 the last" if skipped else "nan at step 7"
    assert why in said and "step-00000006.pt; going back to it with other views (1 of --r" in said
    monkeypatch.undo()
    run.pretrain("simclr", plain)
    once, never = (read_log(tmp_path / name / "log.jsonl") for name in "ab")
    assert [r["step"] for r in once] == [r["step"] for r in never] == list(range(1, 13))
    assert [r["loss"] for r in once[:6]] == [r["loss"] for r in never[:6]]
    assert all(a["loss"] != b["loss"] for a, b in zip(once[6:], never[6:], strict=True))
    assert torch.load(tmp_path / "a" / "checkpoints" / "last")["salt"] == 1


@pytest.mark.slow
def test_after_a_roll_back_a_run_is_as_exact_as_before(stopped, whole):
    """Salted once: the same again, whether stopped in between or not."""
    train(stopped, salt=1)
    once = weights(stopped)
    assert not same(once, weights(whole))
    for path in sorted((stopped / "checkpoints").glob("step-*"))[1:]:
        path.unlink()
    (stopped / "checkpoints" / newest(whole).name).write_bytes(newest(whole).read_bytes())
    train(stopped, salt=1, epochs=10 / 6)
    train(stopped, epochs=2.0)  # takes the salt from the checkpoint
    assert torch.load(stopped / "checkpoints" / "last")["salt"] == 1


@pytest.mark.slow
def test_it_goes_back_so_many_times_and_no_more(tmp_path, monkeypatch, capsys):
    poison(monkeypatch, range(4, 1000))
    settings = config("simclr", tmp_path, data="scenes:train@32", rollbacks=2)
    with pytest.raises(UserError, match=r"nan at step 3.*start another run with a lower --lr"):
        run.pretrain("simclr", settings)
    assert capsys.readouterr().err.count("going back") == 2


def test_a_step_left_out_leaves_the_scale_of_the_loss_as_it_is(tmp_path):
    """It is halved each time and would never grow again: after a hundred, gradients are nothing."""
    method = torch.nn.Linear(1, 1)
    settings = config("simclr", tmp_path, skip_nonfinite=2)
    held = state.State(
        out=tmp_path, name="simclr", config=settings, source=Patches(), method=method,
        optimizer=torch.optim.SGD(method.parameters(), 0.1), scaler=update.scaler(settings),
    )  # fmt: skip
    for value in (1.0, torch.inf, torch.nan, 1.0):
        loss = held.scaler.scale(method.weight.sum() * value)
        torch.autograd.backward(loss)
        held.scaler.unscale_(held.optimizer)
        held.scaler.step(held.optimizer)
        held.scaler.update()
        held.optimizer.zero_grad()
        held.advance(value == 1.0, 0.1)
        assert held.scaler.get_scale() == 1.0
    assert (held.step, held.skipped) == (4, 2)
    for _ in range(2):
        held.advance(False, 0.1)
    with pytest.raises(guards.NonFinite, match=r"^3 steps in a row, step 7 .*; none was saved; st"):
        held.advance(False, 0.1)


@pytest.mark.slow
def test_features_that_become_alike_are_named_once(tmp_path, monkeypatch, capsys):
    real = update.gradients

    def collapsed(*arguments):
        output = real(*arguments)
        return dataclasses.replace(output, features=torch.ones_like(output.features))

    monkeypatch.setattr(update, "gradients", collapsed)
    train(tmp_path)
    said = capsys.readouterr().err
    assert said.count("collapse: feature_spread 0.0000 at step 2 ") == 1
    monkeypatch.undo()
    train(tmp_path / "well")
    assert "collapse" not in capsys.readouterr().err


def test_a_nonfinite_loss_stops_the_run_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    poison(monkeypatch, [7])
    with pytest.raises(UserError) as caught:
        train(tmp_path)
    text = str(caught.value)
    assert "nan at step 7" in text and "step-00000006.pt" in text
    assert "running_mean" in text or "gradient of" in text
    state = checkpoint.read(tmp_path / "checkpoints" / "last")
    assert state["step"] == 6
    assert all(t.isfinite().all() for t in state["method"].values())


def test_an_update_that_breaks_the_networks_is_never_saved(tmp_path, monkeypatch):
    """The loss of the step was finite; the weights after it are not."""
    real = Schedule.rate
    broken = lambda self, step: float("inf") if step == 5 else real(self, step)  # noqa: E731
    monkeypatch.setattr(Schedule, "rate", broken)
    with pytest.raises(UserError, match=r"broke the networks at step 5.*step-00000003\.pt"):
        train(tmp_path)
    assert checkpoint.read(tmp_path / "checkpoints" / "last")["step"] == 3
