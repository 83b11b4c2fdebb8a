import numpy as np

from firstsight.views import PRESETS, Views
from firstsight.views.apply import apply
from firstsight.views.draw import draw
from firstsight.views.sheet import sheet
from tests.views.pictures import generated


def test_the_sheet_shows_the_views_of_a_run():
    pictures = [generated(0, 200, 150), generated(1, 60, 90)]
    picture = sheet(pictures, PRESETS["byol"], 64, draws=2, seed=5, index=[40, 3])
    assert picture.dtype == np.uint8
    assert picture.shape == (4 * 70 + 3 * 6, 3 * 70 + 2 * 6, 3)
    drawn = draw(PRESETS["byol"], [(200, 150), (60, 90)], seed=5, epoch=1, index=[40, 3])
    view = apply(pictures[1], drawn, 1, 1, 64, "bicubic")
    last = picture[-67:-3, -67:-3]
    assert np.array_equal(last[8:, 8:], view[8:, 8:])  # the corner may carry the mark of the flip


def test_views_of_several_sizes_fit_side_by_side():
    views = Views(counts=(2, 3), sizes=(96, 48), min_scale=(0.2, 0.05), max_scale=(1.0, 0.2))
    picture = sheet([generated(0, 200, 150)], views, 32, draws=1)
    assert picture.shape == (102, 3 * 102 + 3 * 54 + 5 * 6, 3)
