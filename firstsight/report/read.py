"""What a report knows of a run: the files in its folder, whether it is finished or not."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from firstsight import methods
from firstsight.errors import UserError
from firstsight.log import read_log
from firstsight.readings import Figure, figures
from firstsight.settings import Pretrain, begun, plain, read_yaml

_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run as its files tell it."""

    path: Path
    label: str
    """The shortest name that sets it apart from the other runs of the report."""
    method: str
    settings: dict[str, Any]
    """Resolved settings under dotted names, as flags spell them without the dashes."""
    defaults: dict[str, Any]
    """What the method trains with unless told otherwise; empty for a method unknown here."""
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    """Empty while the run is not finished."""
    about: dict[str, Any]
    """backbone.json; empty while the run is not finished."""
    readings: dict[str, list[dict[str, Any]]]
    """The readings that were taken of the run's snapshots, by name, each with its `step`."""
    latest: dict[str, dict[str, Any]]
    """The newest reading by name: of the run itself, or of its last snapshot."""
    pictures: dict[str, str]
    """Pictures by name, as data URIs."""
    captions: dict[str, str]
    curves: dict[str, Any]
    """Of a detector, precision over recall; else empty."""
    map: dict[str, Any]
    """What `firstsight diagnose --map` drew of it; empty where it did not."""

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a scalar, where it was logged; null counts as not a number."""
        return [
            (float(r["step"]), math.nan if r[name] is None else float(r[name]))
            for r in self.records
            if name in r and _is_number(r[name])
        ]

    def over(self, name: str, figure: Figure) -> list[tuple[float, float]]:
        """(step, value) of a figure of the reading called `name`, where snapshots have it."""
        found = [(float(one["step"]), figure.of(one)) for one in self.readings.get(name, [])]
        return [(step, value) for step, value in found if value is not None]

    def last(self, name: str) -> float | None:
        """The newest finite value of a scalar."""
        values = [value for _, value in self.curve(name) if math.isfinite(value)]
        return values[-1] if values else None

    @property
    def scalars(self) -> list[str]:
        """Names of all that was logged, in the order in which they first came."""
        return list(dict.fromkeys(k for r in self.records for k, v in r.items() if _is_number(v)))

    @property
    def steps(self) -> int:
        """Steps done."""
        done = self.records[-1]["step"] if self.records else 0
        return int(_number(self.summary.get("steps"), done))

    @property
    def steps_wanted(self) -> int | None:
        """Steps of the whole run, where the log tells how many there are in an epoch."""
        epoch, epochs = self.last("epoch"), self.settings.get("epochs")
        if not epoch or not isinstance(epochs, int | float) or not self.records:
            return None
        return max(1, round(float(self.records[-1]["step"]) / epoch * epochs))

    @property
    def images(self) -> int:
        """Images seen."""
        batch = _number(self.settings.get("batch-size"), 0)
        return int(_number(self.summary.get("images"), self.steps * batch))

    @property
    def rate(self) -> float | None:
        """Images a second over the run; of what was logged so far, while it is not finished."""
        if _is_finite(self.summary.get("images_per_second")):
            return float(self.summary["images_per_second"])
        rates = [v for _, v in self.curve("images_per_second") if math.isfinite(v) and v > 0]
        return len(rates) / sum(1 / rate for rate in rates) if rates else None

    def seconds(self, step: float) -> float | None:
        """When a step was done, from the start of training; at the rate of the whole run."""
        batch = _number(self.settings.get("batch-size"), 0)
        return step * batch / self.rate if self.rate else None

    @property
    def linear(self) -> float | None:
        """The linear classifier after training, percent; None where there was none."""
        found = self.summary.get("linear")
        value = found.get("top1") if isinstance(found, dict) else None
        return float(value) if _is_finite(value) else None

    @property
    def bad_images(self) -> int:
        """Images that could not be decoded."""
        return int(_number(self.summary.get("bad_images"), self.last("bad_images") or 0))

    @property
    def detects(self) -> bool:
        """Whether the run trained a detector."""
        return "detector" in self.settings

    @property
    def figures(self) -> dict[str, Any]:
        """Of a detector, how good it is on the test images; empty before it was judged."""
        test = self.summary.get("test")
        return test if self.detects and isinstance(test, dict) else {}

    @property
    def untrained(self) -> float | None:
        """k-NN before training, percent."""
        value = self._knn.get("untrained", dict(self.curve("knn")).get(0.0))
        return float(value) if _is_finite(value) else None

    @property
    def trained(self) -> float | None:
        """k-NN after training, percent; None while the run is not finished."""
        value = self._knn.get("trained")
        return float(value) if _is_finite(value) else None

    @property
    def protocol(self) -> dict[str, Any]:
        """How k-NN was read: as the summary says, or as the settings ask for."""
        if isinstance(self._knn.get("protocol"), dict):
            return dict(self._knn["protocol"])
        ask = self.settings
        return {
            "k": ask.get("probe-k"),
            "temperature": ask.get("probe-temperature"),
            "train": {"source": ask.get("probe-train") or ask.get("data")},
            "test": {"source": ask.get("probe-test")},
        }

    @property
    def chance(self) -> float | None:
        """Percent that guessing gets, where the protocol says it or the number of classes."""
        if _is_finite(self.protocol.get("chance")):
            return float(self.protocol["chance"])
        classes = self.protocol.get("classes")
        return 100 / classes if isinstance(classes, int) and classes > 0 else None

    @property
    def _knn(self) -> dict[str, Any]:
        knn = self.summary.get("knn")
        return knn if isinstance(knn, dict) else {}


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs in these folders; raises `UserError` where one is no run folder."""
    if not folders:
        raise UserError("a report needs at least one run; give the folder of a run")
    names = [folder.resolve().name for folder in folders]
    unique = len(set(names)) == len(names)
    labels = names if unique else [str(folder) for folder in folders]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is no run folder (there is no config.yaml in it); "
            f"give a folder that `firstsight pretrain` wrote"
        )
    config = read_yaml(folder / "config.yaml")
    method = str(config.pop("name", config.get("detector", "unknown")))
    try:
        records = read_log(folder / "log.jsonl")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {folder / 'log.jsonl'} ({error}); restore it") from None
    records = [r for r in records if isinstance(r, dict) and _is_finite(r.get("step"))]
    over = {path.stem: _results(path) for path in sorted(folder.glob("readings/*.json"))}
    now = {path.stem: _result(path) for path in sorted(folder.glob("readings/last/*.json"))}
    captions = _json(folder / "pictures" / "captions.json")
    return Run(
        path=folder,
        label=label,
        method=method,
        settings=flat(config),
        defaults=_defaults(method, config.get("size")),
        records=records,
        summary=_json(folder / "summary.json"),
        about=_json(folder / "backbone.json"),
        readings=over,
        latest=_newest({name: found[-1] for name, found in over.items() if found}, now),
        pictures=_pictures(folder / "pictures"),
        map=_map(folder / "pictures" / "map.json"),
        captions={name: text for name, text in captions.items() if isinstance(text, str)},
        curves=_json(folder / "curves.json"),
    )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, spelled as flags are."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = prefix + str(key).replace("_", "-")
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def _defaults(method: str, size: Any) -> dict[str, Any]:
    try:
        _, defaults, own = methods.describe(method)
        side = size if isinstance(size, int) and size > 0 else 224
        start = plain(begun(defaults, own, {"size": side}, "report"))
        return flat(
            {**start, "size": Pretrain.size}
        )  # views follow the size; it has its own default
    except UserError:  # a method of another version: nothing to compare with
        return {}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and report again") from None
    return value if isinstance(value, dict) else {}


