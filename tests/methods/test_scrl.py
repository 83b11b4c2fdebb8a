import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from firstsight import engine, methods
from firstsight.backbones import Backbone, build
from firstsight.batch import Batch
from firstsight.errors import UserError
from firstsight.geometry import matched_places
from firstsight.methods.scrl import SCRL, Config, scrl_loss
from tests.methods.test_byol import by_hand
from tests.methods.test_mocov2 import wave
from tests.tiny import Patches, config

SIDE, STRIDE = 64, 8


class Small(Backbone):
    """A map of 8 x 8 cells from 64 pixels, with batch-norm: cells differ, and so do boxes."""

    name, stem, width, map_width, stride = "small", "standard", 6, 6, STRIDE

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, STRIDE, STRIDE)
        self.norm = torch.nn.BatchNorm2d(6)

    def feature_map(self, images):
        return F.relu(self.norm(self.conv(images)))

    def features(self, images):
        return self.feature_map(images).mean(dim=(2, 3))


def method(**settings):
    torch.manual_seed(0)
    options = {"dim": 16, "hidden": 24, "start": "independent", "boxes": 3} | settings
    return SCRL(Config(**options), Small(), images=99).double()


def batch_of(crops, seed=0):
    """Views of 64 pixels; crops are pairs of boxes, the second view of each odd image flipped."""
    generator = torch.Generator().manual_seed(seed)
    count = len(crops)
    shape = (count, 3, SIDE, SIDE)
    return Batch(
        views=tuple(torch.randn(shape, generator=generator).double() for _ in range(2)),
        crops=tuple(torch.tensor([pair[v] for pair in crops]).float() for v in range(2)),
        flips=(torch.zeros(count, dtype=torch.bool), torch.arange(count) % 2 == 1),
        index=torch.arange(count),
    )


SHARED = [((0, 0, 90, 80), (10, 5, 110, 95)), ((5, 5, 60, 60), (0, 0, 64, 64))]
APART = [((0, 0, 40, 40), (50, 50, 90, 90))]


def region(cells, box):
    """RoIAlign of one bin of a map (C, h, w), not aligned, in plain loops over its samples."""
    x1, y1, x2, y2 = (value / STRIDE for value in box)
    spans = [(x1, max(x2 - x1, 1)), (y1, max(y2 - y1, 1))]
    counts = [math.ceil(span) for _, span in spans]
    total = torch.zeros(len(cells), dtype=cells.dtype)
    for j in range(counts[1]):
        for i in range(counts[0]):
            corner, weight = [], []
            for k, (start, span), n, side in zip(
                (i, j), spans, counts, (cells.shape[2], cells.shape[1]), strict=True
            ):
                at = min(max(start + (k + 0.5) * span / n, 0), side - 1)
                low = min(math.floor(at), side - 2)
                corner.append(low)
                weight.append(at - low)
            (x, y), (a, b) = corner, weight
            upper = (1 - a) * cells[:, y, x] + a * cells[:, y, x + 1]
            lower = (1 - a) * cells[:, y + 1, x] + a * cells[:, y + 1, x + 1]
            total += (1 - b) * upper + b * lower
    return total / (counts[0] * counts[1])


def test_loss_of_the_example_by_hand():
    """One term is 0.08; both directions are summed; 0 where all agree, 8 where all oppose."""
    a, b = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    assert scrl_loss(a, b, a, b).item() == pytest.approx(0.16)
    assert scrl_loss(a, b, b, a).item() == pytest.approx(0)
    assert scrl_loss(a, a, -a, -a).item() == pytest.approx(8)
    east, north = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert scrl_loss(east, east, north, north).item() == pytest.approx(4)


def test_loss_is_that_of_byol_with_boxes_for_images():
    rows = [wave((4, 8), phase) for phase in (0.1, 0.5, 0.2, 0.9)]
    assert scrl_loss(*rows).item() == pytest.approx(0.630304, abs=1e-6)
    leaves = [row.clone().requires_grad_() for row in rows]
    scrl_loss(*leaves).backward()
    assert all(leaf.grad.abs().sum() > 0 for leaf in leaves[:2])
    assert all(leaf.grad is None for leaf in leaves[2:])


@pytest.mark.parametrize(
    ("aligned", "weights"), [(False, [0.5, 1, 1, 1, 1, 1, 1.5]), (True, [1.0] * 7)]
)
def test_a_whole_view_on_a_map_of_seven_cells(aligned, weights):
    """Without half a cell taken off, it is not the mean of the map."""
    scrl = method(aligned=aligned, boxes=1)
    cells = torch.eye(7, dtype=torch.float64)[None, :, None, :].expand(1, 7, 7, 7).contiguous()
    side = 7 * STRIDE
    boxes, kept = torch.tensor([[[0.0, 0.0, side, side]]]), torch.tensor([True])
    assert scrl.regions(cells, boxes, kept)[0].tolist() == pytest.approx([w / 7 for w in weights])


