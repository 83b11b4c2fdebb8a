"""LARS in every meaning, learning rates of every paper, clipping: against loops and published
vectors."""

import math
import typing

import pytest
import torch
from torch import nn

from firstsight import methods, optim
from firstsight.engine import update
from firstsight.errors import UserError
from firstsight.optim import lars
from firstsight.optim.schedule import Schedule
from firstsight.settings import Lars as LarsName
from firstsight.settings import begun
from tests.tiny import config


def waves(shape, phase):
    """The inputs of the published vectors: element n is sin(0.37 n + phase)."""
    return (0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).sin().view(shape)


def stepped(variant, rates, weights, decay=1e-6, excluded=()):
    """Weights after steps with these rates; each weight is (value, its gradient at each step)."""
    parameters = [nn.Parameter(value.clone()) for value, _ in weights]
    groups = [{"params": [p], "excluded": i in excluded} for i, p in enumerate(parameters)]
    for i in excluded:
        groups[i]["weight_decay"] = 0.0
    optimizer = optim.build("lars", groups, decay, lars.VARIANTS[variant])
    for number, lr in enumerate(rates):
        for parameter, (_, gradients) in zip(parameters, weights, strict=True):
            parameter.grad = gradients[number].clone()
        optim.set_rate(optimizer, lr)
        optimizer.step()
    return [p.detach() for p in parameters]


def test_larc_and_barlow_lars_make_the_published_steps():
    weights = [
        (waves((3, 4), 0.1), [waves((3, 4), 1)] * 2),
        (waves((3,), 0.2), [waves((3,), 0.7)] * 2),
    ]
    w, b = stepped("larc", [4.8], weights)
    assert w[0, :2].tolist() == pytest.approx([0.09635030, 0.44883013], abs=5e-9)
    assert b[:2].tolist() == pytest.approx([0.19658708, 0.53679675], abs=5e-9)
    w, b = stepped("barlow", [1.6], weights, excluded=(1,))
    assert w[0, :2].tolist() == pytest.approx([0.09867238, 0.45153423], abs=5e-9)
    assert b[:2].tolist() == pytest.approx([-0.83207897, -0.86388876], abs=5e-9)
    w, _ = stepped("barlow", [1.6] * 2, weights, excluded=(1,))
    assert w[0, :2].tolist() == pytest.approx([0.09646768, 0.44896682], abs=5e-9)


def test_scrl_lars_makes_the_published_step():
    weight, gradient = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 0.0]).double()
    (moved,) = stepped("scrl", [1.0], [(weight, [gradient])], decay=0.1)
    assert (weight - moved).tolist() == pytest.approx([0.00433333, 0.00133333], abs=5e-9)


def test_lars_of_pics_simclr_makes_the_published_step():
    """It is PixPro's: the decay counts in the norm; vectors take plain steps."""
    weight, gradient = torch.tensor([3.0, 4.0]).double(), torch.tensor([1.0, 0.0]).double()
    (moved,) = stepped("pixpro", [1.0], [(weight, [gradient])], decay=0.1)
    assert (weight - moved).tolist() == pytest.approx([0.0047789, 0.0014704], abs=5e-8)
    assert ((weight - moved)[0] / 1.3).item() == pytest.approx(0.00367607, abs=5e-9)


def test_nesterov_in_lars_is_that_of_sgd_with_an_adapted_gradient():
    """torch's own SGD on the adapted gradients, by hand, is the same walk."""
    value = waves((3, 4), 0.1)
    ours, theirs = nn.Parameter(value.clone()), nn.Parameter(value.clone())
    variant = lars.VARIANTS["larc"]
    optimizer = lars.Lars([ours], variant, weight_decay=0.0, nesterov=True)
    reference = torch.optim.SGD([theirs], lr=0.0, momentum=0.9, nesterov=True)
    for lr, phase in ((0.5, 1.0), (2.0, 0.3), (0.7, 2.0)):
        gradient = waves((3, 4), phase)
        ours.grad = gradient.clone()
        theirs.grad = gradient * 0.001 * theirs.detach().norm() / (gradient.norm() + 1e-8)
        for one in (optimizer, reference):
            optim.set_rate(one, lr)
            one.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="Nesterov"):
        lars.Lars([ours], lars.VARIANTS["simclr"], weight_decay=0.0, nesterov=True)


