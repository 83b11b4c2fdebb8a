"""Input that makes little sense: one sentence, or a result that is defined (masks: test_merging.py,
teachers: test_seed.py, more prototypes than images: test_swav.py)."""

import dataclasses

import pytest
import torch

from firstsight import engine, methods, run
from firstsight.errors import UserError
from firstsight.log import read_log
from tests.tiny import Patches, config


def test_a_queue_longer_than_the_source_is_said_and_filled_by_repetition(tmp_path, capsys):
    asked = {"data": "scenes:train@16", "epochs": 1.0}
    run._opened(config("mocov2", tmp_path, method={"queue_size": 16}, **asked))
    assert "queue" not in capsys.readouterr().err
    run._opened(config("mocov2", tmp_path, method={"queue_size": 40}, **asked))
    said = "--method.queue-size 40: each of the 16 images is in it repeatedly"
    assert said in capsys.readouterr().err
    settings = config("mocov2", tmp_path, method={"queue_size": 40}, epochs=3.0)
    engine.pretrain("mocov2", settings, Patches(16), None, tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last")["method"]
    torch.testing.assert_close(state["queue.keys"].norm(dim=1), torch.ones(40))
    assert state["queue.position"] == 3 * 16 - 40


def test_a_batch_of_one_and_chunks_of_one_are_refused(tmp_path):
    with pytest.raises(UserError, match="--batch-size must be 2 or more, not 1"):
        config("simclr", tmp_path, batch_size=1)
    settings = config("simclr", tmp_path, data="scenes:train@16", batch_size=4, accumulate=3)
    said = "4 images a device do not make 3 chunks of two or more; use --accumulate 2"
    with pytest.raises(UserError, match=said):
        run.dry_run("simclr", settings)
    run.dry_run("simclr", dataclasses.replace(settings, accumulate=2))


def test_a_run_whose_views_never_overlap_enough_ends_as_it_began(tmp_path):
    """No box at any step: the loss is 0, nothing is learnt, nothing breaks."""
    asked = {"method": {"min_size": 31}, "weight_decay": 0.0, "epochs": 1.0}
    settings = config("scrl", tmp_path, **asked)
    trained = engine.pretrain("scrl", settings, Patches(16), None, tmp_path).method
    records = read_log(tmp_path / "log.jsonl")
    assert [(r["loss"], r["images_with_boxes"]) for r in records] == [(0.0, 0.0)] * 2
    begun = dict(methods.build("scrl", settings, 16).named_parameters())
    for key, parameter in trained.named_parameters():
        assert torch.equal(parameter, begun[key]), key
