"""Methods by the name of their file: the file is the registry."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

from firstsight.errors import UserError, unknown
from firstsight.settings import Pretrain, merged, read_yaml, shallow
from firstsight.views import Views

if TYPE_CHECKING:
    from firstsight.backbones import Backbone
    from firstsight.methods.base import Method

_HERE = Path(__file__).parent


def names() -> list[str]:
    """All methods there are."""
    return sorted(path.stem for path in _HERE.glob("*.py") if path.stem not in ("__init__", "base"))


def load(name: str) -> tuple[type[Method], Any]:
    """The method's class and its `Config` class (this imports torch)."""
    from firstsight.methods.base import Method

    module = importlib.import_module(f"firstsight.methods.{_known(name)}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Method)
        and value.__module__ == module.__name__
    ]
    (method,) = found  # one method, one file
    return method, module.Config


def build(name: str, config: Pretrain, images: int) -> Method:
    """The method with its networks as they are before training: a function of the settings."""
    import torch

    from firstsight import backbones, checkpoint
    from firstsight.nets.norms import global_batch_norm

    method_class, settings_class = load(name)
    sides = config.views.sides(config.size)
    if method_class.views == "pair" and (len(sides) != 2 or sides[0] != sides[1]):
        raise UserError(
            f"{name} takes two views of one size, not of {', '.join(map(str, sides))} pixels; "
            "use --views.counts 2 and at most one of --views.sizes"
        )
    least = method_class.global_views
    if sides[:least] != sides[:1] * least:
        raise UserError(
            f"{name} takes {least} or more views of the first size, not views of "
            f"{', '.join(map(str, sides))} pixels; use --views.counts {least} 6 or another --preset"
        )
    torch.manual_seed(config.seed)
    backbone = backbones.build(config.backbone, config.stem, config.size)
    backbones.refuse_sides(backbone, set(sides) - {config.size})
    if config.init:
        checkpoint.start_backbone(backbone, config.init)  # before momentum encoders copy it
    method = method_class(settings_class(**shallow(config.method)), backbone, images)
    if config.init_policy == "all":
        checkpoint.start_method(method, name, config.init)
    if config.batch_norm == "global":
        global_batch_norm(method)
    return method


def network(spec: str, layer: str, flag: str) -> tuple[Backbone, dict[str, Any]]:
    """The `backbone` of a CHECKPOINT, or with its `embedding` as features, at rest.

    Also what is known about it. `flag` is what names the layer on the command line, for errors.
    """
    import torch

    from firstsight import checkpoint
    from firstsight.backbones import Embedding
    from firstsight.checkpoint.embedded import load_embedding

    if layer == "backbone":
        return checkpoint.load_backbone(spec)
    folder = Path(spec)
    if not (folder / "config.yaml").exists():
        return load_embedding(spec, flag)
    values = read_yaml(folder / "config.yaml")
    name = str(values.pop("name"))
    _, _, settings = describe(name)
    config = merged(Pretrain(data="", views=Views(), method=settings), values, str(folder))
    state, _ = checkpoint.newest(folder / "checkpoints")
    if state is None:
        raise UserError(f"{folder} holds no checkpoint yet")
    with torch.random.fork_rng(devices=[]):
        method = build(name, dataclasses.replace(config, init="", init_policy="backbone"), 1)
    if not hasattr(method, "projector"):
        raise UserError(f"{name} has no projector; use {flag} backbone")
    for part in ("backbone", "projector"):  # not what is as long as the source
        weights = {
            key.removeprefix(f"{part}."): value
            for key, value in state["method"].items()
            if key.startswith(f"{part}.")
        }
        checkpoint.load_state(method.get_submodule(part), weights, folder)
    return Embedding(method.backbone, method.get_submodule("projector")).eval(), state["about"]


def describe(name: str) -> tuple[str, Any, Any]:
    """First line of the method's page, its paper defaults, its settings: without importing torch.

    The command line shows each method's flags at once, so it cannot wait for torch. A method file
    keeps its `Config` and `DEFAULTS` free of it; here just those two, and the imports that they can
    need, are executed.
    """
    path = _HERE / f"{_known(name)}.py"
    tree = ast.parse(path.read_text())
    kept = [
        node
        for node in tree.body
        if (isinstance(node, ast.ImportFrom) and node.module in _LIGHT)
        or (isinstance(node, ast.ClassDef) and node.name == "Config")
        or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "DEFAULTS")
    ]
    module = ModuleType(f"firstsight.methods._light_{name}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where inspect looks for the help under each field
    code = compile(
        ast.Module(body=cast("list[ast.stmt]", kept), type_ignores=[]), str(path), "exec"
    )
    exec(code, vars(module))
    summary = (ast.get_docstring(tree) or name).splitlines()[0]
    return summary, module.DEFAULTS, module.Config()


_LIGHT = ("__future__", "dataclasses", "typing", "firstsight.settings", "firstsight.errors")


def _known(name: str) -> str:
    if name not in names():
        raise unknown("method", name, names())
    return name