def looped(variant, rates, value, gradients, decay, excluded):
    """One tensor by plain loops, each variant as its own text says it."""
    p, buffer = [x.item() for x in value.flatten()], [0.0] * value.numel()

    def length(numbers):
        return math.sqrt(sum(x * x for x in numbers))

    for lr, gradient in zip(rates, gradients, strict=True):
        g = [x.item() for x in gradient.flatten()]
        size = length(p)
        if variant == "larc":
            if size != 0 and length(g) != 0:
                ratio = 0.001 * size / (length(g) + decay * size + 1e-8)
                g = [(x + decay * w) * ratio for x, w in zip(g, p, strict=True)]
        elif excluded:
            if variant == "scrl-published":
                g = [x * lr for x in g]
        elif variant == "solo":
            if size != 0 and length(g) != 0:
                ratio = min(0.02 * size / (length(g) + decay * size + 1e-8) / lr, 1)
                g = [(x + decay * w) * ratio for x, w in zip(g, p, strict=True)]
        elif variant in ("scrl", "scrl-published"):
            ratio = 1.0
            if size > 0 and length(g) > 0:
                ratio = 0.001 * size / (length(g) + decay * size + 1e-8)
            g = [(x + decay * w) * ratio for x, w in zip(g, p, strict=True)]
        else:
            g = [x + decay * w for x, w in zip(g, p, strict=True)]
            if size > 0 and length(g) > 0:
                ratio = 0.001 * size / (length(g) + (1e-8 if variant == "pixpro" else 0))
                g = [x * ratio for x in g]
        if variant == "simclr":
            buffer = [0.9 * v + lr * x for v, x in zip(buffer, g, strict=True)]
            p = [w - v for w, v in zip(p, buffer, strict=True)]
        else:
            buffer = [0.9 * v + x for v, x in zip(buffer, g, strict=True)]
            p = [w - lr * v for w, v in zip(p, buffer, strict=True)]
    return torch.tensor(p, dtype=torch.float64).view(value.shape)


@pytest.mark.parametrize("variant", lars.VARIANTS)
def test_every_variant_is_its_plain_loop(variant):
    """Changing rates, zero gradients, zero weights, tensors that are excluded."""
    rates = [0.5, 2.0, 3.0, 0.1, 1.0]
    zero, some = torch.zeros(2, 3).double(), waves((2, 3), 0.4)
    weights = [
        (waves((3, 4), 0.1), [waves((3, 4), phase) for phase in (1, 2, 3, 4, 5)]),
        (zero, [some, zero, some * 2, zero, some]),  # starts at zero
        (some, [zero, some, zero, zero, -some]),
        (zero, [zero] * 5),
        (waves((5,), 0.2) * 1e-9, [waves((5,), phase) * 1e-9 for phase in (1, 2, 3, 4, 5)]),
        (waves((4,), 0.3), [waves((4,), phase) for phase in (1, 2, 3, 4, 5)]),
        (some, [some * 1e-3] * 5),  # so short a gradient that a ratio may have to be cut
    ]
    excluded = () if variant == "larc" else (5,)
    got = stepped(variant, rates, weights, decay=0.1, excluded=excluded)
    for i, (value, gradients) in enumerate(weights):
        expected = looped(variant, rates, value, gradients, 0.1, i in excluded)
        torch.testing.assert_close(got[i], expected, atol=1e-15, rtol=1e-10, msg=f"tensor {i}")


def test_inside_and_outside_the_buffer_differ_only_where_the_rate_changes():
    weights = [(waves((3, 4), 0.1), [waves((3, 4), phase) for phase in (1, 2, 3)])]
    steady = [stepped(v, [0.7] * 3, weights)[0] for v in ("byol", "simclr")]
    changing = [stepped(v, [0.7, 0.1, 0.7], weights)[0] for v in ("byol", "simclr")]
    torch.testing.assert_close(*steady)
    assert (changing[0] - changing[1]).abs().max() > 1e-5


