"""What learns and what moves: freezing as MMDetection and as torchvision, five kinds of norm."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstsight import backbones
from firstsight.detect import models, policies
from firstsight.errors import UserError
from firstsight.nets.norms import SplitBatchNorm
from tests.detect.squares import config

PARTS = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
STAGES = [("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",)]


def built(**values):
    """A detector with every scale and statistic of its backbone off its first value."""
    torch.manual_seed(0)
    backbone = backbones.build("timm:test_resnet", size=32)
    for norm in backbone.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    return models.build(backbone, 2, config(**values), (0.5,) * 3, (0.2,) * 3), backbone


def trained(detector, backbone):
    """Which parts of the network got a gradient, and of which the statistics moved."""
    root = backbone.network
    before = {name: one.clone() for name, one in backbone.named_buffers()}
    detector.eval().train()
    torch.manual_seed(1)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    torch.stack(list(detector(images, [target, target]).values())).sum().backward()
    learns = {
        part
        for part in PARTS
        if any(p.grad is not None and p.grad.any() for p in getattr(root, part).parameters())
    }
    moved = {
        name.split(".")[1]
        for name, one in backbone.named_buffers()
        if "running" in name and not torch.equal(one, before[name])
    }
    return learns, moved


def named(stages):
    return {part for stage in stages for part in stage}


@pytest.mark.parametrize("k", [-1, 0, 2])
def test_frozen_stages_rest_with_their_statistics(k):
    learns, moved = trained(*built(frozen_stages=k))
    assert learns == named(STAGES[k + 1 :])
    assert moved == named(STAGES[k + 1 :])


@pytest.mark.parametrize("n", [0, 3, 5])
def test_trainable_layers_leave_statistics_moving(n):
    learns, moved = trained(*built(trainable_layers=n))
    assert learns == named(STAGES[5 - n :])
    assert moved == set(PARTS)


def test_frozen_norms_neither_learn_nor_move_and_norm_eval_learns():
    detector, backbone = built(norm="frozen")
    learns, moved = trained(detector, backbone)
    assert learns == set(PARTS) - {"bn1"} and not moved
    assert all(m.weight.grad is None for m in backbone.modules() if isinstance(m, _BatchNorm))
    learns, moved = trained(*built(norm_eval=True))
    assert learns == set(PARTS) and not moved


def test_split_and_group_stand_where_batch_norm_was():
    detector, backbone = built(norm="split", splits=1, norm_also=("neck",))
    kinds = {type(m) for m in detector.modules() if isinstance(m, _BatchNorm)}
    assert kinds == {SplitBatchNorm}
    assert trained(detector, backbone)[1] == set(PARTS)
    _, of_plain = built()
    detector, backbone = built(norm="group", norm_also=("neck", "heads"), box_head="4conv1fc")
    assert not any(isinstance(m, _BatchNorm) for m in detector.modules())
    norm = backbone.network.bn1  # the scales stay, the statistics are of 32 groups, or all channels
    assert isinstance(norm, nn.GroupNorm) and norm.num_groups == 32
    assert torch.equal(norm.weight, of_plain.network.bn1.weight)
    x = torch.rand(2, 32, 4, 4)
    alone = (x - x.mean((2, 3), keepdim=True)) / (
        x.var((2, 3), unbiased=False, keepdim=True) + norm.eps
    ).sqrt()
    expected = alone * norm.weight.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_norms_of_neck_and_heads_are_where_they_are_asked_for():
    def counted(**values):
        detector, _ = built(box_head="4conv1fc", detector="mask-rcnn", **values)
        network = detector.network
        parts = {"neck": network.backbone.fpn, "box": network.roi_heads.box_head,
                 "mask": network.roi_heads.mask_head, "rpn": network.rpn}  # fmt: skip
        return {name: sum(isinstance(m, _BatchNorm) for m in part.modules())
                for name, part in parts.items()}  # fmt: skip

    assert counted() == {"neck": 0, "box": 0, "mask": 0, "rpn": 0}
    assert counted(norm_also=("neck",)) == {"neck": 8, "box": 0, "mask": 0, "rpn": 0}
    both = counted(norm_also=("neck", "heads"))
    assert both == {"neck": 8, "box": 4, "mask": 4, "rpn": 0}


def test_what_cannot_be_frozen_is_said():
    backbone = backbones.build("timm:test_convnext", size=64)
    with pytest.raises(UserError, match="test_convnext has no stem and four stages"):
        policies.freeze(backbone, 0, 5)
    with pytest.raises(UserError, match="two ways to say what rests"):
        config(frozen_stages=1, trainable_layers=3)
    with pytest.raises(UserError, match="--norm frozen rests as pretrained"):
        config(norm="frozen", norm_also=("neck",))
