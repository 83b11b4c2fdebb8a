"""What other libraries write: a table of formats, and a backbone's weights out of each.

A file is a nest of dicts. Here a tensor's key is its whole path: names of dicts joined by `/`,
without a wrapper that says nothing (`state_dict`, `model`), then the name of the tensor without the
`module.` that data parallelism puts before it. `teacher/backbone.conv1.weight` is one. Prefixes are
anchored at the beginning of such a key: `backbone.` is not found in `momentum_backbone.`.

Sources: the formats' own code, and https://github.com/open-mmlab/mmdetection/issues/5284 for what
happens where a prefix is missed (training from weights that were never loaded).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from firstsight.checkpoint.names import inside
from firstsight.errors import UserError, unknown

Weights = dict[str, torch.Tensor]

_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PARALLEL = re.compile(r"^((module|_orig_mod)\.)+")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How one library lays its checkpoints out."""

    summary: str
    """What it is, in a few words."""
    halves: Mapping[str, tuple[str, ...]]
    """Which networks a file holds, and the prefixes under which each may be; the first is taken."""
    signs: tuple[str, ...]
    """Patterns for the beginnings of keys: a file of this format has a key for each."""
    licence: str = "ask where the weights come from"
    """What its authors say about released weights."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from the pixels."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Divides the pixels."""
    heads: Mapping[int, int] = field(default_factory=dict)
    """Attention heads for a width of transformer where they are not timm's."""
    padding: int = 1
    """Of a first convolution of 3x3."""
    note: str = ""
    """What the file cannot say."""


_NC = "upstream code is CC-BY-NC-4.0"

