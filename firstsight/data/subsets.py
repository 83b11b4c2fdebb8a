"""A random part of a source, as a folder or a list, with a manifest of what was drawn and how."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from firstsight import keyed
from firstsight.data.names import encoded, names_inside
from firstsight.errors import UserError
from firstsight.log import Meter, printable
from firstsight.sources import Source, UnreadableImage, open_source
from firstsight.sources.base import Encoded

How = Literal["link", "copy", "list"]
Rest = Literal["spread", "dropped"]

MANIFEST = "subset.json"


def subset(
    source: str,
    *,
    out: str,
    images: int = 0,
    per_class: int = 0,
    classes: int = 0,
    rest: Rest = "spread",
    how: How = "link",
    seed: int = 0,
) -> dict[str, Any]:
    """Draw a part of a SOURCE, without replacement, and put it into `out`; the manifest.

    `images` alone: so many over all images, whatever their classes (some may be missing).
    `per_class`: so many of each class. `classes` and `images`: so many classes, drawn first, and
    `images` in all of them together, as evenly as possible: those that do not divide go to the
    classes drawn first. differs from the paper: the code of Tobias drops them (`rest="dropped"`).

    `how`: a folder of links or copies, in folders of classes where there are labels, with the
    manifest `subset.json` in it; or a text list, with `LIST.json` beside it. Nothing appears before
    it is whole. The same seed and source give the same part.
    """
    found = open_source(source)
    chosen = np.sort(_drawn(found, images, per_class, classes, rest, seed))
    target = Path(out)
    if target.exists():
        raise UserError(f"{out} is there already; use another --out")
    if how == "list" and target.suffix != ".txt":
        raise UserError(f"--how list writes a text; --out must end in .txt, not {out!r}")
    manifest = {
        "source": source,
        "fingerprint": found.fingerprint(),
        "rule": {"images": images, "per_class": per_class, "classes": classes, "rest": rest},
        "seed": seed,
        "how": how,
        "images": len(chosen),
        "classes": _counts(found, chosen),
        "identities": [printable(found.identity(int(i))) for i in chosen],
    }
    text = json.dumps(manifest, indent=1) + "\n"
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if how == "list":
            part.write_text(_list(found, chosen, target), "utf-8", "surrogateescape")
            target.with_name(f"{target.name}.json").write_text(text)
        else:
            shutil.rmtree(part, ignore_errors=True)  # of a call that was interrupted
            _place(found, chosen, part, how, target)
            (part / MANIFEST).write_text(text)
        os.replace(part, target)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror}); use another --out") from error
    return {"out": out, **manifest}


def _drawn(
    source: Source, images: int, per_class: int, classes: int, rest: Rest, seed: int
) -> NDArray[np.int64]:
    """The positions that the rule draws, in no particular order."""
    rule = (images > 0, per_class > 0, classes > 0)
    if rule not in ((True, False, False), (False, True, False), (True, False, True)):
        raise UserError("give --images N, or --per-class n, or --classes c with --images N")
    if rule == (True, False, False):
        return _some(np.arange(len(source)), images, f"images of {source.spec}", (seed, 0))
    if source.labels is None:
        raise UserError(f"{source.spec} has no labels; without them only --images N can be drawn")
    labels = source.labels
    present = np.unique(labels)
    if per_class:
        wanted = {int(label): per_class for label in present}
    else:
        if images < classes:
            raise UserError(f"--images {images} gives {classes} classes less than one image each")
        drawn = _some(present, classes, f"classes of {source.spec}", (seed, 1))
        left = images % classes if rest == "spread" else 0
        wanted = {int(k): images // classes + (n < left) for n, k in enumerate(drawn)}
    return np.concatenate(
        [
            _some(
                np.flatnonzero(labels == label),
                count,
                f"images of class {source.classes[label]!r}",
                (seed, 2, label),
            )
            for label, count in wanted.items()
        ]
    )


def _some(
    values: NDArray[np.int64], count: int, what: str, key: tuple[int, ...]
) -> NDArray[np.int64]:
    """`count` of the values in random order, a function of the key."""
    if count > len(values):
        raise UserError(f"there are {len(values)} {what}, fewer than the {count} asked for")
    return np.random.default_rng(keyed.seed(*key)).permutation(values)[:count]


def _counts(source: Source, chosen: NDArray[np.int64]) -> dict[str, int]:
    if source.labels is None:
        return {}
    labels, counts = np.unique(source.labels[chosen], return_counts=True)
    return {printable(source.classes[k]): int(n) for k, n in zip(labels, counts, strict=True)}


def _file(source: Source, index: int) -> Path:
    path = source.file_of(index) if isinstance(source, Encoded) else None
    if path is None:
        raise UserError(f"the images of {source.spec} are no files of their own; use --how copy")
    return Path(path).resolve()


def _list(source: Source, chosen: NDArray[np.int64], target: Path) -> str:
    folder = target.parent.resolve()
    lines = []
    for index in chosen.tolist():
        label = "" if source.labels is None else f"\t{source.classes[source.labels[index]]}"
        lines.append(f"{os.path.relpath(_file(source, index), folder)}{label}\n")
    return "".join(lines)


def _place(source: Source, chosen: NDArray[np.int64], part: Path, how: How, target: Path) -> None:
    names = names_inside(source)
    with Meter(f"writing {target}", 0, len(chosen)) as meter:
        for number, index in enumerate(chosen.tolist(), start=1):
            name = names[index]
            if source.labels is not None:
                label = printable(source.classes[source.labels[index]]).replace("/", "_")
                name = name if name.startswith(f"{label}/") else f"{label}/{name}"
            place = part / name
            place.parent.mkdir(parents=True, exist_ok=True)
            if how == "link":
                place.symlink_to(_file(source, index))
                continue
            try:
                place.write_bytes(encoded(source, index))
            except UnreadableImage as error:
                raise UserError(
                    f"cannot read {source.identity(index)} of {source.spec} ({error}); remove it"
                ) from error
            meter.show(number)
