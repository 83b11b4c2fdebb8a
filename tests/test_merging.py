"""Merged views in a run: geometry, workers, ranks, resuming, masks that are made or given."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
import torch

from firstsight import methods, run
from firstsight.engine import trial
from firstsight.errors import UserError
from firstsight.loader import Steps, merging, resident
from firstsight.localize.commands import Masks
from firstsight.localize.grids import write_masks
from firstsight.order import Epochs
from firstsight.settings import read_yaml
from firstsight.sources.base import UnreadableImage, readable
from firstsight.sources.masks import foreground, foregrounds_of, read_masks
from firstsight.views import Merge
from firstsight.views.apply import apply
from firstsight.views.draw import draw
from firstsight.views.merge import draw_merges, exchanged, merged
from tests.tiny import NETWORK, Patches, config

N = 12


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """A file of ours with grids of 4 x 4 at random, and the grids by position."""
    path = tmp_path_factory.mktemp("masks") / "m.json"
    grids = np.random.default_rng(0).random((N, 4, 4))
    named = {f"patch-{i}.png": grid.tolist() for i, grid in enumerate(grids)}
    path.write_text(json.dumps({"meta": {"seed": 0}, "masks": named}))
    return path, grids


def settings(masks, **values):
    merge = {"probability": 1.0, "masks": str(masks[0]), "side": 32, **values}
    if merge.get("foreground", "masks") != "masks":
        merge["masks"] = ""
    return config("mocov2", "unused", views={"merge": merge})


def maker(asked, source=None, **options):
    source = source or Patches(N)
    options = {"rank": 0, "world": 1, **options}
    return Steps(
        source=source,
        views=asked.views,
        size=32,
        order=Epochs(len(source), 6, 0),
        seed=0,
        merger=merging.merger_of(asked, source),
        **options,
    )


def same(one, other):
    tensors = zip(one.views + one.crops + one.flips, other.views + other.crops + other.flips)  # noqa: B905
    return all(torch.equal(a, b) for a, b in tensors) and torch.equal(one.index, other.index)


def test_a_view_is_cut_out_of_the_merged_image(masks):
    """Step by step: the partner, the cells, the merged image, and all that follows of old."""
    asked, source = settings(masks, probability=0.6), Patches(N)
    batch = maker(asked).batch(3)
    plain = dataclasses.replace(asked.views, merge=Merge())
    seen = 0
    for slot, i in enumerate(batch.index.tolist()):
        image = source.pixels(i)
        drawn = draw(plain, [image.shape[1::-1]], seed=0, epoch=1, index=[i])
        merges = draw_merges(asked.views, 16, N, seed=0, epoch=1, index=[i])
        shown = [image, image]
        if (partner := int(merges.partners[0, 0])) >= 0:
            own, other = (foreground(masks[1][k]) for k in (i, partner))
            cells = exchanged(own, other, merges.numbers[0, 0, 0])
            shown[0] = merged(image, source.pixels(partner), cells, 32)
            seen += partner != i
        for v in range(2):
            expected = torch.from_numpy(apply(shown[v], drawn, 0, v, 32, mean=plain.mean))
            assert torch.equal(batch.views[v][slot], expected.permute(2, 0, 1))
            assert batch.crops[v][slot].tolist() == drawn.crops[0, v].tolist()
    assert 0 < seen < 6


class Plain(Patches):
    """Even images are red, odd ones blue, so that a pixel says whose it is."""

    def pixels(self, index):
        picture = np.zeros((60, 96, 3), np.uint8)
        picture[..., 2 if index % 2 else 0] = 255
        return picture


def test_foreground_is_cropped_and_mirrored_as_the_photograph_is(masks):
    colourless = {"jitter": 0.0, "gray": 0.0, "blur": (0.0,), "min_scale": (0.3,)}
    asked = settings(masks)
    asked = dataclasses.replace(asked, views=dataclasses.replace(asked.views, **colourless))
    batch = maker(asked, Plain(N)).batch(0)
    drawn = draw_merges(asked.views, 16, N, seed=0, epoch=0, index=batch.index.numpy())
    checked, mirrored = 0, set()
    for slot, i in enumerate(batch.index.tolist()):
        partner = int(drawn.partners[slot, 0])
        x1, y1, x2, y2 = batch.crops[0][slot].tolist()
        flipped = bool(batch.flips[0][slot])
        for y in range(32):
            for x in range(32):
                across = (31 - x if flipped else x) + 0.5
                left = (x1 + across / 32 * (x2 - x1)) / 96 * 4
                top = (y1 + (y + 0.5) / 32 * (y2 - y1)) / 60 * 4
                if min(left % 1, top % 1, -left % 1, -top % 1) < 0.17:
                    continue  # beside an edge, where two cells mix
                whose = i if foreground(masks[1][i])[int(top), int(left)] else partner
                red, _, blue = batch.views[0][slot, :, y, x].tolist()
                assert (blue > red) == bool(whose % 2)
                checked += partner % 2 != i % 2
        mirrored |= {flipped} if partner % 2 != i % 2 else set()
    assert checked > 500 and mirrored == {True, False}


@pytest.mark.parametrize("kind", ["masks", "random", "constant"])
def test_only_the_query_is_merged_unless_both_are_asked_for(kind, masks):
    before = maker(settings(masks, probability=0.0)).batch(0)
    query = maker(settings(masks, foreground=kind)).batch(0)
    both = maker(settings(masks, foreground=kind, views="both")).batch(0)
    assert torch.equal(before.views[1], query.views[1])
    assert torch.equal(query.views[0], both.views[0])
    differs = [(a != b).flatten(1).any(1).all() for a, b in zip(before.views, both.views)]  # noqa: B905
    assert all(differs)
    for other in (query, both):
        assert all(map(torch.equal, before.crops + before.flips, other.crops + other.flips))


def test_never_merged_is_the_plain_run_bit_for_bit(masks):
    plain = config("mocov2", "unused")
    assert merging.merger_of(settings(masks, probability=0.0), Patches(N)) is None
    never = settings(masks, probability=1e-12)  # drawn, and nobody is chosen
    assert same(maker(plain).batch(1), maker(never).batch(1))


@pytest.mark.parametrize("kind", ["masks", "random"])
def test_neither_ranks_nor_history_nor_workers_count(kind, masks):
    asked = settings(masks, foreground=kind, views="both", probability=0.7)
    whole = maker(asked)
    earlier = [whole.batch(step) for step in range(4)]
    fresh = pickle.loads(pickle.dumps(maker(asked)))  # as a worker gets it, at the third step
    assert same(fresh.batch(3), earlier[3])
    halves = [maker(asked, rank=rank, world=2).batch(3) for rank in range(2)]
    for v in range(2):
        assert torch.equal(earlier[3].views[v], torch.cat([half.views[v] for half in halves]))
    assert not torch.equal(earlier[1].views[0], earlier[3].views[0])


def test_a_run_that_went_back_merges_others(masks):
    """The seed of views is salted then; partners that brought a fault would bring it again."""
    asked, order = settings(masks, foreground="random"), Epochs(N, 6, 0)
    for seed in (0, 7):
        made = resident.maker_of(asked, Patches(N), order, torch.device("cpu"), seed)
        drawn = made.merger.draw(1, np.arange(N))
        expected = draw_merges(asked.views, 16, N, seed=seed, epoch=1, index=np.arange(N))
        assert (drawn.partners == expected.partners).all()
        assert (drawn.numbers == expected.numbers).all()


def test_on_the_device_only_colours_are_left_to_do(masks):
    """What workers cut out for it is the merged image, without colours."""
    asked = settings(masks)
    batch = maker(asked, views_on="device").batch(0)
    bare = dict.fromkeys(("jitter", "gray", "flip"), 0.0) | {"blur": (0.0,)}
    asked = dataclasses.replace(asked, views=dataclasses.replace(asked.views, **bare))
    assert all(map(torch.equal, maker(asked).batch(0).views, batch.views))
    with pytest.raises(UserError, match="leave out --resident"):
        config("simclr", "x", resident=True, views={"merge": {"probability": 0.3}})


def test_random_and_constant_foregrounds_know_no_mask(masks):
    """Random cells are drawn anew for each view; constant ones are the same eight for all."""
    source, seen = Patches(N), {}
    for kind in ("random", "constant"):
        merger = merging.merger_of(settings(masks, foreground=kind), source)
        assert merger.foregrounds.shape == (N, 4, 4)
        drawn = merger.draw(0, np.arange(N))
        kept = []
        for i in range(N):
            image = np.full((32, 32, 3), 7, np.uint8)
            shown = merger.shown(image, i, drawn, i, 0, [])
            cells = (shown == 7).all(-1).reshape(4, 8, 4, 8).all((1, 3))
            assert cells.sum() == 8
            kept.append(cells)
        seen[kind] = np.array(kept)
    lower_right = [[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert (seen["constant"] == np.array(lower_right, bool)).all()
    assert len(np.unique(seen["random"], axis=0)) == N and (seen["random"].mean(0) > 0.1).all()


def test_a_partner_that_cannot_be_read_is_named_and_replaced(masks):
    """By always the same image, whose own mask then counts."""
    asked, bad = settings(masks), Patches(N, unreadable=(4, 7))
    batch, again = maker(asked, bad).batch(0), maker(asked, bad).batch(0)
    assert same(batch, again) and set(batch.bad) <= {"patch-4.png", "patch-7.png"}
    merger = merging.merger_of(asked, bad)
    drawn, named = merger.draw(0, np.arange(N)), []
    drawn.partners[0, 0] = 4
    shown = merger.shown(bad.pixels(0), 0, drawn, 0, 0, named)
    other, pixels = readable(bad, 4, 0, [])
    cells = exchanged(foreground(masks[1][0]), foreground(masks[1][other]), drawn.numbers[0, 0, 0])
    assert named[0] == "patch-4.png" and other not in bad.unreadable
    assert (shown == merged(bad.pixels(0), pixels, cells, 32)).all()
    with pytest.raises(UnreadableImage):
        bad.pixels(4)


def test_masks_that_do_not_cover_the_source_are_refused_and_counted(masks, tmp_path):
    with pytest.raises(UserError, match=r"for 3 of the 15 images of patches, patch-12\.png first"):
        foregrounds_of(masks[0], Patches(15), 0.5)
    held = json.loads(masks[0].read_text())
    held["meta"]["unreadable"] = ["patch-12.png", "patch-13.png", "patch-14.png"]
    known = tmp_path / "known.json"  # they could not be read when it was made, and need none
    known.write_text(json.dumps(held))
    assert foregrounds_of(known, Patches(15), 0.5).sum((1, 2)).tolist() == [8] * 15


def test_images_that_cannot_be_read_when_masks_are_made_need_none(tmp_path):
    asked = Masks(
        checkpoint=f"random:{NETWORK}", data="patches", out=str(tmp_path / "m.json"), input_size=64
    )
    bad = Patches(N, unreadable=(4, 7))
    assert write_masks(asked, bad)["images"] == N - 2
    assert read_masks(asked.out)[1]["unreadable"] == ["patch-4.png", "patch-7.png"]
    assert foregrounds_of(asked.out, bad, 0.5).sum((1, 2)).tolist() == [8] * N


class Nested(Patches):
    def identity(self, index):
        return f"deep/{index // 2}/{index % 2}.png"


class Twins(Patches):
    def identity(self, index):
        return f"{index}/cats/0.png"


def test_a_published_file_names_images_by_class_and_file(tmp_path):
    grids = np.random.default_rng(1).random((6, 4, 4))
    file = tmp_path / "flat.json"
    named = {f"{i // 2}/{i % 2}.png": grid.tolist() for i, grid in enumerate(grids)}
    file.write_text(json.dumps(named))
    expected = [foreground(grid) for grid in grids]
    assert (foregrounds_of(file, Nested(6), 0.5) == expected).all()
    with pytest.raises(UserError, match="no mask for 2 of the 8 images"):
        foregrounds_of(file, Nested(8), 0.5)
    with pytest.raises(UserError, match="by CLASS/FILE, and 5 of patches share that"):
        foregrounds_of(file, Twins(6), 0.5)


@pytest.mark.parametrize("name", methods.names())
def test_every_method_of_two_views_can_be_merged(name, tmp_path):
    """Its own views, all else of the batch as it is: nothing that a method could tell."""
    plain = config(name, tmp_path, batch_size=6)
    merge = {"probability": 1.0, "foreground": "constant", "side": 32}
    if plain.views.counts[0] < 2:
        with pytest.raises(UserError, match="for two views of one size"):
            config(name, tmp_path, views={"merge": merge})
        return
    asked = config(name, tmp_path, batch_size=6, views={"merge": merge})
    before, after = (maker(one).batch(0) for one in (plain, asked))
    assert not torch.equal(before.views[0], after.views[0])
    assert all(map(torch.equal, before.views[1:], after.views[1:]))
    assert all(map(torch.equal, before.crops + before.flips, after.crops + after.flips))
    sides = asked.views.sides(32)
    assert [view.shape[-1] for view in after.views] == list(sides)


MADE = {"probability": 0.5, "network": f"random:{NETWORK}", "side": 32}


def asked_for(folder, **merge):
    values = {"data": "scenes:train@16", "probe": "none", "epochs": 1.0, "linear": False}
    values["precision"] = "bf16"
    return config("mocov2", folder, **values, views={"merge": {**MADE, **merge}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that made its masks."""
    folder = tmp_path_factory.mktemp("made") / "run"
    told, say = [], run.say
    run.say = told.append
    run.pretrain("mocov2", asked_for(folder))
    run.say = say
    (folder / "told.txt").write_text("\n".join(told))
    return folder


