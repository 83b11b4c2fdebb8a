"""Every call that concerns other processes. Alone, each of them is the identity.

One device is the normal case: nothing here needs to be started for it. Under torchrun (or what else
sets RANK, WORLD_SIZE and LOCAL_RANK) or srun `start` joins the group, and the same code runs on W
ranks.
"""

from __future__ import annotations

import datetime
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from firstsight.distributed import slurm
from firstsight.distributed.traffic import Sent
from firstsight.errors import UserError

_device = torch.device("cpu")


class _Imagined:
    """Ranks that are not there: each is taken to say what this process says."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.sent: list[Sent] = []


_imagined: _Imagined | None = None


def start(device: str, threads: int = 0, patience: float = 1800) -> torch.device:
    """Join the other processes, if there are any, and return the device of this one.

    `threads` is how many the CPU's arithmetic takes; 0: one for each core that this rank has.
    `patience` is for how many seconds ranks wait for each other before they raise.
    """
    os.environ.update(slurm.variables(os.environ))
    torch.set_num_threads(threads or cores())
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    kind = device if device != "auto" else _best_device()
    if (kind == "cuda" and not torch.cuda.is_available()) or (
        kind == "mps" and not torch.backends.mps.is_available()
    ):
        raise UserError(f"this machine offers torch no {kind} device; use --device cpu")
    if kind == "cuda":
        # a scheduler may show each process its own device only
        local = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        torch.cuda.set_device(local)
    if launched and not dist.is_initialized():
        limit = datetime.timedelta(seconds=patience)
        try:
            store, place, count = next(rendezvous("env://", timeout=limit))
            store.set_timeout(limit)
            dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                store=_without_the_dead(store, place, count, patience),
                rank=place,
                world_size=count,
                timeout=limit,
            )
        except RuntimeError as error:  # what libraries raise when they wait in vain
            raise UserError(
                f"rank {os.environ.get('RANK')} did not find all {os.environ['WORLD_SIZE']} ranks "
                f"within {patience:.0f} s ({str(error).splitlines()[0][:120]}); start all of them, "
                "or give them longer with --timeout"
            ) from error
    global _device
    _device = torch.device(f"cuda:{torch.cuda.current_device()}" if kind == "cuda" else kind)
    return _device


def _without_the_dead(store: Store, place: int, count: int, patience: float) -> Store:
    """The part of a `store` that is of this start alone.

    After an elastic restart torchrun (2.15) hands out the same store, with the addresses of ranks
    that have died, and gloo waits for these for ever. So rank 0 names a new part, and answers each
    rank under a word that only one that lives now can have asked for.
    """
    word = uuid.uuid4().hex
    if place > 0:
        store.set(f"firstsight/{place}", word)
        part = store.get(f"firstsight/{word}").decode()  # waits for it
        store.set(f"firstsight/{part}/{place}", "heard")
        return PrefixStore(part, store)
    silent, deadline = set(range(1, count)), time.monotonic() + patience
    while silent:
        for other in sorted(silent):
            if store.check([f"firstsight/{word}/{other}"]):
                silent.discard(other)
            elif store.check([f"firstsight/{other}"]):
                store.set(f"firstsight/{store.get(f'firstsight/{other}').decode()}", word)
        if time.monotonic() > deadline:
            raise RuntimeError(f"no word from rank {min(silent)}")
        time.sleep(0.01)
    return PrefixStore(word, store)


def device() -> torch.device:
    """The device of this process; the CPU before `start`."""
    return _device


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cores() -> int:
    """CPU cores that this rank may use: an equal share of those of its machine."""
    allowed = getattr(os, "sched_getaffinity", None)  # not on every platform
    here = len(allowed(0)) if allowed is not None else os.cpu_count() or 1
    if "SLURM_CPUS_PER_TASK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        # srun binds each rank to cores of its own; those of torchrun share what the agent has
        return max(1, min(here, int(os.environ["SLURM_CPUS_PER_TASK"])))
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Position of this process among all, from 0."""
    return dist.get_rank() if dist.is_initialized() and not _imagined else 0


