"""Rows that are caught up with: against plain SGD on all rows at every step."""

import math

import numpy as np
import pytest
import torch
from torch.optim import SGD

from firstsight.optim import cosine
from firstsight.optim.schedule import Schedule
from firstsight.prototypes import rows
from firstsight.prototypes.rows import Recent, Rests, Rows, merged, powers


def loop(w, u, rates, momentum=0.9, decay=0.01):
    for rate in rates:
        u = momentum * u + decay * w
        w = w - rate * u
    return w, u


def caught_up(rates, momentum=0.9, decay=0.01, tolerance=0.0, w=1.0, u=0.5):
    """A row left alone for all of `rates`, then caught up with; row 1 is moved at every step."""
    weight = torch.tensor([[w], [1.0]], dtype=torch.float64)
    lazy = Rows(weight, momentum=momentum, decay=decay, tolerance=tolerance)
    lazy.velocity[0] = u
    for rate in rates:
        lazy.move(torch.tensor([1]), torch.zeros(1, 1, dtype=torch.float64), rate)
    lazy.catch_up(torch.tensor([0]))
    return lazy.weight[0].item(), lazy.velocity[0].item()


@pytest.mark.parametrize(
    ("n", "w", "u"),
    [(1, 0.954, 0.46), (2, 0.911646, 0.42354), (3, 0.872615754, 0.39030246),
     (10, 0.670861853, 0.226586649), (100, 0.182018632, 0.020512217)],
)  # fmt: skip
def test_a_rest_is_the_published_vector(n, w, u):
    assert caught_up([0.1] * n) == pytest.approx((w, u), abs=5e-10)


def test_without_decay_it_is_the_closed_form():
    w, u = caught_up([0.1] * 30, decay=0.0)
    assert w == pytest.approx(1 - 0.1 * 0.9 * (1 - 0.9**30) / 0.1 * 0.5, rel=1e-13)
    assert u == pytest.approx(0.5 * 0.9**30, rel=1e-12)


