"""One format is spelt in several ways, and its prefixes count at the beginning of a name only."""

import pytest
import torch

from firstsight.checkpoint.foreign import taken
from firstsight.errors import UserError
from tests.checkpoint.test_foreign import LAYOUTS, NETWORKS, detectron2, numbered, one, under

SPELLINGS = {
    "swav, nested": ("swav", {"state_dict": LAYOUTS["swav"], "epoch": 3}),
    "barlow, backbone only": ("torchvision", under("")),
    "dino, parallel": ("dino", {
        "teacher": under("module.backbone.") | one("module.head.mlp.0.weight"),
        "student": under("module.backbone.", "other"),
    }),
    "densecl, exported": ("torchvision", {"state_dict": under(""), "author": "densecl"}),
    "densecl, backbone alone": ("mmselfsup", {"state_dict": under("backbone.")}),
    "solo-learn, old": ("sololearn", {
        "state_dict": under("encoder.") | one("classifier.weight", "projector.0.weight")
    }),
    "lightly, two backbones": ("lightly", {
        "state_dict": under("student_backbone.", rename=numbered)
        | under("teacher_backbone.", "other", numbered)
    }),
    "vissl, trunk alone": ("vissl", {"model_state_dict": under("_feature_blocks.")}),
    "byol, flat networks": ("byol", under("online.encoder.") | under("target.encoder.", "other")),
    "byol, parallel": ("byol", {
        "state_dict": under("module.online_network.backbone.")
        | under("module.target_network.backbone.", "other")
    }),
    "mmdet, a detector": ("mmselfsup", {
        "state_dict": under("backbone.") | one("neck.lateral_convs.0.conv.weight")
    }),
    "torchvision, a detector": ("torchvision", {
        "model": under("backbone.body.") | one("backbone.fpn.inner_blocks.0.0.weight")
    }),
    "detectron2, a detector": ("detectron2", {
        "model": under("backbone.bottom_up.", rename=detectron2) | one("proposal.weight")
    }),
}  # fmt: skip
"""Formats in others of their spellings, or with other things around them."""


def assert_takes(found, network):
    """All tensors of a network, the very ones."""
    expected = NETWORKS[network].state_dict()
    assert set(found.weights) == set(expected)
    assert all(torch.equal(found.weights[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_spellings_are_recognised(name):
    form, state = SPELLINGS[name]
    found = taken(state, "file")
    assert found.name == form
    assert_takes(found, "this")


@pytest.mark.parametrize(
    ("inside", "format", "half"),
    [
        ("my.encoder_q.", "moco", "query"),
        ("model.module.encoder_q.", "moco", "query"),
        ("encoder_q.module.encoder_q.", "moco", "query"),
        ("momentum_backbone.", "mmselfsup", "backbone"),
        ("neck.backbone.", "mmselfsup", "backbone"),
        ("online.module.encoder.", "simsiam", "backbone"),
    ],
)
def test_a_prefix_in_the_middle_of_a_name_is_none(inside, format, half):
    """What stands under it is neither recognised nor taken, nor is the prefix cut out of it."""
    middle = under(inside, "other")
    with pytest.raises(UserError, match=r"of no known format|holds no"):
        taken({"state_dict": middle}, "file")
    with pytest.raises(UserError, match=f"holds no {half} network as {format} has it"):
        taken({"state_dict": middle}, "file", format)
    found = taken({"state_dict": LAYOUTS[format]["state_dict"] | middle}, "file", format)
    assert_takes(found, "this")
    assert set(middle) <= set(found.dropped)
