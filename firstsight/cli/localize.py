"""`firstsight localize` and `firstsight masks`: what is typed, and what is shown of it."""

from __future__ import annotations

from typing import Any

from firstsight import settings
from firstsight.cli.flags import parsed, taken
from firstsight.cli.judge import taken_of
from firstsight.cli.shown import protocol, show, table, write_json
from firstsight.errors import UserError
from firstsight.localize import commands


def localize(args: list[str]) -> None:
    """Object boxes by activation: firstsight localize [CHECKPOINT] --data SOURCE --boxes FILE."""
    target, args = taken(args, "--json")
    asked = settings.shallow(parsed(commands.Localize, args, "localize"))

    from firstsight.localize import run

    def read(checkpoint: str, **how: Any) -> dict[str, Any]:
        result = run(checkpoint, **how)
        if over_run and "corloc" not in result:
            raise UserError("--snapshots draws a curve of scores; --boxes says what is marked")
        return result

    over_run = asked["snapshots"]
    if (result := taken_of(read, "localize", asked, target)) is None:
        return
    write_json(target, result)
    if "corloc" in result:
        of = f"{result['images']} images of {asked['data']}"
        table(f"CorLoc of {of}, percent", commands.COLUMNS, commands.score_rows(result))
    _told(result, f"{result['images']} images, nothing to score by; --boxes says what is marked")


def masks(args: list[str]) -> None:
    """Foreground grids for background merging: firstsight masks --data SOURCE --out FILE.json."""
    target, args = taken(args, "--json")
    asked = settings.shallow(parsed(commands.Masks, args, "masks"))

    from firstsight.localize import masks

    result = masks(**asked)
    shares = [[f"{100 * share:.0f}" for share in row] for row in result["foreground"]]
    title = f"{result['out']}: percent of {result['images']} images in which a cell is foreground"
    show(title, [""] * len(shares), shares, result, target)
    print(
        f"entropy {result['entropy']:.3f} bits a cell (0: one mask for all images), "
        f"constant cells {100 * result['constant_cells']:.0f} %"
    )


def _told(result: dict[str, Any], otherwise: str) -> None:
    """What a reader of a result has to know, and its protocol."""
    for note in result["notes"] if "corloc" in result else [*result["notes"], otherwise]:
        print(note)
    protocol(result)
