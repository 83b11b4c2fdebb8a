"""The folder of a run: which one it is, that one process alone writes it, what may differ there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from firstsight import distributed
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.plain_yaml import spelt
from firstsight.settings import UNBOUND, Pretrain, flag, merged, plain, read_yaml, write_yaml

T = TypeVar("T")
Differing = dict[str, tuple[Any, Any]]
"""Flag -> (what it was, what it is)."""


def of(name: str, config: Pretrain) -> Path:
    """Where a run without `--out` goes: to its own unfinished folder, or the next free number.

    Its own is the newest of `runs/NAME-NNN` that nobody is writing and whose settings are these.
    """
    found = [re.fullmatch(rf"{name}-(\d+)", path.name) for path in Path("runs").glob(f"{name}-*")]
    taken = sorted((int(match[1]), Path("runs") / match[0]) for match in found if match)
    for _, folder in reversed(taken):
        if _goes_on(folder, config):
            say(f"going on with {folder}; another --out would start anew")
            return folder
    return Path("runs") / f"{name}-{taken[-1][0] + 1 if taken else 1:03d}"


def _goes_on(folder: Path, config: Pretrain) -> bool:
    begun = (folder / "checkpoints" / "last").exists() and not (folder / "summary.json").exists()
    if not begun or not (folder / "config.yaml").exists():
        return False
    try:
        with only_writer(folder):
            _, differing = _compared(config, folder / "config.yaml")
    except UserError:  # written by another process, or by another version
        return False
    return not differing


@contextmanager
def only_writer(out: Path) -> Iterator[None]:
    """Hold the run folder for writing; readers are welcome, a second writer is refused."""
    if distributed.rank() > 0:
        yield
        return
    try:
        import fcntl
    except ImportError:  # no such locks on this platform
        yield
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "w")  # noqa: SIM115  held until the block ends
    except OSError as error:
        raise UserError(f"cannot write into {out} ({error.strerror}); use another --out") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{out} is being written by another process; use another --out"
            ) from None
        yield


def require_shared(file: Path) -> None:
    """Refuse a run folder that is not one and the same on all machines; `file` is in it."""
    for _ in range(30):  # network file systems show what is new after a while
        if not distributed.anyone(not file.exists()):
            return
        time.sleep(1)
    raise UserError(
        f"{file.parent} is not the same folder on all machines; use an --out that they share"
    )


def continued(name: str, config: Pretrain, earlier: Path) -> Pretrain:
    """`config` for going on with an earlier run: the same but for what does not change results.

    `auto` means what was picked then; more epochs extend the run; other differences are refused.
    """
    if (old_name := read_yaml(earlier).get("name", name)) != name:
        raise UserError(f"{earlier.parent} is a run of {old_name}; use another --out for {name}")
    config, differing = _compared(config, earlier)
    was, wanted = differing.get("epochs", (0.0, 0.0))
    if wanted > was:
        differing.pop("epochs")
    if differing:
        raise started_otherwise(earlier.parent, differing)
    return config


def started_otherwise(out: Path, differing: Differing, first: str = "") -> UserError:
    """What differs from the run in `out`, given or not, and what to type to go on with it.

    `first` is the setting that is typed without a flag.
    """

    def typed(value: Any) -> str:
        return shlex.quote(value) if isinstance(value, str) else spelt(value)

    values = [
        (key.upper() if key == first else flag(key), typed(was), typed(new))
        for key, (was, new) in differing.items()
    ]
    told = ", ".join(f"{name} {new} (was {was})" for name, was, new in values)
    again = " ".join(f"{name} {was}" for name, was, _ in values)
    return UserError(f"{out} was started otherwise: {told}; use {again} to go on, or another --out")


def extend(name: str, config: Pretrain, earlier: Path) -> None:
    """Note that the run goes on to more epochs than it was begun with, where that is so."""
    was = distributed.share(float(read_yaml(earlier)["epochs"]))
    if config.epochs > was:
        say(f"extending {earlier.parent} from {was:g} to {config.epochs:g} epochs")
        if distributed.rank() == 0:
            write_yaml(earlier, {"name": name, **plain(config)})
            (earlier.parent / "summary.json").unlink(missing_ok=True)


def _compared(config: Pretrain, earlier: Path) -> tuple[Pretrain, Differing]:
    """`config` with what the earlier run had picked for `auto`, and what then differs.

    The warm-up of a run that is made longer is past, and stays what it was.
    """
    values = read_yaml(earlier)
    values.pop("name", None)
    old = begun_with(config, values, str(earlier))
    config = dataclasses.replace(
        config,
        precision=old.precision if config.precision == "auto" else config.precision,
        layout=old.layout if config.layout == "auto" else config.layout,
        resident=old.resident if config.resident == "auto" else config.resident,
        warmup_epochs=old.warmup_epochs if config.epochs > old.epochs else config.warmup_epochs,
        views=dataclasses.replace(
            config.views,
            merge=dataclasses.replace(config.views.merge, sha256=old.views.merge.sha256),
        ),
    )
    differing = differences(plain(old), plain(config), UNBOUND)
    if "part" not in (old.cache, config.cache):  # the other two differ in speed alone
        differing.pop("cache", None)
    return config, differing


def begun_with(config: T, values: dict[str, Any], where: str) -> T:
    """The settings of an earlier run: `values`, read from `where`."""
    return merged(_as_before(config, values), values, where)


def _as_before(settings: T, values: dict[str, Any]) -> T:
    """`settings` with class defaults where `values` are silent: there was no such setting then."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        inner = getattr(settings, field.name)
        if dataclasses.is_dataclass(inner):
            changes[field.name] = _as_before(inner, values.get(field.name, {}))
        elif field.name not in values and field.default is not dataclasses.MISSING:
            changes[field.name] = field.default
    return dataclasses.replace(settings, **changes)  # type: ignore[type-var]


def differences(
    old: dict[str, Any], new: dict[str, Any], unbound: Sequence[str], prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, those of parts with dots; at the top, `unbound` ones may."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, value in new.items():
        if isinstance(value, dict):
            found |= differences(old[key], value, unbound, f"{prefix}{key}.")
        elif old[key] != value and (prefix or key not in unbound):
            found[prefix + key] = (old[key], value)
    return found
