"""Batches sent ahead: order, content, and who waits for whom; CUDA's calls are noted, not made."""

import contextlib
import runpy
import types
from pathlib import Path

import pytest
import torch

from firstsight.batch import Batch
from firstsight.engine import watch
from firstsight.loader.prefetch import ahead

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def batch(number):
    """Two images in two views; all tensors hold `number`."""
    pair = tuple(torch.full((2, 3, 4, 4), number, dtype=torch.uint8) for _ in range(2))
    return Batch(
        views=pair,
        crops=(torch.full((2, 4), float(number)),) * 2,
        flips=(torch.zeros(2, dtype=torch.bool),) * 2,
        index=torch.tensor([number, number]),
        sizes=torch.full((2, 2), float(number)),
        label=torch.tensor([number, number]),
        bad=(f"{number}.png",),
    )


def pulled(count, noted):
    for number in range(count):
        noted.append(f"pull {number}")
        yield batch(number)


@pytest.fixture
def noted(monkeypatch):
    """What is asked of CUDA, in order."""
    notes, streams = [], ["compute"]

    def to(self, device):
        assert device == CUDA
        notes.append(f"copy {int(self.index[0])} on {streams[-1]}")
        return self

    @contextlib.contextmanager
    def stream(inner):
        streams.append(inner.name)
        yield
        streams.pop()

    def current(device):
        return types.SimpleNamespace(
            wait_stream=lambda other: notes.append(f"{streams[-1]} waits for {other.name}")
        )

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: types.SimpleNamespace(name="side"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(Batch, "pin_memory", lambda self: self)
    monkeypatch.setattr(Batch, "to", to)
    return notes


def test_the_next_batch_is_sent_before_this_one_is_handed_out(noted):
    numbers = []
    for one in ahead(pulled(3, noted), CUDA):
        numbers.append(int(one.index[0]))
        noted.append(f"train {numbers[-1]}")
    assert numbers == [0, 1, 2]
    assert noted == [
        *("pull 0", "copy 0 on side"),
        *("pull 1", "compute waits for side", "copy 1 on side", "train 0"),
        *("pull 2", "compute waits for side", "copy 2 on side", "train 1"),
        *("compute waits for side", "train 2"),
    ]


@pytest.mark.parametrize("count", [0, 1])
def test_few_batches(noted, count):
    assert [int(one.index[0]) for one in ahead(pulled(count, noted), CUDA)] == [0] * count


def test_nothing_is_pulled_before_it_is_asked_for(noted):
    ahead(pulled(3, noted), CUDA)
    assert noted == []


def test_what_the_loader_raises_comes_through(noted):
    def breaking():
        yield batch(0)
        raise RuntimeError("a worker is gone")

    with pytest.raises(RuntimeError, match="a worker is gone"):
        list(ahead(breaking(), CUDA))


def test_on_a_cpu_it_is_the_stream_itself():
    stream = pulled(2, [])
    assert ahead(stream, CPU) is stream


def test_a_batch_pins_and_lists_all_that_it_moves(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: seen.append(self) or self + 0)
    one = batch(3)
    other = one.pin_memory()
    assert {id(t) for t in seen} == {id(t) for t in one.tensors()} and len(one.tensors()) == 9
    assert all(map(torch.equal, one.tensors(), other.tensors())) and other.bad == ("3.png",)
    assert all(a is not b for a, b in zip(one.tensors(), other.tensors(), strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_content_and_order_stay():
    torch.cuda.set_device(0)
    for number, one in enumerate(ahead((batch(k) for k in range(50)), torch.device("cuda:0"))):
        assert all(tensor.is_cuda for tensor in one.tensors())
        assert all(map(torch.equal, (t.cpu() for t in one.tensors()), batch(number).tensors()))


def test_the_share_of_time_that_training_waited_is_told(tmp_path, monkeypatch):
    """Three seconds for each batch, one for each step; then a loader that is always ready."""
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(watch.time, "perf_counter", lambda: clock.now)

    def slow(seconds):
        for number in range(4):
            clock.now += seconds
            yield batch(number)

    watched = watch.Watch(tmp_path, timeout=60)
    for seconds, share in ((3.0, 0.75), (0.0, 0.0)):
        for _, one in watched.over(slow(seconds), 0):
            clock.now += 1
            watched.step_took(len(one))
        pace = watched.pace()
        assert pace["data_wait"] == pytest.approx(share)
        assert pace["images_per_second"] == pytest.approx(len(batch(0)) / (1 + seconds))


@pytest.mark.slow
def test_the_benchmark_of_it_runs_without_a_gpu(capsys):
    """Its rows exist and are ratios to the first; what they come to on a CPU says nothing."""
    place = Path(__file__).parents[1] / "benchmarks" / "near_gpu.py"
    typed = ["--data", "scenes:train@16", "--backbones", "timm:test_resnet", "--size", "32"]
    typed += ["--batch", "4", "--steps", "2", "--rounds", "1", "--workers", "0"]
    threads = torch.get_num_threads()
    found = runpy.run_path(str(place))["main"]([*typed, "--device", "cpu", "--threads", "1"])
    torch.set_num_threads(threads)
    rows = found["timm:test_resnet"]
    assert next(iter(rows)) == "model alone" and len(rows) == 4
    alone = rows["model alone"]
    assert alone["of_model_alone"] == 1 and alone["data_wait"] == 0
    for row in rows.values():
        share = row["images_per_second"] / alone["images_per_second"]
        assert row["of_model_alone"] == pytest.approx(share) and 0 <= row["data_wait"] < 1
    assert "% of alone" in capsys.readouterr().out
