"""Recipes: every one parses, builds, and says what was published; precedence and scaling."""

import dataclasses

import pytest
import torch

from firstsight import cli, methods, recipes, settings
from firstsight.errors import UserError
from firstsight.optim.schedule import Schedule
from firstsight.views import IMAGENET_MEAN, IMAGENET_STD, PRESETS, Merge
from tests.tiny import NETWORK

# name: epochs, images of a batch, peak learning rate and weight decay, as their authors wrote them
PUBLISHED = {
    "barlow-1000ep": (1000, 2048, 1.6, 1e-6),
    "byol-40ep": (40, 4096, 7.2, 1e-6),
    "byol-100ep": (100, 4096, 7.2, 1e-6),
    "byol-300ep": (300, 4096, 4.8, 1e-6),
    "byol-1000ep": (1000, 4096, 3.2, 1.5e-6),
    "byol-scrl-200ep": (200, 8192, 14.4, 1e-6),
    "byol-scrl-1000ep": (1000, 8192, 6.4, 1.5e-6),
    "instdisc-200ep": (200, 256, 0.03, 1e-4),
    "instdisc-pic-200ep": (200, 256, 0.03, 1e-4),
    "instdisc-pic-400ep": (400, 256, 0.03, 1e-4),
    "mocov1-200ep": (200, 256, 0.03, 1e-4),
    "mocov1-pic-200ep": (200, 256, 0.03, 1e-4),
    "mocov2-200ep": (200, 256, 0.03, 1e-4),
    "mocov2-800ep": (800, 256, 0.03, 1e-4),
    "mocov2-pic-100ep": (100, 256, 0.03, 1e-4),
    "mocov2-pic-200ep": (200, 256, 0.03, 1e-4),
    "mocov2-ssl-small-200ep": (200, 256, 0.03, 1e-4),
    "mocov2-ssl-small-improved-200ep": (200, 512, 0.06, 1e-4),
    "mocov2-ssl-small-improved-800ep": (800, 512, 0.06, 1e-4),
    "mocov2-tobias-10k-200ep": (200, 256, 0.3, 1e-4),
    "mocov2-tobias-baseline-10k-200ep": (200, 256, 0.3, 1e-4),
    "mocov2-tobias-random-10k-800ep": (800, 256, 0.3, 1e-4),
    "mocov2-tobias-50k-800ep": (800, 256, 0.3, 1e-4),
    "mocov2-tobias-baseline-50k-800ep": (800, 256, 0.3, 1e-4),
    "mocov2-tobias-random-50k-800ep": (800, 256, 0.3, 1e-4),
    "mocov2-cifar10": (200, 512, 0.06, 5e-4),
    "mocov2-cifar10-symmetric": (200, 512, 0.06, 5e-4),
    "pic-200ep": (200, 256, 0.03, 1e-4),
    "pic-400ep": (400, 256, 0.03, 1e-4),
    "pic-1600ep": (1600, 256, 0.03, 1e-4),
    "pic-released-200ep": (200, 256, 0.03, 1e-4),
    "pic-one-view-200ep": (200, 256, 0.03, 1e-4),
    "pic-sampled-200ep": (200, 256, 0.03, 1e-4),
    "pic-uncorrected-200ep": (200, 256, 0.03, 1e-4),
    "densecl-200ep": (200, 256, 0.03, 1e-4),
    "densecl-coco-800ep": (800, 256, 0.3, 1e-4),
    "densecl-coco-1600ep": (1600, 256, 0.3, 1e-4),
    "pixpro-100ep": (100, 1024, 4.0, 1e-5),
    "pixpro-400ep": (400, 1024, 4.0, 1e-5),
    "mocov3-100ep": (100, 4096, 9.6, 1e-6),
    "mocov3-300ep": (300, 4096, 4.8, 1e-6),
    "mocov3-1000ep": (1000, 4096, 4.8, 1.5e-6),
    "mocov3-vits16-300ep": (300, 4096, 2.4e-3, 0.1),
    "scrl-200ep": (200, 8192, 14.4, 1e-6),
    "scrl-1000ep": (1000, 8192, 6.4, 1.5e-6),
    "seed-200ep": (200, 256, 0.03, 1e-4),
    "seed-multicrop-200ep": (200, 256, 0.03, 1e-4),
    "simclr-100ep": (100, 4096, 4.8, 1e-6),
    "simclr-1000ep": (1000, 4096, 4.8, 1e-6),
    "simclr-pic-100ep": (100, 256, 0.3, 1e-6),
    "simclr-pic-200ep": (200, 256, 0.3, 1e-6),
    "simclr-cifar10": (1000, 512, 2.0, 1e-4),
    "simsiam-100ep": (100, 512, 0.1, 1e-4),
    "vicreg-1000ep": (1000, 2048, 1.6, 1e-6),
    "swav-100ep": (100, 4096, 4.8, 1e-6),
    "swav-200ep": (200, 4096, 4.8, 1e-6),
    "swav-400ep": (400, 4096, 4.8, 1e-6),
    "swav-800ep": (800, 4096, 4.8, 1e-6),
    "swav-200ep-batch256": (200, 256, 0.6, 1e-6),
    "swav-400ep-batch256": (400, 256, 0.6, 1e-6),
    "swav-400ep-pair": (400, 4096, 4.8, 1e-6),
    "dino-vits16-100ep": (100, 512, 1e-3, 0.04),
    "dino-vits16-300ep": (300, 1024, 2e-3, 0.04),
    "dino-resnet50-100ep": (100, 512, 0.06, 1e-4),
    "barlow-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "byol-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "mocov2-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "simclr-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "simsiam-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "barlow-cifar10-solo": (1000, 256, 0.3, 1e-4),
    "byol-cifar10-solo": (1000, 256, 1.0, 1e-5),
    "mocov2-cifar10-solo": (1000, 256, 0.3, 1e-4),
    "simclr-cifar10-solo": (1000, 256, 0.4, 1e-4),
    "simsiam-cifar10-solo": (1000, 256, 0.5, 1e-5),
    "vicreg-cifar10-solo": (1000, 256, 0.3, 1e-4),
    "dino-cifar10-lightly": (200, 128, 0.06, 5e-4),
    "dino-cifar10-solo": (1000, 256, 0.3, 1e-6),
    "mocov3-cifar10-solo": (1000, 256, 0.3, 1e-6),
    "swav-cifar10-lightly": (200, 128, 1e-3, 1e-6),
    "swav-cifar10-solo": (1000, 256, 0.6, 1e-6),
}
# whose loss is a multiple of theirs: SGD takes the same steps at rate / n and weight decay * n
MULTIPLE = {"mocov2-cifar10-lightly": 2, "mocov2-cifar10-solo": 2, "byol-cifar10-lightly": 4}


