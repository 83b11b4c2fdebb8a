"""Files of other libraries: what they hold is found, whole, and nothing in them is run."""

import argparse
import collections
import os
import pathlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision

import firstsight
from firstsight import backbones, checkpoint
from firstsight.checkpoint.foreign import FORMATS
from firstsight.errors import UserError

REAL = Path(__file__).parents[2].parent / "shared/data/checkpoints"
IMAGES = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def resnet(name="resnet18", seed=0):
    """torchvision's, with statistics that no untrained network has, and without its fc."""
    torch.manual_seed(seed)
    network = getattr(torchvision.models, name)()
    network.fc = torch.nn.Identity()
    for key, value in network.state_dict().items():
        if key.endswith(("bn1.weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif key.endswith(("bias", "running_mean")):
            value.normal_(std=0.1)
        elif key.endswith("tracked"):
            value.fill_(7)
    return network.eval()


NETWORKS = {"this": resnet(), "other": resnet(seed=1)}


def under(prefix, network="this", rename=lambda key: key):
    return {prefix + rename(key): value for key, value in NETWORKS[network].state_dict().items()}


def numbered(key):
    """As torchvision's children are counted: conv1 0, bn1 1, relu, maxpool, layer1 4, ..."""
    first, _, rest = key.partition(".")
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    return f"{children.index(first)}.{rest}"


def detectron2(key):
    """The steps of MoCo's own converter, as the specification gives them."""
    if "layer" not in key:
        key = "stem." + key
    for t in (1, 2, 3, 4):
        key = key.replace(f"layer{t}", f"res{t + 1}")
    for t in (1, 2, 3):
        key = key.replace(f"bn{t}", f"conv{t}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def huggingface(key):
    key = key.replace("downsample.0", "shortcut.convolution")
    key = key.replace("downsample.1", "shortcut.normalization")
    if not key.startswith("layer"):
        key = key.replace("conv1", "embedder.embedder.convolution")
        return key.replace("bn1", "embedder.embedder.normalization")
    layer, block, *rest = key.split(".")
    key = f"encoder.stages.{int(layer[5:]) - 1}.layers.{block}.{'.'.join(rest)}"
    for c in (1, 2, 3):
        key = key.replace(f".conv{c}.", f".layer.{c - 1}.convolution.")
        key = key.replace(f".bn{c}.", f".layer.{c - 1}.normalization.")
    return key


def one(*names):
    """Something that sits beside a backbone."""
    return {name: torch.ones(2, 3) for name in names}


SETTINGS = argparse.Namespace(lr=0.1, out=pathlib.Path("x"))
QUEUE = one("module.queue") | {"module.queue_ptr": torch.zeros(1, dtype=torch.long)}
HEADS = one("module.encoder_q.fc.0.weight", "module.encoder_k.fc.0.weight")
LAYOUTS = {
    "moco": {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": under("module.encoder_q.")
        | under("module.encoder_k.", "other")
        | QUEUE
        | HEADS,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
    },
    "openselfsup": {
        "state_dict": under("backbone.")
        | under("encoder_q.0.")
        | under("encoder_k.0.", "other")
        | one("encoder_q.1.mlp.0.weight", "queue", "queue2")
    },
    "mocov3": {
        "state_dict": under("module.base_encoder.")
        | under("module.momentum_encoder.", "other")
        | one("module.base_encoder.fc.0.weight", "module.predictor.0.weight")
    },
    "seed": {
        "state_dict": under("module.student.")
        | under("module.teacher.", "other")
        | one("module.student.fc.0.weight", "module.queue")
    },
    "scrl": {
        "tag": "x",
        "online_network_state_dict": under("encoder.", rename=numbered) | one("projector.0.weight"),
        "target_network_state_dict": under("encoder.", "other", numbered),
        "predictor_state_dict": one("0.weight"),
        "evaluator_state_dict": one("weight"),
        "optimizer_state_dict": {"state": {}},
    },
    "byol": under("online_encoder.net.")
    | under("target_encoder.net.", "other")
    | one("online_predictor.net.0.weight"),
    "dino": {
        "teacher": under("backbone.") | one("head.mlp.0.weight"),
        "student": under("module.backbone.", "other") | one("module.head.mlp.0.weight"),
        "args": SETTINGS,
        "epoch": np.int64(3),
    },
    "lightly": {
        "state_dict": under("backbone.", rename=numbered)
        | under("backbone_momentum.", "other", numbered)
        | one("projection_head.layers.0.weight")
    },
    "sololearn": {
        "state_dict": under("backbone.")
        | under("momentum_backbone.", "other")
        | one("projector.0.weight", "classifier.weight", "predictor.0.weight")
    },
    "pixpro": {
        "opt": SETTINGS,
        "model": under("module.encoder.")
        | under("module.encoder_k.", "other")
        | one("module.projector.linear1.weight", "module.projector_k.linear1.weight"),
    },
    "simsiam": {
        "state_dict": under("module.encoder.")
        | one("module.encoder.fc.0.weight", "module.predictor.0.weight")
    },
    "swav": under("module.") | one("module.projection_head.0.weight", "module.prototypes.weight"),
    "barlow": {
        "model": under("module.backbone.")
        | one("module.projector.0.weight", "module.bn.running_mean")
    },
    "vicreg": {"model": under("module.backbone.") | one("module.projector.0.weight")},
    "vissl": {
        "classy_state_dict": {
            "base_model": {
                "model": {
                    "trunk": under("_feature_blocks."),
                    "heads": one("0.clf.0.weight"),
                }
            }
        }
    },
    "mmselfsup": {
        "meta": {},
        "state_dict": under("backbone.")
        | under("encoder_k.module.0.", "other")
        | one("neck.mlp.0.weight"),
    },
    "detectron2": {
        "model": {key: value.numpy() for key, value in under("", rename=detectron2).items()},
        "__author__": "MOCO",
        "matching_heuristics": True,
    },
    "huggingface": under("resnet.", rename=huggingface) | one("classifier.1.weight"),
    "pic": {
        "opt": SETTINGS,
        "model": under("module.encoder.") | one("module.encoder.fc.weight", "module.sim_matrix"),
    },
    "torchvision": under("") | one("fc.weight"),
}


def features(network):
    with torch.no_grad():
        return network(IMAGES)


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    """The path of a file in a format of LAYOUTS, written once."""
    folder = tmp_path_factory.mktemp("foreign")

    def path(name):
        if not (folder / name).exists():
            written(folder / name, LAYOUTS[name])
        return str(folder / name)

    return path


def written(path, state):
    if "__author__" in state:
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    return str(path)


def assert_is(fit, network):
    """All tensors of a network, none of them changed."""
    expected = NETWORKS[network].state_dict()
    assert len(fit.matched) == fit.total == len(expected) and not fit.gap and not fit.filled
    state = fit.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_every_format_is_tested():
    assert {*LAYOUTS, "timm"} == set(FORMATS)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_foreign_file_gives_its_network_and_says_what_is_left(name, file_of):
    fit = checkpoint.fit_backbone(file_of(name))
    assert (fit.format, fit.half) == (name, next(iter(FORMATS[name].halves)))
    assert_is(fit, "this")
    left = {"scrl": "projector", "dino": "head.mlp", "lightly": "projection_head", "seed": "queue"}
    left |= {"moco": "optimizer", "pic": "sim_matrix", "huggingface": "classifier.1.weight"}
    left |= {"swav": "prototypes", "openselfsup": "queue2"}
    nothing_left = name in ("detectron2", "torchvision")
    assert any(left.get(name, "") in key for key in fit.dropped) or nothing_left
    assert (
        "fc.weight" in fit.head or name != "torchvision"
    )  # it may go on to a library that has one


def two_halves():
    return [name for name in LAYOUTS if len(FORMATS[name].halves) > 1 and name != "pic"]


@pytest.mark.parametrize("name", two_halves())
def test_the_other_half_is_to_be_had(name, file_of):
    half = list(FORMATS[name].halves)[1]
    fit = checkpoint.fit_backbone(file_of(name), half=half)
    assert fit.half == half
    assert_is(fit, "other")
    with pytest.raises(UserError, match=f"no middle half; use --half .*{half}"):
        checkpoint.fit_backbone(file_of(name), half="middle")


def test_features_are_those_of_the_network_there(file_of):
    for name in ("moco", "detectron2"):
        ours = features(firstsight.load_backbone(file_of(name)))
        torch.testing.assert_close(ours, features(NETWORKS["this"]), atol=1e-5, rtol=1e-5)


def test_what_is_insisted_on_is_taken_or_refused(file_of):
    fit = checkpoint.fit_backbone(file_of("openselfsup"), source="mmselfsup")
    assert fit.format == "mmselfsup"
    assert_is(fit, "this")
    with pytest.raises(UserError, match=r"as simsiam has it: no weights under encoder\., but"):
        checkpoint.fit_backbone(file_of("moco"), source="simsiam")
    with pytest.raises(UserError, match="no format called 'mocco'"):
        checkpoint.fit_backbone(file_of("moco"), source="mocco")


def test_a_student_of_seed_converted_for_moco_is_mocos(tmp_path):
    """ssl-small's converter leaves the student's keys beside their copies."""
    state = under("module.encoder_q.") | under("module.student.") | QUEUE
    assert_is(checkpoint.fit_backbone(written(tmp_path / "x", {"state_dict": state})), "this")


@pytest.mark.parametrize(
    ("name", "network"),
    [("resnet50", "resnet50"), ("wide_resnet50_2", "timm:wide_resnet50_2"),
     ("resnext50_32x4d", "timm:resnext50_32x4d")],
)  # fmt: skip
def test_all_318_tensors_of_larger_networks(name, network, tmp_path):
    there = resnet(name)
    state = {f"module.encoder_q.{key}": value for key, value in there.state_dict().items()}
    fit = checkpoint.fit_backbone(written(tmp_path / "x", {"state_dict": state}))
    assert fit.backbone.name == network and len(fit.matched) == fit.total == 318
    torch.testing.assert_close(features(fit.backbone), features(there), atol=1e-5, rtol=1e-5)


def transformer(name="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=0, img_size=64, **options).eval()


def test_a_transformer_under_names_of_dino_timm_torchvision_and_transformers(tmp_path):
    there = transformer()
    weights = there.state_dict()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = there(images)
    spelt = {
        "timm": weights,
        "dino": {side: {f"backbone.{k}": v for k, v in weights.items()}
                 for side in ("teacher", "student")},
        "mocov3": {f"base_encoder.{k}": v for k, v in weights.items()},
    }  # fmt: skip
    for name, state in spelt.items():
        fit = checkpoint.fit_backbone(written(tmp_path / name, state))
        assert (fit.format, fit.backbone.name) == (name, "timm:vit_tiny_patch16_224")
        assert fit.about["size"] == 64 and not fit.gap
        with torch.no_grad():
            assert torch.equal(fit.backbone(images), expected)


@pytest.mark.parametrize("prefix", ["module.base_encoder.", ""])
def test_twelve_heads_are_told_from_six(prefix, tmp_path):
    """MoCo v3's ViT-S has timm's shapes: by its name, or by positions that were never learnt."""
    there = transformer("vit_small_patch16_224", num_heads=12)
    there.pos_embed.data[:, 0] = 0
    state = {prefix + key: value for key, value in there.state_dict().items()}
    fit = checkpoint.fit_backbone(written(tmp_path / "x", {"state_dict": state}))
    assert fit.backbone.name == "timm:vit_small_patch16_224,num_heads=12"
    assert "12 heads" in fit.notes[0]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(fit.backbone(images), there(images))
        six = backbones.build("timm:vit_small_patch16_224", size=64).eval()
        six.network.load_state_dict(there.state_dict())
        assert not torch.allclose(six(images), there(images), atol=1e-3)
    saved = tmp_path / "ours.safetensors"
    checkpoint.save_backbone(saved, fit.backbone, fit.about)
    with torch.no_grad():
        assert torch.equal(checkpoint.load_backbone(str(saved))[0](images), there(images))


def test_a_stem_of_3x3_is_marked_and_refused_where_its_padding_is_another(tmp_path):
    state = under("encoder_q.")
    state["encoder_q.conv1.weight"] = torch.randn(64, 3, 3, 3)
    fit = checkpoint.fit_backbone(written(tmp_path / "x", state))
    assert (fit.about["stem"], fit.about["size"]) == ("small", 32) and "3x3" in fit.notes[0]
    state = {key.replace("encoder_q", "backbone"): value for key, value in state.items()}
    with pytest.raises(UserError, match="sololearn pads by 2: ours pads by 1"):
        checkpoint.fit_backbone(written(tmp_path / "y", state | one("classifier.weight")))


def test_what_is_not_there_is_named(tmp_path):
    state = under("module.encoder_q.")
    del state["module.encoder_q.layer3.0.conv1.weight"]
    state["module.encoder_q.bn1.weight"] = torch.ones(32)
    file = written(tmp_path / "x", {"state_dict": state})
    fit = checkpoint.fit_backbone(file)
    assert fit.missing == ("layer3.0.conv1.weight",)
    assert fit.unlike == ("bn1.weight [32], here [64]",) and len(fit.matched) == fit.total - 2
    with pytest.raises(UserError, match=r"layer3\.0\.conv1\.weight; 1 have another shape: bn1"):
        checkpoint.load_backbone(file)
    counted = {key: value for key, value in under("").items() if "tracked" not in key}
    old = checkpoint.fit_backbone(written(tmp_path / "y", counted))  # as torch 0.4 saved them
    assert not old.gap and len(old.filled) == 20 and old.total == 120


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["res_net50/~/initial_conv/w"], "BYOL's in JAX, which pads"),
        (["net.0.0.weight"], "SimCLR's of TensorFlow"),
        (["module.encoder_q._conv_stem.weight"], "holds no query network as moco"),
        (["_conv_stem.weight", "_blocks.0._bn0.weight"], "an EfficientNet with Tens"),
        (["to_patch_embedding.1.weight"], "6 heads of 64"),
        (["features.0.0.weight"], "numbered `features`"),
        (["a", "b"], "of no known format: 2 tensors, such as a, b; known are openselfsup"),
        ([], "of no known format: no tensors"),
    ],
)  # fmt: skip
def test_networks_that_are_none_of_ours_are_refused_by_name(keys, said, tmp_path):
    with pytest.raises(UserError, match=said):
        checkpoint.load_backbone(written(tmp_path / "x", one(*keys)))


def test_a_network_of_other_depth_or_width_is_refused(tmp_path):
    short = {key: value for key, value in under("").items() if "layer4" not in key}
    with pytest.raises(UserError, match=r"\(2, 2, 2, 0\) blocks a stage"):
        checkpoint.load_backbone(written(tmp_path / "x", short))
    wide = under("") | {"layer1.0.conv2.weight": torch.ones(96, 96, 3, 3)}
    with pytest.raises(UserError, match="a resnet18 with blocks of 96 channels"):
        checkpoint.load_backbone(written(tmp_path / "y", wide))


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_hostile_file_is_refused_by_name_and_runs_nothing(form, tmp_path):
    trap, file = tmp_path / "sprung", tmp_path / "x.pth"
    state = {"state_dict": one("conv1.weight"), "args": Hostile(trap)}
    if form == "pickle":
        file.write_bytes(pickle.dumps({"args": Hostile(trap)}))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"asks for (posix|nt)\.mkdir, which weights do not"):
        checkpoint.load_backbone(str(file))
    assert not trap.exists()
    if form == "pickle":  # the trap is one: without the guard it springs
        pickle.loads(file.read_bytes())
        assert trap.exists()


def test_plain_settings_are_read_in_every_form_and_stay_what_they_were(tmp_path):
    state = {
        "args": SETTINGS,
        "best": np.float64(0.25),
        "counts": np.arange(3),
        "order": collections.OrderedDict(a=1),
        "weights": torch.arange(3.0),
    }
    for zipped in (True, False):
        torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=zipped)
        again = checkpoint.read(tmp_path / "x")
        assert again["args"].lr == 0.1 and str(again["args"].out) == "x"
        assert again["best"] == 0.25 and again["counts"].tolist() == [0, 1, 2]
        assert torch.equal(again["weights"], state["weights"])
    torch.save({"x": argparse.FileType()}, tmp_path / "y")
    with pytest.raises(UserError, match=r"asks for argparse\.FileType"):
        checkpoint.read(tmp_path / "y")


def test_a_real_checkpoint_of_torchs_old_format_is_read_and_its_network_named():
    file = REAL / "cifar10_resnet20_supervised.th"
    if not file.exists():
        pytest.skip("the real checkpoints are not beside the project")
    assert "module.linear.weight" in checkpoint.read(file)["state_dict"]
    backbone, _ = checkpoint.load_backbone(str(file))
    assert (backbone.name, backbone.width) == ("cifar_resnet20", 64)
