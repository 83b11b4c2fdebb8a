"""`firstsight localize`: from what was asked to boxes, figures and pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firstsight import checkpoint, distributed, keyed
from firstsight.errors import UserError
from firstsight.geometry import percentile
from firstsight.localize import network, pictures
from firstsight.localize.commands import NAMES, Localize
from firstsight.localize.eyes import POSITIVE, Eye, open_eye
from firstsight.localize.judging import judge, marks
from firstsight.localize.reading import Boxer, Found, find, seen
from firstsight.localize.truth import Truth, truth_of
from firstsight.sources import fetch, open_source
from firstsight.sources.base import Source


def run(checkpoint: str = "random:resnet50", **settings: Any) -> dict[str, Any]:
    """Boxes of objects from activations; where they are marked, scores and controls beside them.

    `settings` are the fields of `commands.Localize` (`data=SOURCE` at least), which say what each
    means. CorLoc is in percent, the mean IoU from 0 to 1, both higher is better; of several
    networks the figures are means, and `fallbacks` counts them all. Raises `UserError` where the
    network cannot be read so, or `boxes` marks none of the images.
    """
    return localized(Localize(checkpoint=checkpoint, **settings))


def localized(ask: Localize) -> dict[str, Any]:
    """What `run` gives, by its settings."""
    began = time.perf_counter()
    rule, level = _threshold(ask)
    where = distributed.start(ask.device, ask.threads)
    if ask.download:
        fetch(ask.data)
    source = open_source(ask.data)
    truth = truth_of(source, ask.boxes)
    index = _index(source, truth, ask)
    names = network.networks(ask.checkpoint, ask.seed, ask.seeds)
    eyes = [open_eye(ask, seed, where, ask.reading, ask.classifier) for _, seed in names]
    for eye in eyes:
        if ask.reading == "pca":
            eye.learn((pixels for pixels, _ in seen(eye, source, index)), len(index))
        eye.blind()
    boxer = Boxer(
        size=eyes[0].reader.size,
        threshold=level,
        connectivity=ask.connectivity,
        published_cam=ask.compat and ask.reading == "cam",
    )
    known = source.labels if eyes[0].classes == len(source.classes) else None
    divide = ask.reading in POSITIVE
    found = find(eyes, source, index, boxer, divide, known)
    result: dict[str, Any] = {"protocol": _protocol(ask, eyes[0], rule, found[0])}
    if ask.reading == "cam":
        result["protocol"]["class"] = "that of the image" if known is not None else "most likely"
    if truth is not None:
        marked = marks(truth, source, found[0], ask.compat)
        result |= judge(found, marked, divide, ask.seed)
        result |= {"images": len(marked.rows), **marked.counts}
    else:
        result["images"] = len(found[0].shapes)
    result |= _counted(found, len(index), divide, result.get("controls"))
    result["notes"] = _notes(result, len(found))
    if distributed.rank() == 0:
        verdict = result["notes"][-1] if "explained" in result else ""
        _keep(ask, eyes[0], source, truth, found[0], known, verdict)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def _threshold(ask: Localize) -> tuple[str, str | float]:
    rule = ask.threshold or ("zero" if ask.reading == "pca" else "mean")
    if rule not in ("mean", "zero"):
        percentile(rule)  # refused before anything is computed
    return rule, 0.0 if rule == "zero" else rule


def _index(source: Source, truth: Truth | None, ask: Localize) -> NDArray[np.int64]:
    """The images that are read: marked ones, where a file marks some; drawn by seed."""
    index = np.arange(len(source)) if truth is None else np.array(sorted(truth.marked), np.int64)
    if not ask.images or ask.images >= len(index):
        return index
    order = np.random.default_rng(keyed.seed(ask.seed, ask.images)).permutation(len(index))
    return np.sort(index[order[: ask.images]])


def _protocol(ask: Localize, eye: Eye, rule: str, found: Found) -> dict[str, Any]:
    size = eye.reader.size
    return {
        "checkpoint": ask.checkpoint,
        "data": ask.data,
        "boxes": ask.boxes or None,
        "reading": ask.reading,
        "threshold": rule,
        "connectivity": ask.connectivity,
        "map": list(found.cells),
        "stages": "all" if eye.stages is None else eye.stages,
        "activation": ask.activation,
        "init": ask.init,
        "last_stride": network.last_stride(ask.checkpoint, ask.last_stride) or "own",
        "bn": ask.bn,
        "padding": ask.padding,
        "compat": ask.compat,
        **eye.reader.protocol,
        "view": f"squeezed to {size} x {size} (antialiased {ask.resample})",
        "seed": ask.seed,
        "seeds": ask.seeds,
    }


def _counted(
    found: Sequence[Found], asked: int, divide: bool, controls: dict[str, Any] | None
) -> dict[str, Any]:
    """Boxes that are the whole image for want of a better one, over all networks; bad files."""
    flags = np.array([one.flags.sum(axis=0) for one in found]).sum(axis=0)
    if controls is not None:
        controls["noise"]["fallbacks"] = sum(one.noise_fallback for one in found)
        if divide:
            controls["noise_divided"]["fallbacks"] = int(flags[2])
    return {
        "fallbacks": int(flags[0]),
        "non_finite": int(flags[1]),
        "unreadable": asked - len(found[0].shapes),
    }


def _notes(result: dict[str, Any], networks: int) -> list[str]:
    """What a reader of the figures has to know, in sentences."""
    notes = []
    if result["fallbacks"]:
        notes.append(
            f"{result['fallbacks']} maps show nothing above the threshold, {result['non_finite']} "
            "of them because they hold NaN or infinity; their box is the whole image"
        )
    left_out = {
        "without_boxes": "images without a box are not scored",
        "degenerate_boxes": "boxes without width or height are left out",
        "outside_boxes": "boxes reach beyond their image and are cut",
        "crowds": "crowds are left out",
        "annotated_elsewhere": "annotated images are not in the source",
        "unreadable": "images cannot be decoded",
    }
    notes += [f"{result[key]} {what}" for key, what in left_out.items() if result.get(key)]
    if "explained" in result:
        notes.append(_verdict(result["explained"]["corloc_0.5"]))
    return notes


def _verdict(explained: dict[str, Any]) -> str:
    name, (low, high) = NAMES[explained["best_control"]], explained["interval"]
    beaten = "it sees more than that" if low > 0 else "nothing shows that it sees more than that"
    share = "" if explained["share"] is None else f", {100 * explained['share']:.0f} % of it"
    if explained["control"] > explained["score"]:
        share = ", more than it"
    return (
        f"CorLoc .5 is {explained['score']:.1f}; the best control ({name}) has "
        f"{explained['control']:.1f}{share}: {beaten} (difference {low:+.1f} to {high:+.1f})"
    )


def _keep(
    ask: Localize,
    eye: Eye,
    source: Source,
    truth: Truth | None,
    found: Found,
    known: NDArray[np.int64] | None,
    verdict: str,
) -> None:
    """Boxes and pictures, where they were asked for; those of a run into its report, judged."""
    folders = [Path(ask.out)] if ask.out else []
    of_run = Path(ask.checkpoint) / "pictures"
    if (Path(ask.checkpoint) / "config.yaml").is_file():
        folders.append(of_run)
    if not folders:
        return
    sheet, caption = pictures.sheet(eye, source, truth, found, known, ask)
    caption += f" Of {len(found.shapes)} images: {verdict}." if verdict else ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make {folder} ({error.strerror}); use another --out") from None
        pictures.save(folder, sheet, caption)
    if ask.out:
        checkpoint.write_json(Path(ask.out) / "boxes.json", _boxes(source, found))


def _boxes(source: Source, found: Found) -> dict[str, Any]:
    """The box of each image in pixels of the upright original; null where nothing was found."""
    listed = {}
    for (i, width, height), flags, boxes in zip(
        found.shapes.tolist(), found.flags, found.boxes, strict=True
    ):
        box = boxes[0] * np.array([width, height, width, height]) / found.size
        listed[source.identity(i)] = None if flags[0] else [round(v, 3) for v in box.tolist()]
    return listed
