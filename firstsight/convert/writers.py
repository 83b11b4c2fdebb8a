"""One writer for each library: its names, its container, and the lines that load it there.

Each takes the path, what was read and what `backbone.json` will say. A network that the library
has not, or has with other features under the same names and shapes, is refused.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import nn

from firstsight import backbones, checkpoint
from firstsight.backbones.conv import Conv3x3
from firstsight.checkpoint.names import is_transformer, outside
from firstsight.checkpoint.networks import Fit, inner
from firstsight.convert import mmdet
from firstsight.errors import UserError

Weights = dict[str, torch.Tensor]
About = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a writer wrote."""

    files: tuple[Path, ...]
    lines: tuple[str, ...]
    """Three lines that load it there."""
    notes: tuple[str, ...] = ()
    """What to mind there."""
    with_head: bool = False
    """Whether what sat on the network went along."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A library to write for."""

    suffix: str
    """Of the file; none: a folder is written."""
    write: Callable[[Path, Fit, About], Done]


def _weights(fit: Fit) -> Weights:
    return {key: value.detach().clone() for key, value in inner(fit.backbone).state_dict().items()}


def _name(fit: Fit) -> str:
    """The network's name without what says where it comes from."""
    return fit.backbone.name.removeprefix("timm:").partition(",")[0]


def _options(fit: Fit, about: About) -> str:
    """What timm must be told beyond the name of a transformer."""
    heads = fit.backbone.name.partition(",")[2]
    return f", img_size={about['size']}" + (f", {heads}" if heads else "")


def _refused(fit: Fit, library: str, why: str) -> UserError:
    return UserError(f"{fit.backbone.name} cannot go to {library}: {why}; --to safetensors can")


def _whole_stem(fit: Fit, library: str) -> None:
    if fit.backbone.stem != "standard":
        raise _refused(fit, library, "its first convolution is 3x3, that of the networks there 7x7")


def _is_resnet(fit: Fit) -> bool:
    return _name(fit) in backbones.RESNETS  # timm's are the same networks


def _renamed(fit: Fit, library: str) -> Weights:
    found = outside(_weights(fit), library)
    if found is None:
        raise _refused(fit, library, "there is no table of its names")
    return found


def _save(path: Path, state: Any) -> None:
    checkpoint.write_atomically(path, lambda file: torch.save(state, file))


def _loading(path: Path, build: str) -> tuple[str, ...]:
    weights = f'network.load_state_dict(torch.load("{path.name}", weights_only=True))'
    return (build, weights, "network.eval()")


def to_torchvision(path: Path, fit: Fit, about: About) -> Done:
    """A flat dict under torchvision's names, of a ResNet or a ViT, without a classifier."""
    _whole_stem(fit, "torchvision")
    weights, name = _weights(fit), _name(fit)
    if is_transformer(weights):
        weights = _renamed(fit, "torchvision")
        shape = weights["conv_proj.weight"].shape
        blocks = inner(fit.backbone).get_submodule("blocks")
        depth = len(list(blocks.children()))
        mlp = weights["encoder.layers.encoder_layer_0.mlp.0.weight"].shape[0]
        sizes = (about["size"], shape[-1], depth, _heads(fit), shape[0], mlp)
        network = f"torchvision.models.VisionTransformer({', '.join(map(str, sizes))})"
        line = f"network = {network}; network.heads = torch.nn.Identity()"
    elif _is_resnet(fit) or name.startswith(("wide_resnet", "resnext")):
        line = f"network = torchvision.models.{name}(); network.fc = torch.nn.Identity()"
    else:
        raise _refused(fit, "torchvision", "torchvision has it under other names, or not at all")
    _save(path, weights)
    return Done(files=(path,), lines=_loading(path, line))


def to_timm(path: Path, fit: Fit, about: About) -> Done:
    """A flat dict under timm's names, without a classifier."""
    _whole_stem(fit, "timm")
    weights = _weights(fit)
    more = _options(fit, about) if is_transformer(weights) else ""
    _save(path, weights)
    line = f'network = timm.create_model("{_name(fit)}", num_classes=0{more})'
    return Done(files=(path,), lines=_loading(path, line))


def _heads(fit: Fit) -> int:
    attention: Any = inner(fit.backbone).get_submodule("blocks.0.attn")
    return int(attention.num_heads)


