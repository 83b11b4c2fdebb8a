"""Files of weights, whoever wrote them, read without executing anything of theirs.

A pickle names functions and has them called. Here it may name those that hold weights and plain
settings together, and nothing else: a file that asks for more is refused with the name.
"""

from __future__ import annotations

import argparse
import codecs
import collections
import pathlib
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from firstsight.errors import UserError

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"
"""Behind its two first bytes, a file of torch before 1.6 begins with this number."""


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU: of torch (its old format too), pickled arrays."""
    try:
        with open(path, "rb") as file:
            start = file.read(2 + len(_MAGIC))
        plain = start[:1] == b"\x80" and start[2:] != _MAGIC
        state = _unpickled(path) if plain else _loaded(path)
    except Exception as error:  # a damaged file raises whatever the parser stumbles over
        asked = re.search(r"GLOBAL ([\w.<>]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and asked:
            raise UserError(
                f"{path} is not a readable checkpoint: it asks for {asked[1]}, which weights do not"
                " need; nothing of it was run; save its state_dict alone where it comes from"
            ) from error
        reason = "no file of torch, or a damaged one"
        if not isinstance(error, pickle.UnpicklingError):
            reason = first_line(error)
        raise UserError(f"{path} is not a readable checkpoint ({reason})") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(state).__name__}")
    return state


def first_line(error: Exception) -> str:
    """An error in a few words."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do, whatever its name."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors of a safetensors file, and its text."""
    try:
        with safe_open(path, "pt") as file:
            text = file.metadata() or {}
        return load_file(path), text
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} is not a readable safetensors file ({first_line(error)})"
        ) from error


def _loaded(path: Path) -> Any:
    with torch.serialization.safe_globals(_allowed()):
        return torch.load(path, map_location="cpu", weights_only=True)


def _allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What checkpoints of torch may ask for beyond tensors: plain settings, numbers, paths.

    Paths become paths without a file system: one of Windows can be read elsewhere.
    """
    numbers = [np.dtype(kind) for kind in "?bhilqBHILQefdSU"]
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        argparse.Namespace,
        *{type(number) for number in numbers},
        *((thing, name) for name, thing in _ARRAYS.items()),
    ]
    for module in ("pathlib", "pathlib._local"):
        for pure in (pathlib.PurePosixPath, pathlib.PureWindowsPath):
            found.append((pure, f"{module}.{pure.__name__}"))
            found.append((pure, f"{module}.{pure.__name__.removeprefix('Pure')}"))
    return found


def _rebuilders(name: str) -> dict[str, Callable[..., Any]]:
    # of numpy 2 and of numpy 1: the same functions
    found = {
        "_reconstruct": np.ndarray([0]).__reduce__()[0],
        "scalar": np.float32(0).__reduce__()[0],
    }
    return {f"{name}.{key}": found[key] for key in found}


_ARRAYS: dict[str, Callable[..., Any]] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    **_rebuilders("numpy.core.multiarray"),
    **_rebuilders("numpy._core.multiarray"),
}


class _Arrays(pickle.Unpickler):
    """Dicts of arrays, as detectron2 keeps them; any other name is refused before it is looked
    up."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            **_ARRAYS,
            "collections.OrderedDict": collections.OrderedDict,
            "_codecs.encode": codecs.encode,
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[f"{module}.{name}"]


def _unpickled(path: Path) -> Any:
    with open(path, "rb") as file:
        return _Arrays(file, encoding="latin1").load()
