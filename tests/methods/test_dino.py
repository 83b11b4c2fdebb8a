import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import DropPath

from firstsight import methods, optim
from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.dino import DINO, Config, dino_loss
from tests.methods.test_mocov2 import wave
from tests.methods.test_swav import batch_of
from tests.tiny import NETWORK, config


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    own = Config(dim=8, hidden=24, **{"prototypes": 5, **settings})
    return DINO(own, build(network, size=32), images=99)


def by_hand(students, teachers, centre, student_temperature, teacher_temperature):
    """Equation 3, in plain numbers."""

    def softmax(row, temperature):
        raised = [math.exp(x / temperature) for x in row]
        return [x / sum(raised) for x in raised]

    total, pairs = 0.0, 0
    for i, teacher in enumerate(teachers):
        for v, student in enumerate(students):
            if v == i:
                continue
            pairs += 1
            for t, s in zip(teacher.tolist(), student.tolist(), strict=True):
                target = softmax(
                    [x - c for x, c in zip(t, centre, strict=True)], teacher_temperature
                )
                guess = softmax(s, student_temperature)
                cross = sum(p * math.log(q) for p, q in zip(target, guess, strict=True))
                total -= cross / len(student)
    return total / pairs


def published():
    return wave((12, 5), 0.1).split(3), wave((6, 5), 0.4).split(3)


def test_loss_and_centre_equal_the_published_vectors():
    students, teachers = published()
    dino = method().double()
    centre = dino.centre
    loss = dino_loss(students, teachers, centre, 0.1, 0.04)
    assert loss.item() == pytest.approx(4.415364, abs=2e-6)
    said = torch.cat(teachers)
    dino._said.append((said.sum(0), len(said)))
    dino.after_step(0.0, 0.1)
    assert dino.centre[:3].tolist() == pytest.approx([0.013290, 0.010837, 0.006918], abs=1e-6)
    loss = dino_loss(students, teachers, dino.centre, 0.1, 0.04)
    assert loss.item() == pytest.approx(4.403363, abs=2e-6)


def test_loss_is_the_double_loop_of_the_paper():
    torch.manual_seed(0)
    students = [torch.randn(3, 4, dtype=torch.float64) for _ in range(5)]
    teachers = [torch.randn(3, 4, dtype=torch.float64) for _ in range(2)]
    centre = torch.randn(4, dtype=torch.float64)
    expected = by_hand(students, teachers, centre.tolist(), 0.3, 0.2)
    assert dino_loss(students, teachers, centre, 0.3, 0.2).item() == pytest.approx(expected)


def test_no_gradient_flows_into_the_teacher():
    students, teachers = published()
    students = [s.clone().requires_grad_() for s in students]
    teachers = [t.clone().requires_grad_() for t in teachers]
    dino_loss(students, teachers, torch.zeros(5).double(), 0.1, 0.04).backward()
    assert all(s.grad.abs().sum() > 0 for s in students)
    assert all(t.grad is None for t in teachers)


def outputs(dino, batch):
    """Of student and teacher: a pass of the backbone for each size, the teacher on two views."""
    with torch.no_grad():
        large = torch.cat(batch.views[:2])
        features = torch.cat([dino.backbone(large), dino.backbone(torch.cat(batch.views[2:]))])
        return dino.projector(features).chunk(5), dino.momentum_encoder(large).chunk(2)


def test_forward_then_centre_teacher_and_temperature_move():
    """The loss sees the old centre; momentum and temperature are those of the run's progress."""
    dino = method(
        head_norm=True, teacher_temperature=0.2, teacher_start=0.1, teacher_warmup=0.5
    ).double()
    centre = [0.0] * 5
    for step, temperature in enumerate((0.1, 0.1, 0.15, 0.2)):  # of the step before
        batch = batch_of(4, seed=step)
        students, teachers = outputs(dino, batch)
        expected = by_hand(students, teachers, centre, 0.1, temperature)
        assert dino(batch).loss.item() == pytest.approx(expected, rel=1e-6)
        mean = torch.cat(teachers).mean(0).tolist()
        centre = [0.9 * c + 0.1 * m for c, m in zip(centre, mean, strict=True)]
        before = [p.clone() for p in dino.momentum_encoder.parameters()]
        online = [*dino.backbone.parameters(), *dino.projector.parameters()]
        with torch.no_grad():
            for parameter in online:
                parameter.add_(0.01)
        dino.after_step(step / 4, 0.1)
        assert dino.centre.tolist() == pytest.approx(centre, abs=1e-9)
        m = 1 - 0.004 * (math.cos(math.pi * step / 4) + 1) / 2
        for old, now, new in zip(before, dino.momentum_encoder.parameters(), online, strict=True):
            torch.testing.assert_close(now, m * old + (1 - m) * new)


