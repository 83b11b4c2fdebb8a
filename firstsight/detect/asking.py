"""A trained network asked about every image of a set, once, whatever it answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from firstsight import distributed
from firstsight.detect.inputs import Asked, ImageSet
from firstsight.detect.settings import Training
from firstsight.engine import trial
from firstsight.loader import each
from firstsight.log import Meter, say
from firstsight.nets import cast_to

T = TypeVar("T")


def answers(
    network: nn.Module,
    images: ImageSet,
    config: Training,
    use: Callable[[int, Tensor, Any], T],
) -> tuple[dict[int, T], dict[str, Any]]:
    """What `use` makes of the answer to each image, by its position, and what that took.

    `use` is given the position, the image as it was shown (3, h, w) and the answer. Each rank asks
    about its share, and knows all at the end. Images that cannot be decoded are not among them.
    """
    share = max(1, config.batch_size // distributed.world())
    shows = Asked(
        images=images, side=config.test_side, long_side=config.long_side, batch_size=share
    )
    mine = range(distributed.rank(), len(shows), distributed.world())
    device, mode = distributed.device(), network.training
    network.eval()
    began, found, done = time.perf_counter(), dict[int, T](), 0
    with torch.inference_mode(), Meter("judging", 0, len(mine)) as meter:
        for shown, positions in each(shows, mine, config.workers):
            floats = [one.to(device).float() / 255 for one in shown]
            with cast_to(config.precision, device):
                said = network(floats) if floats else []
            for position, image, answer in zip(positions, floats, said, strict=True):
                found[position] = use(position, image, answer)
            done += 1
            meter.show(done)
    rate = len(images) / (time.perf_counter() - began)
    for part in distributed.collect(found):
        found |= part
    network.train(mode)
    if lost := len(images) - len(found):
        say(f"{lost} images cannot be decoded: nothing is found in them")
    took = {"images": len(images), "unreadable": lost, "images_per_second": round(rate, 2)}
    memory = trial.peak_memory(distributed.device())
    return found, {**took, "peak_memory_gib": round(memory / 2**30, 2)}
