import dataclasses
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
import torchvision

from firstsight import engine, methods
from firstsight.backbones import build
from firstsight.batch import Batch
from firstsight.errors import UserError
from firstsight.methods.seed import SEED, Config, seed_loss
from firstsight.settings import plain, write_yaml
from tests.tiny import NETWORK, Patches, config

TEACHER = {"teacher": f"random:{NETWORK}", "teacher_layer": "backbone"}


def rows(of, count, width, scale, phase):
    numbers = torch.arange(count * width, dtype=torch.float64).view(count, width)
    return of(scale * numbers + phase)


A = F.normalize(rows(torch.sin, 8, 4, 0.7, 0.1), dim=1)
P = F.normalize(A + 0.6 * F.normalize(rows(torch.cos, 8, 4, 0.9, 0.3), dim=1), dim=1)
Q = F.normalize(rows(torch.cos, 6, 4, 0.37, 0.2), dim=1)


def method(**settings):
    torch.manual_seed(0)
    options = {"queue_size": 20, **TEACHER} | settings
    return SEED(Config(**options), build(NETWORK, size=32), images=99)


def batch_of(count, sides=(32,)):
    generator = torch.Generator().manual_seed(1)
    return Batch(
        views=tuple(torch.randn(count, 3, s, s, generator=generator) for s in sides),
        crops=(torch.zeros(count, 4),) * len(sides),
        flips=(torch.zeros(count, dtype=torch.bool),) * len(sides),
        index=torch.arange(count),
    )


def by_hand(student, teacher, queue, warm, cold):
    """Equations 3 to 5 in plain loops."""
    total = 0.0
    for z, t in zip(student.tolist(), teacher.tolist(), strict=True):
        others = [t, *queue.tolist()]
        said, wanted = (
            [sum(a * b for a, b in zip(one, d, strict=True)) / heat for d in others]
            for one, heat in ((z, warm), (t, cold))
        )
        log_said = [
            x - max(said) - math.log(sum(math.exp(y - max(said)) for y in said)) for x in said
        ]
        weights = [math.exp(x - max(wanted)) for x in wanted]
        total -= sum(w / sum(weights) * x for w, x in zip(weights, log_said, strict=True))
    return total / len(student)


@pytest.mark.parametrize(("cold", "loss"), [(1e-4, 1.053661), (1e-2, 1.054064), (0.07, 1.252802)])
def test_loss_equals_the_published_vectors_and_plain_loops(cold, loss):
    got = seed_loss(P[:4], A[:4], Q, 0.2, cold).item()
    assert got == pytest.approx(loss, abs=1e-6)
    assert got == pytest.approx(by_hand(P[:4], A[:4], Q, 0.2, cold), abs=1e-12)


def test_order_of_the_queue_is_nothing_and_a_cold_teacher_names_one():
    loss = seed_loss(P, A, Q, 0.2, 0.07)
    assert seed_loss(P, A, Q.flip(0), 0.2, 0.07).item() == pytest.approx(loss.item(), abs=1e-12)
    logits = torch.cat([(P * A).sum(1, keepdim=True), P @ Q.T], dim=1) / 0.2
    alone = F.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    assert seed_loss(P, A, Q, 0.2, 1e-6).item() == pytest.approx(alone.item(), abs=1e-12)


def test_no_gradient_reaches_the_teacher():
    student, teacher, queue = P.clone().requires_grad_(), A.clone().requires_grad_(), Q
    seed_loss(student, teacher, queue, 0.2, 0.07).backward()
    assert student.grad.abs().sum() > 0 and teacher.grad is None
    seed = method()
    before = seed._teacher[0].state_dict()
    before = {key: value.clone() for key, value in before.items()}
    seed.train()
    seed(batch_of(6)).loss.backward()
    for key, value in seed._teacher[0].state_dict().items():
        assert torch.equal(value, before[key]), key  # batch-norm statistics too
    assert all(p.grad is None for p in seed._teacher[0].parameters())
    assert not any(id(p) in map(id, seed.parameters()) for p in seed._teacher[0].parameters())


