"""evaluate knn on a run: the layer that was asked for, read as the protocol says."""

import sys

import pytest
import torch
from PIL import Image

from firstsight import diagnose, distributed, load_backbone, methods, pairs, run
from firstsight.errors import UserError
from firstsight.evaluate import dense, finetune, instance, knn, linear
from firstsight.evaluate.knn import Search
from firstsight.evaluate.repeated import repeated_files
from firstsight.features import Reader, extract
from firstsight.metrics import knn_predict
from firstsight.sources import open_source
from firstsight.views.apply import eval_policy, eval_view
from tests.tiny import NETWORK, config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    values = {"data": "scenes:train@32", "probe_test": "scenes:test@30", "probe_k": 5}
    return run.pretrain("mocov2", config("mocov2", out, **values))


def test_the_reading_of_the_run_is_the_reading_of_the_command(finished):
    import json

    summary = json.loads((finished / "summary.json").read_text())
    result = knn(str(finished), train="scenes:train@32", test="scenes:test@30", k=[5], device="cpu")
    assert result["k"]["5"]["top1"] == pytest.approx(summary["knn"]["trained"])
    assert result["protocol"]["size"] == 32 and result["protocol"]["view"] == eval_policy(32)
    said = summary["knn"]["protocol"]
    for key in ("view", "mean", "std", "size", "precision", "versions", "representation"):
        assert said[key] == result["protocol"][key]


def test_the_embedding_is_the_projector_of_the_same_features(finished):
    whole, _ = methods.network(str(finished), "embedding", "--layer")
    backbone = load_backbone(str(finished))
    assert whole.width == 16  # of tests.tiny
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(whole(images), whole.projector(backbone(images)))
    by_layer = [
        knn(
            str(finished), train="scenes:train@32", test="scenes:test@30", layer=layer, device="cpu"
        )
        for layer in ("backbone", "embedding")
    ]
    assert by_layer[0]["protocol"]["layer"] == "backbone"
    assert by_layer[1]["images"] == {"train": 32, "test": 30}
    with pytest.raises(UserError, match="is a backbone alone, without embedding"):
        knn("random:resnet18", train="scenes:train@9", test="scenes:test@9", layer="embedding")


def test_the_embedding_of_a_method_with_a_row_for_each_image(tmp_path):
    run.pretrain("pic", config("pic", tmp_path, data="scenes:train@16", epochs=0.5))
    embedding, _ = methods.network(str(tmp_path), "embedding", "--layer")
    assert embedding(torch.randn(2, 3, 32, 32)).shape == (2, 16)


def test_every_saved_form_of_a_run_is_the_same_backbone(finished):
    last_snapshot = sorted((finished / "snapshots").iterdir())[-1]
    forms = [finished, finished / "backbone.safetensors", finished / "checkpoints" / "last"]
    forms.append(last_snapshot)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        outputs = [load_backbone(str(form))(images) for form in forms]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_the_features_are_those_of_the_stated_view(finished):
    backbone = load_backbone(str(finished))
    source = open_source("scenes:test@5")
    got = extract(backbone, source, Reader(size=32, mean=(0.1,) * 3, std=(0.5,) * 3))
    pixels = torch.from_numpy(eval_view(source.pixels(3), 32)).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = backbone((pixels / 255 - 0.1) / 0.5)
    torch.testing.assert_close(got.values[3:4], expected, atol=1e-5, rtol=1e-4)


def test_a_k_beyond_the_bank_is_refused_and_the_usual_ones_give_way(capsys):
    asked = {"train": "scenes:train@12", "test": "scenes:test@8", "size": 32, "device": "cpu"}
    result = knn("random:resnet18", **asked)
    assert list(result["k"]) == ["1", "5"] and "--k 20, 200 is left out" in capsys.readouterr().err
    for k in ([1, 13], [0]):
        with pytest.raises(UserError, match="use --k from 1 to 12"):
            knn("random:resnet18", k=k, **asked)
    with pytest.raises(UserError, match="use --k from 1 to 11"):  # one is left out
        knn("random:resnet18", k=[12], choose_k=True, **asked)


