"""What a run watches for: undecodable images, numbers that are none, signals to stop."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from firstsight import distributed
from firstsight.errors import UserError
from firstsight.log import say
from firstsight.parallel import lengths, local, members
from firstsight.settings import Pretrain


def note_bad(new: set[str], known: set[str], most: float) -> None:
    """Name each undecodable image once, over all ranks; refuse to go on with more than `most`."""
    new = set().union(*distributed.collect(new)) - known
    for name in sorted(new):
        known.add(name)
        say(f"cannot decode {name}: replaced ({len(known)} so far)")
    if new and len(known) > most:
        raise UserError(
            f"{len(known)} images cannot be decoded, {min(known)} among them, and --max-bad allows "
            f"{most:.0f}; mend or remove them, or allow more"
        )


class NonFinite(UserError):
    """The numbers of a run are none any more; `what` says which, without what to do about it."""

    def __init__(self, what: str, advice: str) -> None:
        super().__init__(f"{what}; {advice}")
        self.what = what


def scaler(config: Pretrain) -> torch.amp.GradScaler:
    """What keeps small float16 gradients from vanishing; else one that at most leaves steps out."""
    device, skips = distributed.device().type, config.skip_nonfinite > 0
    if config.precision == "fp16":
        return torch.amp.GradScaler(device)
    return torch.amp.GradScaler(device, init_scale=1.0, growth_interval=2**31 - 1, enabled=skips)


def steepness(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, float]:
    """For the log, between backward and update: length of the gradient, before it is clipped.

    Of all that the optimiser moves, over all ranks; left out where it is not finite. With a scaler
    its scale too. On all ranks.
    """
    moved = [p for p in members(optimizer) if p.grad is not None]
    gradients: list[Tensor] = [p.grad for p in moved if p.grad is not None]
    scale = scaler.get_scale()
    length = torch.stack([x.float() for x in lengths(moved, gradients)]).norm().item() / scale
    told = {"gradient_norm": length} if math.isfinite(length) else {}
    return told | ({"loss_scale": scale} if scaler.is_enabled() else {})


def refuse_nonfinite_loss(loss: Tensor, method: nn.Module, step: int, out: Path) -> None:
    """Stop the run when the loss of any rank is not finite; to be called on all ranks."""
    if not math.isfinite(mean := distributed.mean(loss)):
        raise _nonfinite(f"the loss is {mean}", method, step, out)


def refuse_nonfinite_networks(method: nn.Module, step: int, out: Path) -> None:
    """Stop the run when an update broke a tensor of any rank, before anything of it is saved."""
    tensors = [*method.state_dict().values(), *method.buffers()]  # some are saved elsewhere
    if distributed.anyone(not all(local(t).isfinite().all() for t in tensors)):
        raise _nonfinite("the update broke the networks", method, step, out)


def _nonfinite(what: str, method: nn.Module, step: int, out: Path) -> NonFinite:
    tensors: list[tuple[str, Tensor | None]] = list(method.state_dict().items())
    tensors += [(f"gradient of {name}", p.grad) for name, p in method.named_parameters()]
    bad = [name for name, t in tensors if t is not None and not local(t).isfinite().all()]
    named = f"{len(bad)} tensors went bad, {', '.join(bad[:3])} first" if bad else "no tensor did"
    return since_last_good(f"{what} at step {step} ({named})", out)


def since_last_good(what: str, out: Path) -> NonFinite:
    """What to raise where numbers of the run in `out` are none, its last good checkpoint named."""
    last = out / "checkpoints" / "last"
    kept = f"the last good checkpoint is {last.resolve()}" if last.exists() else "none was saved"
    return NonFinite(
        f"{what}; {kept}",
        "start another run with a lower --lr, a longer --warmup-epochs or --precision fp32",
    )


_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
"""Signals that ask a run to save and end: of people, of machines, of schedulers before those, of a
terminal that goes away."""


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """While inside, `STOPPING` signals do not end the process; the value says whether one came.

    A SIGHUP that is ignored, by nohup, stays so.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C means at once
        came.append(number)

    try:
        hangup = getattr(signal, "SIGHUP", None)
        ignored = hangup is not None and signal.getsignal(hangup) is signal.SIG_IGN
        heard = [s for s in STOPPING if not (s == hangup and ignored)]
        before = {s: signal.signal(s, note) for s in heard}
    except ValueError:  # not the main thread: signals go elsewhere
        before = {}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
