"""Background merging: what is drawn, and the merged image against a plain loop over cells."""

import numpy as np
import pytest
from PIL import Image

from firstsight.errors import UserError
from firstsight.sources.masks import constant_grid, foreground
from firstsight.views import Merge, Views
from firstsight.views.merge import draw_merges, exchanged, merged
from tests.views.pictures import generated

TIED = np.array([[3, 1, 2, 2], [5, 4, 4, 0], [7, 6, 2, 1], [1, 1, 9, 8]], float)
STAYS = [(3, 2), (3, 3), (2, 0), (2, 1), (1, 0), (1, 1), (1, 2), (0, 0)]  # published vector


def by_loop(image, partner, own_grid, other_grid, order, side, share=0.5):
    """As published: Pillow's bicubic squares, and one background patch after the other."""
    n = len(own_grid)
    patch = side // n
    square = (n * patch, n * patch)
    a, b = (
        np.asarray(Image.fromarray(p).resize(square, Image.Resampling.BICUBIC))
        for p in (image, partner)
    )
    by_rank = [
        sorted(((r, c) for r in range(n) for c in range(n)), key=lambda cell: -g[cell])
        for g in (own_grid, other_grid)
    ]  # sorted keeps the order of the rows among equals
    kept = int(n * n * share)
    own_background, given = (sorted(ranked[kept:]) for ranked in by_rank)
    given = [given[k] for k in sorted(range(len(given)), key=lambda k: order[k])]
    mixed = a.copy()
    for (r, c), (r2, c2) in zip(own_background, given, strict=True):
        mixed[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] = b[
            r2 * patch : (r2 + 1) * patch, c2 * patch : (c2 + 1) * patch
        ]
    height, width = image.shape[:2]
    return np.asarray(Image.fromarray(mixed).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(
    ("size", "other", "n", "side", "share", "most"),
    [
        ((64, 64), (64, 64), 4, 64, 0.5, 0),  # nothing is resized: exact
        ((90, 61), (50, 120), 4, 64, 0.5, 8),
        ((40, 48), (33, 30), 3, 64, 0.5, 8),  # squares of 63 pixels
        ((40, 48), (33, 30), 5, 64, 0.3, 8),
    ],
)
def test_a_merged_image_is_that_of_a_plain_loop(size, other, n, side, share, most):
    generator = np.random.default_rng(n)
    image, partner = generated(1, *size), generated(2, *other)
    own, given = generator.integers(0, 6, (2, n, n)).astype(float)  # with ties
    order = generator.random(n * n)
    cells = exchanged(foreground(own, share), foreground(given, share), order)
    found = merged(image, partner, cells, side)
    expected = by_loop(image, partner, own, given, order, side, share)
    assert found.shape == image.shape and found.dtype == np.uint8
    distance = np.abs(found.astype(int) - expected)  # bicubic overshoots at sharp edges
    assert distance.max() <= most and distance.mean() <= 0.5 * (most > 0)


def test_published_vector_of_the_cells_that_stay():
    """Of (row, column): the rest is a permutation of the partner's eight weakest."""
    other = np.arange(16.0).reshape(4, 4)
    cells = exchanged(foreground(TIED), foreground(other), np.random.default_rng(0).random(16))
    assert {divmod(int(c), 4) for c in np.flatnonzero(cells < 0)} == set(STAYS)
    assert sorted(cells[cells >= 0]) == list(range(8)) != list(cells[cells >= 0])


def test_the_constant_mask_is_what_published_masks_choose_most():
    """Shares of 80 photographs, docs/localization.md: its eight largest."""
    shares = [[0, 0, 0, 4], [1, 65, 94, 85], [0, 96, 98, 95], [1, 84, 98, 80]]
    assert (foreground(constant_grid(4)) == foreground(np.array(shares, float))).all()
    assert foreground(constant_grid(7)).sum() == 24


def merging(**settings):
    return Views(merge=Merge(probability=0.3, **settings))


def test_draws_are_a_function_of_seed_epoch_image_and_view():
    views, index = merging(views="both"), np.arange(500)
    drawn = draw_merges(views, 16, 1000, seed=3, epoch=2, index=index)
    alone = draw_merges(views, 16, 1000, seed=3, epoch=2, index=[77])
    assert (alone.partners[0] == drawn.partners[77]).all()
    assert (alone.numbers[0] == drawn.numbers[77]).all()
    for other in ({"seed": 4}, {"epoch": 3}, {"salt": 1}):
        key = {"seed": 3, "epoch": 2, **other}
        again = draw_merges(views, 16, 1000, index=index, **key)
        assert (again.partners != drawn.partners).mean() > 0.4
    assert (drawn.partners[:, 0] != drawn.partners[:, 1]).any()
    finer = draw_merges(views, 49, 1000, seed=3, epoch=2, index=index)
    assert (finer.numbers[..., :16] == drawn.numbers).all()  # cells keep their numbers


def test_as_many_are_merged_as_asked_with_anybody():
    drawn = draw_merges(merging(), 16, 10, seed=0, epoch=0, index=np.arange(4000))
    query, key = drawn.partners.T
    assert (key == -1).all()
    assert abs((query >= 0).mean() - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 4000)
    counts = np.bincount(query[query >= 0], minlength=10)
    assert len(counts) == 10 and np.abs(counts - 120).max() < 4 * np.sqrt(120)
    assert draw_merges(Views(), 16, 10, seed=0, epoch=0, index=[1]).partners.max() == -1
    # where each of the partner's first cells goes: anywhere
    firsts = drawn.numbers[:, 0, 0].argsort(axis=1)[:, 0]
    assert np.abs(np.bincount(firsts, minlength=16) - 250).max() < 5 * np.sqrt(250)
    flat = np.column_stack([query, drawn.numbers[:, 0].reshape(4000, -1)])[query >= 0]
    assert np.abs(np.corrcoef(flat.T) - np.eye(49)).max() < 0.15  # partner, order, random grids


def test_of_many_sizes_only_the_first_two_views_are_merged():
    views = Views(counts=(2, 3), sizes=(64, 32), merge=Merge(probability=1.0, views="both"))
    partners = draw_merges(views, 16, 9, seed=0, epoch=0, index=np.arange(20)).partners
    assert (partners[:, :2] >= 0).all() and (partners[:, 2:] == -1).all()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"probability": 1.5}, "--views.merge.probability must be from 0 to 1"),
        ({"share": -0.1}, "--views.merge.share"),
        ({"grid": 0}, "--views.merge.grid must be above 0"),
        ({"side": -1}, "--views.merge.side"),
        ({"foreground": "random", "masks": "m.json"}, "random reads no masks; leave out"),
    ],
)
def test_wrong_settings_are_one_sentence(values, said):
    with pytest.raises(UserError, match=said):
        Merge(**values)


def test_one_view_alone_has_no_background_to_lose():
    with pytest.raises(UserError, match=r"not for --views\.counts 1; leave it out"):
        Views(counts=(1,), merge=Merge(probability=0.3))
    Views(counts=(1,))
