"""A backbone handed over gives the same features there, and comes home bit for bit."""

import json
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision

import firstsight
from firstsight import checkpoint, cli, convert
from firstsight.convert import writers
from firstsight.errors import UserError
from tests.checkpoint.test_foreign import detectron2, features, huggingface, one, resnet

FILES = [to for to in writers.TARGETS if to not in ("onnx", "selfsup2mmdet")]
THERE = {"torch": torch, "torchvision": torchvision, "timm": timm}


@pytest.fixture(autouse=True)
def unhurried_disk(monkeypatch):
    """Files here need not outlive a power cut: a gigabyte need not reach the disk."""
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.fixture(scope="module")
def moco(tmp_path_factory):
    """A file of MoCo with a ResNet-18, and its network."""
    return as_moco(resnet(), tmp_path_factory.mktemp("moco") / "moco.pth.tar")


def as_moco(network, path):
    state = {f"module.encoder_q.{key}": value for key, value in network.state_dict().items()}
    state |= one("module.encoder_q.fc.weight", "module.encoder_k.fc.weight", "module.queue")
    torch.save({"epoch": 200, "arch": "x", "state_dict": state, "optimizer": {}}, path)
    return str(path), network


def lines_of(result):
    """What backbone.json says about loading, and the rest of it."""
    about = json.loads(Path(result["files"][-1]).read_text())
    return about["load"], about


def loaded(result, monkeypatch, folder):
    """The network that the three lines of backbone.json build, where they are run."""
    monkeypatch.chdir(folder)
    names = dict(THERE)
    lines, _ = lines_of(result)
    assert len(lines) == 3
    exec("\n".join(lines), names)
    return names["network"]


def same(ours, theirs):
    """All tensors under the same names, bit for bit."""
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("to", ["torchvision", "timm"])
def test_the_three_lines_give_the_same_features_there(to, moco, tmp_path, monkeypatch):
    file, network = moco
    result = convert.run(file, str(tmp_path / "x.pth"), to=to)
    there = loaded(result, monkeypatch, tmp_path)
    same(network.state_dict(), there.state_dict())
    torch.testing.assert_close(features(there), features(network), atol=1e-5, rtol=0)


def test_wider_networks_go_to_torchvision_and_timm(tmp_path, monkeypatch):
    name = "resnext50_32x4d"
    file, network = as_moco(resnet(name), tmp_path / "moco")
    for to in ("torchvision", "timm"):
        there = loaded(convert.run(file, str(tmp_path / to), to=to), monkeypatch, tmp_path / to)
        torch.testing.assert_close(features(there), features(network), atol=1e-5, rtol=0)
    for to in ("mmdet", "detectron2", "huggingface"):
        with pytest.raises(UserError, match=f"{name} cannot go to {to}: .*--to safetensors can"):
            convert.run(file, str(tmp_path / to), to=to)


def test_all_318_tensors_of_a_resnet_50_go_round_every_library_and_come_home(tmp_path):
    network = resnet("resnet50")
    file, _ = as_moco(network, tmp_path / "start")
    home = firstsight.load_backbone(file)
    for to in FILES:
        result = convert.run(file, str(tmp_path / to), to=to)
        assert (result["matched"], result["total"], result["missing"]) == (318, 318, [])
        file = result["files"][0] if to != "huggingface" else str(tmp_path / to)
    same(firstsight.load_backbone(file).state_dict(), network.state_dict())
    assert torch.equal(features(firstsight.load_backbone(file)), features(home))


def test_detectron2_gets_its_names_in_a_pickle_that_either_numpy_reads(moco, tmp_path):
    file, network = moco
    convert.run(file, str(tmp_path / "x.pkl"), to="detectron2")
    whole = (tmp_path / "x.pkl").read_bytes()
    state = pickle.loads(whole)
    assert state["__author__"] and state["matching_heuristics"] is True
    expected = {detectron2(key): value.numpy() for key, value in network.state_dict().items()}
    assert list(state["model"]) == list(expected)
    assert all(np.array_equal(state["model"][key], expected[key]) for key in expected)
    asked = {arg for code, arg, _ in pickletools.genops(whole) if code.name == "GLOBAL"}
    assert asked == {"numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}
    with pytest.raises(UserError, match=r"end x\.pth in \.pkl"):
        convert.run(file, str(tmp_path / "x.pth"), to="detectron2")


def test_transformers_gets_a_folder_under_its_names(moco, tmp_path):
    file, network = moco
    result = convert.run(file, str(tmp_path / "hf"), to="huggingface")
    weights = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    expected = {huggingface(key): value for key, value in network.state_dict().items()}
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[key], expected[key]) for key in expected)
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["depths"] == [2, 2, 2, 2] and config["layer_type"] == "basic"
    preprocessor = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert preprocessor["size"] == {"shortest_edge": 256}
    assert preprocessor["image_mean"] == [0.485, 0.456, 0.406]
    assert str(tmp_path / "hf/backbone.json") == result["files"][-1]


