"""Networks as Tobias ablates them: sizes of maps, initial weights, and what each change does."""

import copy
import dataclasses
import math

import pytest
import torch
from torch import nn

from firstsight.errors import UserError
from firstsight.localize import activation
from firstsight.localize.network import Changes, load, networks, weights_hash

NONE = Changes()


def shape(name, stages=None, size=64, **changes):
    network, _ = load(f"random:{name}", 0, size, Changes(**changes))
    features, _ = activation.features_of(network, stages)
    with torch.no_grad():
        return tuple(features(torch.randn(1, 3, size, size)).shape[1:])


def test_map_sizes_of_the_published_networks_at_224():
    assert shape("resnet50", size=224) == (2048, 14, 14)
    for stage, expected in enumerate([(64, 56, 56), (256, 56, 56), (512, 28, 28), (1024, 14, 14)]):
        assert shape("resnet50", stage, size=224) == expected
    assert shape("resnet50", size=224, last_stride=2) == (2048, 7, 7)
    assert shape("resnet18", size=224, last_stride=2) == (512, 7, 7)
    assert shape("timm:vgg16", size=224) == (512, 7, 7)


def test_stages_out_of_range_are_refused():
    with pytest.raises(UserError, match="resnet18 has stages 0 to 4; --stages 5"):
        shape("resnet18", 5)
    assert shape("timm:test_resnet", 2) == (48, 8, 8)


def test_a_layer_norm_at_the_end_makes_sums_vanish_so_transformers_are_read_before_it():
    network, _ = load("random:timm:test_vit", 0, 64, NONE)
    images = torch.randn(2, 3, 64, 64)
    features, stage = activation.features_of(network, None)
    assert stage == network.last_stage == 5
    with torch.no_grad():
        assert network.feature_map(images).sum(dim=1).abs().max() < 1e-4
        assert features(images).sum(dim=1).abs().max() > 0.1


@pytest.mark.parametrize(
    ("init", "spread", "largest"),
    [
        ("kaiming-normal", math.sqrt(2 / (64 * 9)), None),
        ("kaiming-uniform", math.sqrt(2 / (64 * 9)), math.sqrt(6 / (64 * 9))),
        ("xavier-normal", math.sqrt(2 / (128 * 9)), None),
        ("xavier-uniform", math.sqrt(2 / (128 * 9)), math.sqrt(6 / (128 * 9))),
        ("normal:0.1", 0.1, None),
        ("uniform:0.1", 0.1 / math.sqrt(3), 0.1),
    ],
)
def test_initial_weights_have_the_published_spread(init, spread, largest):
    network, _ = load("random:resnet18", 3, 64, Changes(init=init))
    weight = network.get_submodule("layer1")[0].conv1.weight  # 64 to 64 channels, 3 x 3
    assert weight.std().item() == pytest.approx(spread, rel=0.02)
    assert abs(weight.mean().item()) < spread / 30
    if largest is not None:
        assert 0.99 * largest < weight.abs().max().item() <= largest


def test_atan_starts_with_the_gain_of_tanh_as_published():
    network, _ = load("random:resnet18", 3, 64, Changes(init="kaiming-normal", activation="atan"))
    weight = network.get_submodule("layer1")[0].conv1.weight
    assert weight.std().item() == pytest.approx(5 / 3 / math.sqrt(64 * 9), rel=0.02)