FORMATS: dict[str, Format] = {
    # first those that have what others have, and more
    "openselfsup": Format(
        summary="MoCo or DenseCL in OpenSelfSup: a backbone and a neck in one sequence",
        halves={
            "query": ("encoder_q.0.",),
            "momentum": ("encoder_k.0.",),
        },
        signs=(r"encoder_q\.0\.(conv1|layer1)\.",),
        licence="DenseCL is GPL-3.0, OpenSelfSup Apache-2.0",
    ),
    "moco": Format(
        summary="MoCo v1 and v2, Tobias, ssl-small, a converted student of SEED",
        halves={"query": ("encoder_q.",), "momentum": ("encoder_k.",)},
        signs=(r"encoder_q\.",),
        licence="files of MoCo say MIT, its page CC-BY-NC-4.0",
    ),
    "mocov3": Format(
        summary="MoCo v3",
        halves={"query": ("base_encoder.",), "momentum": ("momentum_encoder.",)},
        signs=(r"base_encoder\.",),
        licence=_NC,
        heads={384: 12},
    ),
    "seed": Format(
        summary="SEED: a student and its teacher",
        halves={"student": ("student.",), "teacher": ("teacher.module.", "teacher.")},
        signs=(r"student\.", r"teacher\."),
        licence="SEED is MIT; the teacher's weights are under those of its own authors",
    ),
    "scrl": Format(
        summary="SCRL and its BYOL: torchvision's children by number",
        halves={
            "online": ("online_network_state_dict/encoder.",),
            "target": ("target_network_state_dict/encoder.",),
        },
        signs=(r"online_network_state_dict/encoder\.",),
    ),
    "byol": Format(
        summary="an online and a target network, as many BYOLs have them",
        halves={
            side: tuple(
                f"{side}{name}.{inner}"
                for name in ("_network", "_encoder", "_net", "")
                for inner in ("backbone.", "encoder.", "net.", "0.", "")
            )
            for side in ("online", "target")
        },
        signs=(r"online(_network|_encoder|_net)?\.", r"target(_network|_encoder|_net)?\."),
        licence="DeepMind's own weights are CC-BY-NC-4.0",
        note="a network ported from DeepMind's pads as TensorFlow does (SAME): it would load and"
        " give other features",
    ),
    "dino": Format(
        summary="DINO",
        halves={"teacher": ("teacher/backbone.",), "student": ("student/backbone.",)},
        signs=(r"teacher/backbone\.", r"student/backbone\."),
        licence="DINO is Apache-2.0",
    ),
    "lightly": Format(
        summary="lightly: torchvision's children by number, or DINO's two backbones",
        halves={
            "backbone": ("backbone.", "student_backbone."),
            "momentum": ("backbone_momentum.", "teacher_backbone."),
        },
        signs=(r"(student_)?backbone\.(0\.weight$|4\.0\.|cls_token)",),
    ),
    "sololearn": Format(
        summary="solo-learn",
        halves={
            "backbone": ("backbone.", "encoder."),
            "momentum": ("momentum_backbone.", "momentum_encoder."),
        },
        signs=(r"(backbone|encoder)\.", r"(classifier|momentum_(backbone|encoder))\."),
        licence="solo-learn is MIT",
        padding=2,
    ),
    "pixpro": Format(
        summary="PixPro",
        halves={"query": ("encoder.",), "momentum": ("encoder_k.",)},
        signs=(r"encoder\.", r"projector\.", r"(encoder_k|projector_k)\."),
        licence="PixPro is MIT",
    ),
    "simsiam": Format(
        summary="SimSiam",
        halves={"backbone": ("encoder.",)},
        signs=(r"encoder\.", r"predictor\."),
        licence=_NC,
    ),
    "swav": Format(
        summary="SwAV and DeepCluster-v2",
        halves={"backbone": ("",)},
        signs=(r"(projection_head|prototypes)\.", r"conv1\."),
        licence=_NC,
        std=(0.228, 0.224, 0.225),  # theirs, in the first place a slip
    ),
    "barlow": Format(
        summary="Barlow Twins",
        halves={"backbone": ("backbone.",)},
        signs=(r"backbone\.", r"projector\.", r"bn\.running_mean"),
        licence="Barlow Twins is MIT",
    ),
    "vicreg": Format(
        summary="VICReg",
        halves={"backbone": ("backbone.",)},
        signs=(r"backbone\.", r"projector\."),
        licence="VICReg is MIT",
    ),
    "vissl": Format(
        summary="VISSL",
        halves={
            "backbone": (
                "classy_state_dict/base_model/model/trunk/_feature_blocks.",
                "base_model/model/trunk/_feature_blocks.",
                "trunk/_feature_blocks.",
                "trunk._feature_blocks.",
                "_feature_blocks.",
            )
        },
        signs=(r"([\w/]*/)?(trunk\.)?_feature_blocks\.",),
        licence="VISSL is MIT; its zoo has weights of many",
    ),
    "mmselfsup": Format(
        summary="mmselfsup, MMDetection, mmpretrain: the network under `backbone.`",
        halves={
            "backbone": ("backbone.",),
            "momentum": ("encoder_k.module.0.", "encoder_k.0.", "target_net.0."),
        },
        signs=(r"backbone\.(conv1|patch_embed)\.",),
        licence="OpenMMLab's weights are Apache-2.0",
    ),
    "detectron2": Format(
        summary="detectron2",
        halves={"backbone": ("", "backbone.bottom_up.", "backbone.")},
        signs=(r"(backbone\.)?(bottom_up\.)?stem\.conv1\.",),
        licence="detectron2 is Apache-2.0",
        note="STRIDE_IN_1X1 and the order of pixels are not in the file: read as False and RGB",
    ),
    "huggingface": Format(
        summary="transformers: ResNetModel and ViTModel",
        halves={"backbone": ("", "resnet.", "vit.")},
        signs=(r"(resnet\.|vit\.)?(embedder\.embedder|embeddings\.patch_embeddings)\.",),
    ),
    "pic": Format(
        summary="PIC and its companions",
        halves={"backbone": ("encoder.",), "momentum": ("encoder_k.",)},
        signs=(r"encoder\.(conv1|layer1)\.",),
        licence="PIC is MIT",
    ),
    "torchvision": Format(
        summary="names of torchvision, and of timm where they are the same, flat or in a detector",
        halves={"backbone": ("", "backbone.body.")},
        signs=(
            r"(backbone\.body\.)?(conv1|conv_proj)\.",
            r"(backbone\.body\.)?(layer1|encoder\.layers\.encoder_layer_0)\.",
        ),
    ),
    "timm": Format(
        summary="a transformer under the names of timm and DINO: flat",
        halves={"backbone": ("",)},
        signs=(r"patch_embed\.proj\.", r"blocks\.0\."),
    ),
}
"""By name, as `convert --from` takes it; the first whose signs are all there is recognised."""

