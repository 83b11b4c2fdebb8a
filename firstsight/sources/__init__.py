"""Where images come from: `open_source` turns what the user typed into a `Source`.

Nothing heavy is imported here: the command line must answer `--help` at once.
"""

from __future__ import annotations

import os
import re

from firstsight.errors import UserError, unknown
from firstsight.sources.base import Source, UnreadableImage

__all__ = ["Source", "UnreadableImage", "open_source"]

_SCENES = ("scenes:train", "scenes:test")
_UNDERSTOOD = "a folder of images, a .zip archive, scenes:train, scenes:test, scenes:train@N"


def open_source(spec: str) -> Source:
    """The source that `spec` names: a folder, a `.zip`, `scenes:train` or `scenes:test`.

    `@N` behind a scenes name is the number of images. A folder or an archive that exists wins over
    a name that looks the same. Raises `UserError` where `spec` is nothing of this, or what it names
    cannot be used.
    """
    source = _open(os.fspath(spec))
    source.spec = os.fspath(spec)
    return source


def _open(spec: str) -> Source:
    if os.path.isdir(spec):
        from firstsight.sources.folder import Folder

        return Folder(spec)
    if spec.lower().endswith(".zip"):
        from firstsight.sources.zip import Zip

        return Zip(spec)
    if spec.startswith("scenes"):
        from firstsight.sources.scenes import Scenes

        name, at, number = spec.partition("@")
        if name not in _SCENES:
            raise unknown("source", name, _SCENES)
        if not at:
            return Scenes(name.partition(":")[2])
        if not re.fullmatch(r"[0-9]{1,7}", number) or int(number) == 0:
            raise UserError(
                f"{number!r} is not a number of scenes; allowed are 1 to 9999999, as in "
                f"--data {name}@500"
            )
        return Scenes(name.partition(":")[2], int(number))
    if os.path.exists(spec):
        raise UserError(f"{spec!r} is a file of no known kind; point --data at {_UNDERSTOOD}")
    if re.fullmatch(r"[A-Za-z0-9_-]+:\S*", spec):  # looks like a name, not like a path
        raise unknown("source", spec, (*_SCENES, "scenes:train@N"))
    raise UserError(f"there is no {spec!r}; point --data at {_UNDERSTOOD}")
