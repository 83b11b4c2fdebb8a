"""A folder of static views: originals and augmented copies, told apart by their manifest."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from firstsight.errors import UserError
from firstsight.sources.files import Files

MANIFEST = "views.json"


class StaticViews(Files):
    """What `firstsight data views` wrote: all files are images of this source.

    Those of one image stand together: its original, then its views. `groups` has their positions,
    one row for each image: `groups[n, 0]` is the original of image n, `groups[n, k]` its view k.

    Raises `UserError` where the manifest is damaged or its writing was not finished.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.spec = self._root = os.fspath(root)
        manifest = read_manifest(os.path.join(self.spec, MANIFEST))
        try:
            if not manifest["complete"]:
                raise UserError(
                    f"the views in {self.spec!r} are not all written; call firstsight data views "
                    "again as before, which goes on where it stopped"
                )
            rows, end, count = manifest["files"], manifest["format"], 1 + manifest["views"]
            self.kind, self.size_of_views = str(manifest["aug"]), int(manifest["size"])
            self._names = [f"{row['name']}-{k}.{end}" for row in rows for k in range(count)]
            self.classes = tuple(manifest["classes"])
            labels = [row["label"] for row in rows for _ in range(count)]
            self.labels = np.array(labels, np.int64) if self.classes else None
            self.groups = np.arange(len(self._names)).reshape(-1, count)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.spec}/{MANIFEST} is damaged ({error!r}); write it anew"
            ) from None

    def __len__(self) -> int:
        return len(self._names)

    def identity(self, index: int) -> str:
        """The path of file `index` relative to the folder."""
        return self._names[index]

    def file_of(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self._root, self._names[index])


def read_manifest(path: str) -> dict[str, Any]:
    """The manifest; raises `UserError` where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path!r} ({error}); write the views anew") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path!r} is no manifest of static views; write the views anew")
    return manifest
