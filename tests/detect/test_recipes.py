"""Recipes of detectors: their published numbers, in their own words, and what scales with them."""

import pytest

from firstsight import recipes, settings
from firstsight.cli.detect import _begun
from firstsight.detect.settings import Train
from firstsight.errors import UserError
from firstsight.optim.schedule import Schedule

COCO = tuple(range(640, 801, 32))
VOC = tuple(range(480, 801, 32))
# detector, neck, frozen stages, short sides, steps or epochs, drops in these, warm-up
PUBLISHED = {
    "mask-rcnn-mocov2-1x": ("mask-rcnn", "fpn", 0, (800,), 12, (8, 11), 500),
    "mask-rcnn-mocov2-ms-2x": ("mask-rcnn", "fpn", 0, (640, 800), 24, (16, 22), 500),
    "mask-rcnn-swav-1x": ("mask-rcnn", "fpn", 0, (800,), 12, (8, 11), 500),
    "mask-rcnn-swav-ms-2x": ("mask-rcnn", "fpn", 0, (640, 800), 24, (16, 22), 500),
    "faster-rcnn-tobias-voc-24k": ("faster-rcnn", "fpn", -1, VOC, 24000, (18000, 22000), 100),
    "faster-rcnn-moco-voc-c4-24k": ("faster-rcnn", "c4", -1, VOC, 24000, (18000, 22000), 100),
    "mask-rcnn-tobias-coco-1x": ("mask-rcnn", "fpn", -1, COCO, 90000, (60000, 80000), 1000),
    "faster-rcnn-scrl-1x": ("faster-rcnn", "fpn", 1, COCO, 90000, (60000, 80000), 1000),
    "mask-rcnn-scrl-1x": ("mask-rcnn", "fpn", 1, COCO, 90000, (60000, 80000), 1000),
}


def resolved(name, **values):
    values = recipes.of_detection({"recipe": name, **values})
    return settings.merged(Train(checkpoint="x", out="x"), values, name)


def test_every_recipe_is_compared_with_what_was_published():
    assert set(recipes.names("detect")) == {*PUBLISHED, "faster-rcnn-small", "fcn-small"}
    assert not set(recipes.names("detect")) & set(recipes.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_as_published(name):
    config = resolved(name)
    detector, neck, frozen, sides, length, drops, warmup = PUBLISHED[name]
    assert (config.detector, config.neck, config.frozen_stages) == (detector, neck, frozen)
    assert config.short_sides == sides and config.warmup_steps == warmup
    assert config.scales == ("range" if "ms" in name else "choice")
    assert (config.steps or config.epochs) == length
    assert (config.batch_size, config.peak_lr, config.weight_decay) == (16, 0.02, 1e-4)
    steps = config.steps or length * 7330
    schedule = Schedule(
        steps=steps, peak=0.02, shape="step", drops=config.drops, warmup=warmup, start=0.001
    )
    unit = steps // length
    for drop, before, after in ((drops[0], 0.02, 0.002), (drops[1], 0.002, 0.0002)):
        rates = [schedule.rate(drop * unit - 1), schedule.rate(drop * unit)]
        assert rates == pytest.approx([before, after])
    assert schedule.rate(0) == pytest.approx(2e-5)
    assert schedule.rate(warmup // 2) == pytest.approx(0.02 * 0.5005)
    norms = {"scrl": ("neck", "heads"), "tobias": ("neck",), "c4": ("heads",)}
    assert config.norm == "sync" and config.norm_also == next(
        (places for who, places in norms.items() if who in name), ()
    )
    assert config.proposals == ((2000, 1000) if neck == "c4" else (1000, 1000))
    assert config.undecayed == (() if frozen == 0 else ("norm",))  # MMDetection decays norms too


@pytest.mark.parametrize("name", recipes.names("detect"))
def test_a_recipe_tells_where_it_comes_from(name):
    recipe = recipes.read(name)
    assert recipe.method == "detect" and recipe.summary and not recipe.summary.endswith(".")
    assert {"paper", "command", "hardware", "published", "reproduced"} <= set(recipe.story)
    words = recipe.story["command"].split()
    assert words[:3] == ["firstsight", "detect", "train"] and f"runs/{name}" in words
    config = _begun(Train, words[3:], "detect train", {"checkpoint": "x"})
    assert config.recipe == name and config.test_data


def test_other_lengths_scale_the_warm_up():
    assert resolved("mask-rcnn-mocov2-1x", epochs=3).warmup_steps == 125
    assert resolved("faster-rcnn-tobias-voc-24k", steps="2400").warmup_steps == 10
    by_epochs = resolved("faster-rcnn-tobias-voc-24k", epochs=4)
    assert (by_epochs.steps, by_epochs.epochs, by_epochs.warmup_steps) == (0, 4, 100)
    with pytest.raises(UserError, match="byol-40ep is a recipe of byol; use --recipe with one of"):
        recipes.of_detection({"recipe": "byol-40ep"})
    with pytest.raises(UserError, match="recipe of detect, not of byol"):
        recipes.beneath("byol", {"recipe": "faster-rcnn-small"})
