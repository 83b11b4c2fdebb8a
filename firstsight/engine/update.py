"""One optimiser step: the gradient of a batch, in chunks where asked for, and what it moves."""

from __future__ import annotations

import torch
from torch import nn

from firstsight import distributed, optim, parallel
from firstsight.batch import Batch
from firstsight.engine.guards import scaler as scaler
from firstsight.loader import LAYOUTS, on_device
from firstsight.methods.base import Method, Output
from firstsight.nets import Queue, cast_to
from firstsight.settings import Pretrain


def gradients(
    model: nn.Module, batch: Batch, scaler: torch.amp.GradScaler, config: Pretrain
) -> Output:
    """Forward and backward of this rank's batch; what the method said of it, without its graph.

    In `config.accumulate` chunks it needs the memory of one. The gradient is that of the mean over
    the batch; queues read as before the batch and take all its keys at the end. Batch-norm, and
    losses that compare the images of a batch, see one chunk at a time (`Method.couples`).
    """
    device, layout = distributed.device(), LAYOUTS[config.layout]
    chunks, outputs = batch.chunks(config.accumulate), list[Output]()
    with Queue.still(model):
        for chunk in chunks:
            share = len(chunk) / len(batch)
            seen = on_device(chunk, config.views, device, layout, config.compile)
            with parallel.averaging(model, now=chunk is chunks[-1]):
                with cast_to(config.precision, device):
                    output = model(seen)
                torch.autograd.backward(scaler.scale(output.loss * share))
            scalars = {key: value * share for key, value in output.scalars.items()}
            outputs.append(Output(output.loss.detach() * share, output.features, scalars))
    return Output(
        torch.stack([output.loss for output in outputs]).sum(),
        torch.cat([output.features for output in outputs]),
        {key: torch.stack([o.scalars[key] for o in outputs]).sum() for key in outputs[0].scalars},
    )


def apply(
    method: Method,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Pretrain,
    progress: float,
    lr: float,
) -> bool:
    """Clip, step, move what follows; whether the optimiser stepped.

    In float16 it does not where a gradient overflowed; moving averages and the learning rate go
    on, as in the code of the papers that train so.
    """
    optim.set_rate(optimizer, lr, config.peak_lr)
    if config.weight_decay_end is not None:
        decay = optim.cosine(progress, config.weight_decay, config.weight_decay_end)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay if group["weight_decay"] else 0.0
    scaler.unscale_(optimizer)
    optim.clip(parallel.members(optimizer), config.clip_norm, config.clip_param)
    method.before_step(progress)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    method.after_step(progress, lr)
    return scaler.get_scale() >= scale
