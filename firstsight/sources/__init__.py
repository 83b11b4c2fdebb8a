"""Where images come from: `open_source` turns what the user typed into a `Source`.

Nothing heavy is imported here: the command line must answer `--help` at once.
"""

from __future__ import annotations

import os
import re

from firstsight.errors import UserError, unknown
from firstsight.sources.base import Source, UnreadableImage

__all__ = ["Source", "UnreadableImage", "fetch", "open_source"]

_TORCHVISION = ("cifar10:", "cifar100:", "stl10:", "imagenet:")
_SCENES = ("scenes:train", "scenes:test")
_NAMES = (*_SCENES, "scenes:train@N", "cifar10:train", "cifar100:train", "stl10:train")
_UNDERSTOOD = (
    "a folder of images or tars, a .zip, a .tar, a .pack, a list (.txt, .csv, .parquet), "
    "scenes:train, scenes:test, scenes:train@N, cifar10:train, cifar100:train, stl10:train, "
    "imagenet:train@ROOT, hf:NAME:SPLIT"
)


def open_source(spec: str) -> Source:
    """The source that `spec` names: a folder, an archive, a list, `scenes:train`, ...

    `@N` behind a scenes name is the number of images, `@ROOT` behind that of a torchvision set the
    folder of its files (else FIRSTSIGHT_DATA, else `data` in the cache). A folder or an archive
    that exists wins over a name that looks the same. Raises `UserError` where `spec` is nothing of
    this, or what it names cannot be used.
    """
    source = _open(os.fspath(spec))
    source.spec = os.fspath(spec)
    return source


def fetch(*specs: str) -> None:
    """Download what sets of torchvision and the hub lack (by the first of several ranks)."""
    from firstsight import distributed
    from firstsight.sources import hub, named

    if distributed.rank() == 0:
        for spec in specs:
            hub.download(spec)
            named.download(spec)
    distributed.barrier()


def _open(spec: str) -> Source:
    suffix = os.path.splitext(spec)[1].lower()
    if os.path.isdir(spec):
        return _folder(spec)
    if suffix == ".zip":
        from firstsight.sources.zip import Zip

        return Zip(spec)
    if suffix == ".tar" or spec.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")):
        from firstsight.sources.tar import Tar

        return Tar(spec)
    if suffix == ".pack":
        from firstsight.sources.packed import Packed

        return Packed(spec)
    if suffix in (".txt", ".csv", ".parquet"):
        from firstsight.sources.listed import Listed

        return Listed(spec)
    if spec.startswith("hf:") and not os.path.exists(spec):
        from firstsight.sources.hub import Hub

        return Hub(spec)
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
    if spec.startswith(_TORCHVISION) and not os.path.exists(spec):
        from firstsight.sources.named import open_named, parts

        if (named := parts(spec)) is not None:
            return open_named(*named)
    if os.path.exists(spec):
        raise UserError(f"{spec!r} is a file of no known kind; point --data at {_UNDERSTOOD}")
    if re.fullmatch(r"[A-Za-z0-9_-]+:\S*", spec):  # looks like a name, not like a path
        raise unknown("source", spec, (*_NAMES, "imagenet:train@ROOT", "hf:NAME:SPLIT"))
    raise UserError(f"there is no {spec!r}; point --data at {_UNDERSTOOD}")


def _folder(spec: str) -> Source:
    """A folder of tars or of static views, else of images."""
    from firstsight.sources.folder import Folder
    from firstsight.sources.static import MANIFEST, StaticViews
    from firstsight.sources.tar import Tar, tars_in

    if os.path.exists(os.path.join(spec, MANIFEST)):
        return StaticViews(spec)
    try:
        tars = tars_in(spec)
    except OSError:  # said better below
        tars = []
    return Tar(spec) if tars else Folder(spec)
