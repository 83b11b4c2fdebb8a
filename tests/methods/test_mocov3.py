import dataclasses
import math

import pytest
import torch

from firstsight import methods, recipes
from firstsight.backbones import build
from firstsight.errors import UserError
from firstsight.methods.mocov3 import Config, MoCoV3, mocov3_loss
from tests.methods.test_mocov2 import batch_of, wave
from tests.tiny import NETWORK, config


def method(network=NETWORK, **settings):
    torch.manual_seed(0)
    return MoCoV3(Config(dim=16, hidden=24, **settings), build(network, size=32), images=99)


def direction(queries, keys, temperature):
    """Equation 1 of the paper for one direction, in plain numbers."""

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    queries, keys, total = queries.tolist(), keys.tolist(), 0.0
    for i, query in enumerate(queries):
        similar = [math.exp(cosine(query, key) / temperature) for key in keys]
        total -= math.log(similar[i] / sum(similar))
    return 2 * temperature * total / len(queries)


def by_hand(p1, p2, k1, k2, temperature):
    return direction(p1, k2, temperature) + direction(p2, k1, temperature)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_loss_is_algorithm_1(temperature):
    rows = [wave((5, 7), 0.3 * i) * scale for i, scale in enumerate((1, 3, 0.2, 9))]
    got = mocov3_loss(*rows, temperature).item()
    assert got == pytest.approx(by_hand(*rows, temperature), abs=1e-12)


def test_loss_of_the_example_by_hand():
    """Two images, keys at right angles, queries on their own: 2 T log(1 + exp(-1 / T)) twice."""
    rows = torch.eye(2, dtype=torch.float64)
    expected = 2 * 2 * 0.5 * math.log(1 + math.exp(-2))
    assert mocov3_loss(rows, rows, rows, rows, 0.5).item() == pytest.approx(expected)


def test_no_gradient_flows_into_keys():
    p1, p2, k1, k2 = (wave((4, 8), 0.3 * i).requires_grad_() for i in range(4))
    mocov3_loss(p1, p2, k1, k2, 0.2).backward()
    assert p1.grad.abs().sum() > 0 and p2.grad.abs().sum() > 0
    assert k1.grad is None and k2.grad is None


def test_the_loss_of_rounded_embeddings_is_computed_in_full():
    rounded = [wave((4, 8), 0.3 * i).bfloat16() for i in range(4)]
    with torch.autocast("cpu", torch.bfloat16):
        low = mocov3_loss(*rounded, 0.2)
    exact = mocov3_loss(*(rows.double() for rows in rounded), 0.2)
    assert low.dtype == torch.float32 and low.item() == pytest.approx(exact.item(), rel=1e-5)


def test_forward_crosses_views_and_keys_come_from_the_momentum_encoder():
    moco = method(temperature=0.3).double()
    with torch.no_grad():
        for parameter in moco.momentum_encoder.parameters():
            parameter.mul_(1.3)
    batch = batch_of(6)
    batch = dataclasses.replace(batch, views=tuple(v.double() for v in batch.views))
    with torch.no_grad():
        predicted = [moco.predictor(moco.projector(moco.backbone(v))) for v in batch.views]
        keys = [moco.momentum_encoder(v) for v in batch.views]
    expected = by_hand(*predicted, *keys, 0.3)
    assert moco(batch).loss.item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(("progress", "momentum"), [(0, 0.97), (0.1, 0.970734), (0.9, 0.999266)])
def test_momentum_rises_along_half_a_cosine(progress, momentum):
    moco = method(momentum=0.97)
    before = [p.clone() for p in moco.momentum_encoder.parameters()]
    online = [*moco.backbone.parameters(), *moco.projector.parameters()]
    with torch.no_grad():
        for parameter in online:
            parameter.add_(1.0)
    moco.after_step(progress, 0.1)
    for old, now, seen in zip(before, moco.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * seen, atol=1e-6, rtol=0)


def kinds(head):
    return [type(m).__name__ for m in head]


def test_heads_are_those_of_the_code():
    """Of ResNets, and of transformers."""
    full, plain = ["Linear", "BatchNorm1d", "ReLU"], ["Linear"]
    resnet = method()
    assert kinds(resnet.projector) == [*full, "Linear", "BatchNorm1d"]
    assert kinds(resnet.predictor) == full + plain
    vit = method(projector_layers=3, predictor_norm=True)
    assert kinds(vit.projector) == full * 2 + ["Linear", "BatchNorm1d"]
    assert kinds(vit.predictor) == [*full, "Linear", "BatchNorm1d"]
    for moco in (resnet, vit):
        heads = [*moco.projector, *moco.predictor]
        assert all(m.bias is None for m in heads if isinstance(m, torch.nn.Linear))
        assert moco.projector[-1].weight is None and moco.projector[1].weight is not None
    assert vit.predictor[-1].weight is None


def test_patches_and_positions_of_a_transformer_stay():
    moco = method("timm:test_vit", freeze_patches=True, fixed_positions=True)
    held = {n for n, p in moco.backbone.named_parameters() if not p.requires_grad}
    patches = {"network.patch_embed.proj.weight", "network.patch_embed.proj.bias"}
    assert held == patches | {"network.pos_embed"}
    positions = moco.backbone.network.pos_embed[0]  # of a token, then of 10 x 10 patches
    assert not positions[0].any()
    for y in range(10):
        for x in range(10):
            angles = [[at * 10000 ** (-c / 16) for c in range(16)] for at in (x, y)]
            sides = [[*map(math.sin, a), *map(math.cos, a)] for a in angles]
            expected = pytest.approx([*sides[0], *sides[1]], abs=2e-6)
            assert positions[1 + 10 * y + x].tolist() == expected
    batch = batch_of(4)
    moco(batch).loss.backward()
    assert all((p.grad is None) == (n in held) for n, p in moco.backbone.named_parameters())


@pytest.mark.parametrize("zero", [True, False])
def test_residual_blocks_begin_as_the_identity_where_asked(zero):
    moco = method("resnet18", zero_init=zero)
    for backbone in (moco.backbone, moco.momentum_encoder.copy[0]):
        assert (backbone.layer1[0].bn2.weight == 0).all() == zero


def test_the_recipe_of_a_transformer_has_its_twelve_heads():
    """timm's has 6 in the same shapes."""
    name = recipes.read("mocov3-vits16-300ep").values["backbone"]
    with torch.device("meta"):
        blocks = build(name).network.blocks
    assert {block.attn.num_heads for block in blocks} == {12}


@pytest.mark.parametrize("flag", ["freeze_patches", "fixed_positions"])
def test_a_network_without_patches_is_told_so(flag, tmp_path):
    settings = config("mocov3", tmp_path, method={flag: True})
    with pytest.raises(UserError, match=f"--method.{flag.replace('_', '-')}"):
        methods.build("mocov3", settings, images=48)


@pytest.mark.parametrize("wrong", [{"dim": 0}, {"temperature": 0.0}, {"momentum": 1.5}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name} must be"):
        Config(**wrong)
