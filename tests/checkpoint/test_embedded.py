"""Embeddings of files of other libraries: the head that was trained, and nothing taken for one."""

import pytest
import torch
import torchvision
from torch import nn

from firstsight import methods
from firstsight.errors import UserError

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))


def settled(network):
    """With batch-norm statistics and scales that no untrained network has."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return network.eval()


def with_head(*head):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    network.fc = nn.Sequential(*head)
    return settled(network)


def wide(bias=True):
    layers = nn.Linear(512, 64, bias=bias), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 16)
    return with_head(*layers)


def moco_v1():
    network = with_head(nn.Linear(512, 16))
    network.fc = network.fc[0]
    return network


def swav(key):
    return key.replace("fc.", "projection_head.")


CASES = {
    "moco v1": (moco_v1, lambda key: f"module.encoder_q.{key}", "state_dict"),
    "moco v2": (
        lambda: with_head(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16)),
        lambda key: f"module.encoder_q.{key}",
        "state_dict",
    ),
    "ssl-small, deep": (
        lambda: with_head(
            *(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16))
        ),
        lambda key: f"module.encoder_q.{key}",
        "state_dict",
    ),
    "seed's student": (
        lambda: with_head(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 16)),
        lambda key: f"module.student.{key}",
        "state_dict",
    ),
    "simclr, as seed takes it": (wide, lambda key: f"module.module.module.{key}", "model"),
    "swav": (wide, lambda key: f"module.{swav(key)}", None),
    "a head without biases": (lambda: wide(bias=False), lambda key: f"module.{swav(key)}", None),
}
BESIDE = {
    "moco": {"module.queue": torch.zeros(16, 8), "module.encoder_k.conv1.weight": torch.zeros(1)},
    "seed": {"module.teacher.conv1.weight": torch.zeros(64, 3, 7, 7)},
    "swav": {"module.prototypes.weight": torch.zeros(30, 16)},
}


@pytest.mark.parametrize("case", CASES)
def test_an_embedding_is_what_its_own_network_gives(case, tmp_path):
    build, rename, wrapper = CASES[case]
    network = build()
    state = {rename(key): value for key, value in network.state_dict().items()}
    state |= next((more for name, more in BESIDE.items() if case.startswith(name)), {})
    torch.save({wrapper: state} if wrapper else state, tmp_path / "file.pth")
    embedding, about = methods.network(str(tmp_path / "file.pth"), "embedding", "--layer")
    with torch.no_grad():
        torch.testing.assert_close(embedding(IMAGES), network(IMAGES), rtol=1e-4, atol=1e-5)
    assert embedding.width == 16 and about["backbone"] == "resnet18"


def test_what_is_no_embedding_is_not_taken_for_one(tmp_path):
    torch.manual_seed(0)
    network = torchvision.models.resnet18()
    torch.save(network.state_dict(), tmp_path / "classifier.pth")
    with pytest.raises(UserError, match="has a classifier on its backbone, no embedding; use --x"):
        methods.network(str(tmp_path / "classifier.pth"), "embedding", "--x")
    bare = {k: v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    torch.save(bare, tmp_path / "bare.pth")
    with pytest.raises(UserError, match=r"has nothing that is known here .* use --x backbone"):
        methods.network(str(tmp_path / "bare.pth"), "embedding", "--x")
    with pytest.raises(UserError, match="no checkpoint nowhere"):
        methods.network("nowhere", "embedding", "--x")
