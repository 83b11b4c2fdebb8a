"""`firstsight data WORK ...`: options of each work, and its result as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from firstsight import settings
from firstsight.cli.flags import parsed, taken
from firstsight.cli.shown import table, write_json
from firstsight.errors import UserError, unknown
from firstsight.log import printable


def data(args: list[str]) -> None:
    """Lay images out and look at them: firstsight data zip|pack|views|info|..."""
    if not args or args[0] in ("-h", "--help"):
        lines = [
            f"  {name:<18} {(kind.__doc__ or '').strip()}" for name, (kind, _) in WORKS.items()
        ]
        print("usage: firstsight data WORK ... [--json FILE]\n\nworks:\n" + "\n".join(lines))
        return
    if args[0] not in WORKS:
        raise unknown("work on data", args[0], WORKS)
    target, rest = taken(args[1:], "--json")
    kind, work = WORKS[args[0]]
    work(parsed(kind, rest, f"data {args[0]}"), target)


@dataclass(frozen=True, kw_only=True)
class Zip:
    """Write a SOURCE into a zip archive, uncompressed, with a map of its labels beside it."""

    source: tyro.conf.Positional[str]
    """SOURCE of the images: a folder, a list, ..."""
    out: str
    """The archive, X.zip; X_map.txt and classes.txt go beside it."""


def zip_up(asked: Zip, target: str | None) -> None:
    """Write an archive and say what is in it."""
    from firstsight import data

    result = data.zip_up(asked.source, out=asked.out)
    rows = [["images", f"{result['images']}"], ["left out", f"{len(result['skipped'])}"]]
    rows += [["MiB", f"{result['bytes'] / 2**20:.1f}"], ["map", result["map"] or "no labels"]]
    table(asked.out, ["", ""], rows)
    write_json(target, result)


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Check a zip archive and its map, line by line; exit code 2 where something is wrong."""

    archive: tyro.conf.Positional[str]
    """The archive, X.zip, with X_map.txt beside it where there are labels."""
    decode: bool = False
    """Decode every image too."""
    workers: int = 0
    """Threads that decode; 0: one for each core."""