def to_detectron2(path: Path, fit: Fit, about: About) -> Done:
    """A pickle of arrays, as MoCo's converter makes them."""
    if path.suffix != ".pkl":
        raise UserError(f"detectron2 tells formats by names: end {path.name} in .pkl")
    _detector(fit, "detectron2")
    arrays = {key: value.numpy() for key, value in _renamed(fit, "detectron2").items()}
    state = {"model": arrays, "__author__": "firstsight", "matching_heuristics": True}
    whole = pickle.dumps(state, protocol=3)
    # numpy 2 names a module that numpy 1 has not; the older name is known to both
    whole = whole.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n", 1)
    checkpoint.write_atomically(path, lambda file: file.write(whole))
    mean, std = mmdet.pixels(about["mean"]), mmdet.pixels(about["std"])
    narrow = ', "MODEL.RESNETS.RES2_OUT_CHANNELS", 64' if fit.backbone.width == 512 else ""
    lines = (
        f'cfg.merge_from_list(["MODEL.WEIGHTS", "{path.name}", "INPUT.FORMAT", "RGB"])',
        f'cfg.merge_from_list(["MODEL.PIXEL_MEAN", {mean}, "MODEL.PIXEL_STD", {std}])',
        f'cfg.merge_from_list(["MODEL.RESNETS.DEPTH", {_name(fit)[6:]},'
        f' "MODEL.RESNETS.STRIDE_IN_1X1", False{narrow}])',
    )
    note = "not frozen and with SyncBN (FREEZE_AT 0, RESNETS.NORM) it is what the papers fine-tune"
    return Done(files=(path,), lines=lines, notes=(note,))


def _detector(fit: Fit, library: str) -> None:
    _whole_stem(fit, library)
    if not _is_resnet(fit):
        raise _refused(fit, library, "detectors there take the ResNets of torchvision's names")


def to_mmdet(path: Path, fit: Fit, about: About) -> Done:
    """What MMDetection's and mmpretrain's ResNet reads, and two configs of Mask R-CNN with it."""
    _detector(fit, "mmdet")
    _save(path, {"state_dict": _weights(fit), "meta": {}})
    files = [path]
    for schedule in mmdet.SCHEDULES:
        files.append(path.with_name(f"{path.stem}_mask-rcnn_fpn_{schedule}.py"))
        text = mmdet.config(path.name, int(_name(fit)[6:]), about["mean"], about["std"], schedule)
        files[-1].write_text(text)
    lines = (
        f'# in a config: init_cfg=dict(type="Pretrained", checkpoint="{path.name}")',
        f"# ready, one schedule each: {files[1].name}, {files[2].name}",
        f"python tools/train.py {files[1].name}",
    )
    return Done(files=tuple(files), lines=lines)


def to_selfsup2mmdet(path: Path, fit: Fit, about: About) -> Done:
    """What MMDetection's selfsup2mmdet writes of MoCo: the head too, and nothing around."""
    _detector(fit, "mmdet")
    _save(path, {"state_dict": OrderedDict(_weights(fit) | dict(fit.head))})
    line = f'# in a config: init_cfg=dict(type="Pretrained", checkpoint="{path.name}")'
    return Done(files=(path,), lines=(line, "", ""), with_head=True)


def to_huggingface(path: Path, fit: Fit, about: About) -> Done:
    """A folder for transformers: config, safetensors, preprocessor."""
    _whole_stem(fit, "huggingface")
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; transformers read a folder: give another DST")
    weights = _weights(fit)
    transformer = is_transformer(weights)
    if not transformer and not _is_resnet(fit):
        raise _refused(fit, "huggingface", "there is no table of its names")
    renamed = {key: value.contiguous() for key, value in _renamed(fit, "huggingface").items()}
    config = _vit_config(fit, about) if transformer else _resnet_config(weights)
    side = int(about["size"])
    crop = {"do_center_crop": True, "crop_size": {"height": side, "width": side}, "resample": 3}
    preprocessor = {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": round(side / 0.875)},
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": about["mean"],
        "image_std": about["std"],
        "do_convert_rgb": True,
    }
    path.mkdir(parents=True, exist_ok=True)
    files = (
        path / "model.safetensors",
        path / "config.json",
        path / "preprocessor_config.json",
    )
    whole = serialize({k: v.clone() for k, v in renamed.items()}, {"format": "pt"})
    checkpoint.write_atomically(files[0], lambda file: file.write(whole))
    checkpoint.write_json(files[1], config)
    checkpoint.write_json(files[2], preprocessor)
    more = ", add_pooling_layer=False" if transformer else ""
    kind = config["architectures"][0]
    pooled = "last_hidden_state[:, 0]" if transformer else "pooler_output.flatten(1)"
    lines = (
        f"from transformers import {kind}",
        f'network = {kind}.from_pretrained("{path.name}"{more}).eval()',
        f"features = network(pixel_values=images).{pooled}",
    )
    return Done(files=files, lines=lines)


