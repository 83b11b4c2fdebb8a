"""The embeddings of other libraries' checkpoints: a backbone with the head it was trained with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from firstsight import checkpoint
from firstsight.backbones import Embedding
from firstsight.checkpoint.foreign import Foreign, Weights, taken, tensors
from firstsight.checkpoint.networks import fitted
from firstsight.errors import UserError

HEADS = {"moco": "fc.", "seed": "fc.", "swav": "projection_head.", "torchvision": "fc."}
"""Formats whose files hold what embeds, and its name; SimCLR's, as SEED takes it, is plain."""


def load_embedding(spec: str, flag: str) -> tuple[Embedding, dict[str, Any]]:
    """The embedding of a foreign CHECKPOINT (MoCo's, SimCLR's, SwAV's, a student of SEED), at rest.

    Also what is known of its backbone. The head is rebuilt from its tensors: linear layers, the
    batch-norms between them, and a ReLU before every linear layer but the first, which is all that
    these libraries have. `flag` names the layer on the command line, for errors.
    """
    path = Path(spec)
    if not path.exists() and ":" not in spec:
        raise UserError(f"no checkpoint {spec}; give the folder of a run, or a file")
    if not path.is_file() or checkpoint.is_safetensors(path):
        raise UserError(f"{spec} is a backbone alone, without embedding; use {flag} backbone")
    state = checkpoint.read(path)
    if "about" in state:
        raise UserError(f"{spec} is of a run: give its folder, or use {flag} backbone")
    foreign = taken(state, spec)
    layers = _layers(_head(tensors(state)[0], foreign))
    if not layers or (foreign.name == "torchvision" and len(layers) == 1):
        held = "a classifier" if layers else "nothing that is known here"
        raise UserError(f"{spec} has {held} on its backbone, no embedding; use {flag} backbone")
    backbone, about = checkpoint.filled(fitted(foreign, spec), spec)
    return Embedding(backbone, nn.Sequential(*layers)).eval(), about


def _head(found: Weights, foreign: Foreign) -> Weights:
    """Tensors of the head by what follows its name: `weight` of one layer, `0.weight` of many."""
    if foreign.name not in HEADS:
        return {}
    starts = (half + HEADS[foreign.name] for half in foreign.format.halves[foreign.half])
    inner = ({k[len(s) :]: v for k, v in found.items() if k.startswith(s)} for s in starts)
    return next(filter(None, inner), {})


def _layers(head: Weights) -> list[nn.Module]:
    """The modules of a head, in their order, as they were trained."""
    of: dict[int, Weights] = {}
    for key, value in head.items():
        name, _, leaf = key.rpartition(".")
        of.setdefault(int(name or 0), {})[leaf] = value
    layers: list[nn.Module] = []
    for _, own in sorted(of.items()):
        weight = own["weight"]
        layer: nn.Module
        if weight.ndim == 2:
            layers += [nn.ReLU(inplace=True)] if layers else []
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in own)
        else:
            layer = nn.BatchNorm1d(len(weight))
        layer.load_state_dict(own)
        layers.append(layer)
    return layers