def test_seeds_decide_the_network_and_leave_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = (load("random:timm:test_resnet", s, 64, NONE)[0] for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert weights_hash(one) == weights_hash(two) != weights_hash(other)
    assert networks("random:resnet18", 4, 3) == [("random:resnet18", n) for n in (4, 5, 6)]
    with pytest.raises(UserError, match="runs/a is one network"):
        networks("runs/a", 0, 2)


def test_a_finer_last_stage_has_the_same_weights_and_agrees_on_every_other_cell():
    coarse, _ = load("random:resnet18", 0, 64, Changes(last_stride=2))
    fine, _ = load("random:resnet18", 0, 64, Changes(last_stride=1))
    images = torch.randn(1, 3, 64, 64)
    assert weights_hash(coarse) == weights_hash(fine)
    with torch.no_grad():
        before = coarse.stage_map(images, 3)
        a, b = (n.get_submodule("layer4")[0].conv1(before) for n in (coarse, fine))
    assert torch.allclose(a, b[..., ::2, ::2], atol=1e-5)
    with pytest.raises(UserError, match="--last-stride is for ResNets"):
        load("random:timm:vgg16", 0, 64, Changes(last_stride=1))


def test_activations_are_replaced_everywhere_and_gates_stay():
    network, _ = load("random:resnet18", 0, 64, Changes(activation="sigmoid"))
    kinds = [type(m) for m in network.modules()]
    assert nn.ReLU not in kinds and kinds.count(nn.Sigmoid) == 9
    gated, _ = load("random:timm:efficientnet_b0", 0, 64, NONE)
    changed, _ = load("random:timm:efficientnet_b0", 0, 64, Changes(activation="relu"))
    count = [sum(isinstance(m, nn.Sigmoid) for m in n.modules()) for n in (gated, changed)]
    assert count[0] == count[1] > 0
    atan, _ = load("random:timm:test_resnet", 0, 64, Changes(activation="atan"))
    with torch.no_grad():
        stem = atan.stage_map(torch.randn(1, 3, 64, 64), 0)
    assert stem.min() < 0 and stem.abs().max() <= math.pi / 2


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_padding_is_that_of_torch_pad(mode):
    network, _ = load("random:resnet18", 0, 64, Changes(padding=mode))
    conv = network.get_submodule("conv1")
    images = torch.randn(2, 3, 20, 20)
    padded = nn.functional.pad(images, (3, 3, 3, 3), mode=mode)
    expected = nn.functional.conv2d(padded, conv.weight, stride=2)
    assert torch.allclose(conv(images), expected, atol=1e-5)


def test_padding_reaches_the_convolutions_that_are_products_on_tiny_maps():
    network, _ = load("random:resnet18", 0, 64, Changes(padding="replicate", last_stride=2))
    conv = network.get_submodule("layer4")[1].conv1
    tiny = torch.randn(1, 512, 2, 2)
    expected = nn.functional.conv2d(nn.functional.pad(tiny, (1, 1, 1, 1), mode="replicate"),
                                    conv.weight)  # fmt: skip
    assert torch.allclose(conv(tiny), expected, atol=1e-4)


def test_a_flat_image_gives_a_flat_map_where_the_edge_is_repeated_and_not_with_zeros():
    grey = torch.full((1, 3, 64, 64), 0.3)
    for padding, is_flat in (("zeros", False), ("replicate", True)):
        network, _ = load("random:resnet18", 0, 64, Changes(padding=padding))
        with torch.no_grad():
            values = activation.activation_sum(network.feature_map(grey))[0]
        assert ((values.max() - values.min()) / values.mean() < 1e-4) == is_flat


@pytest.mark.parametrize("name", ["resnet18", "timm:efficientnet_b0"])
def test_own_statistics_are_batch_norm_in_training_on_one_image(name):
    changed, _ = load(f"random:{name}", 0, 64, Changes(bn="batch", last_stride=0))
    plain, _ = load(f"random:{name}", 0, 64, NONE)
    changed, plain = changed.double(), plain.double()  # variances of four values magnify rounding
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        together = changed.feature_map(images)
        for image, expected in zip(images, together, strict=True):
            alone = copy.deepcopy(plain)
            for module in alone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train()
            assert torch.allclose(alone.feature_map(image[None])[0], expected)


def test_changes_are_settings_of_the_command():
    from firstsight.localize.commands import Network

    assert {f.name for f in dataclasses.fields(Changes)} <= {
        f.name for f in dataclasses.fields(Network)
    }


def test_an_init_is_refused_where_it_cannot_be_read_or_would_undo_training(tmp_path):
    for wrong in ("normal", "normal:-1", "uniform:x", "orthogonal"):
        with pytest.raises(UserError, match="--init is own"):
            load("random:timm:test_resnet", 0, 64, Changes(init=wrong))
    with pytest.raises(UserError, match="--init xavier-normal would undo runs/x"):
        load("runs/x", 0, 64, Changes(init="xavier-normal"))
