"""One interface over torchvision and timm: the same features, and true statements about itself."""

import copy

import pytest
import timm
import torch
import torchvision

from firstsight import backbones, checkpoint
from firstsight.backbones.conv import Conv3x3, with_small_maps
from firstsight.errors import UserError


@pytest.mark.parametrize(
    ("name", "stem", "width", "stride"),
    [
        ("resnet18", "standard", 512, 32),
        ("resnet18", "small", 512, 8),
        ("resnet50", "standard", 2048, 32),
        ("cifar_resnet20", "standard", 64, 4),
        ("timm:test_resnet", "standard", 96, 32),
        ("timm:test_efficientnet", "standard", 256, 32),
        ("timm:test_vit", "standard", 64, 16),
    ],
)
def test_a_backbone_states_its_width_and_stride(name, stem, width, stride):
    backbone = backbones.build(name, stem, 64).eval()
    assert (backbone.width, backbone.stride, backbone.name) == (width, stride, name)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert backbone.feature_map(images).shape[-2:] == (64 // stride, 64 // stride)
        assert backbone(images).shape == backbone.features(images).shape == (2, width)
        cells, pooled = backbone.map_and_features(images)
        assert cells.shape[1] == backbone.map_width
        assert torch.equal(cells, backbone.feature_map(images))
        assert torch.equal(pooled, backbone(images))


def test_views_that_a_network_cannot_take_are_refused_in_one_sentence():
    backbone = backbones.build("timm:test_vit", size=32).train()
    backbones.refuse_sides(backbone, {16, 48})
    assert backbone.training
    with pytest.raises(UserError, match=r"timm:test_vit takes no views of 24 pixels \(.*16"):
        backbones.refuse_sides(backbone, {24})


def test_a_resnet_is_torchvisions():
    reference = torchvision.models.resnet18()
    backbone = backbones.build("resnet18")
    weights = {k: v for k, v in reference.state_dict().items() if not k.startswith("fc.")}
    checkpoint.load_state(backbone, weights, "torchvision")
    reference.fc = torch.nn.Identity()
    for side in (32, 64, 96):
        images = torch.randn(2, 3, side, side)
        with torch.no_grad():
            theirs, ours = reference.eval()(images), backbone.eval()(images)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [(1, 1), (2, 2), (1, 2), (3, 3)])
@pytest.mark.parametrize("channels", [5, 512])
def test_a_convolution_of_a_tiny_map_is_the_convolution(side, stride, channels, layout):
    """Values and both gradients; 512 channels are where 2x2 maps go the short way too."""
    plain = torch.nn.Conv2d(3, channels, 3, stride, 1, bias=False).double()
    short = copy.deepcopy(plain).to(memory_format=layout)
    with_small_maps(torch.nn.Sequential(short))
    assert isinstance(short, Conv3x3) and list(short.state_dict()) == ["weight"]
    images = torch.randn(4, 3, *side, dtype=torch.double, requires_grad=True)
    again = images.detach().clone().to(memory_format=layout).requires_grad_()
    expected, got = plain(images), short(again)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    for one, other in ((got, expected), (short.weight.grad, plain.weight.grad)):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(again.grad, images.grad, atol=1e-11, rtol=1e-11)


def test_other_convolutions_are_left_alone():
    others = [
        torch.nn.Conv2d(4, 4, 3, padding=1),  # has a bias
        torch.nn.Conv2d(4, 4, 3, padding=1, bias=False, groups=2),
        torch.nn.Conv2d(4, 4, 3, bias=False),
        torch.nn.Conv2d(4, 4, 1, bias=False),
    ]
    with_small_maps(torch.nn.ModuleList(others))
    assert all(type(conv) is torch.nn.Conv2d for conv in others)


def test_features_are_the_mean_over_the_map_and_tokens_are_laid_out_in_rows():
    resnet = backbones.build("resnet18").eval()
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        cells = resnet.feature_map(images)
        assert cells.shape == (1, 512, 3, 2)
        torch.testing.assert_close(resnet.features(images), cells.mean((2, 3)))
        vit = backbones.build("timm:test_vit", size=64).eval()
        tokens = vit.network.forward_features(images[:, :, :64])
        laid_out = vit.feature_map(images[:, :, :64])
    prefix = vit.network.num_prefix_tokens
    torch.testing.assert_close(laid_out[0, :, 1, 2], tokens[0, prefix + 4 + 2])


