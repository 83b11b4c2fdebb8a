"""Checkpoints of ours: written whole or not at all, read without executing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize

from firstsight import backbones
from firstsight.backbones import Backbone
from firstsight.checkpoint.foreign import taken
from firstsight.checkpoint.networks import Fit, fitted, inner, whole
from firstsight.checkpoint.reading import first_line as _first_line
from firstsight.checkpoint.reading import is_safetensors, read, read_safetensors
from firstsight.checkpoint.writing import (
    Writer,
    newest,
    on_host,
    refuse_damaged,
    save,
    write_atomically,
    write_json,
)
from firstsight.errors import UserError

__all__ = [
    "Writer",
    "about_backbone",
    "filled",
    "fit_backbone",
    "is_safetensors",
    "load_backbone",
    "load_state",
    "newest",
    "on_host",
    "read",
    "refuse_damaged",
    "refuse_unlike",
    "save",
    "save_backbone",
    "start_backbone",
    "start_method",
    "write_atomically",
    "write_json",
]


def refuse_unlike(module: torch.nn.Module, state: dict[str, Any], path: Path | str) -> None:
    """Refuse the state of another architecture than that of `module`, saying what differs."""
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    extra = [name for name in state if name not in own]
    unlike = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or extra or unlike:
        first = (
            f"{unlike[0]} is {list(state[unlike[0]].shape)} there"
            f" and {list(own[unlike[0]].shape)} here"
            if unlike
            else f"{(missing or extra)[0]} is {'missing there' if missing else 'unknown here'}"
        )
        raise UserError(f"{path} is of another architecture: {first}; check --backbone and --stem")


def load_state(module: torch.nn.Module, state: dict[str, Any], path: Path | str) -> None:
    """Load all of a state into `module`; another architecture is refused, saying what differs."""
    refuse_unlike(module, state, path)
    module.load_state_dict(state)


def save_backbone(path: Path, backbone: Backbone, about: dict[str, Any]) -> None:
    """Write the backbone's weights as safetensors; `about` (what it is) goes in as text."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in _weights(backbone).items()
    }
    whole = serialize(weights, {"format": "pt", "firstsight": json.dumps(about)})
    write_atomically(path, lambda file: file.write(whole))


def _weights(backbone: Backbone) -> dict[str, torch.Tensor]:
    return inner(backbone).state_dict()


def about_backbone(
    backbone: Backbone, size: int, mean: Any, std: Any, **more: Any
) -> dict[str, Any]:
    """What `backbone.json` says: all that is needed to build the network and feed it."""
    return {
        "backbone": backbone.name,
        "stem": backbone.stem,
        "width": backbone.width,
        "stride": backbone.stride,
        "size": size,
        "mean": list(mean),
        "std": list(std),
        "pixels": "RGB, values in 0 to 1, minus mean, over std",
        "load": "firstsight.load_backbone(FOLDER), or safetensors.torch.load_file",
        **more,
    }


def load_backbone(spec: str) -> tuple[Backbone, dict[str, Any]]:
    """A backbone on the CPU in evaluation mode, and what is known about it, from a CHECKPOINT.

    CHECKPOINT: a run folder, a checkpoint or `.safetensors` file of ours, a file (or a folder of
    transformers) of a known foreign format, `random:resnet50` (untrained, seed 0),
    `torchvision:resnet50` or `timm:NAME` (published weights). Of a foreign file all tensors of the
    backbone must be there.
    """
    return filled(fit_backbone(spec), spec)


def filled(fit: Fit, spec: str) -> tuple[Backbone, dict[str, Any]]:
    """The backbone of a fit and what is known about it; refused where tensors of it are missing."""
    if fit.gap:
        raise UserError(
            f"{spec} ({fit.format}) does not fill {fit.backbone.name}: {fit.gap}; firstsight"
            " convert --allow-partial takes what is there"
        )
    return fit.backbone, fit.about


def fit_backbone(spec: str, source: str | None = None, half: str | None = None) -> Fit:
    """The backbone of a CHECKPOINT as far as it fits, and what became of each of its tensors.

    Of a foreign file `source` insists on the format, `half` on one of its networks (query or
    momentum, student or teacher, ...).
    """
    kind, _, name = spec.partition(":")
    path = Path(spec)
    if kind == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            about = {"backbone": name, "untrained": True}
            return whole("firstsight", backbones.build(name), about)
    if kind in ("torchvision", "timm") and name:
        return whole(kind, _published(kind, name), {"backbone": spec})
    if path.is_dir() and not _in_folder(path).exists():
        return _only(whole("firstsight", *_from_run(path)), spec, source, half)
    state, text = _opened(path)
    if "firstsight" in text:
        ours = _from_weights(state, text["firstsight"], path)
        return _only(whole("firstsight", *ours), spec, source, half)
    if "about" in state and ("method" in state or "detector" in state):
        refuse_damaged(path)
        return _only(whole("firstsight", *_from_parts(state, spec)), spec, source, half)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is missing is untrained, always the same
        return fitted(taken(state, spec, source, half), spec)


