"""Networks handed over, run by transformers and onnxruntime: the same features."""

import pytest
import torch

from firstsight import backbones, checkpoint, convert
from tests.checkpoint.test_foreign import resnet
from tests.convert.test_convert import as_moco, vit


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit", "vit of 12 heads", "stem of 3x3"])
def test_other_networks_give_the_same_features_there(name, tmp_path):
    for needed in ("onnx", "onnxscript", "onnxruntime", "transformers"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    import onnxruntime
    import transformers

    side, file = 64 if "vit" in name else 224, tmp_path / "file"
    if "vit" in name:
        network = vit(**({"num_heads": 12} if "12" in name else {}))
        torch.save(network.state_dict(), file)
    elif name == "resnet50":
        network = as_moco(resnet(name), file)[1]
    else:
        side, network = 32, backbones.build("resnet18", "small").eval()
        about = checkpoint.about_backbone(network, side, (0.5,) * 3, (0.2,) * 3)
        checkpoint.save_backbone(file, network, about)
    images = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = network(images)
    found = []
    if name in ("vit", "stem of 3x3"):  # tracing is slow, and the others have the same layers
        result = convert.run(str(file), str(tmp_path / "x.onnx"), to="onnx")
        session = onnxruntime.InferenceSession(result["files"][0])
        found.append(torch.tensor(session.run(None, {"images": images.numpy()})[0]))
    if side != 32:
        convert.run(str(file), str(tmp_path / "hf"), to="huggingface")
        kind = transformers.ViTModel if "vit" in name else transformers.ResNetModel
        more = {"add_pooling_layer": False} if "vit" in name else {}
        other = kind.from_pretrained(tmp_path / "hf", **more).eval()
        with torch.no_grad():
            said = other(pixel_values=images)
        found.append(
            said.last_hidden_state[:, 0] if "vit" in name else said.pooler_output.flatten(1)
        )
    for theirs in found:
        torch.testing.assert_close(
            theirs, expected, atol=1e-5 * expected.abs().max().item(), rtol=0
        )