PIECEWISE = {
    "constant": [0.03] * 2000,
    "steps": [0.03] * 700 + [0.003] * 900 + [0.0003] * 400,
    "windows of a cosine": [cosine((t // 64) / 40, 0.03, 0.0) for t in range(2500)],
    "every step another": [cosine(t / 600, 0.03, 0.0) for t in range(600)],
    "from zero": [0.0] * 5 + [0.1] * 50,
    "complex roots": [0.9] * 300,  # decay .01: faster than (1 - sqrt m)^2 / d = .26
}


@pytest.mark.parametrize("name", PIECEWISE)
def test_a_rest_over_pieces_is_the_loop_over_its_steps(name):
    rates = PIECEWISE[name]
    expected = loop(1.0, 0.5, rates)
    assert caught_up(rates) == pytest.approx(expected, abs=1e-12)


def test_the_longest_rest_of_imagenet_is_exact_too():
    rates = [0.03] * 36_000
    assert caught_up(rates, decay=1e-4) == pytest.approx(
        loop(1.0, 0.5, rates, decay=1e-4), abs=1e-12
    )


def test_rows_follow_the_rate_within_their_tolerance():
    rates = [0.03 * (0.01 + 0.99 * t / 500) for t in range(500)]
    w, u = loop(1.0, 0.5, rates, decay=1e-4)
    got_w, got_u = caught_up(rates, decay=1e-4, tolerance=0.001)
    assert got_w == pytest.approx(w, abs=1e-3 * abs(1 - w)) and got_u == pytest.approx(u, rel=1e-3)
    assert caught_up(rates, decay=1e-4, tolerance=0.05)[0] != pytest.approx(w, abs=1e-3 * (1 - w))


@pytest.mark.parametrize(("length", "stated", "begun"), [
    (64, 1.4e-4, (2000, 20_000, 30_000, 100_000, 500_000)),
    (512, 1.4e-4, (2000, 20_000, 30_000, 100_000, 500_000)),
    (36_000, 2.1e-4, (60_000,)),
])  # fmt: skip
def test_the_errors_of_rows_page_are_those_of_pics_200_epochs_on_imagenet(length, stated, begun):
    """1,000,960 steps, 25,000 of warm-up. Rows begin to rest all over the pieces of the rate, which
    are told to begin some hundred steps before; of all steps, a rest of zero tolerance is exact."""
    schedule, worst = Schedule(steps=1_000_960, peak=0.03, warmup=25_000, start=0.01), 0.0
    for at in begun:
        rates = [schedule.rate(at + step) for step in range(900 + length)]
        rests = Rests(0.9, 1e-4, 0.001)
        for step, rate in enumerate(rates):
            rests.rate(rate)
            rests.step += 1
            rest = rests.step - length
            if rest > 0 and step % (97 if length < 1000 else 300) == 0:
                w, _ = loop(1.0, 0.5, rates[rest : rest + length], decay=1e-4)
                off = abs(rests.since(np.array([rest]))[0, 0] @ [1.0, 0.5] - w)
                worst = max(worst, off)
                assert off < 0.001 * abs(1 - w)
    assert stated / 3 < worst < stated


@pytest.mark.parametrize("rates", ["constant", "steps", "every step another"])
def test_lazy_rows_are_dense_rows(rates):
    """SGD of torch on all rows, against rows touched now and then, some with a gradient; the lazy
    ones go through a checkpoint in the middle."""
    torch.manual_seed(0)
    start = 0.01 * torch.randn(40, 6, dtype=torch.float64)
    dense = torch.nn.Parameter(start.clone())
    sgd = SGD([dense], lr=0.0, momentum=0.9, weight_decay=1e-2)
    lazy = Rows(start.clone(), momentum=0.9, decay=1e-2)
    for t, rate in enumerate(PIECEWISE[rates][:600]):
        index = torch.randperm(40)[: torch.randint(1, 6, ())].sort().values
        lazy.catch_up(index)
        gradient = torch.zeros(40, 6, dtype=torch.float64)
        gradient[index] = torch.randn(len(index), 6, dtype=torch.float64)
        torch.testing.assert_close(lazy.weight[index], dense.data[index], rtol=0, atol=1e-12)
        lazy.move(index, gradient[index], rate)
        dense.grad, sgd.param_groups[0]["lr"] = gradient, rate
        sgd.step()
        if t == 300:
            saved = lazy.state_dict()
            lazy = Rows(torch.empty(40, 6).double(), momentum=0.9, decay=1e-2)
            lazy.load_state_dict(saved)
    lazy.catch_up(torch.arange(40))
    torch.testing.assert_close(lazy.weight, dense.data, rtol=0, atol=1e-12)
    velocity = sgd.state[dense]["momentum_buffer"]
    torch.testing.assert_close(lazy.velocity, velocity, rtol=0, atol=1e-12)


def test_all_rows_at_once_are_torchs_sgd():
    torch.manual_seed(0)
    start = torch.randn(7, 3, dtype=torch.float64)
    dense, every = torch.nn.Parameter(start.clone()), Rows(start.clone(), momentum=0.8, decay=0.1)
    sgd = SGD([dense], lr=0.3, momentum=0.8, weight_decay=0.1)
    for _ in range(5):
        dense.grad = torch.randn(7, 3, dtype=torch.float64)
        every.move(None, dense.grad, 0.3)
        sgd.step()
    torch.testing.assert_close(every.weight, dense.data, rtol=0, atol=1e-14)
    assert (every.current == 5).all()
    for _ in range(4):  # and then one row alone
        every.move(torch.tensor([0]), torch.ones(1, 3, dtype=torch.float64), 0.2)
        dense.grad, sgd.param_groups[0]["lr"] = torch.zeros(7, 3, dtype=torch.float64), 0.2
        dense.grad[0] = 1.0
        sgd.step()
    every.catch_up(torch.arange(7))
    torch.testing.assert_close(every.weight, dense.data, rtol=0, atol=1e-14)


def test_the_past_takes_no_more_room_than_its_pieces():
    """Nothing of it is kept where all rows move, nor of the order that the first K came from."""
    every = Rows(torch.ones(2, 1), momentum=0.9, decay=0.1)
    for step in range(50):
        every.move(None, torch.zeros(2, 1), 0.1 + step)
    assert every.rests._count == 0
    assert Recent(4, of=1000).index.untyped_storage().nbytes() == 4 * 8


def test_without_correction_rows_rest_where_they_were():
    kept = Rows(torch.ones(2, 1), momentum=0.9, decay=0.1, correction=False)
    kept.velocity.fill_(0.5)
    for _ in range(9):
        kept.move(torch.tensor([1]), torch.zeros(1, 1), 0.1)
    kept.catch_up(torch.tensor([0]))
    assert kept.weight[0] == 1 and kept.velocity[0] == 0.5 and kept.current[0] == 9


def test_what_is_older_than_all_pieces_is_forgotten(monkeypatch):
    monkeypatch.setattr(rows, "PIECES", 4)
    rests = Rests(0.9, 0.01, 0.0)
    rates = [0.1 * (k + 1) for k in range(9)]
    for rate in rates:
        assert rests.rate(rate) == rate
        rests.step += 1
    for since in (5, 6, 7, 8):
        (got,) = rests.since(np.array([since]))
        expected = loop(1.0, 0.5, rates[since:])
        assert got @ [1.0, 0.5] == pytest.approx(expected, abs=1e-14)
    np.testing.assert_array_equal(rests.since(np.array([2])), rests.since(np.array([5])))


def test_lengths_are_kept_within_bounds():
    some = Rows(torch.tensor([[0.01, 0.0], [3.0, 4.0], [0.0, 0.5]]), momentum=0.0, decay=0.0)
    some.move(None, torch.zeros(3, 2), 0.1, shortest=0.1, longest=1.0)
    expected = torch.tensor([[0.1, 0.0], [0.6, 0.8], [0.0, 0.5]])
    torch.testing.assert_close(some.weight, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_counts_as_none(bad):
    index, none = torch.tensor([0, 2]), torch.zeros(2, 2)
    hit, spared = (Rows(torch.ones(3, 2), momentum=0.9, decay=0.1) for _ in range(2))
    for gradient, some in ((none.clone().fill_(bad), hit), (none, spared)):
        some.move(index, torch.ones(2, 2), 0.1)
        some.move(index, gradient, 0.1)
    assert torch.equal(hit.weight, spared.weight) and torch.equal(hit.velocity, spared.velocity)
    assert hit.figures(hit.weight)["prototype_steps_left_out"] == 1 and spared.broken == 0


@pytest.mark.parametrize("index", [None, torch.tensor([0, 2])])
def test_gradients_are_clipped_all_together(index):
    """Of (3, 4) and (0, 12), 13 long: to 6.5 the halves of both; to 13 and more as they are."""
    for most, share in ((6.5, 0.5), (13.0, 1.0), (0.0, 1.0)):
        some = Rows(torch.zeros(3 if index is not None else 2, 2), momentum=0.0, decay=0.0)
        gradient = torch.tensor([[3.0, 4.0], [0.0, 12.0]])
        some.move(index, gradient.clone(), 1.0, steepest=most)
        moved = some.weight[torch.arange(2) if index is None else index]
        torch.testing.assert_close(moved, -share * gradient)


def test_lengths_are_told():
    some = Rows(torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 2.0]]), momentum=0.0, decay=0.0)
    told = {k: v.item() for k, v in some.figures(some.weight).items()}
    assert told["prototype_norm_min"] == 1 and told["prototype_norm_median"] == 2
    assert told["prototype_norm_max"] == 5 and told["prototype_norm"] == pytest.approx(8 / 3)


def test_powers_of_matrices():
    turn = np.array([[0.0, -1.0], [1.0, 0.0]])
    got = powers(np.stack([turn, 2 * np.eye(2), turn]), np.array([3, 10, 0]))
    np.testing.assert_allclose(got[0], -turn)
    np.testing.assert_allclose(got[1], 1024 * np.eye(2))
    np.testing.assert_allclose(got[2], np.eye(2))


def test_recent_indices_are_first_in_first_out():
    recent = Recent(4, of=9)
    assert len(set(recent.index.tolist())) == 4
    recent.push(torch.tensor([1, 2, 3]))
    recent.push(torch.tensor([4, 5]))
    assert sorted(recent.index.tolist()) == [2, 3, 4, 5]
    recent.push(torch.arange(10, 16))
    assert sorted(recent.index.tolist()) == [12, 13, 14, 15]


def test_gradients_of_chunks_add_up():
    one = (torch.tensor([1, 4]), torch.tensor([[1.0], [2.0]]))
    other = (torch.tensor([0, 4]), torch.tensor([[5.0], [3.0]]))
    index, total = merged([one, other])
    assert index.tolist() == [0, 1, 4] and total.flatten().tolist() == [5, 1, 5]
    assert merged([(None, one[1]), (None, other[1])])[1].flatten().tolist() == [6, 5]
    assert math.isclose(merged([one])[1].sum(), 3)
