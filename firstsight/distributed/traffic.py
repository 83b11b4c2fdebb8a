"""How long ranks take to tell each other what they must, and what of it training waits for.

All times in seconds, sizes in bytes, bandwidths in bytes a second in each direction. Replicas as
DDP keeps them; a ring goes through all ranks, machine after machine, and is as fast as its slowest
link (Patarasuk and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

BUCKET = 25 * 2**20
"""Bytes of gradients that DDP averages at a time."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """M machines of N devices, and what joins them."""

    machines: int
    devices: int
    inside: float
    """Bandwidth of each device to another of its machine."""
    between: float
    """Bandwidth of each machine to another."""
    latency: float
    """From one rank to another, of a message of no length."""

    @property
    def world(self) -> int:
        """W, ranks in all."""
        return self.machines * self.devices

    @property
    def link(self) -> float:
        """Bandwidth of the slowest link of the ring."""
        if self.machines == 1:
            return self.inside
        return self.between if self.devices == 1 else min(self.inside, self.between)

    def all_reduce(self, size: float) -> float:
        """Until every rank has the sum of `size` bytes of each: 2 (W - 1) / W of them pass a link.

        Messages wait for each other on the way up and down a tree of ranks.
        """
        return 2 * self._hops + 2 * (self.world - 1) / self.world * size / self.link

    def all_gather(self, size: float) -> float:
        """Until every rank has the `size` bytes of each: those of all others pass a link."""
        return self._hops + (self.world - 1) * size / self.link

    @property
    def _hops(self) -> float:
        return math.ceil(math.log2(self.world)) * self.latency


class Sent(NamedTuple):
    """What each rank gives away while it trains one step, and waits for: `size` bytes."""

    kind: Literal["gather", "sum"]
    size: int


def waited(sent: Sequence[Sent], cluster: Cluster) -> float:
    """Seconds that a step waits for what methods exchange: forward and backward need it at once."""
    cost = {"gather": cluster.all_gather, "sum": cluster.all_reduce}
    return sum(cost[one.kind](one.size) for one in sent) if cluster.world > 1 else 0.0


def exposed(gradients: float, backward: float, cluster: Cluster) -> float:
    """Seconds that averaging `gradients` bytes goes on after a backward of `backward` seconds.

    DDP averages one bucket after another, each when it is complete; they become so at equal
    intervals. So the last one at least is waited for.
    """
    if cluster.world == 1 or not gradients:
        return 0.0
    buckets = math.ceil(gradients / BUCKET)
    each, done = cluster.all_reduce(gradients / buckets), 0.0
    for number in range(1, buckets + 1):
        done = max(done, backward * number / buckets) + each
    return done - backward


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one device was measured to do for one step, alone."""

    images: int
    forward: float
    backward: float
    update: float
    """Optimiser, moving averages, rows of memory banks."""
    gradients: int
    """Bytes that DDP averages."""
    sent: tuple[Sent, ...] = ()
    """What the method exchanges at this number of ranks."""


class Predicted(NamedTuple):
    """What a cluster is expected to do."""

    step: float
    images_per_second: float
    efficiency: float
    """Of W devices that each train as fast as one alone, views being at hand."""
    gradients: float
    """Seconds of a step that wait for gradients."""
    exchange: float
    """Seconds of a step that wait for what the method gathers and sums."""
    data: float
    """Seconds that the processes of a machine take for the views of a step."""


def predicted(step: Step, alone: Step, cluster: Cluster, views: float) -> Predicted:
    """Throughput of a cluster whose machines each make views of `views` images a second.

    `alone` is the same step measured for one rank: there methods compare with fewer images.
    """
    gradients = exposed(step.gradients, step.backward, cluster)
    exchange = waited(step.sent, cluster)
    computed = step.forward + step.backward + step.update
    data = cluster.devices * step.images / views
    seconds = max(computed + gradients + exchange, data)
    rate = cluster.world * step.images / seconds
    one = alone.images / (alone.forward + alone.backward + alone.update)
    return Predicted(seconds, rate, rate / (cluster.world * one), gradients, exchange, data)