def test_biases_of_barlow_twins_have_a_rate_of_their_own(tmp_path):
    """.2 and .0048 per 256 images, plain steps of momentum for what is not adapted."""
    settings = config("barlow", tmp_path, batch_size=512)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    optimizer = optim.of(net, settings)
    before = [p.detach().clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = waves(parameter.shape, 0.3)
    optim.set_rate(optimizer, settings.peak_lr)
    optimizer.step()
    weight, *rest = net.parameters()
    pull = waves((4, 3), 0.3) + 1e-6 * before[0]
    moved = 2 * 0.2 * 0.001 * before[0].norm() / pull.norm() * pull
    torch.testing.assert_close(weight, before[0] - moved, rtol=1e-12, atol=0)
    for parameter, was in zip(rest, before[1:], strict=True):
        torch.testing.assert_close(parameter, was - 2 * 0.0048 * waves((4,), 0.3))
    assert optimizer.variant.excluded_rate == 0.024
    assert optim.of(net, config("vicreg", tmp_path)).variant == lars.VARIANTS["barlow"]
    with pytest.raises(UserError, match="--excluded-lr must be above 0"):
        config("barlow", tmp_path, excluded_lr=0.0)


@pytest.mark.parametrize("kind", ["sgd", "lars", "adamw"])
def test_a_steady_part_keeps_the_peak_while_the_rest_falls(kind, tmp_path):
    """SimSiam's predictor; weights, norms and biases of it alike."""
    asked = {"optimizer": kind, "undecayed": ("norm",), "method": {"steady_predictor": True}}
    settings = config("simsiam", tmp_path, **asked)
    method = methods.build("simsiam", settings, 48)
    optimizer, scaler = optim.of(method, settings), update.scaler(settings)
    predictor = {id(p) for p in method.predictor.parameters()}
    for lr in (settings.peak_lr, 1e-4, 0.0):
        update.apply(method, optimizer, scaler, settings, 0.5, lr)
        rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
        assert len(rates) == sum(p.requires_grad for p in method.parameters())
        assert all(
            rate == (settings.peak_lr if p in predictor else lr) for p, rate in rates.items()
        )
    plain = methods.build("simsiam", config("simsiam", tmp_path, optimizer=kind), 48)
    assert not any(group["steady"] for group in optim.of(plain, settings).param_groups)


def test_whose_lars_a_method_has():
    """Table of the variants: PixPro, SimCLR and BYOL have their own, three share one."""
    shared = dict.fromkeys(("barlow", "vicreg", "mocov3"), "barlow")
    own = {"simclr": "simclr", "byol": "byol", "pixpro": "pixpro", "swav": "larc", "scrl": "scrl"}
    for name in methods.names():
        defaults = methods.describe(name)[1]
        expected = {**shared, **own}.get(name)
        assert (defaults.lars if defaults.optimizer == "lars" else None) == expected, name


def test_what_each_variant_excludes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
            self.bn1 = nn.BatchNorm2d(4)
            self.scale = nn.Parameter(torch.ones(4))
            self.layer1 = nn.ModuleDict({"bn2": nn.BatchNorm2d(4), "downsample": nn.BatchNorm2d(4)})
            self.layer1 = nn.Sequential(self.layer1)
            self.head = nn.Linear(4, 2)

    net = Net()
    names = {id(p): name for name, p in net.named_parameters()}

    def excluded(variant):
        parts = optim.groups(net, (), lars.VARIANTS[variant])
        assert sum(len(part["params"]) for part in parts) == len(names)
        (part,) = [p for p in parts if p.get("excluded")] or [{"params": [], "weight_decay": 0.0}]
        assert part["weight_decay"] == 0.0
        return {names[id(p)] for p in part["params"]}

    owners = ("bn1", "layer1.0.bn2", "layer1.0.downsample")
    norms = {f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")}
    assert excluded("larc") == set()
    assert excluded("byol") == excluded("simclr") == excluded("scrl") == norms | {"head.bias"}
    for variant in ("barlow", "pixpro", "solo"):
        assert excluded(variant) == norms | {"head.bias", "scale"}
    by_name = {name for name in names.values() if "bias" in name} | {"layer1.0.bn2.weight"}
    assert excluded("scrl-published") == by_name
    for kinds in ((), ("norm", "bias")):  # scales of other norms are decayed as published
        parts = optim.groups(net, kinds, lars.VARIANTS["scrl-published"])
        assert [part.get("weight_decay") for part in parts] == [None, 0.0]
        assert {names[id(p)] for p in parts[0]["params"]} == set(names.values()) - by_name


def test_the_command_line_knows_every_variant():
    assert set(typing.get_args(LarsName)) == set(lars.VARIANTS)


def test_a_run_gets_the_optimiser_it_asked_for():
    _, defaults, own = methods.describe("simclr")
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    for values, kind in (
        ({"optimizer": "sgd"}, torch.optim.SGD),
        ({"optimizer": "adamw"}, torch.optim.AdamW),
        ({"optimizer": "lars", "lars": "byol"}, lars.Lars),
    ):
        optimizer = optim.of(net, begun(defaults, own, values, "test"))
        assert isinstance(optimizer, kind)
    assert optimizer.variant == lars.VARIANTS["byol"]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 3]


def test_dino_and_swav_rates():
    dino = Schedule(steps=70, peak=5e-4, warmup=14, end=1e-6 / 5e-4, at="linspace")
    rates = [dino.rate(step) for step in (0, 13, 14, 40, 69)]
    assert rates == pytest.approx([0, 5e-4, 5e-4, 2.78435e-4, 1.39251e-6], rel=5e-6)
    swav = Schedule(
        steps=2000, peak=4.8, warmup=200, start=0.3 / 4.8, end=0.0048 / 4.8, at="linspace"
    )
    rates = [swav.rate(step) for step in (0, 100, 199, 200, 1100, 1999)]
    assert rates == pytest.approx([0.3, 2.561307, 4.8, 4.8, 2.4024, 0.004803652], rel=2e-7)


def test_scrl_rates_are_read_at_the_end_of_a_step():
    """The k-th batch overall, k from 1, of 6 epochs of 10."""
    scrl = Schedule(steps=60, peak=1.0, warmup=20, at="end")
    rates = [scrl.rate(k - 1) for k in (1, 10, 20, 21, 40, 60)]
    assert rates == pytest.approx([0.05, 0.5, 1.0, 0.998459, 0.5, 0], abs=5e-7)


def test_pic_rates():
    pic = Schedule(steps=60, peak=0.03, warmup=20, start=0.01, end=1e-6 / 0.03)
    rates = [pic.rate(step) for step in (0, 10, 20, 21, 40, 59)]
    expected = [0.0003, 0.01515, 0.03, 0.02995376, 0.0150005, 0.00004724]
    assert rates == pytest.approx(expected, abs=5e-9)


def test_seed_rates_fall_along_a_cosine_that_counts_the_warm_up():
    """Rate .03 at batch 512: to twice that in 5 epochs; epochs 0, 1, 4, 5, 100, 199 of 200."""
    seed = Schedule(steps=200, peak=0.06, warmup=5, start=0.5, shape="whole-cosine")
    rates = [seed.rate(epoch) for epoch in (0, 1, 4, 5, 100, 199)]
    assert rates == pytest.approx([0.03, 0.036, 0.054, 0.059908, 0.03, 4e-6], abs=5e-7)


def test_moco_rates_change_every_epoch():
    moco = Schedule(steps=200 * 7, peak=0.03, hold=7)
    for epoch in (0, 1, 120, 199):
        expected = 0.03 * 0.5 * (1 + math.cos(math.pi * epoch / 200))
        for step in (7 * epoch, 7 * epoch + 6):
            assert moco.rate(step) == pytest.approx(expected, abs=1e-15)
    cifar = Schedule(steps=200 * 7, peak=0.06, hold=7, at="end")  # its epochs are 1 to 200
    assert cifar.rate(0) == pytest.approx(0.06 * 0.5 * (1 + math.cos(math.pi / 200)), abs=1e-15)
    assert cifar.rate(199 * 7) == cifar.rate(200 * 7 - 1) == 0
    drops = Schedule(steps=200 * 7, peak=1.0, hold=7, shape="step", drops=(0.6, 0.8))
    rates = [drops.rate(7 * epoch) for epoch in (119, 120, 159, 160, 199)]
    assert rates == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


def test_barlow_and_byol_rates_warm_up_from_zero_by_step():
    barlow = Schedule(steps=110, peak=1.6, warmup=10, end=0.001)
    for step in range(110):
        q = 0.5 * (1 + math.cos(math.pi * (step - 10) / 100))
        expected = 1.6 * step / 10 if step < 10 else 1.6 * q + 0.0016 * (1 - q)
        assert barlow.rate(step) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("at", ["start", "end", "linspace"])
@pytest.mark.parametrize("hold", [1, 4])
def test_a_run_that_is_all_warm_up_or_one_step_has_rates(at, hold):
    assert 0 <= Schedule(steps=1, peak=1.0, warmup=1, at=at, hold=hold).rate(0) <= 1
    rates = [Schedule(steps=6, peak=1.0, warmup=6, at=at, hold=hold).rate(s) for s in range(6)]
    assert rates == sorted(rates) and max(rates) <= 1


def test_settings_become_the_schedule():
    _, defaults, own = methods.describe("mocov2")
    values = {
        "lr": 0.5,
        "epochs": 10,
        "warmup_epochs": 2,
        "lr_start": 0.1,
        "lr_end": 0.01,
        "lr_at": "end",
        "lr_every": "epoch",
    }
    got = Schedule.of(begun(defaults, own, values, "test"), 70, 7)
    assert got == Schedule(
        steps=70,
        peak=0.5,
        warmup=14,
        drops=(0.6, 0.8),
        start=0.1,
        end=0.01,
        at="end",
        hold=7,
    )


def test_gradients_are_clipped_each_and_all_together():
    def clipped(norm, each):
        parameters = [nn.Parameter(torch.zeros(n).double()) for n in (3, 2, 4)]
        for parameter, size in zip(parameters, (5.0, 0.5, 2.0), strict=True):
            parameter.grad = waves(parameter.shape, size)
            parameter.grad *= size / parameter.grad.norm()
        before = [p.grad.clone() for p in parameters]
        optim.clip([*parameters, nn.Parameter(torch.zeros(1))], norm, each)
        return before, [p.grad for p in parameters]

    before, after = clipped(0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    before, after = clipped(0, 2.5)  # DINO
    shares = [min(1.0, 2.5 / (size + 1e-6)) for size in (5.0, 0.5, 2.0)]
    for a, b, share in zip(before, after, shares, strict=True):
        torch.testing.assert_close(b, a * share)
    before, after = clipped(1.0, 0)
    whole = math.sqrt(25 + 0.25 + 4)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a / (whole + 1e-6))


def test_weight_decay_moves_along_half_a_cosine_where_it_is_not_zero(tmp_path):
    """Of DINO: .04 to .4; what does not decay at first never does."""
    settings = config("dino", tmp_path, clip_param=0.0)
    method = methods.build("dino", settings, 48)
    optimizer, scaler = optim.of(method, settings), update.scaler(settings)
    assert len(optimizer.param_groups) == 2
    for progress in (0.0, 0.25, 0.5, 0.9):
        method._said.append((torch.zeros(24), 1))
        update.apply(method, optimizer, scaler, settings, progress, lr=0.0)
        expected = 0.4 - 0.36 * (math.cos(math.pi * progress) + 1) / 2
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        assert decays == [pytest.approx(expected), 0.0]


def test_weight_decay_stays_where_no_end_is_named(tmp_path):
    settings = config("simclr", tmp_path)
    method = methods.build("simclr", settings, 48)
    optimizer = optim.of(method, settings)
    before = [group["weight_decay"] for group in optimizer.param_groups]
    update.apply(method, optimizer, update.scaler(settings), settings, 0.9, lr=0.0)
    assert before == [group["weight_decay"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"weight_decay_end": -1.0}, "--weight-decay-end must not be below 0"),
        ({"weight_decay_end": 0.1, "weight_decay": 0.0}, "needs a start above 0"),
    ],
)
def test_impossible_ends_of_weight_decay_are_refused(values, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        config("simclr", tmp_path, **values)