@pytest.mark.slow
def test_transformers_give_the_same_features(moco, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers are not installed")
    file, network = moco
    convert.run(file, str(tmp_path / "hf"), to="huggingface")
    there = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        theirs = there(pixel_values=images).pooler_output.flatten(1)
        torch.testing.assert_close(theirs, network(images), atol=1e-5, rtol=0)
    network, images = vit(), torch.randn(2, 3, 64, 64)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    convert.run(str(tmp_path / "vit.pth"), str(tmp_path / "v"), to="huggingface")
    there = transformers.ViTModel.from_pretrained(tmp_path / "v", add_pooling_layer=False).eval()
    with torch.no_grad():
        theirs = there(pixel_values=images).last_hidden_state[:, 0]
        torch.testing.assert_close(theirs, network(images), atol=1e-5, rtol=0)


def run_config(path):
    """A config's names, as MMDetection's reader makes them: it is Python."""
    names = {}
    exec(path.read_text(), {}, names)
    return names


def test_mmdet_gets_the_weights_and_a_config_for_each_schedule(moco, tmp_path):
    file, network = moco
    convert.run(file, str(tmp_path / "x.pth"), to="mmdet")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    same(state["state_dict"], network.state_dict())
    one_x = run_config(tmp_path / "x_mask-rcnn_fpn_1x.py")
    two_x = run_config(tmp_path / "x_mask-rcnn_fpn_ms-2x.py")
    assert one_x["_base_"] == "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    assert two_x["_base_"] == "mmdet::mask_rcnn/mask-rcnn_r50_fpn_2x_coco.py"
    for names in (one_x, two_x):
        backbone = names["model"]["backbone"]
        assert backbone["norm_cfg"] == {"type": "SyncBN", "requires_grad": True}
        assert (backbone["frozen_stages"], backbone["norm_eval"]) == (0, False)
        assert backbone["init_cfg"] == {"type": "Pretrained", "checkpoint": "x.pth"}
        assert backbone["depth"] == 18 and names["model"]["neck"]["in_channels"][-1] == 512
        pixels = names["model"]["data_preprocessor"]
        assert pixels["mean"] == [123.675, 116.28, 103.53] and pixels["bgr_to_rgb"]
        assert pixels["std"] == [58.395, 57.12, 57.375]
    assert "train_pipeline" not in one_x
    resize = two_x["train_dataloader"]["dataset"]["pipeline"][2]
    assert resize["scale"] == [(1333, 640), (1333, 800)]


def test_moco_gets_what_its_linear_evaluation_asks_for(moco, tmp_path):
    file, network = moco
    result = convert.run(file, str(tmp_path / "x.pth"), to="moco")
    state = torch.load(tmp_path / "x.pth", weights_only=True)
    assert state["arch"] == "resnet18"
    expected = {f"module.encoder_q.{key}" for key in network.state_dict()}
    assert set(state["state_dict"]) == {*expected, "module.encoder_q.fc.weight"}
    assert result["dropped"] == ["encoder_k.fc.weight", "queue", "optimizer"]


def vit(**options):
    torch.manual_seed(0)
    name = "vit_small_patch16_224" if options else "vit_tiny_patch16_224"
    network = timm.create_model(name, num_classes=0, img_size=64, **options).eval()
    network.pos_embed.data[:, 0] = 0
    return network


@pytest.mark.parametrize("options", [{}, {"num_heads": 12}])
def test_a_transformer_goes_out_and_comes_home(options, tmp_path, monkeypatch):
    network = vit(**options)
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = network(images)
    for to in ("torchvision", "timm", "huggingface", "safetensors"):
        result = convert.run(str(tmp_path / "vit.pth"), str(tmp_path / to), to=to)
        assert result["matched"] == result["total"] and not result["dropped"]
        again = str(tmp_path / to) if to == "huggingface" else result["files"][0]
        home = firstsight.load_backbone(again)
        same(home.network.state_dict(), network.state_dict())
        with torch.no_grad():
            assert torch.equal(home(images), expected)
            if to in ("torchvision", "timm"):
                there = loaded(result, monkeypatch, tmp_path / to)
                torch.testing.assert_close(there(images), expected, atol=1e-5, rtol=0)
    config = json.loads((tmp_path / "huggingface/config.json").read_text())
    assert config["num_attention_heads"] == network.blocks[0].attn.num_heads
    assert (config["layer_norm_eps"], config["image_size"], config["patch_size"]) == (1e-6, 64, 16)


def test_transformers_names_of_a_transformer_are_those_on_its_disk(tmp_path):
    network = vit()
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    convert.run(str(tmp_path / "vit.pth"), str(tmp_path / "hf"), to="huggingface")
    there = safetensors.torch.load_file(tmp_path / "hf/model.safetensors")
    own = network.state_dict()
    pairs = {
        "embeddings.cls_token": "cls_token",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
        "encoder.layer.3.layernorm_before.weight": "blocks.3.norm1.weight",
        "encoder.layer.3.attention.output.dense.weight": "blocks.3.attn.proj.weight",
        "encoder.layer.11.layernorm_after.bias": "blocks.11.norm2.bias",
        "encoder.layer.0.intermediate.dense.weight": "blocks.0.mlp.fc1.weight",
        "encoder.layer.0.output.dense.weight": "blocks.0.mlp.fc2.weight",
        "layernorm.weight": "norm.weight",
    }
    assert all(torch.equal(there[key], own[ours]) for key, ours in pairs.items())
    assert len(there) == len(own) + 2 * 2 * 12  # weight and bias in three instead of one
    for i, part in enumerate(("query", "key", "value")):
        rows = own["blocks.5.attn.qkv.weight"][192 * i : 192 * (i + 1)]
        assert torch.equal(there[f"encoder.layer.5.attention.attention.{part}.weight"], rows)


def test_onnx_takes_any_number_of_images(moco, tmp_path, monkeypatch):
    """The graph is traced with a free batch; what writes it as ONNX may be missing."""
    file, network = moco
    backbone = writers.plain(firstsight.load_backbone(file))
    free = ({0: torch.export.Dim("batch")},)
    graph = torch.export.export(backbone, (torch.zeros(2, 3, 96, 96),), dynamic_shapes=free)
    images = torch.randn(5, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(graph.module()(images), network(images), atol=1e-5, rtol=0)
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(
            UserError, match=r"needs onnx and onnxscript; install firstsight\[onnx\]"
        ):
            convert.run(file, str(tmp_path / "x.onnx"), to="onnx")


@pytest.mark.slow
def test_onnxruntime_gives_the_same_features(moco, tmp_path):
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    import onnxruntime

    file, network = moco
    result = convert.run(file, str(tmp_path / "x.onnx"), to="onnx")
    session = onnxruntime.InferenceSession(result["files"][0])
    images = torch.randn(5, 3, 224, 224)
    (theirs,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(theirs), network(images), atol=1e-5, rtol=0)


def test_a_stem_of_3x3_goes_only_where_it_is_understood(tmp_path):
    state = resnet().state_dict() | {"conv1.weight": torch.randn(64, 3, 3, 3)}
    torch.save(state, tmp_path / "x.pth")
    for to in ("torchvision", "timm", "detectron2", "mmdet", "huggingface"):
        with pytest.raises(UserError, match=f"resnet18 cannot go to {to}: its first convolution"):
            convert.run(str(tmp_path / "x.pth"), str(tmp_path / to), to=to)
    result = convert.run(str(tmp_path / "x.pth"), str(tmp_path / "moco"), to="moco")
    assert any("this one is 3x3" in note for note in result["notes"])
    result = convert.run(str(tmp_path / "x.pth"), str(tmp_path / "ours"), to="safetensors")
    with pytest.raises(UserError, match="is ours and holds one backbone: leave out --from"):
        convert.run(result["files"][0], str(tmp_path / "x"), to="moco", half="query")
    again, about = checkpoint.load_backbone(result["files"][0])
    assert (about["stem"], about["size"]) == ("small", 32)
    same(again.state_dict(), state)


def test_a_json_of_its_name_says_what_a_file_is_and_hides_no_other(moco, tmp_path):
    file, _ = moco
    first = convert.run(file, str(tmp_path / "a.pth"), to="torchvision", half="query")
    second = convert.run(file, str(tmp_path / "b.pth"), to="timm")
    again = convert.run(file, str(tmp_path / "a.pth"), to="torchvision")
    assert first["files"][-1] == again["files"][-1] == str(tmp_path / "a.json")
    assert second["files"][-1] == str(tmp_path / "b.json")
    _, about = lines_of(again)
    assert (about["format"], about["half"], about["matched"]) == ("moco", "query", 120)
    assert about["mean"] == [0.485, 0.456, 0.406] and "RGB" in about["pixels"]
    assert "CC-BY-NC" in about["licence"] and about["file"] == "a.pth"
    torch.save(resnet().state_dict() | one("prototypes.weight"), tmp_path / "swav")
    _, about = lines_of(convert.run(str(tmp_path / "swav"), str(tmp_path / "s"), to="mmdet"))
    assert about["std"] == [0.228, 0.224, 0.225]


def failing(capsys, *args):
    with pytest.raises(SystemExit) as caught:
        cli.main(["convert", *args])
    assert caught.value.code == 2
    said = capsys.readouterr()
    return said.out, said.err


def test_coverage_is_printed_and_a_gap_ends_with_2(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    state = {f"module.encoder_q.{key}": value for key, value in resnet().state_dict().items()}
    del state["module.encoder_q.layer4.1.bn2.weight"]
    torch.save({"state_dict": state | one("module.queue")}, tmp_path / "x.pth")
    src, dst, told = (str(tmp_path / name) for name in ("x.pth", "y.pth", "z.json"))
    out, err = failing(capsys, src, dst, "--to", "torchvision", "--json", told)
    assert "119 of 120" in out and "1: layer4.1.bn2.weight" in out and "1: queue" in out
    assert "--allow-partial" in err and err.count("\n") == 1
    report = json.loads((tmp_path / "z.json").read_text())
    assert {key: report[key] for key in ("format", "matched", "total", "dropped", "missing")} == {
        "format": "moco",
        "matched": 119,
        "total": 120,
        "dropped": ["queue"],
        "missing": ["layer4.1.bn2.weight"],
    }
    assert not (tmp_path / "y.pth").exists()
    cli.main(["convert", src, dst, "--to", "torchvision", "--allow-partial", "--json", told])
    assert "written: " in capsys.readouterr().out and (tmp_path / "y.pth").exists()
    assert json.loads((tmp_path / "z.json").read_text())["files"][0] == dst

    (tmp_path / "folder").mkdir()  # what a file in it is, is said in it
    own = str(tmp_path / "folder/backbone.json")
    _, err = failing(capsys, src, str(tmp_path / "folder"), "--to", "torchvision", "--json", own)
    assert f"{own} will say what" in err and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["x.pth", "y.pth"], "to which library? use --to"),
        (["x.pth", "y.pth", "--to", "moco", "--selfsup", "moco"], "to which library? use --to"),
        (["x.pth", "y.pth", "--to", "mmdett"], "mmdett"),
        (["x.pth", "y.pth", "--to", "mmdet", "--from", "pytorch"], "no format called 'pytorch'"),
        (["x.pth", "y.pth", "--to", "mmdet", "--half", "left"], "use --half query or momentum"),
        (["x.pth", "x.pth", "--to", "mmdet"], "x.pth is what is read; give another DST"),
        (["no.pth", "y.pth", "--to", "mmdet"], "no checkpoint no.pth"),
        (["odd.pth", "y.pth", "--to", "mmdet"], "of no known format: 1 tensors, such as a;"),
        (["ours", "y.pth", "--to", "mmdet", "--half", "query"], "ours holds no checkpoint"),
        (["x.pth", "y.pth", "--selfsup", "swav"], "holds no backbone network as swav has it"),
    ],
)
def test_what_can_be_mended_is_one_sentence(args, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    as_moco(resnet(), tmp_path / "x.pth")
    torch.save(one("a"), tmp_path / "odd.pth")
    (tmp_path / "ours").mkdir()
    assert said in failing(capsys, *args)[1]


def test_selfsup_gives_what_mmdetections_script_gives(moco, tmp_path, capsys):
    """moco: what is under encoder_q, fc too, in its order, and nothing else. swav: not nothing."""
    file, _ = moco
    cli.main(["convert", file, str(tmp_path / "y.pth"), "--selfsup", "moco"])
    state = torch.load(file, weights_only=True)["state_dict"]
    prefix = "module.encoder_q."
    expected = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    written = torch.load(tmp_path / "y.pth", weights_only=True)
    assert set(written) == {"state_dict"}
    same(written["state_dict"], expected)
    swav = {f"module.{key}": value for key, value in resnet().state_dict().items()}
    torch.save(swav | one("module.prototypes.weight"), tmp_path / "s.pth")
    cli.main(["convert", str(tmp_path / "s.pth"), str(tmp_path / "t.pth"), "--selfsup", "swav"])
    same(torch.load(tmp_path / "t.pth", weights_only=True)["state_dict"], resnet().state_dict())
