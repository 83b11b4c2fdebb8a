"""`firstsight convert`: what was found in a file, what became of it, and where it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from firstsight import checkpoint
from firstsight.checkpoint.networks import Fit
from firstsight.convert.writers import TARGETS
from firstsight.errors import UserError, unknown
from firstsight.views import IMAGENET_MEAN, IMAGENET_STD


def run(
    src: str,
    dst: str,
    *,
    to: str,
    from_: str | None = None,
    half: str | None = None,
    allow_partial: bool = False,
) -> dict[str, Any]:
    """Write the backbone of the CHECKPOINT `src` to `dst` for the library `to`; its coverage.

    `from_` insists on a foreign format and `half` on one of its networks, as `read` has them; a
    backbone that is not all there is refused unless `allow_partial`.
    """
    fit = read(src, from_=from_, half=half)
    return write(fit, src, dst, to=to, allow_partial=allow_partial)


def read(src: str, *, from_: str | None = None, half: str | None = None) -> Fit:
    """What a CHECKPOINT holds, recognised by its content."""
    return checkpoint.fit_backbone(src, from_, half)


def report(fit: Fit) -> dict[str, Any]:
    """Coverage: which tensors of the backbone were in the file, and what else was."""
    return {
        "format": fit.format,
        "half": fit.half,
        "backbone": fit.backbone.name,
        "matched": len(fit.matched),
        "total": fit.total,
        "dropped": [*fit.dropped, *fit.head, *fit.unknown],
        "missing": list(fit.missing),
        "unlike": list(fit.unlike),
        "filled": list(fit.filled),
        "notes": list(fit.notes),
    }


def write(fit: Fit, src: str, dst: str, *, to: str, allow_partial: bool = False) -> dict[str, Any]:
    """Write a backbone to `dst`, a file or a folder, and a JSON of its name that tells of it.

    Raises UserError where tensors are missing (unless `allow_partial`) and where the library has no
    network that would give the same features.
    """
    beside = sidecar(dst, to)
    if fit.gap and not allow_partial:
        raise UserError(
            f"{src} ({fit.format}) does not fill {fit.backbone.name}: {fit.gap}; --allow-partial"
            " leaves them untrained"
        )
    path = _file(Path(dst), TARGETS[to].suffix)
    if path.exists() and Path(src).exists() and path.samefile(src):
        raise UserError(f"{dst} is what is read; give another DST")
    path.parent.mkdir(parents=True, exist_ok=True)
    about = _about(fit, to)
    done = TARGETS[to].write(path, fit, about)
    files = [*done.files, beside]
    about |= {"file": path.name, "load": list(done.lines), "notes": [*fit.notes, *done.notes]}
    checkpoint.write_json(files[-1], about)
    coverage = report(fit)
    dropped = [key for key in coverage["dropped"] if key not in fit.head or not done.with_head]
    more = {"to": to, "files": [str(file) for file in files]}
    return {**coverage, "dropped": dropped, "notes": about["notes"], **more}


def sidecar(dst: str, to: str) -> Path:
    """The JSON that `write` puts beside what it writes."""
    if to not in TARGETS:
        raise unknown("target", to, TARGETS)
    return _beside(_file(Path(dst), TARGETS[to].suffix), TARGETS[to].suffix)


def _file(dst: Path, suffix: str) -> Path:
    """The file to write; in a folder it is called backbone."""
    if not suffix:
        return dst
    return dst / f"backbone{suffix}" if dst.is_dir() or not dst.suffix else dst


def _beside(path: Path, suffix: str) -> Path:
    """What the file is: `backbone.json` in a folder, else the name of the file with `.json`."""
    return path.with_suffix(".json") if suffix else path / "backbone.json"


def _about(fit: Fit, to: str) -> dict[str, Any]:
    known = fit.about
    return checkpoint.about_backbone(
        fit.backbone,
        int(known.get("size", 224)),
        known.get("mean", IMAGENET_MEAN),
        known.get("std", IMAGENET_STD),
        **{key: known[key] for key in ("method", "images", "steps") if key in known},
        format=fit.format,
        half=fit.half,
        to=to,
        matched=len(fit.matched),
        total=fit.total,
        licence=fit.licence or "that of its weights and of the images they were learnt from",
    )