def test_a_run_says_how_much_its_masks_differ(trained):
    """Masks that are one for all images are no masks: the share of each cell, by hand."""
    grids = read_masks(trained / "masks.json")[0].values()
    shares = np.mean([foreground(grid) for grid in grids], axis=0).ravel()
    bits = [-sum(p * np.log2(p) for p in (s, 1 - s) if p > 0) for s in shares]
    constant = sum(s <= 0.02 or s >= 0.98 for s in shares) / 16
    expected = f"entropy {np.mean(bits):.3f} bits a cell (0: one mask for all images), constant "
    assert f"{expected}cells {100 * constant:.0f} %" in (trained / "told.txt").read_text()


def test_a_run_makes_its_masks_and_goes_on_with_them(trained, capsys):
    held = json.loads((trained / "masks.json").read_text())
    assert len(held["masks"]) == 16 and held["meta"]["checkpoint"] == f"random:{NETWORK}"
    assert held["meta"]["precision"] == "bf16"  # as the run: two and a half times as fast
    written = read_yaml(trained / "config.yaml")["views"]["merge"]
    assert written["masks"] == "" and len(written["sha256"]) == 64
    before = (trained / "masks.json").read_bytes()
    run.pretrain("mocov2", dataclasses.replace(asked_for(trained), epochs=2.0))
    assert "extending" in capsys.readouterr().err
    assert (trained / "masks.json").read_bytes() == before
    assert (trained / "pictures/views.png").exists()

    (trained / "masks.json").write_text(json.dumps({**held, "meta": {"note": "same masks"}}))
    run.pretrain("mocov2", dataclasses.replace(asked_for(trained), epochs=2.0))
    grids = {key: (-np.array(grid)).tolist() for key, grid in held["masks"].items()}
    (trained / "masks.json").write_text(json.dumps({**held, "masks": grids}))
    with pytest.raises(UserError, match=r"is not what .* began with; put the old one back"):
        run.pretrain("mocov2", dataclasses.replace(asked_for(trained), epochs=3.0))
    (trained / "masks.json").unlink()  # made again, the same
    run.pretrain("mocov2", dataclasses.replace(asked_for(trained), epochs=2.0))
    assert json.loads((trained / "masks.json").read_text())["masks"] == held["masks"]


def test_a_given_file_is_refused_before_anything_is_written(masks, tmp_path):
    asked = asked_for(tmp_path / "run", masks=str(masks[0]))
    with pytest.raises(UserError, match="no mask for 16 of the 16 images"):
        run.pretrain("mocov2", asked)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_needs_no_masks(tmp_path, monkeypatch):
    tried = trial.Trial(seconds=1.0, memory=1, parameters=1)
    monkeypatch.setattr(trial, "of_share", lambda *_: tried)
    result = trial.dry_run("mocov2", asked_for(tmp_path / "run"), Patches(N))
    assert result["seconds_views"] > 0 and not (tmp_path / "run").exists()


def test_the_sheet_of_a_run_shows_merged_views(masks):
    from firstsight.pictures import views_sheet

    plain, asked = (settings(masks, probability=p) for p in (0.0, 1.0))
    before, after = (views_sheet(one, Patches(N)) for one in (plain, asked))
    differs = (before != after).any(axis=(0, 2)).nonzero()[0]
    block = (before.shape[1] - 24) // 2  # two photographs beside each other
    cell = 32 + 2 * 3 + 6
    places = {(x % (block + 24)) // cell for x in differs}
    assert places == {1}, "only the query: not the original, not the key"
