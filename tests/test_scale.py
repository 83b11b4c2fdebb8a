"""The scaling model against numbers computed by hand, and what it measures against a count."""

import json

import pytest
import torch

from firstsight import cli, distributed
from firstsight import scale as scaling
from firstsight.distributed.traffic import BUCKET, Cluster, Sent, Step, exposed, predicted, waited
from firstsight.errors import UserError
from tests.tiny import config


def cluster(machines=1, devices=1, **values):
    """Links of 100 bytes a second inside, 10 between; no latency."""
    return Cluster(
        machines=machines, devices=devices, **{"inside": 100, "between": 10, "latency": 0, **values}
    )


def test_a_ring_passes_two_times_w_minus_1_over_w_of_a_sum_over_its_slowest_link():
    assert cluster(1, 4).all_reduce(200) == pytest.approx(2 * 3 / 4 * 200 / 100)
    assert cluster(2, 4).all_reduce(200) == pytest.approx(2 * 7 / 8 * 200 / 10)
    assert cluster(2, 1, inside=1).all_reduce(200) == pytest.approx(2 * 1 / 2 * 200 / 10)
    assert cluster(1, 4).all_gather(50) == pytest.approx(3 * 50 / 100)
    assert cluster(2, 4, latency=0.5).all_gather(0) == pytest.approx(3 * 0.5)  # 8 are 3 levels
    assert cluster(2, 4, latency=0.5).all_reduce(0) == pytest.approx(6 * 0.5)


def test_only_what_backward_does_not_hide_is_waited_for():
    # two ranks at B bytes a second: a bucket of B bytes takes one second
    two = cluster(1, 2, inside=BUCKET)
    assert exposed(BUCKET, 5.0, two) == pytest.approx(1)  # the only bucket is ready at the end
    # ready at 2 and 4, done at 3 and 5
    assert exposed(2 * BUCKET, 4.0, two) == pytest.approx(1)
    # ready at .5, 1, 1.5, 2; done at 1.5, 2.5, 3.5, 4.5
    assert exposed(4 * BUCKET, 2.0, two) == pytest.approx(2.5)
    assert exposed(4 * BUCKET, 2.0, cluster()) == 0


def test_throughput_is_that_of_the_slowest_of_step_and_views():
    alone = Step(images=10, forward=1.0, backward=2.0, update=1.0, gradients=0)
    sent = (Sent("gather", 100), Sent("sum", 50))
    step = Step(images=10, forward=2.0, backward=2.0, update=1.0, gradients=200, sent=sent)
    shape = cluster(1, 2)
    # exchange: 100 / 100 + 2 * 1/2 * 50 / 100; gradients: 200 / 100 after the backward
    told = predicted(step, alone, shape, views=1000)
    assert waited(sent, shape) == told.exchange == pytest.approx(1.5)
    assert told.step == pytest.approx(5 + 1.5 + 2)
    assert told.images_per_second == pytest.approx(20 / 8.5)
    assert told.efficiency == pytest.approx(20 / 8.5 / (2 * 10 / 4))
    slow = predicted(step, alone, shape, views=2)  # 20 images at two a second
    assert (slow.step, slow.data) == (10.0, 10.0)
    assert waited(sent, cluster()) == 0


def asked(name, folder, **values):
    return config(name, folder, data="scenes:train@48", batch_norm="local", **values)


def test_what_simclr_and_pic_send_is_counted(tmp_path):
    """SimCLR gathers two views' embeddings and sums their gradients; PIC sums prototypes'."""
    b, d, w = 4, 16, 3
    told = scaling.measured("simclr", asked("simclr", tmp_path), b, 48, w)
    rows, whole = b * d * 4, w * b * d * 4
    assert sorted(told.sent) == [("gather", rows)] * 2 + [("sum", whole)] * 2
    pic = asked("pic", tmp_path, method={"negatives": 0})
    prototypes = 48 * pic.method.dim * 4
    assert ("sum", prototypes) in scaling.measured("pic", pic, b, 48, w).sent
    assert scaling.measured("simclr", asked("simclr", tmp_path), b, 48, 1).sent == ()
    assert distributed.world() == 1


def test_ranks_that_are_imagined_say_what_this_one_says():
    rows = torch.tensor([[1.0, 2.0]], requires_grad=True)
    with distributed.imagined(3) as sent:
        assert (distributed.world(), distributed.rank()) == (3, 0)
        gathered = distributed.gather(rows)
        assert gathered.tolist() == [[1.0, 2.0]] * 3
        gathered.sum().backward()
        assert distributed.summed(rows.detach()).tolist() == [[3.0, 6.0]]
    assert rows.grad.tolist() == [[3.0, 3.0]]  # each of the three asks for it
    assert sent == [Sent("gather", 8), Sent("sum", 24), Sent("sum", 8)]


def checked(rank, folder):
    try:
        options = {"machines": (2,), "devices": 3, "inside": 1.0, "between": 0.5, "latency": 1.0}
        return scaling.scale("simclr", asked("simclr", folder), images=4, **options)
    finally:
        distributed.stop()


def test_ranks_at_hand_check_their_prediction(on_ranks, tmp_path):
    first, second = on_ranks(checked, tmp_path)
    assert [(row["machines"], row["devices"]) for row in first["predicted"]] == [(2, 3), (1, 2)]
    link = first["link"]
    assert link["measured"] and link["inside"] == second["link"]["inside"] != 1.0
    told = first["checked"]
    assert told["ranks"] == 2 and told["predicted_ms"] >= told["computed_ms"] > 0
    assert told["measured_ms"] > 0


def test_bench_scale_prints_its_assumptions(capsys, tmp_path):
    flags = "--data scenes:train@48 --backbone timm:test_resnet --size 32 --precision fp32 "
    flags += "--layout contiguous --threads 1 --device cpu --images 4 --machines 1 2 --devices 2"
    json_file = tmp_path / "scale.json"
    cli.main(["bench", "scale", "simclr", *flags.split(), "--json", str(json_file)])
    said = capsys.readouterr().out
    result = json.loads(json_file.read_text())
    assert [row["machines"] for row in result["predicted"]] == [1, 2]
    assert all(assumption in said for assumption in result["assumptions"])
    for wrong in (["scale"], ["other"], ["scale", "simclr", "--images", "1"]):
        with pytest.raises(SystemExit) as error:
            cli.main(["bench", *wrong])
        assert error.value.code == 2
    with pytest.raises(UserError, match="--machines above 0"):
        from firstsight.cli.bench import Scale

        Scale(machines=(0,))
