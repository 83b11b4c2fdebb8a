"""Readings that a run keeps: of each backbone on its way, and of the one it has now."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from firstsight import checkpoint, distributed
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.readings import of_run


def over_snapshots(
    run: str, name: str, read: Callable[[str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `read` says of every snapshot of a run, in the order of their steps.

    Each is the reading's own result as `readings.of_run` completes it. They are kept in
    RUN/readings/NAME.json, of which the report draws what `readings.FIGURES` names. A snapshot is a
    CHECKPOINT: `read` gets its path. Raises `UserError` where there is none.
    """
    found = sorted((Path(run) / "snapshots").glob("step-*.safetensors"))
    if not found:
        raise UserError(f"{run} holds no snapshots; give the folder of a run, or leave --snapshots")
    results = [of_run(read(str(path)), _step(path)) for path in found]
    if distributed.rank() == 0:
        folder = Path(run) / "readings"
        folder.mkdir(exist_ok=True)
        checkpoint.write_json(folder / f"{name}.json", results)
    return results


def kept(spec: str, name: str, read: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `read` says of a CHECKPOINT; of a run folder it stays there, for the run's report.

    In RUN/readings/last/NAME.json, with the step of the newest checkpoint. A folder that cannot be
    written to costs that file alone.
    """
    newest = Path(spec) / "checkpoints" / "last"
    step = _step(newest.resolve()) if newest.exists() else None
    result = read(spec)
    if step is not None and distributed.rank() == 0:
        folder = Path(spec) / "readings" / "last"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoint.write_json(folder / f"{name}.json", of_run(result, step))
        except (OSError, UserError) as error:
            say(f"this reading is not kept for the report of {spec}: {error}")
    return result


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))
