"""The training loop. There is one, it is here, and it has no hooks.

What happens once in a while (a line in the log, a reading, a checkpoint) is an `if` in the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from firstsight import backbones, distributed, keyed, methods, metrics, optim, parallel
from firstsight.engine import guards, update
from firstsight.engine.state import SNAPSHOTS, State
from firstsight.engine.watch import Watch
from firstsight.features import Seen
from firstsight.loader import LAYOUTS, batches, prefetch
from firstsight.loader.resident import maker_of
from firstsight.loader.windows import order_of
from firstsight.log import Log, Meter, say, told
from firstsight.methods.base import Method
from firstsight.optim.schedule import Schedule, due
from firstsight.probe import KnnProbe, Online
from firstsight.settings import Pretrain, plain
from firstsight.sources.base import Source


class Trained(NamedTuple):
    """What training came to."""

    method: Method
    done: int
    """Steps done: fewer than wanted when a signal asked the run to stop; the same call goes on."""
    wanted: int
    seen: Seen | None
    """The features of the last reading, where it was taken just now."""


def pretrain(
    name: str, config: Pretrain, source: Source, probe: KnnProbe | None, out: Path, salt: int = 0
) -> Trained:
    """Train method `name` from where the run in `out` stands; config is resolved (no `auto`).

    `salt` counts how often it is tried from there: what is drawn is other each time.
    """
    device, layout = distributed.device(), LAYOUTS[config.layout]
    order = order_of(config, len(source))
    steps = order.steps(config.epochs)
    schedule = Schedule.of(config, steps, order.steps_per_epoch)

    method = methods.build(name, config, len(source))
    method.to(device, memory_format=layout)  # type: ignore[call-overload]
    optimizer, scaler = optim.of(method, config), update.scaler(config)
    probe = None if config.probe == "none" else probe
    online = Online(probe, config, source, method.backbone.width, device) if probe else None
    state = State(
        out=out,
        name=name,
        config=config,
        source=source,
        method=method,
        optimizer=optimizer,
        scaler=scaler,
        online=online,
        salt=salt,
    )
    state.resume()
    if config.compile:
        backbones.compile_all(method)
    model = parallel.spread(method, optimizer, config.parallel)  # the method itself on one rank
    method.train()

    main, first = distributed.rank() == 0, state.step
    log = Log(out, first, config.loggers, plain(config)) if main else None
    maker = maker_of(config, source, order, device, state.seed)
    stream = prefetch.ahead(batches(maker, first, steps, config.workers), device)
    if online:
        online.begin(first, steps)
    if online and first == 0:  # every rank takes its share of a reading
        readings = online.untrained(state.backbone())
        if log and readings:
            log.write(0, {"epoch": 0.0, **readings})

    seen: Seen | None = None
    new_bad, often = set[str](), True  # to ask all ranks at each of slow steps costs nothing
    watch = Watch(out, config.timeout)
    with Meter(name, first, steps) as meter, guards.stop_signal() as stopped, state, watch:
        for step, batch in watch.over(stream, first):
            done, progress = step + 1, step / steps
            logging = done % config.log_every == 0 or done == steps
            reading = online is not None and due(done, steps, config.probe_readings + 1)
            stopping = (often or logging) and distributed.anyone(stopped())
            saving = done % config.save_every == 0 or done == steps or stopping
            keeping = due(done, steps, SNAPSHOTS)

            torch.manual_seed(keyed.seed(state.seed, step, distributed.rank()))
            lr = schedule.rate(step)
            output = update.gradients(model, batch, scaler, config)
            # reading a loss waits for the device, so on a fast one that is rare
            alone = device.type == "cpu" and distributed.world() == 1
            if not config.skip_nonfinite and (logging or saving or alone):
                guards.refuse_nonfinite_loss(output.loss, method, step, out)
            steep = guards.steepness(optimizer, scaler) if logging or reading else {}
            stepped = update.apply(method, optimizer, scaler, config, progress, lr)
            if online:
                online.learn(step, steps, method.backbone, output.features, batch.label)
            state.advance(stepped, watch.step_took(config.batch_size))
            new_bad |= set(batch.bad)

            if logging or saving:
                guards.note_bad(new_bad, state.bad, config.max_bad * len(source))
                new_bad.clear()
            if logging or reading:
                figures = {
                    "epoch": done / order.steps_per_epoch,
                    "loss": distributed.mean(output.loss),
                    "lr": lr,
                    **watch.pace(),
                    **steep,
                    **state.counts(),
                    "feature_spread": distributed.mean(metrics.spread(output.features.float())),
                    **{key: distributed.mean(value) for key, value in output.scalars.items()},
                }
                watch.note(figures)
                slow = figures["images_per_second"] < config.batch_size or distributed.world() == 1
                often = distributed.anyone(slow)
                if reading:
                    watch.reads()
                    state.settle()
                if online and done == steps:
                    readings, seen = online.fully(state.backbone())
                    figures |= readings
                elif online and reading:
                    figures |= online.quickly(state.backbone())
                if log:
                    log.write(done, figures)
                    meter.show(done, told(figures))
            if saving or keeping:
                guards.refuse_nonfinite_networks(method, step, out)
            if keeping:
                state.snapshot()
            if saving:
                state.save()
            if stopping:
                say("stopping; the same command goes on from there")
                break
    if log:
        log.close()
    method.backbone = state.backbone()  # whole again
    distributed.barrier()
    return Trained(method, state.step, steps, seen)
