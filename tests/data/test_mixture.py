"""Shares are exact, spread and a function of the item; one source is its own order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.mixture import Interleave, Joined, Mixture, whole_weights
from data.order import Order

weights = st.lists(st.integers(0, 10**6), min_size=1, max_size=9).filter(any)


@given(weights, st.integers(0, 2**64), st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_choices_count_up_and_stay_near_their_share(shares: list[int], seed: int, items: int) -> None:
    interleave, seen = Interleave(shares, seed), [0] * len(shares)
    for item in range(items):
        choice, before = interleave.choose(item)
        assert before == seen[choice]
        seen[choice] += 1
        for count, share in zip(seen, shares, strict=True):
            assert abs(count - (item + 1) * share / sum(shares)) <= 1 + interleave.depth
    assert not any(count for count, share in zip(seen, shares, strict=True) if not share)


@given(weights, st.integers(0, 2**64), st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_many_at_a_time_are_the_same(shares: list[int], seed: int, items: list[int]) -> None:
    interleave = Interleave(shares, seed)
    found = interleave.choose_many(np.array(items))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == [
        interleave.choose(item) for item in items
    ]


def test_golden_choices() -> None:
    assert [Interleave([5, 3, 1], seed=7).choose(i)[0] for i in range(18)] == [
        0, 0, 1, 0, 2, 1, 0, 0, 1, 0, 0, 1, 0, 2, 1, 0, 0, 1,
    ]  # fmt: skip


def test_weights_become_whole_parts() -> None:
    assert whole_weights([3.0, 1.0]) == [750_000, 250_000]
    assert whole_weights([1.0, 1e-9, 0.0]) == [1_000_000, 1, 0]
    for wrong in ([-1.0, 2.0], [0.0, 0.0], [float("nan"), 1.0], []):
        with pytest.raises(ValueError, match="must be 0 or more"):
            whole_weights(wrong)
    for refused in ([-1, 2], [0, 0], [1 << 31]):
        with pytest.raises(ValueError, match="below 2"):
            Interleave(refused)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=8).filter(any), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_one_source_is_its_order(counts: list[int], seed: int) -> None:
    order, items = Order(counts, seed, 3), np.arange(3 * sum(counts))
    expected = [order.order(int(i))[1:] for i in items]
    for plan in (Mixture([order], [0.3], seed), Joined(order, [len(counts)])):
        places = plan.places(items)
        assert list(zip(places.shards.tolist(), places.positions.tolist(), strict=True)) == expected
        assert set(places.sources.tolist()) == {0}
        draw = 2**63 + 12345
        assert plan.substitute(0, draw).positions[0] == order.order(draw % order.samples)[2]


def test_a_mixture_walks_each_source_in_its_own_order() -> None:
    orders = [Order([30, 20], 1), Order([7], 2), Order([5], 3)]
    plan = Mixture(orders, [2.0, 1.0, 0.0], seed=4)
    places = plan.places(np.arange(300))
    assert np.bincount(places.sources, minlength=3).tolist() == [200, 100, 0]
    assert plan.samples == 57
    for source, order in enumerate(orders[:2]):
        inside = places.sources == source
        found = zip(places.shards[inside].tolist(), places.positions[inside].tolist(), strict=True)
        assert list(found) == [order.order(i)[1:] for i in range(int(inside.sum()))]
    assert plan.window() == 7 * 3


def test_joined_sources_are_counted_through() -> None:
    plan = Joined(Order([2, 3, 4], 0), [1, 2])
    places = plan.places(np.arange(9))
    assert sorted(zip(*(column.tolist() for column in places[:3]), strict=True)) == [
        *((0, 0, i) for i in range(2)), *((1, 0, i) for i in range(3)), *((1, 1, i) for i in range(4)),
    ]  # fmt: skip
