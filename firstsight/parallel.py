"""One network on several ranks: as replicas (DDP), or its backbones in shards (FSDP2).

Shards are for backbones whose weights, gradients and moments of the optimiser do not fit on one
device together. Each rank keeps a part of every tensor of a backbone (and of its momentum copy) and
gathers the rest of a block when its turn comes. All else, projectors and prototypes, is small and
stays whole on every rank. The optimiser sees plain tensors in both cases, and a checkpoint holds
whole ones: so a run may go on in either way, on any number of ranks.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from firstsight import backbones, distributed
from firstsight.backbones import Backbone
from firstsight.errors import UserError

Kind = Literal["ddp", "fsdp"]


class Shard(nn.Parameter):
    """This rank's part of a parameter as the optimiser sees it; it shares its memory."""

    whole: DTensor
    """The parameter."""


def spread(method: nn.Module, optimizer: torch.optim.Optimizer, kind: Kind) -> nn.Module:
    """The method as all ranks train it together; itself when alone.

    With `fsdp` its backbones are cut up here, and what the optimiser keeps with them. Raises
    `UserError` for a network that has no blocks to cut at.
    """
    if distributed.world() == 1:
        return method
    return replica(method) if kind == "ddp" else Sharded(method, optimizer)


def replica(module: nn.Module) -> nn.Module:
    """The module as one of W replicas that average their gradients; itself when alone."""
    if distributed.world() == 1:
        return module
    # each rank keeps batch-norm statistics of its own: nothing is overwritten from rank 0.
    # Newer releases of torch have another name for that
    known = inspect.signature(DistributedDataParallel).parameters
    keep = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    device = distributed.device()
    devices = [device] if device.type == "cuda" else None
    options: dict[str, Any] = {"device_ids": devices, keep: False}
    return DistributedDataParallel(module, **options)


@contextmanager
def averaging(model: nn.Module, now: bool) -> Iterator[None]:
    """For forward and backward of what `spread` made: ranks average gradients `now`, or later."""
    if isinstance(model, DistributedDataParallel) and not now:
        with model.no_sync():
            yield
        return
    yield
    if isinstance(model, Sharded) and now:
        model.hand_over()


class Sharded(nn.Module):
    """A method whose backbones lie in shards over the ranks; the rest of it are replicas."""

    def __init__(self, method: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        before = dict(method.named_parameters())
        mesh = init_device_mesh(distributed.device().type, (distributed.world(),))
        if not _blocks(cast(Any, method).backbone):
            raise UserError(
                "--parallel fsdp cuts networks at their blocks, which transformers of timm have; "
                f"for {cast(Any, method).backbone.name} use --parallel ddp"
            )
        for module in list(method.modules()):
            if isinstance(module, Backbone) and (blocks := _blocks(module)):
                _shard(module, blocks, mesh)
        self.method = method
        now = {id(before[name]): p for name, p in method.named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [_exchanged(p, now[id(p)], optimizer) for p in group["params"]]
        trained = members(optimizer)
        self._shards = [p for p in trained if isinstance(p, Shard)]
        self._replicas = [p for p in trained if not isinstance(p, Shard)]

    def forward(self, batch: Any) -> Any:
        """What the method says of this rank's batch."""
        return self.method(batch)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the optimiser the mean gradients: FSDP has averaged those of shards, none else."""
        for shard in self._shards:
            if isinstance(gradient := shard.whole.grad, DTensor):
                shard.grad, shard.whole.grad = gradient.to_local(), None
        gradients = [p.grad for p in self._replicas if p.grad is not None]
        if not gradients:
            return
        mean = torch.cat([g.flatten() for g in gradients]) / distributed.world()
        dist.all_reduce(mean)
        parts = torch.split(mean, [g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))


def _blocks(backbone: nn.Module) -> list[nn.Module]:
    """The blocks of a transformer of timm; of other networks none."""
    blocks = getattr(getattr(backbone, "network", None), "blocks", None)
    return list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []


def _shard(backbone: Backbone, blocks: list[nn.Module], mesh: DeviceMesh) -> None:
    """Cut up a backbone, block by block: a block is what is whole on a device at a time."""
    network = cast(Any, backbone).network
    # a view of its output would be trouble if it were changed in place: nothing here does
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    for name in ("forward_features", "forward_head", "forward_intermediates"):
        register_fsdp_forward_method(network, name)


def _exchanged(
    old: nn.Parameter, new: nn.Parameter, optimizer: torch.optim.Optimizer
) -> nn.Parameter:
    """What the optimiser moves in place of `old`; what it keeps with it is cut likewise."""
    if new is old:
        return old
    whole = cast(DTensor, new)
    shard = Shard(whole.to_local().detach())
    shard.whole = whole
    if old in optimizer.state:
        kept = optimizer.state.pop(old)
        optimizer.state[shard] = {
            key: _cut(value, whole) if _is_like(value, old) else value
            for key, value in kept.items()
        }
    return shard


def _is_like(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _cut(value: Tensor, like: DTensor) -> Tensor:
    parts = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return parts.to_local().clone()


def members(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimiser moves, in the order of its state."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def lengths(parameters: Sequence[nn.Parameter], gradients: list[Tensor]) -> list[Tensor]:
    """The length of each gradient, of all its shards together where it lies in shards."""
    found = list(torch._foreach_norm(gradients))
    cut = [number for number, p in enumerate(parameters) if isinstance(p, Shard)]
    if cut:
        squares = torch.stack([found[number] for number in cut]).square()
        dist.all_reduce(squares)
        for number, square in zip(cut, squares, strict=True):
            found[number] = square.sqrt()
    return found


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that lies in shards; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(state: Mapping[str, Any], everywhere: bool = False) -> dict[str, Any]:
    """A state with whole tensors: on the first rank, or `everywhere`; to be called on all ranks.

    On the other ranks None stands for what lies in shards. One tensor at a time is whole on the
    device, so that the memory of the host is what counts.
    """
    return {
        key: _gathered(value, everywhere) if isinstance(value, DTensor) else value
        for key, value in state.items()
    }


def _gathered(value: DTensor, everywhere: bool) -> Tensor | None:
    whole = value.full_tensor()
    return whole.cpu() if everywhere or distributed.rank() == 0 else None


def gathered_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of the optimiser with whole tensors, on the first rank, as without shards."""
    state = optimizer.state_dict()
    for number, parameter in enumerate(members(optimizer)):
        kept = state["state"].get(number)
        if kept and isinstance(parameter, Shard):
            joined = {k: _joined(v, parameter) for k, v in kept.items()}
            state["state"][number] = gathered(joined)
    return state


def _joined(value: Any, shard: Shard) -> Any:
    """This rank's part of a tensor, as a part of the whole."""
    if not _is_like(value, shard) or shard.whole.ndim == 0:
        return value
    of = shard.whole
    return DTensor.from_local(
        value, of.device_mesh, of.placements, shape=of.shape, stride=of.stride(), run_check=False
    )


def whole(backbone: Backbone, size: int) -> Backbone:
    """The backbone with all its weights on this rank: a copy where it lies in shards.

    `size` is the side of its images. To be called on all ranks.
    """
    if not any(isinstance(p, DTensor) for p in backbone.parameters()):
        return backbone
    weights = gathered(backbone.state_dict(), everywhere=True)
    with torch.random.fork_rng(devices=[]):
        copy = backbones.build(backbone.name, backbone.stem, size)
    copy.load_state_dict(weights)
    return copy.to(distributed.device()).eval()