def resolved(name, **values):
    method = recipes.read(name).method
    _, defaults, own = methods.describe(method)
    values = recipes.beneath(method, {"recipe": name, "data": "x", **values})
    return settings.begun(defaults, own, values, name)


def test_every_recipe_is_compared_with_what_was_published():
    assert set(recipes.names()) == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_trains_as_published(name):
    config, times = resolved(name), MULTIPLE.get(name, 1)
    epochs, batch, peak, decay = PUBLISHED[name]
    assert (config.epochs, config.batch_size) == (epochs, batch)
    assert config.peak_lr * times == pytest.approx(peak)
    assert config.weight_decay / times == pytest.approx(decay)
    assert times == 1 or config.optimizer == "sgd"
    assert config.recipe == name and (config.size == 32) == ("cifar10" in name)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_builds(name):
    recipe = recipes.read(name)
    network = "timm:test_vit" if "vit" in recipe.values["backbone"] else NETWORK
    teacher = {"teacher": f"random:{NETWORK}", "teacher_layer": "backbone"}
    own = {"method": teacher} if recipe.method == "seed" else {}  # it names none itself
    config = resolved(name, backbone=network, stem="standard", **own)
    with torch.device("meta"):  # shapes without values: heads of hundreds of megabytes
        method = methods.build(recipe.method, config, 1000)
    for key, value in recipe.values["method"].items():
        assert getattr(config.method, key) == value
    assert method.backbone.width > 0
    own = settings.plain(config)
    for key in set(recipe.values) - {"views", "method", "backbone", "stem"}:
        assert own[key] == pytest.approx(recipe.values[key]), key


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_tells_where_it_comes_from(name):
    recipe = recipes.read(name)
    assert recipe.summary and not recipe.summary.endswith(".")
    assert {"paper", "command", "hardware", "published", "reproduced"} <= set(recipe.story)
    assert f"pretrain {recipe.method} --recipe {name} " in recipe.story["command"]
    assert {"epochs", "batch_size", "base_lr", "weight_decay", "warmup_epochs"} < set(recipe.values)


def test_swav_trains_as_its_scripts_say():
    """Rates of the first, the peak and the last step; one epoch of frozen prototypes; the queue."""
    for epochs in (100, 200, 400, 800):
        config = resolved(f"swav-{epochs}ep")
        assert config.lr_start * config.peak_lr == pytest.approx(0.3)
        assert config.lr_end * config.peak_lr == pytest.approx(0.0048)
        assert config.method.freeze * epochs == pytest.approx(1)
        assert config.views.sides(224) == (224,) * 2 + (96,) * 6 and config.method.queue_size == 0
    for epochs in (200, 400):
        config = resolved(f"swav-{epochs}ep-batch256")
        assert config.lr_end * config.peak_lr == pytest.approx(0.0006)
        assert config.method.queue_start * epochs == pytest.approx(15)
        assert config.method.queue_size == 3840
    assert resolved("swav-400ep-pair").views.scales == ((0.08, 1.0),) * 2


