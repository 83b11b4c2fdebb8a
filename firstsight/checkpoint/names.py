"""One network under the names of several libraries, each a table that is read both ways.

Here a ResNet has torchvision's names and a vision transformer timm's (which are DINO's).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch

Weights = dict[str, torch.Tensor]
Table = dict[str, tuple[str, ...]]
"""Name here to the names there: one, or the equal parts that the tensor is cut into."""

_STAGES, _BLOCKS = 4, 36
_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_LINEAR = ("weight", "bias")


@dataclass(frozen=True, kw_only=True)
class ResNetNames:
    """The modules of a ResNet; conv and norm of the stem, of a block, of a shortcut."""

    stem: tuple[str, str]
    block: str
    """With places for stage and block."""
    inner: tuple[str, str]
    """With a place for the number of the convolution."""
    shortcut: tuple[str, str]
    first: tuple[int, int] = (1, 1)
    """Numbers of the first stage and of the first convolution."""

    def keys(self) -> Iterator[str]:
        """Every key of a ResNet of any depth, always in the same order."""
        yield from _conv_and_norm(*self.stem)
        for stage in range(_STAGES):
            for number in range(_BLOCKS):
                block = self.block.format(stage + self.first[0], number)
                pairs = [tuple(p.format(n + self.first[1]) for p in self.inner) for n in range(3)]
                for conv, norm in [*pairs, self.shortcut]:
                    yield from _conv_and_norm(f"{block}.{conv}", f"{block}.{norm}")


def _conv_and_norm(conv: str, norm: str) -> Iterator[str]:
    yield f"{conv}.weight"
    yield from (f"{norm}.{leaf}" for leaf in _NORM)


_OURS = ResNetNames(
    stem=("conv1", "bn1"),
    block="layer{}.{}",
    inner=("conv{}", "bn{}"),
    shortcut=("downsample.0", "downsample.1"),
)
RESNETS = {
    "detectron2": ResNetNames(
        stem=("stem.conv1", "stem.conv1.norm"),
        block="res{}.{}",
        inner=("conv{}", "conv{}.norm"),
        shortcut=("shortcut", "shortcut.norm"),
        first=(2, 1),
    ),
    "huggingface": ResNetNames(
        stem=("embedder.embedder.convolution", "embedder.embedder.normalization"),
        block="encoder.stages.{}.layers.{}",
        inner=("layer.{}.convolution", "layer.{}.normalization"),
        shortcut=("shortcut.convolution", "shortcut.normalization"),
        first=(0, 0),
    ),
    # children in a sequence, as lightly and SCRL take torchvision's network apart
    "numbered": ResNetNames(
        stem=("0", "1"),
        block="{}.{}",
        inner=("conv{}", "bn{}"),
        shortcut=("downsample.0", "downsample.1"),
        first=(4, 1),
    ),
}

_VIT_BLOCK = ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
TRANSFORMERS = {
    "huggingface": (
        ("embeddings.cls_token", "embeddings.position_embeddings"),
        ("embeddings.patch_embeddings.projection", "layernorm"),
        "encoder.layer.{}.",
        (
            "layernorm_before",
            "attention.output.dense",
            "layernorm_after",
            "intermediate.dense",
            "output.dense",
        ),
        tuple(f"attention.attention.{part}." for part in ("query", "key", "value")),
    ),
    "torchvision": (
        ("class_token", "encoder.pos_embedding"),
        ("conv_proj", "encoder.ln"),
        "encoder.layers.encoder_layer_{}.",
        ("ln_1", "self_attention.out_proj", "ln_2", "mlp.0", "mlp.3"),
        ("self_attention.in_proj_",),
    ),
}
"""Class token and positions; first and last module; a block, its modules, and what makes query,
key and value, in one tensor or in three."""


@cache
def table(library: str, transformer: bool) -> Table:
    """Names here to names in `library`, for networks of any depth."""
    if not transformer:
        theirs = RESNETS[library].keys()
        return {here: (there,) for here, there in zip(_OURS.keys(), theirs, strict=True)}
    tokens, ends, block, modules, qkv = TRANSFORMERS[library]
    found: Table = {
        here: (there,) for here, there in zip(("cls_token", "pos_embed"), tokens, strict=True)
    }
    pairs = list(zip(("patch_embed.proj", "norm"), ends, strict=True))
    for i in range(_BLOCKS):
        there = block.format(i)
        for leaf in _LINEAR:
            found[f"blocks.{i}.attn.qkv.{leaf}"] = tuple(f"{there}{part}{leaf}" for part in qkv)
        pairs += [
            (f"blocks.{i}.{here}", f"{there}{module}")
            for here, module in zip(_VIT_BLOCK, modules, strict=True)
        ]
    return found | {f"{a}.{leaf}": (f"{b}.{leaf}",) for a, b in pairs for leaf in _LINEAR}


def is_transformer(weights: Weights) -> bool:
    """Whether these are a vision transformer's."""
    return "patch_embed.proj.weight" in weights


def outside(weights: Weights, library: str) -> Weights | None:
    """A network's weights under the names of `library`; None where it has none for one of them."""
    known = table(library, is_transformer(weights))
    if not set(weights) <= set(known):
        return None
    renamed: Weights = {}
    for here, tensor in weights.items():
        parts = tensor.chunk(len(known[here])) if len(known[here]) > 1 else (tensor,)
        renamed |= dict(zip(known[here], parts, strict=True))
    return renamed


_LAYOUTS = [(name, False) for name in RESNETS] + [(name, True) for name in TRANSFORMERS]
_FIRST = {False: "conv1.weight", True: "patch_embed.proj.weight"}
_NETWORK = re.compile(
    r"(conv1|bn1|layer\d|patch_embed|blocks|norm|norm_pre|fc_norm)\.|(cls_token|reg_token|pos_embed)$"
)


def inside(weights: Weights) -> tuple[Weights, list[str]] | None:
    """Weights of any of these libraries under the names used here, and the keys of what is no part
    of the network; None where the network's first layer is under none of the names."""
    if any(key in weights for key in (*_FIRST.values(), "conv1.0.weight")):
        network = {key: tensor for key, tensor in weights.items() if _NETWORK.match(key)}
        return network, [key for key in weights if key not in network]
    for library, transformer in _LAYOUTS:
        known = table(library, transformer)
        if not set(known[_FIRST[transformer]]) <= set(weights):
            continue
        network, used = {}, set()
        for here, there in known.items():
            if set(there) <= set(weights):
                parts = [weights[key] for key in there]
                network[here] = torch.cat(parts) if len(parts) > 1 else parts[0]
                used |= set(there)
        return network, [key for key in weights if key not in used]
    return None