def test_forward_embeds_one_view_twice_and_pushes_the_teachers():
    seed = method().double()
    view = batch_of(6).views[0].double()
    queue = seed.queue.read()
    z = F.normalize(seed.projector(seed.backbone(view)), dim=1).detach()
    teacher = methods.network(TEACHER["teacher"], "backbone", "")[0].double()
    t = F.normalize(teacher(view), dim=1)
    output = seed(dataclasses.replace(batch_of(6), views=(view,)))
    assert output.loss.item() == pytest.approx(by_hand(z, t, queue, 0.2, 1e-4), rel=1e-6)
    torch.testing.assert_close(seed.queue.keys[:6], t.detach())
    assert torch.equal(seed.queue.keys[6:], queue[6:])


def test_small_crops_have_a_queue_of_their_own():
    """The loss is that of the view and the mean of theirs; the first crop goes into the queue."""
    seed = method(local_crops=3, teacher_temperature=0.07).double().eval()
    batch = batch_of(4, (32, 24, 24, 24))
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))
    queues = seed.queue.read(), seed.local_queue.read()
    with torch.no_grad():
        zs = [F.normalize(seed.projector(seed.backbone(v)), dim=1) for v in batch.views]
    ts = [seed.taught(v) for v in batch.views]
    losses = [
        by_hand(z, t, queues[min(i, 1)], 0.2, 0.07)
        for i, (z, t) in enumerate(zip(zs, ts, strict=True))
    ]
    assert seed(batch).loss.item() == pytest.approx(losses[0] + sum(losses[1:]) / 3, rel=1e-6)
    torch.testing.assert_close(seed.queue.keys[:4], ts[0])
    torch.testing.assert_close(seed.local_queue.keys[:4], ts[1])
    assert torch.equal(seed.local_queue.keys[4:], queues[1][4:])
    with pytest.raises(UserError, match=r"--method.local-crops 3 small ones, not 1 views"):
        seed(batch_of(4))


def taught_run(tmp_path, name="mocov2"):
    """A finished run of another method, to be the teacher."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    settings = config(name, folder, epochs=1.0)
    engine.pretrain(name, settings, Patches(16), None, folder)
    write_yaml(folder / "config.yaml", {"name": name, **plain(settings)})
    return folder, settings


def test_a_run_teaches_its_embedding(tmp_path):
    folder, settings = taught_run(tmp_path)
    seed = method(teacher=str(folder), teacher_layer="embedding")
    torch.manual_seed(0)
    build(NETWORK, size=32)
    teacher = methods.build("mocov2", settings, 1)
    teacher.load_state_dict(torch.load(folder / "checkpoints" / "last")["method"])
    teacher.eval()
    view = batch_of(4).views[0]
    expected = F.normalize(teacher.projector(teacher.backbone(view)), dim=1)
    torch.testing.assert_close(seed.taught(view), expected)
    assert seed.projector[-1].out_features == seed.queue.keys.shape[1] == 16


def test_the_teacher_is_not_saved_and_another_one_is_refused(tmp_path):
    folder, _ = taught_run(tmp_path)
    out = tmp_path / "run"
    out.mkdir()
    own = {"teacher": str(folder), "teacher_layer": "embedding"}
    settings = config("seed", out, epochs=1.0, method=own)
    engine.pretrain("seed", settings, Patches(16), None, out)
    saved = torch.load(out / "checkpoints" / "last")
    assert saved["settings"]["method"]["teacher"] == str(folder)
    student = methods.build("seed", settings, 1)
    assert set(saved["method"]) == {
        *(f"backbone.{key}" for key in student.backbone.state_dict()),
        *(f"projector.{key}" for key in student.projector.state_dict()),
        *(f"{queue}.{key}" for queue in ("queue", "local_queue") for key in ("keys", "position")),
        "_extra_state",
    }
    longer = dataclasses.replace(settings, epochs=2.0)
    engine.pretrain("seed", longer, Patches(16), None, out)  # the same teacher: goes on
    assert json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == 4
    shutil.rmtree(folder / "checkpoints")
    engine.pretrain(
        "mocov2", config("mocov2", folder, epochs=1.0, seed=5), Patches(16), None, folder
    )
    with pytest.raises(UserError, match="is not the teacher that the run began with"):
        engine.pretrain("seed", dataclasses.replace(longer, epochs=3.0), Patches(16), None, out)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"teacher": ""}, "name it: --method.teacher CHECKPOINT"),
        ({"teacher": "nowhere"}, "no checkpoint nowhere"),
        (
            {"teacher_layer": "embedding"},
            "random:.* is a backbone alone, without embedding; use --method.teacher-layer backbone",
        ),
    ],
)
def test_a_teacher_of_the_wrong_kind_is_one_sentence(wrong, said):
    with pytest.raises(UserError, match=said):
        method(**wrong)


def warm(tmp_path, init, **options):
    own = {"projector": "wide", "dim": 16, "queue_size": 20}
    return methods.build("mocov2", config("mocov2", tmp_path, init=init, method=own, **options), 16)


def test_a_student_warms_up_another_method_with_its_backbone_alone(tmp_path):
    """ssl-small's start; theirs takes the queue too."""
    out = tmp_path / "run"
    out.mkdir()
    settings = config("seed", out, epochs=0.5, method={"queue_size": 20})
    engine.pretrain("seed", settings, Patches(16), None, out)
    student = torch.load(out / "checkpoints" / "last")["method"]
    method = warm(tmp_path, str(out))
    for network in (method.backbone, method.momentum_encoder.copy[0]):
        for key, value in network.state_dict().items():
            assert torch.equal(value, student[f"backbone.{key}"]), key
    heads = method.projector, method.momentum_encoder.copy[1]
    assert [head[0].weight.shape for head in heads] == [(192, 96)] * 2
    assert not torch.isin(method.queue.keys, student["queue.keys"]).any()
    cold = warm(tmp_path, "").backbone.state_dict()
    assert not all(torch.equal(cold[k], student[f"backbone.{k}"]) for k in cold)


