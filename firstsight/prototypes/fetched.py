"""Rows of which few are in memory, those in use: the others rest in a store (`stores`)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from firstsight import distributed
from firstsight.errors import UserError
from firstsight.prototypes.rows import Rows
from firstsight.prototypes.stores import File, Host, Index, Records, all_initial

IDLE = 4096
"""Rows that stay in memory after their last use, so that many at once go to their store."""


class Fetched(Rows):
    """Rows of which those in use are in memory, and all others rest in a store.

    What they are is what `Rows` are, bit for bit. In memory are the last ones used and up to `IDLE`
    more, whatever the number of all. Rows are written when they leave, so that one that is read
    ahead is no other than the one that is used. Of several ranks, all hold and move the same rows.
    """

    seed: Tensor

    def __init__(self, store: Host | File, dim: int, seed: int, **settings: Any) -> None:
        super().__init__(torch.empty(0, dim), saved=False, **settings)
        self.register_buffer("seed", torch.tensor(seed))
        self.store, self.store.seed, self.idle = store, seed, IDLE
        self._forget()
        self._reader = ThreadPoolExecutor(1, "reads rows ahead")

    def _forget(self) -> None:
        """Hold no rows."""
        self._held = np.full(len(self.weight), -1, np.int64)  # which row is in each place; -1: none
        self._sort()
        self._ahead: tuple[Index, Future[Records]] | None = None

    def _sort(self) -> None:
        self._order = np.argsort(self._held, kind="stable")
        self._sorted = self._held[self._order]
        self._asked: Tensor | None = None  # what `places` was asked last, and said
        self._said: Tensor | None = None

    def places(self, index: Tensor) -> Tensor:
        """(S,) where rows `index` (S,) are in memory; those that are not there yet are fetched."""
        if index is not self._asked or self._said is None:  # to ask again would wait for the device
            wanted = index.cpu().numpy()
            self._fetch(wanted[~np.isin(wanted, self._held)])
            places = self._order[np.searchsorted(self._sorted, wanted)]
            self._asked, self._said = index, torch.from_numpy(places).to(index.device)
        return self._said

    def now(self, index: Tensor | None, coming: Tensor | None = None) -> Tensor:
        """As of `Rows`; a thread reads those of `coming` that are not in memory."""
        rows = super().now(index)
        if coming is not None:  # ranks have met in this step: what one wrote before, all can read
            ahead = np.setdiff1d(coming.numpy(), self._held)
            self._ahead = ahead, self._reader.submit(self.store.read, ahead)
        return rows

    def rest(self, used: Tensor) -> None:
        """Write rows but `used` (K,) and let them go, once there are enough of them."""
        held = self._held >= 0
        if held.sum() <= len(used) + self.idle:
            return
        leaving = np.flatnonzero(held & ~np.isin(self._held, used.cpu().numpy()))
        self._write(leaving)
        self._held[leaving] = -1
        self._sort()
        self._ahead = None  # it may have read what is written now

    def flush(self) -> None:
        """Write all rows that are in memory; they stay there."""
        self._write(np.flatnonzero(self._held >= 0))

    def _fetch(self, missing: Index) -> None:
        if not len(missing):
            return
        found = self._read(missing)
        if (more := len(missing) - int((self._held < 0).sum())) > 0:
            self._held = np.append(self._held, np.full(more, -1))
            for name in ("weight", "velocity", "current"):
                old = getattr(self, name)
                setattr(self, name, torch.cat([old, old.new_zeros(more, *old.shape[1:])]))
        free = np.flatnonzero(self._held < 0)[: len(missing)]
        places = torch.from_numpy(free).to(self.weight.device)
        for name, values in (
            ("weight", found["weight"]),
            ("velocity", found["velocity"]),
            ("current", found["steps"] - 1),
        ):
            into = getattr(self, name)
            into[places] = torch.from_numpy(np.ascontiguousarray(values)).to(into)
        self._held[free] = missing
        self._sort()

    def _read(self, missing: Index) -> Records:
        """Records of rows that are not in memory, some of which may have been read ahead."""
        known, found = np.zeros(len(missing), bool), np.empty(len(missing), self.store.kind)
        if self._ahead is not None:
            rows, reading = self._ahead
            known = np.isin(missing, rows)
            if known.any():
                found[known] = reading.result()[np.searchsorted(rows, missing[known])]
                self._ahead = None
        found[~known] = self.store.read(missing[~known])
        return found

    def _write(self, places: Index) -> None:
        """Write the rows in these places, in the order of the file."""
        places = places[np.argsort(self._held[places])]
        at = torch.from_numpy(places).to(self.weight.device)
        records = np.empty(len(places), self.store.kind)
        records["weight"] = self.weight[at].cpu().numpy()
        records["velocity"] = self.velocity[at].cpu().numpy()
        records["steps"] = self.current[at].cpu().numpy() + 1
        self.store.write(self._held[places], records)

    def open(self, folder: Path, step: int | None) -> None:
        """Begin with the rows of the checkpoint after `step`; None: anew. On all ranks."""
        self._forget()
        self.store.seed = int(self.seed)
        if isinstance(self.store, Host):
            return
        if step is None and self.rests.step:
            raise UserError(
                "--init-policy all has no prototypes of a run that kept them in a file; "
                "use --init-policy backbone"
            )
        folder = folder / f"machine-{distributed.machine():03d}"
        if distributed.local_rank() == 0:
            if step is None:
                self.store.begin(folder)
            else:
                self.store.go_back(folder, step)
        distributed.barrier()
        self.store.map(folder)

    def commit(self, step: int, keep: int) -> None:
        """Have all rows in the store for a checkpoint after `step`. On all ranks."""
        self.flush()
        if isinstance(self.store, File):
            self.store.commit(step, keep)
            distributed.barrier()  # nobody saves before all have


def of(
    place: Literal["device", "host", "file"], count: int, dim: int, **settings: Any
) -> Rows | Fetched:
    """`count` rows of small normal numbers, the same wherever they are kept."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    if place == "device":
        return Rows(all_initial(count, dim, seed), **settings)
    store = Host(count, dim) if place == "host" else File(count, dim)
    return Fetched(store, dim, seed, **settings)


def inside(module: nn.Module) -> dict[str, Fetched]:
    """Those in `module` that have a store, by their names."""
    return {name: rows for name, rows in module.named_modules() if isinstance(rows, Fetched)}