@pytest.mark.parametrize("together", [True, False])
def test_forward_crosses_the_views_box_by_box(together):
    """Every step by itself: maps, RoIAlign, heads, and which box predicts which."""
    scrl, batch = method(views_together=together), batch_of(SHARED + APART + SHARED)
    torch.manual_seed(7)
    output = scrl(batch)
    torch.manual_seed(7)
    (c1, c2), (f1, f2) = batch.crops, batch.flips
    matched = matched_places(c1, f1, c2, f2, SIDE, rule=scrl.rule)
    assert matched.usable.tolist() == [True, True, False, True, True]

    def embedded(backbone, head):
        views = batch.views
        maps = backbone(torch.cat(views)).chunk(2) if together else [backbone(v) for v in views]
        rows = [
            torch.stack([region(m[i], b) for i in (0, 1, 3, 4) for b in boxes[i].tolist()])
            for m, boxes in zip(maps, matched[:2], strict=True)
        ]
        return head(torch.cat(rows)).chunk(2) if together else [head(r) for r in rows]

    with torch.no_grad():
        online = torch.nn.Sequential(scrl.projector, scrl.predictor)
        backbone, projector = scrl.momentum_encoder.copy
        p1, p2 = embedded(scrl.backbone.feature_map, online)
        z1, z2 = embedded(backbone.feature_map, projector)
    assert output.loss.item() == pytest.approx(by_hand(p1, p2, z1, z2), rel=1e-6)
    assert output.scalars["images_with_boxes"].item() == pytest.approx(4 / 5)
    features = scrl.backbone.features(torch.cat(batch.views) if together else batch.views[0])
    torch.testing.assert_close(output.features, features[:5], atol=1e-12, rtol=0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_without_any_box_trains_on(count):
    """The loss is 0, gradients are 0 and not missing, and nothing becomes NaN."""
    scrl = method()
    output = scrl(batch_of(APART * count))
    output.loss.backward()
    assert output.loss.item() == 0
    for key, parameter in scrl.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), key
    assert all(tensor.isfinite().all() for tensor in scrl.state_dict().values())


def test_one_box_alone_is_none():
    """Batch-norm of one row has no variance."""
    scrl = method(boxes=1, views_together=False)
    assert scrl(batch_of(SHARED[:1] + APART)).loss.item() == 0
    assert scrl(batch_of(SHARED + APART)).loss.item() > 0


def test_boxes_of_all_ranks_count_the_same_or_as_published_each_rank_does(monkeypatch):
    usable = torch.tensor([1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr("firstsight.distributed.world", lambda: 2)
    monkeypatch.setattr("firstsight.distributed.summed", lambda own: own + 3)  # 3 elsewhere
    assert method().weight(usable).item() == pytest.approx(2 * 1 / 4)
    assert method(weights="ranks").weight(usable).item() == 1
    assert method(weights="ranks").weight(0 * usable).item() == 0


def test_views_that_hold_no_box_are_refused(tmp_path):
    settings = config("scrl", tmp_path, method={"min_size": 0})
    with pytest.raises(UserError, match="views of 32 pixels hold no two boxes of 32; use a larger"):
        engine.pretrain("scrl", settings, Patches(16), None, tmp_path)


@pytest.mark.parametrize("name", ["resnet50", "resnet101"])
def test_networks_and_heads_are_those_of_the_paper(name):
    with torch.device("meta"):
        scrl = SCRL(Config(), build(name), images=99)
    assert scrl.backbone.stride == scrl.rule.min_size == 32
    for head, width in ((scrl.projector, 2048), (scrl.predictor, 256)):
        first, norm, _, last = head
        assert first.weight.shape == (4096, width) and first.bias is not None
        assert isinstance(norm, torch.nn.BatchNorm1d) and norm.num_features == 4096
        assert last.weight.shape == (256, 4096) and last.bias is None
    assert dataclasses.astuple(scrl.rule) == (10, 32, 0.5, 0.0, True)


@pytest.mark.parametrize(
    ("step", "momentum"), [(0, 0.97), (1, 0.970734), (5, 0.985), (9, 0.999266)]
)
def test_momentum_rises_along_half_a_cosine(step, momentum):
    scrl = method()
    before = [p.clone() for p in scrl.momentum_encoder.parameters()]
    scrl.after_step(step / 10, 0.1)
    online = [*scrl.backbone.parameters(), *scrl.projector.parameters()]
    for old, now, seen in zip(before, scrl.momentum_encoder.parameters(), online, strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * seen, atol=1e-6, rtol=0)


@pytest.mark.parametrize("wrong", [{"boxes": 0}, {"max_iou": 1.5}, {"jitter": -0.1}, {"dim": 0}])
def test_values_out_of_range_name_their_flag(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"--method.{name.replace('_', '-')} must be"):
        Config(**wrong)


def test_defaults_are_the_authors_two_hundred_epochs(tmp_path):
    settings = config("scrl", tmp_path, size=224)
    assert settings.views.min_scale == (0.2,) and settings.views.blurs == (1.0, 0.1)
    assert settings.views.solarizes == (0.0, 0.2) and settings.lars == "scrl"
    assert methods.load("scrl")[0].views == "pair"