# k-NN after 200 epochs in batches of 128 and of 512, and after 800; linear of CIFAR-10, CIFAR-100
LIGHTLY = {
    "simclr": (84.7, 84.8, 87.9), "mocov2": (83.8, 84.7, 89.9), "byol": (86.9, 86.8, 91.0),
    "simsiam": (81.9, 76.4, 90.4), "barlow": (84.2, 81.9, 85.9), "swav": (81.2, 84.2, 88.4),
    "dino": (84.0, 81.3, 84.8),
}  # fmt: skip
SOLO = {
    "simclr": (90.74, 65.78), "mocov2": (92.94, 69.89), "mocov3": (93.10, 68.83),
    "byol": (92.58, 70.46), "simsiam": (90.51, 66.04), "swav": (89.17, 64.88),
    "barlow": (92.10, 70.90), "vicreg": (92.07, 68.54), "dino": (89.52, 66.76),
}  # fmt: skip


def test_cifar10_is_read_as_the_tables_of_lightly_and_solo_learn_say():
    """Figures, normalisation, views, schedules."""
    for table, kind, digits in ((LIGHTLY, "lightly", 1), (SOLO, "solo", 2)):
        names = {name for name in PUBLISHED if name.endswith(f"-cifar10-{kind}")}
        assert names == {f"{method}-cifar10-{kind}" for method in table}
        for method, figures in table.items():
            told = recipes.read(f"{method}-cifar10-{kind}").story["published"]
            assert [f"{figure:.{digits}f} %" in told for figure in figures] == [True] * len(figures)
            config = resolved(f"{method}-cifar10-{kind}")
            assert config.views.sides(config.size) == (32, 32) and config.lr_end == 0
            assert config.weight_decay_end in (None, config.weight_decay)
            assert config.views.gray == 0.2 and config.clip_param == 0
            if kind == "lightly":
                assert config.views.mean == IMAGENET_MEAN and config.views.std == IMAGENET_STD
                assert config.views.brightness == 0.4 and not any(config.views.blurs)
                assert config.warmup_epochs == 0 and config.lr_every == "epoch"
            else:
                assert config.views.std == (0.247, 0.243, 0.261) and config.warmup_epochs == 10
                start = config.lr_start * config.peak_lr * MULTIPLE.get(f"{method}-cifar10-solo", 1)
                assert start == pytest.approx(3e-5, rel=1e-3)
                assert config.lars == "solo" or config.optimizer == "sgd"
                assert config.excluded_lr == 1 and not getattr(config.method, "zero_init", False)


def test_dino_trains_as_its_readme_says():
    for name, epochs in (("vits16-100ep", 100), ("vits16-300ep", 300), ("resnet50-100ep", 100)):
        config = resolved(f"dino-{name}")
        assert config.lr_end * config.peak_lr == pytest.approx(1e-6, rel=1e-4)
        assert config.method.freeze * epochs == pytest.approx(1, rel=1e-4)
        assert config.clip_param == 3 and config.method.teacher_start == 0.04
    assert resolved("dino-vits16-300ep").method.teacher_warmup * 300 == pytest.approx(30)
    assert resolved("dino-resnet50-100ep").weight_decay_end == 1e-4


def test_tobias_and_its_controls_differ_in_what_is_merged_alone():
    for size, epochs, queue in (("10k", (200, 200, 800), 65_536), ("50k", (800,) * 3, 32_768)):
        kinds, length = ("", "-baseline", "-random"), iter(epochs)
        three = [resolved(f"mocov2-tobias{kind}-{size}-{next(length)}ep") for kind in kinds]
        merges = [one.views.merge for one in three]
        assert [m.probability for m in merges] == [0.3, 0.0, 0.3]
        assert [m.foreground for m in merges] == ["masks", "masks", "random"]
        for one in three:
            assert one.size == 112 and one.method.queue_size == queue and one.peak_lr == 0.3
            assert dataclasses.replace(one.views, merge=Merge()) == PRESETS["mocov2"]
    other = resolved("mocov2-tobias-10k-200ep", preset="simclr").views
    assert dataclasses.replace(other, merge=Merge()) == PRESETS["simclr"]
    assert other.merge.probability == 0.3  # no preset says what is merged