def _map(path: Path) -> dict[str, Any]:
    found = _json(path)
    if not path.exists() or {"points", "thumbnails", "names", "images", "how"} <= set(found):
        return found
    raise UserError(f"{path} is damaged (no points in it); remove it and report again")


def _results(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it and report again") from None
    if isinstance(found, list) and all(_is_reading(one, path.stem) for one in found):
        return found
    raise UserError(f"{path} is damaged (no list of readings); remove it and report again")


def _is_reading(one: Any, name: str) -> bool:
    if not isinstance(one, dict) or not _is_finite(one.get("step")):
        return False
    return any(figure.of(one) is not None for figure in figures(name))


def _result(path: Path) -> dict[str, Any]:
    found = _json(path)
    if _is_finite(found.get("step")):
        return found
    raise UserError(f"{path} is damaged (no step in it); remove it and report again")


def _newest(*found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each name the result of the highest step, of equal ones the later given."""
    names = dict.fromkeys(name for results in found for name in results)
    return {
        name: max(reversed([r[name] for r in found if name in r]), key=lambda one: one["step"])
        for name in names
    }


def _pictures(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted([*folder.glob("*.png"), *folder.glob("*.jpg")]):
        data = path.read_bytes()
        for magic, kind in _MAGIC.items():
            if data.startswith(magic):
                found[path.stem] = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return found


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_finite(value: Any) -> TypeGuard[float]:
    return value is not None and _is_number(value) and math.isfinite(value)


def _number(value: Any, otherwise: float) -> float:
    if _is_finite(value):
        return float(value)
    return float(otherwise) if _is_finite(otherwise) else 0.0
