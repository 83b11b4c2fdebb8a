"""Settings in YAML files, read without executing anything and written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from firstsight.errors import UserError


class _Once(yaml.SafeLoader):
    """Refuses a key that comes twice: one of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [str(key) for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]} comes twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, which can execute nothing."""
    try:
        values = yaml.load(path.read_text(), Loader=_Once)
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give --config a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not plain YAML: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no settings (expected lines like `epochs: 100`)")
    return values


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write settings in the format that `--config` reads, whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(yaml.safe_dump(values, sort_keys=False))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); use another --out") from None