def test_other_epochs_scale_the_warm_up():
    assert resolved("byol-1000ep").warmup_epochs == 10
    assert resolved("byol-1000ep", epochs=100).warmup_epochs == 1
    assert resolved("byol-100ep", epochs="400").warmup_epochs == 40
    assert resolved("byol-1000ep", epochs=100, warmup_epochs=3).warmup_epochs == 3
    short = resolved("mocov1-200ep", epochs=20)
    schedule = Schedule.of(short, steps=200, steps_per_epoch=10)
    rates = [schedule.rate(step) for step in (0, 119, 120, 159, 160, 199)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_the_colab_schedule_ends_at_zero():
    """Its epochs run from 1 to E: cos(pi e / E) of the epoch, so the last one does not move."""
    schedule = Schedule.of(resolved("mocov2-cifar10"), steps=200 * 97, steps_per_epoch=97)
    assert schedule.rate(0) == schedule.rate(96) == pytest.approx(0.06 * 0.99993831)
    assert schedule.rate(99 * 97) == pytest.approx(0.03)
    assert schedule.rate(200 * 97 - 1) == pytest.approx(0, abs=1e-15)


def test_precedence():
    """Class default < the method's < the recipe < --config < flag."""
    config = resolved("byol-scrl-200ep")
    assert config.accumulate == 1 and config.undecayed == ("norm", "bias")  # class, method
    assert config.lars == "scrl" and config.views.min_scale == (0.2,)  # recipe
    assert config.views.solarize == (0.0, 0.2)  # of the preset that its views start from
    values = {"batch-size": 512, "method": {"momentum": 0.9}, "views": {"min-scale": [0.5]}}
    config = resolved("byol-scrl-200ep", **values)
    assert config.batch_size == 512 and config.peak_lr == pytest.approx(0.9)
    assert config.method.momentum == 0.9 and config.method.start == "independent"
    assert config.views.min_scale == (0.5,)
    assert resolved("byol-scrl-200ep", preset="mocov2").views == settings.preset_views(
        "mocov2", 224
    )


def test_a_resolved_recipe_replays_itself():
    config = resolved("byol-1000ep", epochs=50)
    again = resolved("byol-1000ep", **settings.plain(config))
    assert settings.plain(again) == settings.plain(config)


def test_of_another_method_or_unknown():
    with pytest.raises(UserError, match="byol-40ep is a recipe of byol, not of simclr"):
        recipes.beneath("simclr", {"recipe": "byol-40ep"})
    with pytest.raises(UserError, match="did you mean 'byol-1000ep'"):
        recipes.beneath("byol", {"recipe": "byol-1000eps"})
    with pytest.raises(UserError, match="--epochs takes a number, not 'many'"):
        recipes.beneath("byol", {"recipe": "byol-40ep", "epochs": "many"})


def test_the_command_lists_and_shows(capsys, tmp_path):
    cli.main(["recipes"])
    listed = capsys.readouterr().out
    for name in recipes.names():
        assert f"{name} " in listed and recipes.read(name).story["paper"] in listed
    cli.main(["recipes", "byol-1000ep", "--json", str(tmp_path / "r.json")])
    text = capsys.readouterr().out
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    assert settings.read_yaml(file)["base_lr"] == 0.2 and "# paper: Grill" in text
    assert '"base_lr": 0.2' in (tmp_path / "r.json").read_text()


def test_flags_win_over_a_recipe(monkeypatch):
    from firstsight import run

    asked = []
    monkeypatch.setattr(run, "dry_run", lambda name, config: asked.append(config) or {})
    monkeypatch.setattr(cli, "_show_dry_run", lambda *_: None)
    asks = "--recipe byol-300ep --data x --epochs 30 --base-lr 0.5 --dry-run"
    cli.main(["pretrain", "byol", *asks.split()])
    (config,) = asked
    assert (config.epochs, config.warmup_epochs, config.base_lr) == (30, 1, 0.5)
    assert config.batch_size == 4096 and config.method.momentum == 0.99


def test_pic_keeps_its_crops_beside_readings_of_another_size():
    for name in ("pic-200ep", "pic-400ep", "pic-1600ep", "pic-released-200ep"):
        config = resolved(name)
        assert config.size == 224 and config.views.sides(config.size) == (160, 96, 96, 96)


def test_rates_of_parts_are_those_of_the_authors_code():
    """Barlow Twins' biases: .0048, of which 32 devices each send 1/32; SimSiam's predictor."""
    barlow = resolved("barlow-1000ep")
    assert barlow.excluded_lr * barlow.base_lr == pytest.approx(0.0048 / 32)
    assert resolved("simsiam-100ep").method.steady_predictor
    assert not resolved("simsiam-cifar10-lightly").method.steady_predictor
