"""Detectors: the switches reach torchvision's modules, and coordinates stay exact."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import roi_align

from firstsight import backbones
from firstsight.detect import models
from firstsight.errors import UserError
from tests.detect.squares import config


def built(**values):
    torch.manual_seed(0)
    name = values.pop("name", "timm:test_resnet")
    backbone = backbones.build(name, size=64)
    return models.build(backbone, 2, config(**values), (0.5,) * 3, (0.2,) * 3)


TARGET = {
    "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0], [30.0, 5.0, 60.0, 50.0]]),
    "labels": torch.tensor([1, 0]),
    "masks": torch.ones(2, 64, 64, dtype=torch.uint8),
}


def losses(detector, seed=1, precision=None):
    torch.manual_seed(seed)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        return detector.train()(images, [TARGET, TARGET])


def test_4conv1fc_is_four_convolutions_and_one_linear_layer():
    with torch.device("meta"):
        detector = built(box_head="4conv1fc", channels=256, norm_also=("heads",))
    head = detector.network.roi_heads.box_head
    shapes = [tuple(p.shape) for p in head.parameters() if p.ndim > 1]
    assert shapes == [(256, 256, 3, 3)] * 4 + [(1024, 256 * 7 * 7)]
    norms, fc = 4 * 2 * 256, 1024 * (256 * 49 + 1)
    assert sum(p.numel() for p in head.parameters()) == 4 * 256 * 256 * 9 + norms + fc
    with torch.device("meta"):
        plain = built(channels=256).network.roi_heads.box_head
    assert sum(p.numel() for p in plain.parameters()) == fc + 1024 * 1025


def test_the_extra_norm_of_c4_follows_the_last_stage():
    detector = built(neck="c4", norm_also=("heads",))
    head = detector.network.roi_heads.box_head
    stage, norm = head[0]
    assert isinstance(stage, nn.Sequential) and isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 96
    x = torch.rand(3, 192, 14, 14)
    expected = F.batch_norm(stage.eval()(x), None, None, norm.weight, norm.bias, True)
    assert torch.allclose(head(x)[..., 0, 0], expected.mean((2, 3)), atol=1e-5)
    assert len(built(neck="c4").network.roi_heads.box_head[0]) == 1
    # one map of stride 16, fifteen anchors a cell, and the stage is no longer in the body
    assert detector.network.rpn.head.cls_logits.out_channels == 15
    assert not any("backbone.network.layer4." in k for k, _ in detector.network.named_parameters())
    found = detector.network.backbone(torch.rand(1, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in found.items()} == {"0": (1, 192, 4, 6)}


def test_pools_are_roi_align_from_the_level_of_a_box():
    """Level floor(4 + log2(sqrt(area) / 224)), held to the pyramid's four; aligned or not."""
    torch.manual_seed(0)
    maps = {str(i): torch.rand(1, 2, 64 // 2**i, 64 // 2**i) for i in range(4)}
    boxes = torch.tensor([[10.0, 20.0, 60.0, 90.0], [0.0, 0.0, 120.0, 120.0], [3, 3, 250, 240]])
    levels = [0, 1, 2]
    for aligned in (True, False):
        found = models.Pool(models.STRIDES, 7, aligned)(maps, [boxes], None)
        for box, level, one in zip(boxes, levels, found, strict=True):
            row = torch.cat([torch.zeros(1), box])[None]
            expected = roi_align(
                maps[str(level)], row, 7, 1 / 4 / 2**level, 0 if aligned else 2, aligned
            )
            assert torch.equal(one, expected[0])


def test_switches_reach_torchvision():
    network = built(proposals=(70, 30), proposals_before=(80, 40), rois=17).network
    rpn, heads = network.rpn, network.roi_heads
    assert (rpn._post_nms_top_n, rpn._pre_nms_top_n) == (
        {"training": 70, "testing": 30},
        {"training": 80, "testing": 40},
    )
    assert heads.fg_bg_sampler.batch_size_per_image == 17
    assert heads.box_roi_pool.aligned and heads.box_roi_pool.sampling_ratio == 0
    assert type(rpn) is models.L1Proposals and type(heads) is models.L1Heads
    network = built(roi_align="torchvision", box_loss="smooth-l1").network
    pool = network.roi_heads.box_roi_pool
    assert not pool.aligned and pool.sampling_ratio == 2
    assert type(network.rpn) is RegionProposalNetwork and type(network.roi_heads) is RoIHeads
    head = built(detector="retinanet", box_loss="smooth-l1").network.head
    assert head.regression_head._loss_type == "smooth_l1"
    assert head.classification_head.num_classes == 2


def test_l1_of_proposals_and_boxes_written_out():
    """With smooth L1 in its place torchvision's own losses come out, to the last bit."""
    torch.manual_seed(0)
    labels = [torch.tensor([1.0, 0.0, -1.0, 1.0]), torch.tensor([0.0, 1.0, 0.0, 0.0])]
    scores, deltas, wanted = torch.randn(8, 1), torch.randn(8, 4), torch.randn(8, 4)
    given = (scores, deltas, labels, list(wanted.split(4)))
    rpn = built().network.rpn
    objectness, off = rpn.compute_loss(*given)
    total = sum(float((deltas[i] - wanted[i]).abs().sum()) for i in (0, 3, 5))
    assert off.item() == pytest.approx(total / 7) and objectness.item() == pytest.approx(
        RegionProposalNetwork.compute_loss(rpn, *given)[0].item()
    )
    detector = built()
    said, (mine, theirs) = [], (losses(detector), None)
    heads = detector.network.roi_heads
    heads.box_predictor.register_forward_hook(lambda module, given, out: said.append(out))
    mine = losses(detector)
    (logits, corners), wanted = said[0], heads._wanted
    theirs = fastrcnn_loss(logits, corners, [heads._labels], [wanted])
    assert mine["loss_classifier"].item() == pytest.approx(theirs[0].item())
    total = sum(
        float((corners.detach()[i, 4 * k : 4 * k + 4] - wanted[i]).abs().sum())
        for i, k in enumerate(heads._labels.tolist())
        if k > 0
    )
    assert mine["loss_box_reg"].item() == pytest.approx(total / len(wanted), rel=1e-5)
    assert mine["loss_box_reg"].item() > theirs[1].item()


def test_bfloat16_leaves_coordinates_alone():
    """Anchors, proposals and losses are float32, and near those of a whole float32 pass."""
    detector, seen = built(), []
    detector.network.rpn.register_forward_hook(lambda module, given, out: seen.append(out))
    inner = []
    detector.network.backbone.fpn.register_forward_hook(lambda m, given, out: inner.append(out))
    exact, low = losses(detector), losses(detector, precision="bf16")
    assert inner[1]["0"].dtype == torch.bfloat16  # convolutions did run low
    assert {box.dtype for boxes, _ in seen for box in boxes} == {torch.float32}
    for name, loss in low.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1, abs=0.02)


@pytest.mark.parametrize(
    "values",
    [
        {"name": "timm:test_convnext"},
        {"detector": "mask-rcnn", "neck": "c4"},
        {"detector": "retinanet", "norm_also": ("neck", "heads"), "norm": "group"},
    ],
    ids=["other networks", "masks from c4", "one stage"],
)
def test_every_parameter_learns_or_rests(values):
    """Several ranks would wait for a gradient that never comes; labels out count from 0."""
    detector = built(**values)
    torch.stack(list(losses(detector).values())).sum().backward()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 64, 96)] * 2)[0]
    assert found["boxes"].shape[1] == 4 and set(found["labels"].tolist()) <= {0, 1}
    assert ("masks" in found) == ("mask" in values.get("detector", ""))


def test_what_no_detector_can_stand_on_is_refused():
    with pytest.raises(UserError, match="one pretrained with --stem standard"):
        models.build(backbones.build("resnet18", "small"), 2, config(), (0,) * 3, (1,) * 3)
    with pytest.raises(UserError, match=r"test_vit has no maps of strides 4, 8, 16, 32"):
        built(name="timm:test_vit")