def world() -> int:
    """W, the number of processes."""
    if _imagined:
        return _imagined.world
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world() -> int:
    """Processes on each machine, as torchrun says; all of them where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def local_rank() -> int:
    """Position of this process among those of its machine, from 0."""
    return rank() % local_world()


def machines() -> int:
    """M, the number of machines."""
    return world() // local_world()


def machine() -> int:
    """Position of this machine among all, from 0."""
    return rank() // local_world()


def barrier() -> None:
    """Wait for all ranks."""
    if world() > 1:
        dist.barrier()


def broken(error: BaseException | None) -> bool:
    """Whether `error` says that another process is gone, or keeps this one waiting."""
    words = ("gloo", "nccl", "connection", "timed out", "peer", "recv")
    text = str(error).lower()
    return world() > 1 and isinstance(error, RuntimeError) and any(word in text for word in words)


def share(value: Any) -> Any:
    """The `value` of rank 0, on every rank."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(value: Any) -> list[Any]:
    """The `value` of every rank, in rank order, on every rank."""
    if world() == 1:
        return [value]
    box: list[Any] = [None] * world()
    dist.all_gather_object(box, value)
    return box


def mean(scalar: Tensor) -> float:
    """The mean of a scalar over all ranks."""
    if world() == 1:
        return scalar.item()
    total = scalar.detach().clone()
    _all_reduce(total)
    return total.item() / world()


def anyone(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    return mean(torch.tensor(float(flag), device=_device)) > 0 if world() > 1 else flag


def _all_reduce(tensor: Tensor) -> None:
    if _imagined:
        _imagined.sent.append(Sent("sum", tensor.nbytes))
        tensor.mul_(_imagined.world)
    else:
        dist.all_reduce(tensor)


def _all_gather(rows: Tensor) -> list[Tensor]:
    if _imagined:
        _imagined.sent.append(Sent("gather", rows.nbytes))
        return [rows] * _imagined.world
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows.contiguous())
    return parts


@contextmanager
def imagined(world: int) -> Iterator[list[Sent]]:
    """Inside, a step of a method goes as on `world` ranks; what it would send is noted.

    The other ranks say what this one says. For measurements: only what `gather`, `summed`, `mean`
    and `shared` do is imagined.
    """
    global _imagined
    before, _imagined = _imagined, _Imagined(world)
    try:
        yield _imagined.sent
    finally:
        _imagined = before


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every rank asks of these rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return torch.cat(_all_gather(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        _all_reduce(gradient)
        return gradient.chunk(world())[rank()]


class _Sum(torch.autograd.Function):
    """All-reduce whose backward is an all-reduce too."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        _all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].clone()
        _all_reduce(gradient)
        return gradient


def gather(rows: Tensor) -> Tensor:
    """The rows of all ranks, (W * B, ...), in rank order.

    The gradient flows through: with the mean that DDP takes over ranks, the gradient of a mean of
    per-rank losses is exactly that of one process on the whole batch.
    """
    return rows if world() == 1 else cast(Tensor, _Gather.apply(rows))


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks; the gradient is summed likewise."""
    return tensor if world() == 1 else cast(Tensor, _Sum.apply(tensor))


def same_buffers(module: nn.Module) -> None:
    """Give the buffers of `module` on every rank the values of rank 0."""
    if world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def shared(tensor: Tensor) -> Tensor:
    """The `tensor` of rank 0, on every rank."""
    if world() > 1 and not _imagined:
        dist.broadcast(tensor, src=0)
    return tensor


def permutation(rows: Tensor) -> Tensor:
    """A random order (W * B,) of the rows (B, ...) of all ranks, the same on each rank."""
    return shared(torch.randperm(len(rows) * world()).to(rows.device))


def shuffled(rows: Tensor, order: Tensor) -> Tensor:
    """Rows of the global batch in that order (W * B,): this rank's share of them."""
    return gather(rows)[order].chunk(world())[rank()]


def unshuffled(rows: Tensor, order: Tensor) -> Tensor:
    """What `shuffled` dealt out, back where it came from: this rank's own rows, in order."""
    return gather(rows)[order.argsort()].chunk(world())[rank()]
