"""A list of paths, as text, CSV or Parquet, with a label for each or for none."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from firstsight.errors import UserError
from firstsight.sources.files import Files
from firstsight.sources.paths import EXTENSIONS, has_extension

PATHS = ("path", "image", "file", "filename", "file_name", "filepath", "image_path")
"""Columns of paths, the first that is there."""
LABELS = ("label", "class", "target", "category", "labels")
"""Columns of labels, the first that is there."""

_Row = tuple[str, str, str]  # where it stands, path, label or nothing


class Listed(Files):
    """The images that a list names, in its order; paths are relative to the folder of the list.

    Text: a path a line, then perhaps a TAB and a label, or a space and a label where the line does
    not end like an image. CSV: columns by the names in `PATHS` and `LABELS`, or without a header
    the first two. Parquet: columns by the same names. Labels that are all integers become 0 to
    C - 1 in their order; others are names of classes, in the order of the names.

    Raises `UserError` for a list that cannot be read, and for each wrong line: a path that is there
    twice or does not end like an image, a label where others have none.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.spec = os.fspath(path)
        self._folder = os.path.dirname(self.spec)
        rows = _rows(self.spec)
        self._paths, labels = _checked(self.spec, rows)
        if not os.path.exists(self.file_of(0)):
            raise UserError(
                f"there is no {self.file_of(0)!r}, which {self.spec!r} names first; paths are "
                "relative to the folder of the list"
            )
        self.classes, self.labels = numbered(labels) if labels else ((), None)

    def __len__(self) -> int:
        return len(self._paths)

    def identity(self, index: int) -> str:
        """The path of image `index` as the list has it."""
        return self._paths[index]

    def file_of(self, index: int) -> str:
        """The file of image `index`."""
        return os.path.join(self._folder, self._paths[index])


def numbered(labels: Sequence[str]) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of classes and (N,) numbers: in order of integers where all are, else of names."""
    distinct = set(labels)
    try:
        names = sorted(distinct, key=int)
    except ValueError:
        names = sorted(distinct)
    number = {name: label for label, name in enumerate(names)}
    return tuple(names), np.array([number[label] for label in labels], np.int64)


def _checked(spec: str, rows: Iterator[_Row]) -> tuple[list[str], list[str]]:
    """Paths, and labels of all of them or of none."""
    first_place: dict[str, str] = {}
    labels: list[str] = []
    for where, path, label in rows:
        if not has_extension(path):
            raise UserError(
                f"{where}: {path!r} does not end like an image; allowed are {', '.join(EXTENSIONS)}"
            )
        if path in first_place:
            raise UserError(
                f"{where}: {path!r} is there twice, first in {first_place[path]}; allowed is one "
                "line for each image"
            )
        if bool(label) != bool(labels) and first_place:
            has = "a label" if label else "no label"
            raise UserError(
                f"{where}: {path!r} has {has}, unlike the images before it; give all one, or none"
            )
        first_place[path] = where.rpartition(", ")[2]
        if label:
            labels.append(label)
    if not first_place:
        raise UserError(f"{spec!r} names no image; a line is a path, perhaps with TAB and label")
    return list(first_place), labels


def _rows(spec: str) -> Iterator[_Row]:
    suffix = os.path.splitext(spec)[1].lower()
    if suffix == ".parquet":
        return _parquet(spec)
    try:
        # Paths need not be UTF-8. Only \n ends a line here: splitlines would cut odd names.
        with open(spec, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = file.read().split("\n")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {spec!r} ({reason}); make it readable") from error
    return _csv(spec, lines) if suffix == ".csv" else _text(spec, lines)


def _text(spec: str, lines: list[str]) -> Iterator[_Row]:
    for number, line in enumerate(lines, start=1):
        line = line.removesuffix("\r")
        if not line.strip():
            continue
        path, _, label = line.partition("\t")
        if not label and not has_extension(path.rstrip()):
            path, _, label = path.rstrip().rpartition(" ")
        yield f"{spec}, line {number}", path.rstrip(), label.strip()


def _csv(spec: str, lines: list[str]) -> Iterator[_Row]:
    reader = csv.reader(line + "\n" for line in lines)
    path_at, label_at = 0, 1
    try:
        for row in reader:
            if not any(row):
                continue
            if reader.line_num == 1 and not has_extension(row[0].strip()):
                path_at, label_at = _columns(spec, row)
                continue
            # A row without a path is refused by its lack of an extension.
            path = row[path_at].strip() if path_at < len(row) else ""
            label = row[label_at].strip() if 0 <= label_at < len(row) else ""
            yield f"{spec}, line {reader.line_num}", path, label
    except csv.Error as error:
        raise UserError(f"{spec}, line {reader.line_num}: {error}; mend the CSV") from error


def _columns(spec: str, names: Sequence[str]) -> tuple[int, int]:
    """Places of paths and labels among the columns; -1 where there are no labels."""
    known = [name.strip().lower() for name in names]
    places = [known.index(name) for name in PATHS if name in known]
    if not places:
        raise UserError(
            f"{spec!r} has the columns {', '.join(names)}; that of the paths must be called "
            f"{' or '.join(PATHS)}"
        )
    labels = [known.index(name) for name in LABELS if name in known]
    return places[0], labels[0] if labels else -1


def _parquet(spec: str) -> Iterator[_Row]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"reading {spec!r} needs a package; pip install 'firstsight[parquet]', or use a CSV"
        ) from None
    try:
        table = parquet.ParquetFile(spec)
        names = list(table.schema_arrow.names)
        path_at, label_at = _columns(spec, names)
        kind = str(table.schema_arrow.field(path_at).type)
        if kind.startswith(("struct", "binary", "large_binary")):
            folder = os.path.dirname(os.path.abspath(spec))
            raise UserError(
                f"the column {names[path_at]} of {spec!r} holds images, not their paths; use "
                f"hf:{folder}:train, which needs pip install 'firstsight[datasets]'"
            )
        chosen = [names[at] for at in (path_at, label_at) if at >= 0]
        columns = table.read(columns=chosen).to_pydict()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # what pyarrow raises is one of these
        reason = str(error).splitlines()[0]
        raise UserError(f"{spec!r} is not a whole Parquet file ({reason})") from error
    paths = columns[names[path_at]]
    labels = columns[names[label_at]] if label_at >= 0 else [None] * len(paths)
    for number, (path, label) in enumerate(zip(paths, labels, strict=True), start=1):
        yield f"{spec}, row {number}", str(path or ""), "" if label is None else str(label)
