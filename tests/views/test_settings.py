import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from firstsight.errors import UserError
from firstsight.views import PRESETS, Views
from firstsight.views.draw import draw
from tests.tiny import config


def test_values_repeat_over_resolutions_and_views():
    views = Views(
        counts=(2, 3),
        sizes=(224, 96),
        min_scale=(0.14, 0.05),
        max_scale=(1.0, 0.14),
        blur=(1.0, 0.1),
    )
    assert views.total == 5
    assert views.resolution == (0, 0, 1, 1, 1)
    assert views.sides(160) == (224, 224, 96, 96, 96)
    assert views.scales == ((0.14, 1.0),) * 2 + ((0.05, 0.14),) * 3
    assert views.blurs == (1.0, 0.1, 0.1, 0.1, 0.1)
    assert Views().sides(160) == (160, 160)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"counts": ()}, "views.counts"),
        ({"counts": (2, 0)}, "views.counts"),
        ({"sizes": (224, 96)}, "views.sizes"),
        ({"min_scale": (0.0,)}, "views.min-scale"),
        ({"min_scale": (0.5,), "max_scale": (0.4,)}, "views.max-scale"),
        ({"max_scale": (1.5,)}, "views.max-scale"),
        ({"min_ratio": 1.5}, "views.min-ratio"),
        ({"flip": 1.2}, "views.flip"),
        ({"gray": -0.1}, "views.gray"),
        ({"gray": float("nan")}, "views.gray"),
        ({"hue": 0.6}, "views.hue"),
        ({"brightness": -0.4}, "views.brightness"),
        ({"strength": -1.0}, "views.strength"),
        ({"blur": (0.5, 0.5, 0.5)}, "views.blur"),
        ({"blur": ()}, "views.blur"),
        ({"solarize": (2.0,)}, "views.solarize"),
        ({"min_sigma": 3.0}, "views.min-sigma"),
        ({"interpolation": "bilinaer"}, "bilinear"),
        ({"std": (0.2, 0.0, 0.2)}, "views.std"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_the_name_of_its_flag(wrong, flag):
    with pytest.raises(UserError, match=flag):
        Views(**wrong)


def test_presets_are_those_of_the_papers():
    def jitter(name):
        v = PRESETS[name]
        return v.jitter, v.brightness, v.contrast, v.saturation, v.hue

    assert {"mocov1", "mocov2", "simclr", "byol", "mocov2-small", "simclr-small"} < set(PRESETS)
    assert PRESETS["scrl"] == replace(PRESETS["byol"], min_scale=(0.2,))
    assert PRESETS["seed"] == replace(PRESETS["mocov2"], counts=(1,))
    crops = PRESETS["seed-multicrop"]
    assert crops.sides(224) == (224, *(96,) * 6)
    assert crops.scales == ((0.14, 1.0), *((0.05, 0.14),) * 6)
    assert jitter("mocov1") == (1.0, 0.4, 0.4, 0.4, 0.4)
    assert jitter("mocov2") == (0.8, 0.4, 0.4, 0.4, 0.1)
    assert jitter("simclr") == (0.8, 0.8, 0.8, 0.8, 0.2)
    assert jitter("byol") == (0.8, 0.4, 0.4, 0.2, 0.1)
    assert jitter("mocov2-small") == jitter("simclr-small") == jitter("mocov2")
    assert PRESETS["byol"].blurs == (1.0, 0.1)
    assert PRESETS["byol"].solarizes == (0.0, 0.2)
    assert PRESETS["mocov1"].blurs == PRESETS["mocov2-small"].blurs == (0.0, 0.0)
    assert PRESETS["mocov2"].scales == ((0.2, 1.0),) * 2
    for name in ("simclr", "byol", "mocov2-small", "simclr-small"):
        assert PRESETS[name].scales == ((0.08, 1.0),) * 2
    for name in ("simclr", "byol"):
        assert PRESETS[name].interpolation == "bicubic"
    assert jitter("swav") == jitter("simclr") and jitter("dino") == jitter("byol")
    swav, dino = PRESETS["swav"], PRESETS["dino"]
    assert swav.sides(999) == (224,) * 2 + (96,) * 6
    assert dino.sides(999) == (224,) * 2 + (96,) * 8
    assert swav.scales == ((0.14, 1.0),) * 2 + ((0.05, 0.14),) * 6
    assert dino.scales == ((0.4, 1.0),) * 2 + ((0.05, 0.4),) * 8
    assert swav.blurs == (0.5,) * 8 and dino.blurs == (1.0, 0.1, *(0.5,) * 8)
    assert dino.solarizes == (0.0, 0.2, *(0.0,) * 8) and dino.interpolation == "bicubic"
    assert replace(PRESETS["byol"], flip=0.0).blurs == (1.0, 0.1)


@pytest.mark.parametrize(
    ("cj", "parts", "hue"), [(0.25, 0.2, 0.1), (0.5, 0.4, 0.2), (1, 0.8, 0.4), (1.5, 1.2, 0.5)]
)
def test_one_number_is_the_strength_of_the_jitter(cj, parts, hue):
    """Published vectors of ssl-small's `cj`; what is drawn follows it."""
    views = replace(PRESETS["ssl-small"], strength=cj)
    assert views.strengths == pytest.approx((parts, parts, parts, hue))
    assert (views.gray, views.blurs, views.jitter) == (0.5, (0.5, 0.5), 0.8)
    plain = replace(views, brightness=parts, contrast=parts, saturation=parts, hue=hue, strength=1)
    one, other = (
        draw(v, [[64, 48]] * 40, seed=0, epoch=0, index=np.arange(40)) for v in (views, plain)
    )
    assert np.allclose(one.factors, other.factors, rtol=0, atol=1e-12)
    assert abs(one.factors[..., :3] - 1).max() == pytest.approx(min(1.2, parts), rel=0.05)


def test_settings_import_neither_torch_nor_opencv():
    code = "import sys, firstsight.views; assert not {'torch', 'cv2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_hidden_cells_are_a_work_of_workers(tmp_path):
    for elsewhere in ({"views_on": "device"}, {"resident": True}):
        with pytest.raises(UserError, match="--views-on worker"):
            config("simclr", tmp_path, views={"hide": 0.75}, **elsewhere)
