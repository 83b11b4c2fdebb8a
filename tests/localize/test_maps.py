"""The four readings against plain formulas; the map of noise; maps do not depend on their batch."""

import math

import numpy as np
import pytest
import torch

from firstsight.errors import UserError
from firstsight.localize import activation, controls
from firstsight.localize.commands import Localize
from firstsight.localize.eyes import open_eye

CPU = torch.device("cpu")
NETWORK = "random:timm:test_resnet"


def eye(reading="sum", classifier="", **asked):
    asked = {"checkpoint": NETWORK, "data": "x", "input_size": 64, "device": "cpu"} | asked
    return open_eye(Localize(**asked), 0, CPU, reading, classifier)


def photographs(count):
    return torch.randint(0, 256, (count, 3, 64, 64), dtype=torch.uint8)


def test_sums_are_taken_in_float64():
    features = torch.full((1, 4000, 1, 1), 0.1)
    features[0, 0] = 1e8
    expected = math.fsum(features.double().ravel().tolist())
    assert activation.activation_sum(features).item() == pytest.approx(expected, rel=1e-14)
    assert features.sum(dim=1).item() != pytest.approx(expected, rel=1e-9)


def test_a_map_does_not_depend_on_its_batch_nor_does_the_seed_of_the_process():
    torch.manual_seed(1)
    images = photographs(5)
    for bn in ("eval", "batch"):
        one = eye(bn=bn)
        together = one.see(images)
        alone = torch.cat([one.see(image[None]) for image in images])
        assert together.dtype == torch.float64
        assert torch.allclose(together, alone, rtol=1e-4)


def test_class_activation_is_a_weighted_sum_over_channels(tmp_path):
    features = torch.randn(2, 3, 2, 2)
    weight, classes = torch.randn(4, 3), torch.tensor([2, 0])
    found = activation.class_activation(features, weight, classes)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                parts = [float(features[b, c, y, x] * weight[classes[b], c]) for c in range(3)]
                assert found[b, y, x].item() == pytest.approx(sum(parts), abs=1e-6)


def test_class_activation_takes_the_class_of_the_image_or_the_most_likely(tmp_path):
    weight = torch.randn(7, 96)
    state = {"state_dict": {"module.fc.weight": weight, "module.fc.bias": torch.zeros(7)}}
    torch.save(state, tmp_path / "c.pt")
    one, images = eye("cam", str(tmp_path / "c.pt")), photographs(3)
    features = one.cells(images)
    likely = (features.mean(dim=(2, 3)) @ weight.T).argmax(dim=1)
    expected = activation.class_activation(features, weight, likely)
    assert torch.allclose(one.see(images), expected) and one.classes == 7
    given = torch.tensor([1, 2, 3])
    expected = activation.class_activation(features, weight, given)
    assert torch.allclose(one.see(images, given), expected)
    with pytest.raises(UserError, match="needs the classifier"):
        eye("cam")
    torch.save({"fc.weight": torch.randn(7, 5)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="one classifier of 96 features"):
        eye("cam", str(tmp_path / "other.pt"))


def test_attention_is_that_of_the_class_token_in_the_last_block():
    one = eye("attention", checkpoint="random:timm:test_vit")
    images = photographs(2)
    network = one.backbone.network
    entered = []
    network.blocks[-1].attn.register_forward_hook(lambda m, args, out: entered.append(args[0]))
    found = one.see(images)
    layer, tokens = network.blocks[-1].attn, entered[0]
    qkv = layer.qkv(tokens).reshape(*tokens.shape[:2], 3, layer.num_heads, -1)
    for b in range(2):
        rows = []
        for head in range(layer.num_heads):
            q, k = qkv[b, 0, 0, head], qkv[b, :, 1, head]
            rows.append(torch.softmax(k @ q / math.sqrt(len(q)), dim=0))
        expected = torch.stack(rows).mean(dim=0)[1:].reshape(4, 4)
        assert torch.allclose(found[b], expected.double(), atol=1e-6)
    with pytest.raises(UserError, match="needs a transformer"):
        eye("attention")


def test_principal_component_is_that_of_all_cells_of_all_images():
    one = eye()
    images = photographs(6)
    cells = one.cells(images).double()
    rows = cells.permute(0, 2, 3, 1).reshape(-1, cells.shape[1]).numpy()
    centred = rows - rows.mean(axis=0)
    component = np.linalg.svd(centred)[2][0]
    expected = centred @ component
    expected *= np.sign(np.corrcoef(expected, rows.sum(axis=1))[0, 1])
    one.learn(iter([images[:4], images[4:]]), 6)
    found = one.see(images).numpy().ravel()
    assert np.allclose(found, expected, atol=1e-6 * np.abs(expected).max())


def test_noise_alone_is_brighter_in_the_middle_with_zero_padding():
    """Spec: corners of an untrained ResNet-50's map of noise are .52 to .79 of its mean at 7 x 7,
    and its centre is 1.25; here ResNet-18, whose numbers are its own."""
    middles = {}
    for padding in ("zeros", "replicate"):
        one = eye(checkpoint="random:resnet18", input_size=224, last_stride=2, padding=padding)
        one.blind()
        share = one.noise / one.noise.mean()
        assert share.shape == (7, 7)
        corners = share[[0, 0, 6, 6], [0, 6, 0, 6]].mean().item()
        middles[padding] = share[3, 3].item() - corners
    assert middles["zeros"] > 0.3 and abs(middles["replicate"]) < middles["zeros"] / 2


def test_noise_is_fixed_by_its_seed_and_maps_divide_by_it():
    assert torch.equal(controls.noise(8, 3), controls.noise(8, 3))
    assert not torch.equal(controls.noise(8, 3), controls.noise(8, 4))
    assert abs(controls.noise(64, 0).std().item() - 1) < 0.01
    over = controls.divided(torch.tensor([[6.0, 1.0]]), torch.tensor([[3.0, 0.0]]))
    assert over[0, 0] == 2 and over[0, 1].isnan()


def test_maps_too_small_to_mirror_are_said_in_one_sentence():
    one = eye(checkpoint="random:resnet18", input_size=32, last_stride=2, padding="reflect")
    with pytest.raises(UserError, match="use a larger --input-size"):
        one.see(photographs(1)[..., :32, :32])
    one = eye(checkpoint="random:resnet18", input_size=32, last_stride=2, bn="batch")
    with pytest.raises(UserError, match="use a larger --input-size"):
        one.see(photographs(1)[..., :32, :32])
