"""The small ResNets of CIFAR-10: the network, its checkpoints, and a published figure."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from firstsight import backbones, load_backbone
from firstsight.errors import UserError
from firstsight.features import Reader, extract
from firstsight.sources import open_source

DATA = Path(__file__).parents[2].parent / "shared/data"


def saved(path, name="cifar_resnet20", **more):
    """A checkpoint as ports of these networks write it, and what it holds."""
    torch.manual_seed(1)
    network = backbones.build(name).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    state = {f"module.{key}": value for key, value in network.state_dict().items()}
    head = {"module.linear.weight": torch.randn(10, 64), "module.linear.bias": torch.zeros(10)}
    torch.save({"state_dict": state | head | more, "best_prec1": 91.0}, path)
    return network


def test_a_block_is_the_paper_s_with_a_shortcut_of_every_second_pixel_and_zeros():
    network = backbones.build("cifar_resnet20").eval()
    block, x = network.layer2[0], torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        inner = F.conv2d(x, block.conv1.weight, stride=2, padding=1) / (1 + 1e-5) ** 0.5
        inner = F.conv2d(inner.relu(), block.conv2.weight, padding=1) / (1 + 1e-5) ** 0.5
        shortcut = torch.zeros(2, 32, 4, 4)
        for channel in range(16):
            for row in range(4):
                for column in range(4):
                    shortcut[:, 8 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
        torch.testing.assert_close(block(x), (inner + shortcut).relu(), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_is_recognised_by_what_it_holds(tmp_path):
    network = saved(tmp_path / "small.th")
    loaded = load_backbone(str(tmp_path / "small.th"))
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert loaded.name == "cifar_resnet20" and torch.equal(loaded(images), network(images))
    saved(tmp_path / "odd.th", **{"module.layer3.3.conv1.weight": torch.ones(64, 64, 3, 3)})
    with pytest.raises(UserError, match=r"\(3, 3, 4, 0\) blocks a stage .* cifar_resnet20"):
        load_backbone(str(tmp_path / "odd.th"))
    with pytest.raises(UserError, match="backbone"):
        backbones.build("cifar_resnet20", "small")


@pytest.mark.photos
@pytest.mark.slow
def test_the_published_accuracy_on_cifar_10_to_the_image():
    """8.27 % of CIFAR-10's 10,000 test images are wrong, by their authors: 827."""
    path = DATA / "checkpoints/cifar10_resnet20_supervised.th"
    if not path.exists() or not (DATA / "cifar10/val.zip").exists():
        pytest.skip("no CIFAR-10 and ResNet-20 in ../shared/data beside the repository")
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    source = open_source(str(DATA / "cifar10/val.zip"))
    found = extract(load_backbone(str(path)), source, Reader(size=32))
    logits = found.values @ state["module.linear.weight"].T + state["module.linear.bias"]
    right = int((logits.argmax(dim=1).numpy() == np.array(source.labels)).sum())
    assert (right, len(found.values)) == (9173, 10_000)
