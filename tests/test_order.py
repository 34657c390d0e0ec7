"""The order of a run: shares, cycles, and places by number where no short cycle has the shares."""
import hashlib
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest

from harmonkit.data import order
from harmonkit.data.order import Order, permutation, place_by_time, source_cycle, source_shares


@dataclass
class Weighted:
    task: str
    weight: float


def shares_of(*weights):
    return source_shares([Weighted("text", weight) for weight in weights], {"text": 1})


def test_a_cycle_is_short_and_spread_evenly():
    assert source_cycle([1, 3, 8]) == source_cycle([10, 30, 80])
    assert len(source_cycle([0.7, 0.3])) == 10
    assert source_cycle([1, 1, 1]) == [0, 1, 2]
    assert sorted(source_cycle([2, 6])) == [0, 1, 1, 1]
    long = source_cycle([1, 3, 8]) * 2
    assert all(2 in long[i:i + 2] for i in range(len(long) - 1))       # 8 of 12: never two others


@pytest.mark.parametrize("weights, length, digest", [
    ((1, 3, 8), 12, "44a43064ddbf7980"), ((2, 1 / 3, 5, 0.01), 2203, "a37e73031df4efb1"),
    ((1, 9_999), 10_000, "1d49c9fa3df15c71"), (tuple(range(1, 90)), 4005, "844db6586c091cdd"),
    ((0.1, 0.7, 1.3, 2.9), 50, "0c5b1e347bec7efc"),
])
def test_the_order_of_a_short_cycle_stays(weights, length, digest):
    """A run resumes in the same order only."""
    cycle = source_cycle(weights)
    assert (len(cycle), hashlib.sha256(str(cycle).encode()).hexdigest()[:16]) == (length, digest)
    assert source_cycle([1, 10_000]) == []


@pytest.mark.parametrize("weights", [(1, 3, 8), (0.7, 0.3), (2, 1 / 3, 5, 0.01), (1, 9_999), range(1, 90)])
def test_places_of_a_cycle_are_those_of_a_count(weights):
    of_run = Order(weights)
    cycle = source_cycle(weights)
    seen = Counter()
    for number in range(3 * len(cycle) + 7):
        s = cycle[number % len(cycle)]
        assert of_run.place(number) == (s, seen[s])
        seen[s] += 1


LONG = {                            # weights without a short cycle
    "tiny": (1, 1e-9), "nothing": (1, 2, 1e-300), "denormal": (5e-324, 1), "far": (1, 3.3, 1e-5),
    "many": tuple(1 + 0.37 * i ** 1.5 for i in range(1000)), "even": (np.pi * 1e4, np.e * 1e4, 1),
}


@pytest.mark.parametrize("name", LONG)
def test_places_without_a_cycle_are_those_of_a_count(name):
    of_run = Order(shares_of(*LONG[name]))
    assert not of_run.cycle
    seen = Counter()
    for number in range(5000):
        s, before = of_run.place(number)
        assert before == seen[s]
        seen[s] += 1
    # Each source has its share, give or take a micro-batch of each source.
    shares = np.array(LONG[name]) / sum(LONG[name])
    counts = np.array([seen[s] for s in range(len(shares))])
    slack = 1 + len(shares) / 2 * shares
    assert (np.abs(counts - 5000 * shares) <= slack + 0.5).all()


def test_a_tiny_share_comes_when_it_is_due():
    of_run = Order(shares_of(1, 1e-6))
    for k in range(3):
        due = round((k + 0.5) * (1e6 + 1))
        places = [of_run.place(number) for number in range(due - 5, due + 5)]
        assert [place for place in places if place[0] == 1] == [(1, k)]
    far = [of_run.place(number) for number in range(10 ** 15, 10 ** 15 + 100)]
    assert far == [(0, far[0][1] + i) for i in range(100)]


def test_sources_come_at_their_times():
    shares = np.random.default_rng(0).random(20) ** 3
    shares /= shares.sum()
    times = sorted(((k + 0.5) / share, s, k) for s, share in enumerate(shares) for k in range(600))
    places = [place_by_time(shares, number) for number in range(500)]
    assert places == [(s, k) for _, s, k in times[:500]]


def test_places_of_equal_times_are_in_the_order_of_the_sources():
    places = [place_by_time(np.array([0.25, 0.25, 0.5]), number) for number in range(8)]
    assert places == [(2, 0), (0, 0), (1, 0), (2, 1), (2, 2), (0, 1), (1, 1), (2, 3)]


@pytest.mark.parametrize("weights", [(1, 1e-9), (1, 1e-300), LONG["many"], (1,) * 1000, (5e-324, 1.7e308)])
def test_any_weights_are_instant(weights):
    began = time.process_time()
    of_run = Order(shares_of(*weights))
    for number in range(10 ** 9, 10 ** 9 + 200):
        of_run.place(number)
    assert time.process_time() - began < 1


def test_weights_that_no_number_can_share_are_refused():
    with pytest.raises(ValueError, match=r"the weights of the sources, 1.7e\+308 to 1.7e\+308, are too"):
        shares_of(1.7e308, 1.7e308)
    shares_of(1e-320, 1e-320)


def test_a_permutation_is_a_function_of_its_seed():
    assert sorted(permutation(50, 0, 1, 2)) == list(range(50))
    assert permutation(9, 0, 1, 2).tolist() == np.random.default_rng((0, 1, 2)).permutation(9).tolist()
    assert order.permutation(9, 0, 1, 2).dtype == np.int32