def test_chunks_of_a_step_share_a_centre_and_move_it_once():
    whole, parts = method().double().eval(), method().double().eval()
    batch = batch_of(6)
    whole(batch)
    for chunk in batch.chunks(4):  # of two, two, one and one images
        parts(chunk)
        assert not parts.centre.any()
    for dino in (whole, parts):
        dino.after_step(0.0, 0.1)
    assert whole.centre.any()
    torch.testing.assert_close(parts.centre, whole.centre)


def test_the_published_momentum():
    assert optim.cosine(35 / 70, 0.996, 1.0) == pytest.approx(0.998, abs=1e-12)
    assert optim.cosine(69 / 70, 0.996, 1.0) == pytest.approx(0.99999799, abs=5e-9)


@pytest.mark.parametrize("free", [False, True])
def test_the_last_layer_has_unit_rows_whose_length_may_be_learned(free):
    dino = method(free_length=free).double()
    features = wave((3, dino.backbone.width), 0.2)
    with torch.no_grad():
        dino.projector.length.fill_(2.0)
        bottleneck = F.normalize(dino.projector.mlp(features), dim=1)
        rows = dino.projector.last.weight
        expected = [[2 * float(b @ r) / float(r.norm()) for r in rows] for b in bottleneck]
    assert dino.projector(features).tolist() == [pytest.approx(row) for row in expected]
    assert dino.projector.length.requires_grad == free
    dino(batch_of(2)).loss.backward()
    for progress, frozen in ((0.0, True), (0.01, False)):
        dino(batch_of(2)).loss.backward()
        dino.before_step(progress)
        assert (dino.projector.last.weight.grad is None) == frozen
        assert (dino.projector.length.grad is None) == (frozen or not free)
        dino.zero_grad()


def test_the_projector_is_that_of_the_paper():
    kinds = [type(m).__name__ for m in method().projector.mlp]
    assert kinds == ["Linear", "GELU", "Linear", "GELU", "Linear"]
    kinds = [type(m).__name__ for m in method(head_norm=True).projector.mlp]
    assert kinds == ["Linear", "BatchNorm1d", "GELU"] * 2 + ["Linear"]
    with torch.device("meta"):
        large = DINO(Config(), build("resnet50"), images=99)
    shapes = [tuple(p.shape) for p in large.projector.parameters() if p.ndim == 2]
    assert shapes == [(65536, 1), (2048, 2048), (2048, 2048), (256, 2048), (65536, 256)]


def test_only_the_student_drops_paths():
    dino = method("timm:test_vit", drop_path=0.3)
    student = [m.drop_prob for m in dino.backbone.modules() if isinstance(m, DropPath)]
    assert student[-2:] == [0.3, 0.3] and sorted(student) == student
    assert not [m for m in dino.momentum_encoder.modules() if isinstance(m, DropPath)]
    none = method("timm:test_vit", drop_path=0.0)
    assert not [m for m in none.backbone.modules() if isinstance(m, DropPath)]
    assert none.state_dict().keys() == dino.state_dict().keys()
    assert dino.double()(batch_of(2)).loss.isfinite()


def test_one_global_view_is_refused(tmp_path):
    few = {"counts": (1, 3), "blur": (0.0,), "solarize": (0.0,)}
    with pytest.raises(UserError, match="dino takes 2 or more views of the first size"):
        methods.build("dino", config("dino", tmp_path, views=few), images=48)


@pytest.mark.parametrize(
    "wrong", [{"student_temperature": 0.0}, {"momentum": 1.5}, {"teacher_warmup": 2.0}]
)
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name.replace('_', '-')} must be"):
        Config(**wrong)
