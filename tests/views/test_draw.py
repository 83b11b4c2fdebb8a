import math
from dataclasses import fields, replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

from firstsight.views import PRESETS, Views
from firstsight.views.draw import draw

N = 6000
# All seeds are fixed, so these bounds are passed or not for good; a right sampler misses one with
# a probability of about one in a hundred thousand.
Z = 4.4


def drawn_many(views, width=500, height=375, seed=0, epoch=0):
    sizes = np.tile([[width, height]], (N, 1))
    return draw(views, sizes, seed=seed, epoch=epoch, index=np.arange(N))


def ks_distance(a, b):
    """Kolmogorov and Smirnov: the largest distance between two empirical distributions."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    return np.abs(
        np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)
    ).max()


def ks_bound(n, m, alpha=1e-5):
    return math.sqrt(-math.log(alpha / 2) / 2 * (n + m) / (n * m))


def assert_uniform(values, low, high):
    assert values.min() >= low
    assert values.max() <= high
    expected = np.linspace(low, high, 200_001)
    assert ks_distance(values, expected) < ks_bound(len(values), len(expected))


def assert_share(hits, probability):
    n = hits.size
    spread = math.sqrt(probability * (1 - probability) / n)
    assert abs(hits.mean() - probability) <= Z * spread


def same(a, b, *, but=()):
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name))
        for f in fields(a)
        if f.name not in but
    )


# Crops


@pytest.mark.parametrize(
    ("width", "height", "scale"),
    [
        (500, 375, (0.2, 1.0)),
        (500, 375, (0.08, 1.0)),
        (32, 32, (0.08, 1.0)),
        (96, 128, (0.05, 0.14)),
        (400, 100, (0.2, 1.0)),  # most attempts fail here
        (60, 600, (0.8, 1.0)),  # all attempts fail here
    ],
)
def test_crops_follow_random_resized_crop_of_torchvision(width, height, scale):
    views = Views(counts=(1,), min_scale=(scale[0],), max_scale=(scale[1],))
    x1, y1, x2, y2 = drawn_many(views, width, height).crops[:, 0].T
    ours_w, ours_h = x2 - x1, y2 - y1

    torch.manual_seed(1)
    image = torch.empty(1, height, width)
    params = [RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(N)]
    top, left, their_h, their_w = np.array(params).T

    bound = ks_bound(N, N)
    assert ks_distance(ours_w * ours_h, their_w * their_h) < bound
    assert ks_distance(ours_w / ours_h, their_w / their_h) < bound
    assert ks_distance(x1, left) < bound
    assert ks_distance(y1, top) < bound
    # where the crop lies in the room that it has
    assert ks_distance(x1 / (width - ours_w + 1), left / (width - their_w + 1)) < bound
    assert ks_distance(y1 / (height - ours_h + 1), top / (height - their_h + 1)) < bound


def test_crops_lie_in_the_image_whatever_its_shape():
    rng = np.random.default_rng(0)
    sizes = np.concatenate([rng.integers(1, 40, (N, 2)), [[1, 1], [1, 900], [900, 1], [5000, 2]]])
    drawn = draw(PRESETS["byol"], sizes, seed=0, epoch=0, index=np.arange(len(sizes)))
    x1, y1, x2, y2 = np.moveaxis(drawn.crops, -1, 0)
    assert (x1 >= 0).all()
    assert (y1 >= 0).all()
    assert (x1 < x2).all()
    assert (y1 < y2).all()
    assert (x2 <= sizes[:, :1]).all()
    assert (y2 <= sizes[:, 1:]).all()


def test_crops_of_each_resolution_have_its_scale():
    views = Views(counts=(2, 3), min_scale=(0.14, 0.05), max_scale=(1.0, 0.14))
    x1, y1, x2, y2 = np.moveaxis(drawn_many(views).crops, -1, 0)
    share = (x2 - x1) * (y2 - y1) / (500 * 375)
    assert share[:, :2].min() > 0.135
    assert share[:, :2].max() > 0.95
    assert share[:, 2:].min() > 0.045
    assert share[:, 2:].max() < 0.145


# Everything else


def test_probabilities_hold_for_each_view():
    views = Views(
        counts=(3,),
        flip=0.3,
        jitter=0.7,
        gray=0.15,
        blur=(1.0, 0.1, 0.4),
        solarize=(0.0, 0.2, 0.6),
    )
    drawn = drawn_many(views)
    for view in range(3):
        assert_share(drawn.flips[:, view], 0.3)
        assert_share(drawn.jitter[:, view], 0.7)
        assert_share(drawn.gray[:, view], 0.15)
        assert_share(drawn.sigmas[:, view] > 0, views.blur[view])
        assert_share(drawn.solarize[:, view], views.solarize[view])


def test_factors_and_sigmas_are_uniform():
    drawn = drawn_many(Views(brightness=0.4, contrast=0.8, saturation=1.5, hue=0.1, blur=(1.0,)))
    brightness, contrast, saturation, hue = np.moveaxis(drawn.factors, -1, 0)
    assert_uniform(brightness.ravel(), 0.6, 1.4)
    assert_uniform(contrast.ravel(), 0.2, 1.8)
    assert_uniform(saturation.ravel(), 0.0, 2.5)
    assert_uniform(hue.ravel(), -0.1, 0.1)
    assert_uniform(drawn.sigmas.ravel(), 0.1, 2.0)


def test_all_orders_of_the_jitter_are_equally_likely():
    orders = drawn_many(Views()).order.reshape(-1, 4)
    counts = [np.all(orders == order, axis=1).sum() for order in permutations(range(4))]
    assert sum(counts) == len(orders)
    expected = len(orders) / 24
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 65  # 23 degrees of freedom: one in a hundred thousand


def test_quantities_are_drawn_independently():
    d = drawn_many(Views(counts=(2,), flip=0.5, jitter=0.5, gray=0.5, blur=(0.5,), solarize=(0.5,)))
    columns = [
        *np.moveaxis(d.crops, -1, 0),
        *np.moveaxis(d.factors, -1, 0),
        *(d.flips, d.jitter, d.gray, d.sigmas > 0, d.solarize, d.order[..., 0]),
    ]
    # both views of an image side by side: they must not go together either
    table = np.array([column[:, view] for column in columns for view in range(2)], dtype=float)
    correlation = np.corrcoef(table)
    for i in range(len(table)):
        for j in range(i):
            both_of_one_crop = i < 8 and (i - j) % 2 == 0
            if not both_of_one_crop:
                assert abs(correlation[i, j]) < 4.5 / math.sqrt(N), (i, j)


# The key


def test_a_view_does_not_depend_on_its_batch():
    views = PRESETS["byol"]
    index = np.array([7, 123_456_789, 0, 42, 99])
    sizes = np.array([[500, 375], [32, 32], [640, 480], [100, 400], [37, 211]])
    together = draw(views, sizes, seed=3, epoch=5, index=index)
    reversed_ = draw(views, sizes[::-1], seed=3, epoch=5, index=index[::-1])
    for b in range(5):
        alone = draw(views, sizes[b : b + 1], seed=3, epoch=5, index=index[b : b + 1])
        for field in fields(together):
            expected = getattr(alone, field.name)[0]
            assert np.array_equal(getattr(together, field.name)[b], expected)
            assert np.array_equal(getattr(reversed_, field.name)[4 - b], expected)


def test_a_view_does_not_depend_on_how_many_views_follow():
    sizes, index = np.tile([[500, 375]], (50, 1)), np.arange(50)
    two = draw(Views(), sizes, seed=0, epoch=0, index=index)
    six = draw(Views(counts=(6,)), sizes, seed=0, epoch=0, index=index)
    for field in fields(two):
        assert np.array_equal(getattr(two, field.name), getattr(six, field.name)[:, :2])


def test_every_part_of_the_key_matters():
    sizes, index = np.tile([[500, 375]], (64, 1)), np.arange(64)

    def crops(**key):
        key = {"seed": 0, "epoch": 0, "index": index, "salt": 0} | key
        return draw(Views(), sizes, **key).crops

    base = crops()
    others = [
        crops(seed=1),
        crops(epoch=1),
        crops(salt=1),
        crops(index=index + 64),
        base[:, ::-1],  # the two views of each image
        crops(seed=1, epoch=0),
        crops(seed=0, epoch=1, salt=1),
    ]
    for other in others:
        different = (base != other).any(axis=-1)
        assert different.mean() > 0.99


def test_changing_one_setting_changes_no_other_draw():
    base = drawn_many(Views())
    for change, touched in (
        ({"blur": (0.9,)}, "sigmas"),
        ({"max_sigma": 1.0}, "sigmas"),
        ({"flip": 0.9}, "flips"),
        ({"jitter": 0.2}, "jitter"),
        ({"hue": 0.4}, "factors"),
        ({"gray": 0.9}, "gray"),
        ({"solarize": (0.5,)}, "solarize"),
        ({"min_scale": (0.5,)}, "crops"),
    ):
        changed = drawn_many(replace(Views(), **change))
        assert same(base, changed, but=(touched,))
        assert not np.array_equal(getattr(base, touched), getattr(changed, touched))


def test_a_higher_probability_keeps_what_was_drawn_before():
    rare, common = drawn_many(Views(blur=(0.1,))), drawn_many(Views(blur=(0.6,)))
    blurred = rare.sigmas > 0
    assert np.array_equal(rare.sigmas[blurred], common.sigmas[blurred])


def test_blur_by_resizing_is_one_of_three_and_moves_nothing_else():
    gaussian = drawn_many(Views(blur=(0.6,)))
    resized = drawn_many(Views(blur=(0.6,), blur_by="resize"))
    assert not gaussian.shrinks.any() and not resized.sigmas.any()
    assert same(gaussian, resized, but=("sigmas", "shrinks"))
    assert np.array_equal(gaussian.sigmas > 0, resized.shrinks > 0)
    for times in (1.1, 1.2, 1.5):
        assert_share(resized.shrinks[resized.shrinks > 0] == times, 1 / 3)


def test_draws_never_change_from_one_version_to_the_next():
    drawn = draw(PRESETS["byol"], [[500, 375]], seed=0, epoch=0, index=[0])
    assert drawn.crops.tolist() == [[[31, 13, 351, 312], [222, 54, 443, 284]]]
    assert drawn.sigmas[0, 0] == pytest.approx(0.39260613, abs=1e-8)


def test_hide_and_seek_hides_half_of_the_cells_of_one_of_three_grids():
    views = Views(hide=0.75)
    sizes = [(64, 64)] * 3000
    hidden = draw(views, sizes, seed=0, epoch=0, index=np.arange(3000)).hidden  # (B, 2, 16, 16)
    untouched = ~hidden.any(axis=(2, 3))
    assert_share(untouched[:, 0], 0.25)
    assert not np.array_equal(hidden[:, 0], hidden[:, 1])
    coarse = [
        np.array([h.repeat(w, 0).repeat(w, 1) for h in hidden[:, 0, ::w, ::w]]) for w in (4, 2)
    ]
    fours = (coarse[0] == hidden[:, 0]).all(axis=(1, 2)) & ~untouched[:, 0]
    eights = (coarse[1] == hidden[:, 0]).all(axis=(1, 2)) & ~untouched[:, 0] & ~fours
    sixteens = ~(fours | eights | untouched[:, 0])
    for grid in (fours, eights, sixteens):
        assert_share(grid, 0.25)
    for grid, width in ((fours, 4), (eights, 2), (sixteens, 1)):
        assert_share(hidden[grid, 0, ::width, ::width], 0.5)


def test_hiding_is_off_and_changes_no_other_draw():
    sizes = [(64, 48)] * 20
    plain = draw(Views(), sizes, seed=0, epoch=0, index=np.arange(20))
    hiding = draw(Views(hide=1.0), sizes, seed=0, epoch=0, index=np.arange(20))
    assert not plain.hidden.any() and hiding.hidden.any(axis=(2, 3)).all()
    for field in fields(plain):
        if field.name != "hidden":
            assert np.array_equal(getattr(plain, field.name), getattr(hiding, field.name))
    alone = draw(Views(hide=1.0), sizes[:1], seed=0, epoch=0, index=[7])
    assert np.array_equal(alone.hidden[0], hiding.hidden[7])
