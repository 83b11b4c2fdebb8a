"""`firstsight bench scale`: what is typed, and what is shown of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from firstsight import settings
from firstsight.cli.flags import parsed, pretraining, taken
from firstsight.cli.shown import protocol, table, write_json
from firstsight.errors import UserError, require_positive, unknown
from firstsight.log import is_first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """What a run would take on many devices: firstsight bench scale METHOD --data SOURCE, with any
    flag of pretrain METHOD. Under torchrun the prediction is checked against these ranks."""

    images: int = 64
    """Images of each device in a step: the batch grows with the ranks."""
    machines: tuple[int, ...] = (1, 2, 4, 8)
    """Numbers of machines to predict for."""
    devices: int = 8
    """Devices of each machine."""
    inside: float = 50
    """Bandwidth between devices of a machine, GB/s (10^9 bytes) in each direction."""
    between: float = 12.5
    """Bandwidth between machines, GB/s in each direction; 12.5 is 100 Gbit/s."""
    latency: float = 20
    """Of a message between two ranks, microseconds."""

    def __post_init__(self) -> None:
        require_positive("--", self, "devices", "inside", "between")
        if self.images < 2 or self.latency < 0 or not all(m > 0 for m in self.machines):
            raise UserError("--images must be 2 or more, --latency 0 or more, --machines above 0")


def bench(args: list[str]) -> None:
    """Measure this machine: firstsight bench scale METHOD predicts many devices."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: firstsight bench scale METHOD --data SOURCE [OPTIONS]")
        return
    if args[0] not in BENCHES:
        raise unknown("bench", args[0], BENCHES)
    BENCHES[args[0]](args[1:])


def scale(args: list[str]) -> None:
    """Throughput and efficiency on M machines of N devices, from one device at hand."""
    target, args = taken(args, "--json")
    if not args or args[0].startswith("-"):
        parsed(Scale, args, "bench scale")
        raise UserError("which method? firstsight bench scale METHOD --data SOURCE")
    own, rest = _own(args[1:])
    asked = parsed(Scale, own, "bench scale")
    if "--help" in own:
        return
    name, config = pretraining([args[0], *rest], "bench scale")

    from firstsight.scale import scale

    result = scale(name, config, **settings.shallow(asked))
    if not is_first():
        return
    write_json(target, result)
    alone, link = result["alone"], result["link"]
    print(
        f"{asked.images} images on one device: forward {alone['forward_ms']} ms, backward "
        f"{alone['backward_ms']}, update {alone['update_ms']}; gradients "
        f"{result['gradients_mib']} MiB; views {result['views_per_second_and_core']} images/s on "
        f"each of {result['cores']} cores; link {link['inside']:.3g} GB/s inside a machine"
        f"{' (measured)' if link['measured'] else ''}, {link['between']:.3g} between"
    )
    rows = [[str(row[key]) for key in COLUMNS.values()] for row in result["predicted"]]
    table(f"{name}, predicted; milliseconds of a step", list(COLUMNS), rows)
    for assumption in result["assumptions"]:
        print(f"assumed: {assumption}")
    if "checked" in result:
        checked = result["checked"]
        print(
            f"checked: {checked['ranks']} ranks take {checked['measured_ms']} ms a step, predicted "
            f"{checked['predicted_ms']} ({checked['computed_ms']} of it to compute)"
        )
    protocol(result)


COLUMNS = {
    "M": "machines",
    "N": "devices",
    "images/s": "images_per_second",
    "efficiency": "efficiency",
    "step": "step_ms",
    "gradients": "gradients_ms",
    "exchange": "exchange_ms",
    "views": "data_ms",
}
"""Head of a column -> key of a result. What gradients and exchange take is waited for; views are
made beside."""


def _own(args: list[str]) -> tuple[list[str], list[str]]:
    """What is said of the cluster, and what is said of the run."""
    flags = {f"--{field.name}" for field in dataclasses.fields(Scale)} | {"--help", "-h"}
    parts: tuple[list[str], list[str]] = ([], [])
    at = 1
    for arg in args:
        if arg.startswith("--") or arg == "-h":
            at = 0 if arg.partition("=")[0] in flags else 1
        parts[at].append(arg)
    return parts


BENCHES: dict[str, Callable[[list[str]], None]] = {"scale": scale}
