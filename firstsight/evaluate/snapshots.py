"""Any reading over a whole run: taken of each backbone that was kept on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from firstsight import checkpoint, distributed
from firstsight.errors import UserError


def over_snapshots(
    run: str, name: str, read: Callable[[str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What `read` says of every snapshot of a run, in the order of their steps.

    Each is the reading's own result with its `step` and, of accuracies, the `top1` that a curve
    shows; of boxes it shows the CorLoc at .5. They are kept in RUN/readings/NAME.json, which the
    report draws. A snapshot is a CHECKPOINT: `read` gets its path. Raises `UserError` where there
    is none.
    """
    found = sorted((Path(run) / "snapshots").glob("step-*.safetensors"))
    if not found:
        raise UserError(f"{run} holds no snapshots; give the folder of a run, or leave --snapshots")
    results = []
    for path in found:
        result = read(str(path))
        if "best" in result:
            result = {**result, "top1": result["best"]["top1"]}
        step = int(path.stem.removeprefix("step-"))
        results.append({**result, "step": step})
    if distributed.rank() == 0:
        folder = Path(run) / "readings"
        folder.mkdir(exist_ok=True)
        checkpoint.write_json(folder / f"{name}.json", results)
    return results