ELSEWHERE = {
    r"[\w/]*res_?net\w*/~": "BYOL's in JAX, which pads as TensorFlow does (SAME)",
    r"base_model/|.*batch_normalization.*/|net\.0\.0\.weight": "SimCLR's of TensorFlow, which"
    " pads as TensorFlow does (SAME)",
    r"([\w.]+\.)?_conv_stem\.": "an EfficientNet with TensorFlow's padding (SAME)",
    r"([\w.]+\.)?to_patch_embedding\.": "ssl-small's vit_tiny, with 6 heads of 64 and no biases",
    r"([\w.]+\.)?features\.\d": "a network of numbered `features` (MobileNet, VGG, DenseNet)",
    r"([\w.]+\.)?Conv2d_1a_3x3\.": "an Inception",
    r"conv1_w$": "Caffe2's, with the stride in the first 1x1 and pixels in the order BGR",
}
"""Networks that are no backbone here: loaded into one that looks alike, they would give other
features, or none."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A backbone's weights under names of torchvision or timm, and what came with them."""

    name: str
    """The format."""
    half: str
    """Which of its networks this is."""
    weights: Weights
    """The network's tensors."""
    head: Weights
    """What sat on the network: `fc.*`."""
    dropped: tuple[str, ...]
    """Keys of all else."""

    @property
    def format(self) -> Format:
        """The row of the table."""
        return FORMATS[self.name]


def taken(
    state: Mapping[str, Any], where: str, name: str | None = None, half: str | None = None
) -> Foreign:
    """The backbone in a foreign checkpoint's `state`, recognised by its keys.

    `name` insists on a format, `half` on one of the networks of it. Raises UserError where the
    format is unknown or another, and where it has no such half.
    """
    found, other = tensors(state)
    if name is None:
        name = _recognised(found, where)
    elif name not in FORMATS:
        raise unknown("format", name, FORMATS)
    halves = FORMATS[name].halves
    if half is not None and half not in halves:
        raise UserError(f"{where} ({name}) has no {half} half; use --half {' or '.join(halves)}")
    half = half or next(iter(halves))
    for prefix in halves[half]:
        under = {key.removeprefix(prefix): key for key in found if key.startswith(prefix)}
        split = inside({short: found[key] for short, key in under.items()})
        if split is not None:
            break
    else:
        raise UserError(
            f"{where} holds no {half} network as {name} has it: no weights under"
            f" {' or '.join(p or 'plain names' for p in halves[half])}, but {_some(found)}"
        )
    weights, rest = split
    head = {key: found[under[key]] for key in rest if key.startswith("fc.")}
    used = {key for short, key in under.items() if short in head or short not in set(rest)}
    return Foreign(
        name=name,
        half=half,
        weights=weights,
        head=head,
        dropped=(*(key for key in found if key not in used), *other),
    )


def tensors(state: Mapping[str, Any]) -> tuple[Weights, tuple[str, ...]]:
    """All tensors of a nest of dicts by their paths, and names of what is no network."""
    found: Weights = {}
    other: list[str] = []

    def walk(inner: Mapping[Any, Any], path: str) -> None:
        for key, value in inner.items():
            name = _PARALLEL.sub("", str(key))
            if _is_array(value):
                found[path + name] = torch.as_tensor(value)
            elif isinstance(value, Mapping) and re.search("optim|sched|scaler|^amp$", str(key)):
                other.append(path + str(key))
            elif isinstance(value, Mapping):
                walk(value, path if not path and key in _WRAPPERS else f"{path}{key}/")

    walk(state, "")
    return found, tuple(other)


def _is_array(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or type(value).__name__ == "ndarray"


def _recognised(found: Iterable[str], where: str) -> str:
    keys = list(found)
    for name, kind in FORMATS.items():
        if all(any(re.match(sign, key) for key in keys) for sign in kind.signs):
            return name
    for pattern, what in ELSEWHERE.items():
        if any(re.match(pattern, key) for key in keys):
            raise UserError(f"{where} holds {what}: no backbone here gives its features")
    raise UserError(f"{where} is of no known format: {_some(keys)}; known are {', '.join(FORMATS)}")


def _some(keys: Iterable[str]) -> str:
    """A few keys, for whoever knows what they mean."""
    keys = list(keys)
    return f"{len(keys)} tensors, such as {', '.join(keys[:3])}" if keys else "no tensors"