def _resnet_config(weights: Weights) -> dict[str, Any]:
    depths = [
        sum(key.startswith(f"layer{s}.") and key.endswith(".conv1.weight") for key in weights)
        for s in range(1, 5)
    ]
    deep = "layer1.0.conv3.weight" in weights
    return {
        "architectures": ["ResNetModel"],
        "model_type": "resnet",
        "num_channels": 3,
        "embedding_size": 64,
        "hidden_sizes": [256, 512, 1024, 2048] if deep else [64, 128, 256, 512],
        "depths": depths,
        "layer_type": "bottleneck" if deep else "basic",
        "hidden_act": "relu",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    }


def _vit_config(fit: Fit, about: About) -> dict[str, Any]:
    network = inner(fit.backbone)
    weights = network.state_dict()
    width, _, patch, _ = weights["patch_embed.proj.weight"].shape
    return {
        "architectures": ["ViTModel"],
        "model_type": "vit",
        "hidden_size": width,
        "num_hidden_layers": len(list(network.get_submodule("blocks").children())),
        "num_attention_heads": _heads(fit),
        "intermediate_size": weights["blocks.0.mlp.fc1.weight"].shape[0],
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-6,  # transformers' own 1e-12 gives other features
        "image_size": about["size"],
        "patch_size": patch,
        "num_channels": 3,
        "qkv_bias": True,
    }


def to_safetensors(path: Path, fit: Fit, about: About) -> Done:
    """Ours: readable by anyone, and by every command here."""
    checkpoint.save_backbone(path, fit.backbone, about)
    lines = (
        f'backbone = firstsight.load_backbone("{path.name}")',
        "features = backbone(images)",
        f'weights = safetensors.torch.load_file("{path.name}")',
    )
    return Done(files=(path,), lines=lines)


def to_moco(path: Path, fit: Fit, about: About) -> Done:
    """MoCo's checkpoint, with what sat on the network: its linear evaluation and its converter for
    detectron2 read it, and all that take after them."""
    prefix = "module.encoder_q."
    state = {prefix + key: value for key, value in (_weights(fit) | dict(fit.head)).items()}
    _save(path, {"epoch": 0, "arch": _name(fit), "state_dict": state})
    lines = (
        f"python main_lincls.py -a {_name(fit)} --pretrained {path.name} DATA",
        f"python detection/convert-pretrain-to-detectron2.py {path.name} OUT.pkl",
        "",
    )
    small = fit.backbone.stem == "small"
    note = "MoCo's own scripts build a first convolution of 7x7: this one is 3x3"
    return Done(files=(path,), lines=lines, notes=(note,) if small else (), with_head=True)


def to_onnx(path: Path, fit: Fit, about: About) -> Done:
    """A graph from normalised images (any number of them) to features."""
    absent = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if absent:
        raise UserError(
            f"--to onnx needs {' and '.join(absent)}; install firstsight[onnx], or"
            f" pip install {' '.join(absent)}"
        )
    side = int(about["size"])
    images = torch.zeros(2, 3, side, side)
    torch.onnx.export(
        plain(fit.backbone),
        (images,),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        verbose=False,
    )
    lines = (
        f'session = onnxruntime.InferenceSession("{path.name}")',
        '(features,) = session.run(None, {"images": images})  # float32 (B, 3, S, S), normalised',
        "",
    )
    return Done(files=(path,), lines=lines)


def plain(backbone: nn.Module) -> nn.Module:
    """A copy whose convolutions are torch's own, which exporters know."""
    made = copy.deepcopy(backbone).eval()
    convolutions: list[nn.Conv2d] = [m for m in made.modules() if isinstance(m, Conv3x3)]
    for convolution in convolutions:
        convolution.__class__ = nn.Conv2d
    return made


TARGETS = {
    "torchvision": Target(suffix=".pth", write=to_torchvision),
    "timm": Target(suffix=".pth", write=to_timm),
    "detectron2": Target(suffix=".pkl", write=to_detectron2),
    "mmdet": Target(suffix=".pth", write=to_mmdet),
    "huggingface": Target(suffix="", write=to_huggingface),
    "safetensors": Target(suffix=".safetensors", write=to_safetensors),
    "onnx": Target(suffix=".onnx", write=to_onnx),
    "moco": Target(suffix=".pth", write=to_moco),
    "selfsup2mmdet": Target(suffix=".pth", write=to_selfsup2mmdet),
}
"""By the word behind `convert --to`; the last is what `--selfsup` asks for."""
