"""What holds for every method; a new file in firstsight/methods is enrolled by existing."""

import dataclasses
from pathlib import Path

import pytest
import torch

from firstsight import distributed, engine, methods, parallel, run
from firstsight.batch import Batch
from firstsight.engine import update
from firstsight.errors import UserError
from firstsight.nets import MomentumEncoder
from tests.tiny import Patches, config

NAMES = methods.names()


def batch_of(count, views, sides, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pictures = tuple(torch.randn(count, 3, s, s, generator=generator) for s in sides)
    crops = tuple(
        torch.tensor([[2.0, 3.0, 30.0, 33.0]]).repeat(count, 1) + v for v in range(len(sides))
    )
    crops[-1][count - 1] += 50 * (len(sides) > 1)  # the last image shows two other places
    flips = tuple(torch.zeros(count, dtype=torch.bool) for _ in sides)
    return Batch(views=pictures, crops=crops, flips=flips, index=torch.arange(count))


def built(name, tmp_path, **values):
    settings = config(name, tmp_path, **values)
    method = methods.build(name, settings, images=48)
    with torch.no_grad():  # timm starts residual branches at zero, where no gradient passes yet
        for key, parameter in method.named_parameters():
            if key.endswith("weight") and not parameter.any():
                parameter.fill_(0.5)
    return method, settings


@pytest.mark.parametrize("name", NAMES)
def test_every_method_has_a_formula_test_and_a_paper(name):
    assert (Path(__file__).parent / f"test_{name}.py").exists()
    page = Path(methods.__file__).with_name(f"{name}.py").read_text().split('"""')[1]
    assert "https://arxiv.org/abs/" in page and "Shapes:" in page


@pytest.mark.parametrize("name", NAMES)
def test_settings_shown_by_help_are_those_of_the_method(name):
    _, defaults, light = methods.describe(name)
    _, real = methods.load(name)
    assert dataclasses.asdict(light) == dataclasses.asdict(real())
    assert defaults.epochs > 0


@pytest.mark.parametrize("counts", [(1,), (3,)])
@pytest.mark.parametrize("name", [n for n in NAMES if methods.load(n)[0].views == "pair"])
def test_other_numbers_of_views_are_refused(name, counts, tmp_path):
    with pytest.raises(UserError, match="two views of one size"):
        built(name, tmp_path, views={"counts": counts, "blur": (0.0,), "solarize": (0.0,)})


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_exactly_what_is_trained(name, tmp_path):
    method, settings = built(name, tmp_path)
    sides = settings.views.sides(settings.size)
    output = method(batch_of(8, len(sides), sides))
    output.loss.backward()
    for key, parameter in method.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, key
        else:
            assert parameter.grad is None, key
    assert all(p.requires_grad for p in method.backbone.parameters())
    assert not output.features.requires_grad
    assert output.features.shape == (8, method.backbone.width)


@pytest.mark.parametrize("name", NAMES)
def test_the_backbone_begins_the_same_for_any_number_of_images(name, tmp_path):
    """So that of 1 stands for it where banks and prototypes are not looked at."""
    few, many = (methods.build(name, config(name, tmp_path), images) for images in (1, 48))
    state = many.backbone.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in few.backbone.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_a_momentum_encoder_is_really_used_and_moves_alone(name, tmp_path):
    method, settings = built(name, tmp_path)
    copies = [m for m in method.modules() if isinstance(m, MomentumEncoder)]
    if not copies:
        pytest.skip(f"{name} has no momentum encoder")
    sides = settings.views.sides(settings.size)
    batch = batch_of(8, len(sides), sides)
    state = {k: v.clone() for k, v in method.state_dict().items()}
    before = method(batch).loss.item()
    method.load_state_dict(state)
    with torch.no_grad():
        for parameter in copies[0].parameters():
            parameter.add_(torch.randn_like(parameter))
    assert abs(method(batch).loss.item() - before) > 1e-4
    assert not any(p.requires_grad for p in copies[0].parameters())


def one_rank(rank, world, name, folder, overrides):
    """On a rank: what `gradients` gives for this rank's share of the batch."""
    distributed.start("cpu")
    torch.save(gradients(name, folder, overrides, rank, world), f"{folder}/rank-{rank}.pt")
    distributed.stop()


def gradients(name, folder, overrides, rank=0, world=1):
    settings = config(name, Path(folder), **overrides)
    method = methods.build(name, settings, images=48).double()  # no flips of a ReLU by rounding
    model = parallel.replica(method)
    sides = settings.views.sides(settings.size)
    whole = batch_of(8, len(sides), sides)
    share = slice(rank * 8 // world, (rank + 1) * 8 // world)
    part = Batch(
        views=tuple(v[share].double() for v in whole.views),
        crops=tuple(c[share] for c in whole.crops),
        flips=tuple(f[share] for f in whole.flips),
        index=whole.index[share],
    )
    torch.manual_seed(5 + rank)  # as the engine does; rank 0 decides what ranks share
    loss = model(part).loss
    loss.backward()
    method.after_step(0.5, 0.1)  # banks and prototypes move here
    grads = {k: p.grad for k, p in method.named_parameters() if p.grad is not None}
    buffers = {k: b for k, b in method.named_buffers() if "running" not in k and "batches" not in k}
    buffers |= {k: p.detach() for k, p in method.named_parameters() if not p.requires_grad}
    return distributed.mean(loss.detach()), grads, buffers


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_ranks_are_one_process_on_the_same_batch(name, world, tmp_path, on_ranks):
    """Loss, gradients and queues; per-rank batch-norm is emulated by splits of the batch.

    Where the mean of a rank is over fewer places than that of another (the last image shows no
    place twice), the means are weighted by how many there are.
    """
    _, defaults, own = methods.describe(name)
    splits = hasattr(own, "splits")
    if not splits:
        assert defaults.batch_norm == "global"
    # momentum encoders that start elsewhere have a way to go
    some = {"start": "independent"} if isinstance(getattr(own, "start", 0.0), str) else {}
    alone = {"method": some | ({"splits": world} if splits else {})}
    loss, grads, buffers = gradients(name, str(tmp_path), alone)
    on_ranks(one_rank, world, name, str(tmp_path), {"method": some}, world=world)
    for rank in range(world):
        got_loss, got_grads, got_buffers = torch.load(tmp_path / f"rank-{rank}.pt")
        assert got_loss == pytest.approx(loss, rel=1e-10)
        assert got_grads.keys() == grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(got_grads[key], grad, atol=1e-9, rtol=1e-7, msg=key)
        for key, buffer in buffers.items():
            torch.testing.assert_close(got_buffers[key], buffer, atol=1e-9, rtol=1e-7, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_of_a_batch_are_the_batch_unless_the_method_says_otherwise(
    name, tmp_path, monkeypatch
):
    """Loss, gradients, queues; with batch-norm at rest, since its statistics are of a chunk."""
    monkeypatch.setattr(update, "on_device", lambda batch, *_: batch)  # made of floats already

    def of(chunks):
        method, settings = built(name, tmp_path, accumulate=chunks)
        sides = settings.views.sides(settings.size)
        whole = batch_of(8, len(sides), sides)
        doubles = dataclasses.replace(whole, views=tuple(view.double() for view in whole.views))
        method.double().eval()
        output = update.gradients(method, doubles, update.scaler(settings), settings)
        assert len(output.features) == 8 and not output.loss.requires_grad
        got = {key: p.grad for key, p in method.named_parameters() if p.grad is not None}
        torch.manual_seed(1)
        method.after_step(0.5, 0.1)
        # no means over images: of a chunk, like batch-norm's statistics
        odd = ("embedding_spread", "_min", "_median", "_max")
        scalars = {key: value for key, value in output.scalars.items() if not key.endswith(odd)}
        return method, {
            "loss": output.loss,
            **scalars,
            **got,
            **dict(method.named_buffers()),
        }

    method, whole = of(1)
    for chunks in (2, 3):
        _, parts = of(chunks)
        near = {"rtol": 1e-9, "atol": 1e-12}
        same = [torch.allclose(parts[key], whole[key], **near) for key in whole]
        assert parts.keys() == whole.keys() and all(same) == (not method.couples)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("at", "options"),
    [
        (5, {}),
        *(pytest.param(at, {}, marks=pytest.mark.slow) for at in (1, 4, 9, 11)),
        pytest.param(9, {"accumulate": 2}, marks=pytest.mark.slow),  # in the middle of a step
        (10, {"accumulate": 2, "optimizer": "lars", "lars": "simclr", "clip_norm": 0.5}),
        pytest.param(5, {"precision": "fp16", "clip_param": 0.1}, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_where_an_unbroken_run_ends(name, at, options, tmp_path, monkeypatch):
    """Bit for bit, with another number of workers: weights, optimiser, scaler, queue, log."""
    if options.get("precision") == "fp16" and name not in ("mocov2", "pic"):
        pytest.skip("half precision is slow on a CPU: two methods show that the scaler goes on")
    source = Patches(48)  # 6 steps an epoch, 12 in all, a checkpoint after every third

    def ended(folder, workers=0):
        settings = config(name, tmp_path / folder, workers=workers, **options)
        (tmp_path / folder).mkdir(exist_ok=True)
        engine.pretrain(name, settings, source, None, tmp_path / folder)
        return torch.load(tmp_path / folder / "checkpoints" / "last")

    whole = ended("whole")
    calls = iter(range(100))
    real = update.on_device

    def failing(*arguments):
        if next(calls) == at:
            raise Interrupted
        return real(*arguments)

    monkeypatch.setattr(update, "on_device", failing)
    with pytest.raises(Interrupted):
        ended("broken")
    monkeypatch.setattr(update, "on_device", real)
    resumed = ended("broken", workers=2)
    assert resumed["step"] == whole["step"] == 12
    for key, tensor in whole["method"].items():
        assert torch.equal(tensor, resumed["method"][key]), key
    assert (whole["scaler"], whole["skipped"]) == (resumed["scaler"], resumed["skipped"])
    for key, slots in whole["optimizer"]["state"].items():
        for slot, value in slots.items():
            other = resumed["optimizer"]["state"][key][slot]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other)), (key, slot)

    def steps(folder):
        records = run.read_log(tmp_path / folder / "log.jsonl")
        return [(r["step"], r["loss"], r["lr"]) for r in records]

    assert steps("whole") == steps("broken")
    assert [step for step, _, _ in steps("broken")] == list(range(1, 13))