def _only(fit: Fit, spec: str, source: str | None, half: str | None) -> Fit:
    """`fit`, unless something else is asked of what we wrote ourselves."""
    if source is not None or half is not None:
        raise UserError(f"{spec} is ours and holds one backbone: leave out --from and --half")
    return fit


def _in_folder(path: Path) -> Path:
    return path / "model.safetensors"


def _opened(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What is in a file, or in a folder of transformers, and its text."""
    if not path.exists():
        raise UserError(
            f"no checkpoint {path}; "
            "give a run folder, a file, random:NAME, torchvision:NAME or timm:NAME"
        )
    path = _in_folder(path) if path.is_dir() else path
    return read_safetensors(path) if is_safetensors(path) else (read(path), {})


def start_backbone(backbone: Backbone, spec: str) -> None:
    """Give `backbone` the weights of a CHECKPOINT, which must be of the same architecture."""
    weights = _weights(load_backbone(spec)[0])
    load_state(inner(backbone), weights, spec)


def start_method(method: torch.nn.Module, name: str, spec: str) -> None:
    """Give all networks and queues of a method those of a run of the same method."""
    path = Path(spec)
    state = newest(path / "checkpoints")[0] if path.is_dir() else None
    if path.is_file() and path.suffix != ".safetensors":
        state = read(path)
    if state is None or state.get("name") != name:
        what = f"a run of {state['name']}" if state and "name" in state else "no run of ours"
        raise UserError(
            f"{spec} is {what}: --init-policy all takes a run of {name}; use --init-policy backbone"
        )
    load_state(method, state["method"], spec)


def _published(kind: str, name: str) -> Backbone:
    try:
        if kind == "timm":
            fetch = f"timm; timm.create_model({name!r}, pretrained=True)"
            backbone = backbones.build(f"timm:{name}")
            load_state(backbone.get_submodule("network"), _of_timm(name), f"timm:{name}")
        else:
            import torchvision

            fetch = f"torchvision; torchvision.models.get_model({name!r}, weights='DEFAULT')"
            backbone = backbones.build(name)
            published = torchvision.models.get_model_weights(name).DEFAULT
            file = _require_fetched(published.url)
            weights = torch.load(file, map_location="cpu", weights_only=True)
            weights = {key: value for key, value in weights.items() if not key.startswith("fc.")}
            load_state(backbone, weights, f"torchvision:{name}")
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the weights of {kind}:{name} are not at hand ({_first_line(error)}); fetch them once "
            f'with: python -c "import {fetch}"'
        ) from error
    return backbone


def _of_timm(name: str) -> dict[str, torch.Tensor]:
    """timm's published weights, where they are in a cache: nothing is downloaded unasked."""
    import timm
    from huggingface_hub import constants

    said = timm.get_pretrained_cfg(name)
    if said is not None and said.url and not said.hf_hub_id:
        _require_fetched(str(said.url))
    # the variable HF_HUB_OFFLINE is read when that package is imported, which timm has done
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        weights: dict[str, torch.Tensor]
        weights = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        return weights
    finally:
        constants.HF_HUB_OFFLINE = before


def _require_fetched(url: str) -> Path:
    """Where torch keeps what it once downloaded from there."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    if not file.exists():
        raise OSError(f"{file} does not exist")
    return file


def _from_run(folder: Path) -> tuple[Backbone, dict[str, Any]]:
    state, damaged = newest(folder / "checkpoints")
    if state is not None:
        return _from_parts(state, f"{folder}/checkpoints/last")
    path = folder / "backbone.safetensors"
    if path.exists():
        weights, text = read_safetensors(path)
        return _from_weights(weights, text["firstsight"], path)
    raise UserError(damaged[0] if damaged else f"{folder} holds no checkpoint; is it a run folder?")


def _from_parts(state: dict[str, Any], where: str) -> tuple[Backbone, dict[str, Any]]:
    if "method" not in state:
        raise UserError(f"{where} is of a detector; give the CHECKPOINT that it was trained from")
    about = state["about"]
    backbone = backbones.build(about["backbone"], about["stem"], about["size"])
    prefix = "backbone."
    weights = {
        k.removeprefix(prefix): v for k, v in state["method"].items() if k.startswith(prefix)
    }
    load_state(backbone, weights, where)
    return backbone.eval(), dict(about)


def _from_weights(
    weights: dict[str, torch.Tensor], text: str, path: Path
) -> tuple[Backbone, dict[str, Any]]:
    about = json.loads(text)
    backbone = backbones.build(about["backbone"], about["stem"], about["size"])
    load_state(inner(backbone), weights, path)
    return backbone.eval(), about
