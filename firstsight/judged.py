"""The network that a reading judges: a backbone, or a backbone with its projector behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from firstsight import checkpoint, methods
from firstsight.backbones import Backbone
from firstsight.errors import UserError
from firstsight.settings import Pretrain, merged, read_yaml
from firstsight.views import Views

Layer = Literal["backbone", "embedding"]


class _Embedding(Backbone):
    """A backbone whose features are the embedding that its method compared."""

    def __init__(self, backbone: Backbone, projector: torch.nn.Module) -> None:
        super().__init__()
        self.name, self.stem = backbone.name, backbone.stem
        self.stride = backbone.stride
        self.backbone, self.projector = backbone, projector
        last = [m for m in projector.modules() if isinstance(m, torch.nn.Linear)][-1]
        self.width = last.out_features

    def feature_map(self, images: Tensor) -> Tensor:
        return self.backbone.feature_map(images)

    def features(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.projector(self.backbone.features(images))
        return embedding


def network(spec: str, layer: Layer) -> tuple[Backbone, dict[str, Any]]:
    """What a CHECKPOINT holds, and what is known about it; raises `UserError`.

    `layer` embedding puts the projector behind the backbone, which only a run folder tells of.
    """
    if layer == "backbone":
        return checkpoint.load_backbone(spec)
    folder = Path(spec)
    if not (folder / "config.yaml").exists():
        raise UserError(f"--layer embedding needs a run folder, and {spec} is none")
    values = read_yaml(folder / "config.yaml")
    name = str(values.pop("name"))
    _, _, settings = methods.describe(name)
    config = merged(Pretrain(data="", views=Views(), method=settings), values, str(folder))
    state, _ = checkpoint.newest(folder / "checkpoints")
    if state is None:
        raise UserError(f"{folder} holds no checkpoint yet")
    method = methods.build(name, config, 1)
    checkpoint.load_state(method, state["method"], folder)
    if not hasattr(method, "projector"):
        raise UserError(f"{name} has no projector; use --layer backbone")
    return _Embedding(method.backbone, method.get_submodule("projector")).eval(), state["about"]
