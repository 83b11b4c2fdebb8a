"""Rows that SGD with momentum and weight decay moves, each caught up only when it is needed.

Cao et al. 2020, https://arxiv.org/abs/2006.14618, section 3.3: with one class per image, and few of
them in the loss of a step, most rows have no gradient. Momentum u and weight decay d move a row w
all the same:

    u <- m u + d w,    w <- w - r u,    so (w, u) <- M (w, u),    M = [[1 - r d, -r m], [d, m]].

A row that was left alone for n steps is caught up with by the product of their n matrices. While
the rate r stays, that is the power M^n. So the rates are kept as pieces in which r stays, and the
work of a step depends neither on the number of rows nor on how long one was left alone.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

PIECES = 1 << 15
"""Pieces of the rate that are remembered. Of a row that rested for longer, the steps before the
oldest of them are forgotten. At a tolerance of .001, warm-up and cosine of a run of any length take
fewer (those of PIC's 200 epochs 13,515)."""

Floats = NDArray[np.float64]


class Rests:
    """What steps without a gradient make of (w, u), for any number of them until now."""

    def __init__(self, momentum: float, decay: float, tolerance: float) -> None:
        self.momentum, self.decay, self.tolerance = momentum, decay, tolerance
        self.step = 0  # steps done
        self._count = 0
        self._starts, self._rates = np.zeros(PIECES), np.zeros(PIECES)
        self._after = np.zeros((PIECES, 2, 2))  # product of the whole pieces behind each

    def rate(self, lr: float) -> float:
        """The rate of the next step: the last one as long as `lr` is like it, else `lr`."""
        if self._count:
            last = float(self._rates[self._count - 1])
            if abs(lr - last) <= self.tolerance * last:
                return last
            length = self.step - self._starts[self._count - 1]
            whole = powers(self._matrices(np.array([last])), np.array([int(length)]))
            self._after[: self._count - 1] = whole @ self._after[: self._count - 1]
        if self._count == PIECES:
            for table in (self._starts, self._rates, self._after):
                table[:-1] = table[1:].copy()
            self._count -= 1
        self._starts[self._count], self._rates[self._count] = self.step, lr
        self._after[self._count] = np.eye(2)
        self._count += 1
        return lr

    def forget(self) -> None:
        """Forget the past: no row rests from before now."""
        self._count = 0

    def since(self, steps: NDArray[np.int64]) -> Floats:
        """(Q, 2, 2) products of the matrices of all steps from each of `steps` (Q,) until now."""
        starts, now = self._starts[: self._count], self._count - 1
        steps = np.maximum(steps, starts[0])
        piece = np.searchsorted(starts, steps, side="right") - 1  # of the first step that it rested
        matrices = self._matrices(self._rates[piece])
        ends = np.append(starts[1:], self.step)[piece]
        begun = powers(matrices, (ends - steps).astype(np.int64))
        latest = self._matrices(self._rates[now : now + 1])
        latest = powers(latest, np.array([self.step - int(starts[now])]))
        rest = np.where((piece == now)[:, None, None], np.eye(2), latest @ self._after[piece])
        return cast(Floats, rest @ begun)

    def _matrices(self, rates: Floats) -> Floats:
        made = np.empty((len(rates), 2, 2))
        made[:, 0, 0], made[:, 0, 1] = 1 - rates * self.decay, -rates * self.momentum
        made[:, 1, 0], made[:, 1, 1] = self.decay, self.momentum
        return made

    def state(self) -> Tensor:
        """All of it in one tensor of float64, always of the same size."""
        head = np.array([self.step, self._count], dtype=np.float64)
        parts = [head, self._starts, self._rates, self._after.ravel()]
        return torch.from_numpy(np.concatenate(parts))

    def load(self, state: Tensor) -> None:
        """Go on from a `state`."""
        values = state.double().cpu().numpy().copy()
        self.step, self._count = int(values[0]), int(values[1])
        self._starts, self._rates = values[2 : 2 + PIECES], values[2 + PIECES : 2 + 2 * PIECES]
        self._after = values[2 + 2 * PIECES :].reshape(PIECES, 2, 2)


def powers(matrices: Floats, n: NDArray[np.int64]) -> Floats:
    """(Q, 2, 2): each of the matrices (Q, 2, 2) to its power n (Q,), by repeated squaring."""
    result = np.broadcast_to(np.eye(2), matrices.shape)
    while n.any():
        result = np.where((n & 1).astype(bool)[:, None, None], matrices @ result, result)
        matrices, n = matrices @ matrices, n >> 1
    return result


class Rows(nn.Module):
    """(N, D) rows with SGD of their own.

    It is that of torch (no dampening, no Nesterov) on all rows at every step, as long as rows are
    caught up before they are used. That is exact for any rates (to 1e-12 in float64, over rests of
    36,000 steps too). What is not: the rate may differ from that asked for by the share
    `tolerance`, so that there are few pieces of it, and what momentum and decay move a row by is
    off by no more than about that share. At .001, under the 200-epoch schedule of PIC on ImageNet
    and for w = 1, u = .5, decay 1e-4, w is off by up to 1.4e-4 in a rest of 64 or of 512 steps (it
    moves by .14) and by 2.1e-4 in 36,000 (by .39). With a tolerance of 0 nothing is, in rests of up
    to `PIECES` steps.
    """

    weight: Tensor
    velocity: Tensor
    current: Tensor
    broken: Tensor
    """Gradients so far that were not finite."""
    steepness: Tensor
    """Length of the last gradient, before it was cut; 0 before any."""

    def __init__(
        self,
        weight: Tensor,
        *,
        momentum: float,
        decay: float,
        tolerance: float = 0.0,
        correction: bool = True,
        saved: bool = True,
    ) -> None:
        """Start from `weight` (N, D). Without `correction` rows rest where they were left.

        `saved`: the rows are part of the state.
        """
        super().__init__()
        self.momentum, self.decay, self.correction = momentum, decay, correction
        self.rests = Rests(momentum, decay, tolerance)
        self.register_buffer("weight", weight, saved)
        self.register_buffer("velocity", torch.zeros_like(weight), saved)
        self.register_buffer("current", torch.zeros(len(weight), dtype=torch.long), saved)
        self.register_buffer("broken", torch.zeros((), dtype=torch.long))
        self.register_buffer("steepness", torch.zeros(()))

    def places(self, index: Tensor) -> Tensor:
        """(S,) where in `weight` and the others rows `index` (S,) are."""
        return index

    def now(self, index: Tensor | None, coming: Tensor | None = None) -> Tensor:
        """(S, D) rows `index` (S,), each once, caught up; None: all, as they are.

        `coming` are rows that will be asked for next, which may be got ready meanwhile.
        """
        if index is None:
            return self.weight
        self.catch_up(index)
        return self.weight[self.places(index)]

    def rest(self, used: Tensor) -> None:
        """Rows but `used` (K,) will not be asked for soon."""

    @torch.no_grad()
    def catch_up(self, index: Tensor) -> None:
        """Let rows `index` (S,), each once, take the steps that they have missed."""
        index = self.places(index)
        behind = index[self.current[index] < self.rests.step]  # few: the others were used just now
        if self.correction and len(behind):
            since = self.rests.since(self.current[behind].cpu().numpy())
            moves = torch.from_numpy(since).to(self.weight.dtype).to(self.weight.device)
            w, u = self.weight[behind], self.velocity[behind]
            self.weight[behind] = moves[:, 0, :1] * w + moves[:, 0, 1:] * u
            self.velocity[behind] = moves[:, 1, :1] * w + moves[:, 1, 1:] * u
        self.current[behind] = self.rests.step

    @torch.no_grad()
    def move(
        self,
        index: Tensor | None,
        gradient: Tensor,
        lr: float,
        steepest: float = 0.0,
        shortest: float = 0.0,
        longest: float = 0.0,
    ) -> None:
        """One step of SGD with the gradient (S, D) of rows `index` (S,), each once; None: of all.

        A gradient longer than `steepest`, all of it together, is cut to that; 0: none is.
        Rows that get shorter or longer than allowed are stretched to the nearest length allowed; 0:
        any is. A gradient that is not finite counts as none, and is counted.
        """
        w, u = self.weight, self.velocity
        if index is not None:
            index = self.places(index)
            w, u = w[index], u[index]
        broken = ~gradient.isfinite().all()  # not looked at: that would wait for the device
        gradient.masked_fill_(broken, 0.0)
        self.broken.add_(broken)
        self.steepness.copy_(gradient.norm())
        if steepest > 0:
            gradient.mul_((steepest / self.steepness.clamp_min(1e-12)).clamp(max=1))
        u.mul_(self.momentum).add_(gradient).add_(w, alpha=self.decay)
        w.sub_(u, alpha=self.rests.rate(lr) if index is not None else lr)
        if shortest > 0 or longest > 0:
            length = w.norm(dim=1, keepdim=True).clamp_min(1e-12)
            w.mul_(length.clamp(shortest, longest or None) / length)
        self.rests.step += 1
        if index is None:
            self.current.fill_(self.rests.step)
            self.rests.forget()
        else:
            self.weight[index], self.velocity[index] = w, u
            self.current[index] = self.rests.step

    def figures(self, rows: Tensor) -> dict[str, Tensor]:
        """For the log: lengths of rows (S, D), steps that were left out, and how long the gradient
        of the step before was, all of it together."""
        return {
            **lengths("prototype_norm", rows),
            "prototype_steps_left_out": self.broken.to(rows.dtype),
            "prototype_gradient_norm": self.steepness.to(rows.dtype),
        }

    def get_extra_state(self) -> Tensor:
        """The past of the rates, for the checkpoint."""
        return self.rests.state()

    def set_extra_state(self, state: Any) -> None:
        """Take up the past of the rates."""
        self.rests.load(state)


class Recent(nn.Module):
    """The K indices that came last, first in first out; at the start any K of all."""

    index: Tensor
    oldest: Tensor

    def __init__(self, length: int, of: int) -> None:
        super().__init__()
        generator = np.random.default_rng(int(torch.randint(2**62, (), device="cpu")))
        some = generator.choice(of, length, replace=False, shuffle=False)  # no work for each of all
        self.register_buffer("index", torch.from_numpy(some))
        self.register_buffer("oldest", torch.zeros((), dtype=torch.long))

    def push(self, index: Tensor) -> None:
        """Replace the oldest by these (B,); of more than K, the last K stay."""
        length = len(self.index)
        index = index[-length:]
        places = self.oldest + torch.arange(len(index), device=index.device)
        self.index[places % length] = index
        self.oldest.copy_((self.oldest + len(index)) % length)


def lengths(name: str, rows: Tensor) -> dict[str, Tensor]:
    """The mean, least, median and greatest length of rows (S, D), for the log."""
    length = rows.detach().norm(dim=1)
    told = {"min": length.min(), "median": length.median(), "max": length.max()}
    return {name: length.mean(), **{f"{name}_{key}": value for key, value in told.items()}}


def merged(parts: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor | None, Tensor]:
    """The sum of gradients, each (S, D) of rows `index` (S,) of its own; None: of all rows."""
    if len(parts) == 1:
        return parts[0]
    indices = [index for index, _ in parts if index is not None]
    if not indices:
        return None, torch.stack([gradient for _, gradient in parts]).sum(dim=0)
    members: Tensor = torch.unique(torch.cat(indices))
    total = parts[0][1].new_zeros(len(members), parts[0][1].shape[1])
    for index, (_, gradient) in zip(indices, parts, strict=True):
        total.index_add_(0, torch.searchsorted(members, index), gradient)
    return members, total