def test_a_saved_backbone_comes_back_with_all_that_is_known_of_it(tmp_path):
    backbone = backbones.build("resnet18", "small", 32).eval()
    about = checkpoint.about_backbone(backbone, 32, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
    checkpoint.save_backbone(tmp_path / "b.safetensors", backbone, about)
    again, known = checkpoint.load_backbone(str(tmp_path / "b.safetensors"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(images), backbone(images))
    assert known["stem"] == "small" and known["mean"] == [0.1, 0.2, 0.3]


def test_what_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # no weights at hand
    with pytest.raises(UserError, match="not at hand"):
        checkpoint.load_backbone("torchvision:resnet18")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        checkpoint.load_backbone(str(tmp_path / "x.safetensors"))
    with pytest.raises(UserError, match="no other stem"):
        backbones.build("timm:test_resnet", "small")


def test_an_untrained_backbone_is_always_the_same_and_disturbs_nobody():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, _ = checkpoint.load_backbone("random:resnet18")
    assert torch.equal(torch.rand(1), expected)
    two, _ = checkpoint.load_backbone("random:resnet18")
    assert torch.equal(one.conv1.weight, two.conv1.weight)


def test_zeroed_residuals_leave_the_identity_and_spare_what_is_trained():
    resnet = backbones.build("resnet50", size=32).eval()
    with torch.no_grad():
        resnet.layer1[1].bn3.weight.mul_(1.5)  # as if it had been trained
    backbones.zero_residuals(resnet)
    cells = torch.rand(1, 256, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(resnet.layer1[2](cells), cells)
    assert (resnet.layer1[1].bn3.weight == 1.5).all()
    zeroed = [key for key, weight in resnet.named_parameters() if not weight.any()]
    assert sum(key.endswith("bn3.weight") for key in zeroed) == 15  # of 16 blocks
    assert not any(key.endswith("bn2.weight") for key in zeroed)
    basic = backbones.build("resnet18", size=32)
    backbones.zero_residuals(basic)
    assert not any(block.bn2.weight.any() for block in basic.layer4)


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("timm:mobilenetv3_small_100", 1024, 1_517_856),
        ("timm:mobilenetv3_large_100", 1280, 4_202_032),
        ("timm:efficientnet_b0", 1280, 4_007_548),
        ("resnet18", 512, 11_176_512),
        ("timm:deit_tiny_patch16_224", 192, None),  # 3 heads
    ],
)
def test_the_small_networks_of_ssl_small_are_here_and_train(name, width, parameters):
    backbone = backbones.build(name, size=64)
    assert backbone.width == width
    if parameters:
        assert sum(p.numel() for p in backbone.parameters()) == parameters
    backbone(torch.randn(4, 3, 64, 64)).square().mean().backward()
    trained = [p.grad is not None for p in backbone.parameters()]
    assert all(trained)


@pytest.mark.parametrize(
    ("name", "width", "parameters"),
    [
        ("timm:efficientnet_b1", 1280, 6_513_184),
        ("resnet34", 512, 21_284_672),
        ("resnet50", 2048, 23_508_032),
    ],
)
def test_larger_networks_of_ssl_small_have_the_published_size(name, width, parameters):
    with torch.device("meta"):
        backbone = backbones.build(name)
    assert backbone.width == width
    assert sum(p.numel() for p in backbone.parameters()) == parameters


def test_the_transformer_with_six_heads_is_the_published_one():
    backbone = backbones.build("vit_tiny_6heads", size=224)
    assert sum(p.numel() for p in backbone.parameters()) == 7_286_976  # ssl-small's, without fc
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) == 7_139_328
    backbone(torch.randn(2, 3, 224, 224)).square().mean().backward()
    still = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert still == ["patches.weight", "patches.bias"]
    assert 0.95 < float(backbone.positions.detach().std()) < 1.05


def test_the_transformer_with_six_heads_by_plain_loops():
    torch.manual_seed(0)
    backbone = backbones.build("vit_tiny_6heads", size=32).double().eval()
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    weights = dict(backbone.named_parameters())
    patches = [images[0, :, y : y + 16, x : x + 16].flatten() for y in (0, 16) for x in (0, 16)]
    flat = weights["patches.weight"].flatten(1)
    rows = [weights["first"][0, 0], *(flat @ p + weights["patches.bias"] for p in patches)]
    tokens = torch.stack(rows) + weights["positions"][0]

    def norm(x, name):
        centred = x - x.mean(dim=1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=1, keepdim=True) + 1e-5).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    for number in range(12):
        of = f"blocks.{number}"
        wide = norm(tokens, f"{of}.norm1") @ weights[f"{of}.qkv.weight"].T
        heads = []
        for head in range(6):
            q, k, v = (wide[:, 384 * i + 64 * head : 384 * i + 64 * (head + 1)] for i in range(3))
            heads.append((q @ k.T / 8).softmax(dim=1) @ v)
        out = torch.cat(heads, dim=1) @ weights[f"{of}.out.0.weight"].T
        tokens = tokens + out + weights[f"{of}.out.0.bias"]
        hidden = norm(tokens, f"{of}.norm2") @ weights[f"{of}.mlp.0.weight"].T
        hidden = torch.nn.functional.gelu(hidden + weights[f"{of}.mlp.0.bias"])
        last = hidden @ weights[f"{of}.mlp.3.weight"].T + weights[f"{of}.mlp.3.bias"]
        tokens = tokens + last
        if number == 4:
            torch.testing.assert_close(
                backbone.stage_map(images, 4)[0].flatten(1).T, tokens[1:], rtol=1e-9, atol=1e-9
            )
    tokens = norm(tokens, "norm")
    cells, features = backbone.map_and_features(images)
    torch.testing.assert_close(features[0], tokens[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(cells[0].flatten(1).T, tokens[1:], rtol=1e-9, atol=1e-9)
    assert backbone(torch.randn(1, 3, 64, 48, dtype=torch.float64)).shape == (1, 192)


def test_published_weights_of_timm_are_not_fetched_unasked(monkeypatch):
    """The hub's variable is read when it is imported: what counts is the switch that it became."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    made, offline = timm.create_model, []

    def create(name, pretrained, **options):
        if not pretrained:
            return made(name, pretrained=False, **options)
        offline.append(constants.HF_HUB_OFFLINE)
        raise OSError("not in the cache")

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(UserError, match=r"\(not in the cache\); fetch them once with: python -c"):
        checkpoint.load_backbone("timm:test_resnet")
    assert offline == [True] and not constants.HF_HUB_OFFLINE
