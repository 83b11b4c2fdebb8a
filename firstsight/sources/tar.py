"""Tar files of images, in the layout of WebDataset, read in place by offset."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import uuid
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from firstsight.errors import UserError
from firstsight.sources.base import Encoded, UnreadableImage
from firstsight.sources.files import Opened, stamp
from firstsight.sources.listed import numbered
from firstsight.sources.paths import (
    EXTENSIONS,
    cache_folder,
    class_folders,
    has_extension,
    is_image,
)

_VERSION = 1  # of the cached index
_BLOCK = tarfile.BLOCKSIZE


class _Member(NamedTuple):
    """An image inside a tar."""

    name: str
    offset: int
    size: int
    label: str
    """What KEY.cls or KEY.json says; empty where neither does."""


class Tar(Encoded):
    """The images of a tar file, or of all `.tar` files of a folder; local and uncompressed.

    The order is that of the names of the files, and inside each that of its members. Labels come
    from KEY.cls (its text) or KEY.json (its "label") with the same KEY up to the first dot, where
    every image has one; else from folders inside, where these spell classes (`class_folders`).

    Each file is indexed once. The index is kept in the cache, and made anew when the file has
    another size or time of change.

    Raises `UserError` for a file that is no tar, is compressed, or ends before its end mark.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.spec = os.fspath(path)
        shards = tars_in(self.spec) if os.path.isdir(self.spec) else [self.spec]
        found = [_index(shard) for shard in shards]
        self._files = [Opened(shard) for shard in shards]
        members = [member for part in found for member in part]
        if not members:
            raise UserError(
                f"no images in {self.spec!r} (looked for {', '.join(EXTENSIONS)}); "
                "point --data at tar files that hold some"
            )
        names = [member.name for member in members]
        self._names = names if len(shards) == 1 else _behind(shards, found)
        # Plain numbers instead of tuples: a million of these is what workers are sent.
        places = [(s, m.offset, m.size) for s, part in enumerate(found) for m in part]
        self._places = np.array(places, np.int64)
        labels = [member.label for member in members]
        self.classes, self.labels = numbered(labels) if all(labels) else class_folders(names)

    def __len__(self) -> int:
        return len(self._names)

    def identity(self, index: int) -> str:
        """The path of image `index` inside its tar, behind the name of the tar if of several."""
        return self._names[index]

    def size(self, index: int) -> int:
        """Bytes of the file of image `index`."""
        return int(self._places[index, 2])

    def encoded(self, index: int) -> bytes:
        """The file of image `index`; raises `UnreadableImage`."""
        shard, offset, size = (int(number) for number in self._places[index])
        try:
            data = self._files[shard].read(size, offset)
        except OSError as error:
            raise UnreadableImage(str(error)) from error
        if len(data) != size:
            raise UnreadableImage(f"{self._files[shard].path} is cut short")
        return data


def tars_in(folder: str) -> list[str]:
    """The `.tar` files of a folder, sorted by name; none where images or folders lie beside them.

    A backup beside one's photographs is no source.
    """
    with os.scandir(folder) as entries:
        shown = [entry for entry in entries if not entry.name.startswith(".")]
        if any(has_extension(entry.name) or entry.is_dir() for entry in shown):
            return []
        tars = [e.name for e in shown if e.name.lower().endswith(".tar") and e.is_file()]
    return [os.path.join(folder, name) for name in sorted(tars)]


def _behind(shards: list[str], found: list[list[_Member]]) -> list[str]:
    pairs = zip(shards, found, strict=True)
    return [f"{os.path.basename(shard)}/{m.name}" for shard, part in pairs for m in part]


def _index(path: str) -> list[_Member]:
    """The images of one tar, from the cache where it knows this very file."""
    try:
        current = stamp(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"cannot read {path!r} ({reason}); point --data at a tar or a folder of tars"
        ) from error
    place = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:24]
    file = cache_folder() / "tar" / f"{place}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(file.read_text())
        if (kept["version"], *kept["stamp"]) == (_VERSION, *current):
            return [_Member(*row) for row in kept["members"]]
    members = _scanned(path)
    text = json.dumps({"version": _VERSION, "stamp": current, "members": members})
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, file)
    except OSError:  # not writable, or full: it is indexed again the next time
        with contextlib.suppress(OSError):
            temporary.unlink()
    return members


def _scanned(path: str) -> list[_Member]:
    images: list[tarfile.TarInfo] = []
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:", errors="surrogateescape") as archive:
            for member in archive:
                key, dot, rest = _split(member.name)
                if not member.isfile():
                    continue
                if is_image(member.name):
                    images.append(member)
                elif dot and rest in ("cls", "json"):
                    file = archive.extractfile(member)
                    label = _label(file.read() if file else b"", rest)
                    labels[key] = label or labels.get(key, "")
            ended = _has_end_mark(path, archive.offset)
    except OSError as error:
        raise UserError(f"cannot read {path!r} ({error.strerror or error})") from error
    except tarfile.TarError as error:
        raise UserError(
            f"{path!r} is not a whole, uncompressed tar file ({error}); copy or unpack it again"
        ) from error
    if not ended:
        raise UserError(f"{path!r} is cut short: a tar file ends with zeros; copy it again")
    _refuse_twice(path, images)
    return [
        _Member(image.name, image.offset_data, image.size, labels.get(_split(image.name)[0], ""))
        for image in _of_their_keys(images)
    ]


def _split(name: str) -> tuple[str, str, str]:
    """KEY, dot and extension: the name of the file is cut at its first dot."""
    folder, slash, file = name.rpartition("/")
    key, dot, rest = file.partition(".")
    return folder + slash + key, dot, rest


def _of_their_keys(images: list[tarfile.TarInfo]) -> Iterable[tarfile.TarInfo]:
    """Without KEY.seg.png and its like where KEY.jpg is there: these belong to that image."""
    plain = {key for key, _, rest in (_split(i.name) for i in images) if "." not in rest}
    for image in images:
        key, _, rest = _split(image.name)
        if "." not in rest or key not in plain:
            yield image


def _label(data: bytes, kind: str) -> str:
    text = data.decode("utf-8", "replace").strip()
    if kind == "cls":
        return text
    try:
        value: Any = json.loads(text)
    except ValueError:
        return ""
    label = value.get("label", "") if isinstance(value, dict) else value
    return str(label) if isinstance(label, str | int) else ""


def _has_end_mark(path: str, offset: int) -> bool:
    """Whether a block of zeros stands where the last member ends.

    tarfile takes a damaged header, and the end of the file, for the end of the archive too.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _refuse_twice(path: str, images: list[tarfile.TarInfo]) -> None:
    seen: set[str] = set()
    for image in images:
        if image.name in seen:
            raise UserError(
                f"{path!r} holds {image.name!r} twice; allowed is one image of a name, so write "
                "the file again"
            )
        seen.add(image.name)
