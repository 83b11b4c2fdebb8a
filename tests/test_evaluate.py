"""evaluate knn on a run: the layer that was asked for, read as the protocol says."""

import pytest
import torch

from firstsight import load_backbone, run
from firstsight.errors import UserError
from firstsight.evaluate import knn
from firstsight.methods import network
from firstsight.sources import open_source
from firstsight.views.apply import eval_policy, eval_view
from tests.tiny import config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    values = {"data": "scenes:train@32", "probe_test": "scenes:test@30", "probe_k": 5}
    return run.pretrain("mocov2", config("mocov2", out, **values))


def test_the_reading_of_the_run_is_the_reading_of_the_command(finished):
    import json

    summary = json.loads((finished / "summary.json").read_text())
    result = knn(str(finished), train="scenes:train@32", test="scenes:test@30", k=[5], device="cpu")
    assert result["k"]["5"]["top1"] == pytest.approx(summary["knn"]["trained"])
    assert result["protocol"]["size"] == 32 and result["protocol"]["view"] == eval_policy(32)
    said = summary["knn"]["protocol"]
    for key in ("view", "mean", "std", "size", "precision", "versions", "representation"):
        assert said[key] == result["protocol"][key]


def test_the_embedding_is_the_projector_of_the_same_features(finished):
    whole, _ = network(str(finished), "embedding", "--layer")
    backbone = load_backbone(str(finished))
    assert whole.width == 16  # of tests.tiny
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole(images), whole.projector(backbone(images)))
    by_layer = [
        knn(
            str(finished), train="scenes:train@32", test="scenes:test@30", layer=layer, device="cpu"
        )
        for layer in ("backbone", "embedding")
    ]
    assert by_layer[0]["protocol"]["layer"] == "backbone"
    assert by_layer[1]["images"] == {"train": 32, "test": 30}
    with pytest.raises(UserError, match="needs a run folder"):
        knn("random:resnet18", train="scenes:train@9", test="scenes:test@9", layer="embedding")


def test_every_saved_form_of_a_run_is_the_same_backbone(finished):
    last_snapshot = sorted((finished / "snapshots").iterdir())[-1]
    forms = [finished, finished / "backbone.safetensors", finished / "checkpoints" / "last"]
    forms.append(last_snapshot)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [load_backbone(str(form))(images) for form in forms]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_features_are_those_of_the_stated_view(finished):
    from firstsight.features import Reader, extract

    backbone = load_backbone(str(finished))
    source = open_source("scenes:test@5")
    got = extract(backbone, source, Reader(size=32, mean=(0.1,) * 3, std=(0.5,) * 3))
    pixels = torch.from_numpy(eval_view(source.pixels(3), 32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = backbone((pixels / 255 - 0.1) / 0.5)
    torch.testing.assert_close(got.values[3:4], expected, atol=1e-5, rtol=1e-4)