def test_the_chosen_k_is_that_of_the_training_images_left_out_in_turn():
    """By a plain loop over them; the test images have no say."""
    asked = {"train": "scenes:train@40", "size": 32, "device": "cpu", "k": [1, 3, 9]}
    result = knn("random:resnet18", test="scenes:test@20", choose_k=True, **asked)
    source = open_source("scenes:train@40")
    rows = extract(load_backbone("random:resnet18"), source, Reader(size=32)).values
    labels = torch.from_numpy(source.labels)
    for k in asked["k"]:
        right = 0
        for i in range(40):
            rest = torch.arange(40) != i
            right += int(knn_predict(rows[rest], labels[rest], rows[i : i + 1], k) == labels[i])
        assert result["chosen"]["left_out_top1"][str(k)] == pytest.approx(100 * right / 40)
    found = result["chosen"]["left_out_top1"]
    assert found[str(result["chosen"]["k"])] == max(found.values())
    assert result["chosen"]["top1"] == result["k"][str(result["chosen"]["k"])]["top1"]
    assert result["best"]["chosen_on"] == "the test images"


def the_search(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, queries = (torch.randn(n, 6, generator=generator).double() for n in (90, 31))
    search = Search(rows, torch.arange(90) % 4, 4, [1, 7], "softmax", 0.1, "cosine")
    return search, queries


def _ask(rank):
    distributed.start("cpu", 1)
    search, queries = the_search()
    found = search(queries), search(search.rows[:5], torch.arange(5)), search(queries[:1])
    asked = {"train": "scenes:train@8", "test": "scenes:test@7", "k": [3], "size": 32}
    whole = knn(f"random:{NETWORK}", device="cpu", threads=1, **asked)
    distributed.stop()
    return found, whole["confusion"]


def test_ranks_share_the_queries_and_all_have_the_whole_answer(on_ranks):
    """The published workers each ask for all rows in an order of their own, and hope it is one."""
    search, queries = the_search()
    for k in search.ks:
        by_hand = knn_predict(search.rows, search.labels, queries, k, temperature=0.1)
        assert search(queries)[0][k][:, 0].tolist() == by_hand.tolist()
    alone = search(queries), search(search.rows[:5], torch.arange(5)), search(queries[:1])
    assert (alone[1][1] != torch.arange(5)).all()
    (_, table), (_, same) = ranks = on_ranks(_ask)
    assert table == same and sum(map(sum, table["table"])) == 7
    for answers, _ in ranks:
        for (voted, near), (other, others) in zip(alone, answers, strict=True):
            assert near.tolist() == others.tolist()
            assert all(voted[k].tolist() == other[k].tolist() for k in search.ks)


def test_test_images_that_are_training_images_are_counted(tmp_path, capsys):
    for folder, start in (("train", 0), ("test", 6)):
        for i in range(start, start + 8):  # two of them are in both, under other names
            place = tmp_path / folder / "ab"[i % 2]
            place.mkdir(parents=True, exist_ok=True)
            pixels = open_source("scenes:train@20").pixels(i)
            Image.fromarray(pixels).save(place / f"{folder}-{i}.png")
    train, test = str(tmp_path / "train"), str(tmp_path / "test")
    asked = {"train": train, "test": test, "size": 32, "device": "cpu"}
    on_crops = {"epochs": 1, "protocol": "moco", "batch_size": 8}
    few = {"epochs": 1, "batch_size": 8}
    for reading, more in ((knn, {}), (linear, {"epochs": 1}), (linear, on_crops), (finetune, few)):
        result = reading(f"random:{NETWORK}", **asked, **more)
        assert result["repeated"] == 2
        assert "2 test images (25.0 %) are training images too" in capsys.readouterr().err
        assert result["images"] == {"train": 8, "test": 8}
    learnt = [i for i in range(8) if i not in (6, 7)]  # only what is learnt from counts
    source, again = open_source(train), open_source(train)
    assert repeated_files(source, learnt, again) == 6
    assert repeated_files(open_source("scenes:test@9"), range(9), again) == 0
    scenes = open_source("scenes:test@9")  # no files: pixel by pixel
    assert repeated_files(scenes, range(3, 9), open_source("scenes:test@7")) == 4
    assert repeated_files(scenes, range(9), open_source("scenes:train@9")) == 0


def test_both_spellings_of_shift_norm_and_what_it_depends_on_is_said():
    asked = {"train": "scenes:train@40", "test": "scenes:test@20", "size": 32, "device": "cpu"}
    asked |= {"metric": "euclidean", "weighting": "uniform", "k": [5]}
    results = {
        name: knn("random:resnet18", representation=name, **asked)
        for name in ("original", "norm", "shift-norm", "shifted-norm")
    }
    assert results["shift-norm"]["k"] == results["shifted-norm"]["k"]
    for name in ("original", "norm", "shift-norm"):
        assert results[name]["protocol"]["representation"] == name
    assert results["shifted-norm"]["protocol"]["shift_batch"] == "all"
    assert results["shift-norm"]["k"] != results["original"]["k"]  # the published slip: the same


READINGS = (knn, linear, finetune)


@pytest.mark.parametrize("reading", READINGS)
def test_sources_that_cannot_be_read_from_are_refused_by_name(reading, tmp_path):
    """No labels, a class that the other side lacks, one class alone."""
    for place in ("train/ant", "train/bee", "test/ant", "test/cow", "bare"):
        (tmp_path / place).mkdir(parents=True)
        for i in range(2):
            pixels = open_source("scenes:train@20").pixels(len(place) + i)
            Image.fromarray(pixels).save(tmp_path / place / f"{i}.png")
    train, test, bare = (str(tmp_path / name) for name in ("train", "test", "bare"))
    common = {"size": 32, "device": "cpu"}
    with pytest.raises(UserError, match=r"--train .*bare has no labels"):
        reading(f"random:{NETWORK}", train=bare, test=test, **common)
    with pytest.raises(UserError, match=r"--test .*bare has no labels"):
        reading(f"random:{NETWORK}", train=train, test=bare, **common)
    with pytest.raises(UserError, match=r"--test .*has a class 'cow' that --train .* lacks"):
        reading(f"random:{NETWORK}", train=train, test=test, **common)
    with pytest.raises(UserError, match="scenes:train@1 has images of one class only"):
        reading(f"random:{NETWORK}", train="scenes:train@1", test="scenes:test@20", **common)


def broken(value):
    """`extract` with one feature, or all of them, put to a value."""

    def instead(backbone, source, reader, index=None):
        found = extract(backbone, source, reader, index)
        if value != value:
            found.values[1, 2] = value
        else:
            found.values[:] = value
        return found

    return instead


def whole(value):
    """`_maps` of nothing but a value."""
    return lambda backbone, pixels, reader, stage: torch.full((len(pixels), 8, 3, 3), value)


SOURCES = {"train": "scenes:train@20", "test": "scenes:test@20"}
EVERY = {
    "knn": (knn, SOURCES),
    "linear": (linear, SOURCES | {"epochs": 1}),
    "linear on crops": (linear, SOURCES | {"epochs": 1, "protocol": "moco", "batch_size": 20}),
    "finetune": (finetune, SOURCES | {"epochs": 1, "batch_size": 20}),
    "dense": (dense, SOURCES | {"epochs": 1}),
    "instance": (instance, {"data": "scenes:test@8"}),
    "diagnose": (diagnose.run, {"data": "scenes:test@8"}),
}


@pytest.mark.parametrize("name", EVERY)
def test_features_that_say_nothing_are_named(name, monkeypatch, capsys):
    """NaN is refused; where all images look alike it is called a collapse, and figures follow."""
    reading, asked = EVERY[name]
    asked = {"size": 32, "device": "cpu", **asked}
    module = pairs if name in ("instance", "diagnose") else sys.modules[reading.__module__]
    extracting, instead = ("_maps", whole) if name == "dense" else ("extract", broken)
    monkeypatch.setattr(module, extracting, instead(float("nan")))
    with pytest.raises(UserError, match="not numbers: take an earlier checkpoint"):
        reading(f"random:{NETWORK}", **asked)
    monkeypatch.setattr(module, extracting, instead(0.25))
    result = reading(f"random:{NETWORK}", **asked)
    assert "the backbone has collapsed" in capsys.readouterr().err
    if name == "diagnose":
        assert result["collapse"].startswith("complete: all images look alike")
    elif name not in ("instance", "dense"):
        top1 = result["best"]["top1"] if name == "knn" else result["top1"]
        assert top1 == 10  # one class for all, ten of them
