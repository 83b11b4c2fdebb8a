"""Batch-norm over less or more than the rows at hand: parts of a batch, or all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from firstsight import distributed
from firstsight.errors import UserError
from firstsight.nets import full

Norm = nn.BatchNorm1d | nn.BatchNorm2d


class SplitBatchNorm(nn.BatchNorm2d):
    """Batch-norm with separate statistics for each of `splits` parts of the batch.

    It emulates on one device what batch-norm does on `splits` devices; running statistics are the
    mean over the parts. differs from the paper: the parts of MoCo's CIFAR-10 demo are interleaved,
    ours are runs of neighbours as ranks would hold them; in a random batch that is the same.
    """

    def __init__(self, norm: Norm, splits: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.load_state_dict(norm.state_dict())
        self.weight, self.bias = norm.weight, norm.bias  # frozen ones stay frozen
        self.splits = splits

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # (B, C) is welcome too

    def forward(self, input: Tensor) -> Tensor:
        """The normalised batch, (B, C) or (B, C, h, w); parts differ by one row at most."""
        if not self.training:
            return super().forward(input)
        if len(input) < 2 * self.splits:
            raise UserError(
                f"{len(input)} images a device do not make {self.splits} parts of two or more; "
                f"use --method.splits {max(1, len(input) // 2)} or a larger --batch-size"
            )
        assert self.running_mean is not None and self.running_var is not None
        means = self.running_mean.repeat(self.splits, 1)  # (splits, C)
        variances = self.running_var.repeat(self.splits, 1)
        share_of_new = 0.1 if self.momentum is None else self.momentum
        parts = [
            F.batch_norm(part, mean, var, self.weight, self.bias, True, share_of_new, self.eps)
            for part, mean, var in zip(
                input.tensor_split(self.splits), means, variances, strict=True
            )
        ]
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return torch.cat(parts)


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch-norm with the statistics of all ranks, on any device, for (B, C) and (B, C, h, w).

    torch's own SyncBatchNorm does not run on a CPU; `global_batch_norm` takes it where it does.
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine)
        self.load_state_dict(norm.state_dict())
        self.weight, self.bias = norm.weight, norm.bias  # frozen ones stay frozen

    def _check_input_dim(self, input: Tensor) -> None:
        pass  # (B, C) is welcome too

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows, like `input`."""
        if not self.training or distributed.world() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        rows = input if input.dtype == torch.float64 else input.float()
        count = rows.new_tensor([rows.numel() / rows.shape[1]])
        sums = distributed.summed(torch.cat([rows.sum(axes), count]))
        n = sums[-1].detach()
        mean = sums[:-1] / n  # (C,)
        shape = [1, -1] + [1] * (input.ndim - 2)
        centred = rows - mean.view(shape)
        variance = distributed.summed(centred.square().sum(axes)) / n  # (C,)
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        share_of_new = 0.1 if self.momentum is None else self.momentum
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean), share_of_new)
            self.running_var.lerp_((variance * n / (n - 1)).to(self.running_var), share_of_new)
        normal = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)


def split_batch_norm(module: nn.Module, splits: int) -> None:
    """Give every batch-norm inside `module` its statistics in `splits` parts of the batch."""
    _replace(module, lambda norm: SplitBatchNorm(norm, splits), "--method.splits")


@torch.no_grad()
def among_others(encoder: Callable[[Tensor], Tensor], images: Tensor, splits: int) -> Tensor:
    """What `encoder` makes of `images` (B, ...), each in other company than it came with.

    On several ranks (or in `splits` parts of the batch) images are dealt out anew and the results
    brought back: the statistics of batch-norm would otherwise tell a query which key is its own
    (He et al. 2020, section 3.3). Alone and unsplit there is nothing to deal.
    """
    if distributed.world() * splits == 1:
        return full(encoder(images))
    order = distributed.permutation(images)  # (WB,)
    encoded = full(encoder(distributed.shuffled(images, order)))
    return distributed.unshuffled(encoded, order)


def global_batch_norm(module: nn.Module) -> None:
    """Give every batch-norm inside `module` the statistics of all ranks; nothing when alone."""
    if distributed.world() == 1:
        return
    convert: Callable[[Norm], nn.Module] = GlobalBatchNorm
    if distributed.device().type == "cuda":
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    _replace(module, convert, "--batch-norm global")


def group_norm(module: nn.Module, groups: int) -> None:
    """Put group-norm, with the scales and shifts learnt so far, in place of every batch-norm."""

    def convert(norm: Norm) -> nn.Module:
        made = nn.GroupNorm(math.gcd(groups, norm.num_features), norm.num_features, norm.eps)
        made.weight, made.bias = norm.weight, norm.bias
        return made

    _replace(module, convert, "group-norm")


def _replace(module: nn.Module, convert: Callable[[Norm], nn.Module], flag: str) -> None:
    for name, child in module.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d):
            setattr(module, name, convert(child))  # type: ignore[arg-type]
        elif isinstance(child, _BatchNorm):  # timm's also hold an activation, or it was replaced
            raise UserError(
                f"{flag} cannot replace the {type(child).__name__} of this network; use a ResNet, "
                f"or leave batch-norm as it is (--batch-norm local, no --method.splits; of detect: "
                f"--norm batch)"
            )
        else:
            _replace(child, convert, flag)