def verify(asked: Verify, target: str | None) -> None:
    """Check an archive; each problem is a line."""
    from firstsight import data

    result = data.verify(asked.archive, decode=asked.decode, workers=asked.workers)
    for line in [*result["problems"][:MOST], *result["notes"][:MOST]]:
        print(printable(line))
    counts = [[key, f"{result[key]}"] for key in ("images", "labels")]
    counts += [[key, f"{len(result[key])}"] for key in ("problems", "notes")]
    table(asked.archive, ["", ""], counts)
    write_json(target, result)
    if problems := len(result["problems"]):
        raise UserError(
            f"{asked.archive} has {problems} problems in {result['images']} images; mend it, or "
            "make it anew with firstsight data zip"
        )


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Decode a SOURCE once, into one file of small pictures; goes on where it stopped."""

    source: tyro.conf.Positional[str]
    """SOURCE of the images."""
    out: str
    """The packed file, X.pack; it is a SOURCE itself."""
    side: int = 512
    """Longest side, pixels; larger images are made smaller; crops are as of the original."""
    format: Literal["raw", "jpeg"] = "raw"
    """Pixels, nothing left to decode; or JPEG of quality 95, about a tenth of the size."""
    workers: int = 0
    """Threads; 0: one for each core."""


def pack(asked: Pack, target: str | None) -> None:
    """Pack a source, and say what is in the file."""
    from firstsight import data

    options = settings.shallow(asked)
    result = data.pack(options.pop("source"), **options)
    rows = [["images", f"{result['images']}"], ["left out", f"{len(result['skipped'])}"]]
    rows += [["were there already", f"{result['resumed']}"]]
    rows += [["MiB", f"{result['bytes'] / 2**20:.1f}"]]
    table(asked.out, ["", ""], rows)
    write_json(target, result)


@dataclass(frozen=True, kw_only=True)
class Subset:
    """Draw a random part of a SOURCE, with a manifest of what was drawn."""

    source: tyro.conf.Positional[str]
    """SOURCE to draw from."""
    out: str
    """Folder to make, or text list with --how list."""
    images: int = 0
    """Images in all."""
    per_class: int = 0
    """Images of each class."""
    classes: int = 0
    """Classes to draw first; --images is their number of images in all."""
    rest: Literal["spread", "dropped"] = "spread"
    """Where --images does not divide by --classes: one more for some, or (as published) fewer."""
    how: Literal["link", "copy", "list"] = "link"
    """What is made: a folder of links or of copies, or a list of paths."""
    seed: int = 0
    """Decides what is drawn."""


def subset(asked: Subset, target: str | None) -> None:
    """Draw a part, and say how much of what."""
    from firstsight import data

    options = settings.shallow(asked)
    result = data.subset(options.pop("source"), **options)
    counts = result["classes"].values()
    rows = [["images", f"{result['images']}"], ["classes", f"{len(counts) or 'no labels'}"]]
    if counts:
        rows.append(["images of a class", f"{min(counts)} to {max(counts)}"])
    table(f"{asked.out}, by {asked.how}, seed {asked.seed}", ["", ""], rows)
    write_json(target, result)


@dataclass(frozen=True, kw_only=True)
class StaticViews:
    """Write originals and augmented copies of the images of a SOURCE; goes on where it stopped."""

    source: tyro.conf.Positional[str]
    """SOURCE of the images."""
    out: str
    """Folder for the files and their manifest; it is a SOURCE itself."""
    aug: Literal["moco", "nointer", "super-hard", "hard", "easy"] = "moco"
    """moco: two views; nointer: of different corners; the others: of crops that overlap little to
    much, and copies of these with the overlap or a random place of its size painted over."""
    images_per_class: int = 50
    """Images of each class, the first by name (of all images where there are no labels); 0: all."""
    size: int = 224
    """Side of the views, pixels."""
    iou: Literal["exact", "published"] = "exact"
    """How overlap is measured: of half-open boxes, or with its sides longer by one."""
    format: Literal["png", "jpeg"] = "png"
    """Files without loss, or (as published) JPEG of quality 75."""
    seed: int = 0
    """Decides everything that is random."""
    workers: int = 0
    """Threads; 0: one for each core."""


def views(asked: StaticViews, target: str | None) -> None:
    """Write static views, and say how many."""
    from firstsight import data

    options = settings.shallow(asked)
    result = data.views(options.pop("source"), **options)
    keys = ("images", "views", "written", "left_out", "missed")
    table(f"{asked.out}, {asked.aug}", ["", ""], [[key, f"{result[key]}"] for key in keys])
    write_json(target, result)


@dataclass(frozen=True, kw_only=True)
class Info:
    """Look at every image of a SOURCE: sizes, labels, faults, duplicates, settings that suit."""

    source: tyro.conf.Positional[str]
    """SOURCE to look at."""
    workers: int = 0
    """Threads; 0: one for each core."""


def info(asked: Info, target: str | None) -> None:
    """Look at a source, and tell what is there."""
    from firstsight import data

    result = data.info(asked.source, workers=asked.workers)
    labels = result["labels"].values()
    rows = [["images", f"{result['images']}"], ["MiB", f"{result['bytes'] / 2**20:.1f}"]]
    for side in ("width", "height"):
        spread = [f"{result[side][key]}" for key in ("min", "median", "max") if result[side]]
        rows.append([f"{side}, smallest, median, largest", " ".join(spread)])
    rows.append(["modes", ", ".join(f"{k} {n}" for k, n in result["modes"].items())])
    per_class = f", {min(labels)} to {max(labels)} images each" if labels else ""
    rows.append(["classes", f"{len(labels)}{per_class}"])
    rows.append(["decoded each second", f"{result['decoded_per_second']}"])
    for key in ("unreadable", "exact_duplicates", "near_duplicates"):
        rows.append([key.replace("_", " "), f"{len(result[key])}"])
    rows.append(["suits it", " ".join(f"{k} {v}" for k, v in result["recommended"].items())])
    table(asked.source, ["", ""], rows)
    for one in result["unreadable"][:MOST]:
        print(f"cannot be read: {one['image']} ({printable(one['reason'])})")
    for kind in ("exact", "near"):
        for group in result[f"{kind}_duplicates"][:MOST]:
            print(f"{kind} duplicates: {', '.join(group)}")
    write_json(target, result)


MOST = 100
"""Messages of a kind that are printed; `--json` has all."""


@dataclass(frozen=True, kw_only=True)
class SortImagenetVal:
    """Sort ILSVRC's validation images into folders of their classes; goes on where it stopped."""

    images: tyro.conf.Positional[str]
    """Folder of ILSVRC2012_val_*.JPEG."""
    truth: str
    """CSV of image and class, or the development kit's text of class numbers."""
    out: str
    """Folder for the folders of classes; ROOT/val makes imagenet:val@ROOT a source."""
    classes: str = ""
    """For a truth of numbers: a text whose line k begins with the name of class k."""
    by: Literal["link", "copy", "move"] = "link"
    """What is put there: links to the images, copies, or the images themselves."""


def sort_imagenet_val(asked: SortImagenetVal, target: str | None) -> None:
    """Sort images, and say how many."""
    from firstsight import data

    options = settings.shallow(asked)
    result = data.sort_imagenet_val(options.pop("images"), **options)
    rows = [[key, str(result[key])] for key in ("images", "classes", "placed")]
    table(f"{result['out']}, by {result['by']}", ["", ""], rows)
    write_json(target, result)


WORKS: dict[str, tuple[type[Any], Callable[[Any, str | None], None]]] = {
    "zip": (Zip, zip_up),
    "verify": (Verify, verify),
    "subset": (Subset, subset),
    "pack": (Pack, pack),
    "views": (StaticViews, views),
    "info": (Info, info),
    "sort-imagenet-val": (SortImagenetVal, sort_imagenet_val),
}