def test_a_published_student_warms_up_another_method_with_its_backbone_alone(tmp_path):
    """theirs takes the queue and, by accident of its shape, one bias of the head too."""
    torch.manual_seed(5)
    student = build("resnet18").state_dict()
    held = {f"module.student.{key}": value for key, value in student.items()}
    held |= {"module.student.fc.2.bias": torch.ones(16), "module.queue": torch.ones(16, 20)}
    held |= {f"module.teacher.{key}": value + 1 for key, value in student.items()}
    file = tmp_path / "checkpoint_0001.pth.tar"
    torch.save({"state_dict": held, "epoch": 2}, file)
    method = warm(tmp_path, str(file), backbone="resnet18")
    for key, value in method.backbone.state_dict().items():
        assert torch.equal(value, student[key]), key
    assert not (method.projector[2].bias == 1).any() and not (method.queue.keys == 1).any()


def test_a_published_file_with_its_embedding_is_a_teacher(tmp_path):
    torch.manual_seed(3)
    teacher = torchvision.models.resnet18(num_classes=8)
    teacher.fc = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.ReLU(), teacher.fc)
    file = tmp_path / "moco_v2.pth.tar"
    state = {f"module.encoder_q.{key}": value for key, value in teacher.state_dict().items()}
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, file)
    seed = method(teacher=str(file), teacher_layer="embedding")
    view = batch_of(3).views[0]
    with torch.no_grad():
        expected = F.normalize(teacher.eval()(view), dim=1)
    torch.testing.assert_close(seed.taught(view), expected, rtol=1e-4, atol=1e-5)
    assert seed.queue.read().shape == (20, 8)


def test_the_student_has_two_layers_or_one():
    first, _, last = method().projector
    width = build(NETWORK, size=32).width
    assert first.weight.shape == (width, width) and last.weight.shape == (96, width)
    assert method(projector="linear").projector.weight.shape == (96, width)


@pytest.mark.parametrize("wrong", ["queue_size", "temperature", "teacher_temperature", "splits"])
def test_values_out_of_range_name_their_flag(wrong):
    with pytest.raises(UserError, match=f"--method.{wrong.replace('_', '-')} must be"):
        Config(**{wrong: 0})
