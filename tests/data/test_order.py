"""The order is an exact permutation every epoch, pinned for ever, and batches tile it whatever the ranks."""

import pickle
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import (
    ORDER_VERSION,
    GlobalBatchSampler,
    Order,
    Purpose,
    mix,
    permute,
    permute_many,
    uniform,
    uniforms,
)


def test_golden_vectors() -> None:
    assert ORDER_VERSION == 1
    # splitmix64's published first outputs for the seeds 0 and 2^64 - 1.
    assert mix(0) == 0xE220A8397B1DCDAF
    assert mix(-1) == 0xE4D971771B652C20
    assert mix(1, 2, 3) == 0xD0734750FDE362B3
    assert [permute(i, 10, 42) for i in range(10)] == [1, 4, 0, 8, 6, 2, 9, 5, 7, 3]
    assert [permute(i, 1000003, 7) for i in range(5)] == [193387, 488200, 888571, 763037, 795534]
    order = Order((3, 0, 5, 2, 4), seed=0, block_shards=2)
    assert [order.order(i) for i in (0, 1, 5, 8, 13, 14, 27)] == [
        (0, 2, 2), (0, 2, 1), (0, 4, 2), (0, 3, 1), (0, 0, 0), (1, 4, 3), (1, 0, 2),
    ]  # fmt: skip
    assert uniform(0, 5, Purpose.CROP_X) == 0.8818715088442465
    assert uniform(0, 5, Purpose.FLIP) == 0.13330095169485456


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_permute_is_a_permutation(length: int, key: int) -> None:
    assert sorted(permute(i, length, key) for i in range(length)) == list(range(length))


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    st.integers(-5, 2**63),
    st.integers(1, 13),
    st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_every_epoch_is_an_exact_permutation(counts: list[int], seed: int, block: int, epoch: int) -> None:
    order, samples = Order(counts, seed, block), sum(counts)
    seen = [order.order(epoch * samples + i) for i in range(samples)]
    assert {e for e, _, _ in seen} == {epoch}
    assert sorted((s, r) for _, s, r in seen) == [(s, r) for s, n in enumerate(counts) for r in range(n)]


@given(st.integers(1, 2**40), st.integers(0, 2**64 - 1), st.lists(st.integers(0, 2**41), max_size=12))
@settings(max_examples=60, deadline=None)
def test_many_positions_are_permuted_as_one(length: int, key: int, positions: list[int]) -> None:
    inside = [position % length for position in positions]
    assert permute_many(np.array(inside, np.int64), length, key).tolist() == [
        permute(position, length, key) for position in inside
    ]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(any),
    st.integers(-5, 2**63),
    st.integers(1, 13),
    st.lists(st.integers(0, 10**9), max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_many_samples_are_ordered_as_one(counts: list[int], seed: int, block: int, items: list[int]) -> None:
    order = Order(counts, seed, block)
    found = order.orders(np.array(items, np.int64))
    assert list(zip(*(column.tolist() for column in found), strict=True)) == [order.order(i) for i in items]
    for purpose in (Purpose.FLIP, Purpose.CAPTION):
        draws = uniforms(seed, np.array(items, np.int64), purpose)
        assert draws.tolist() == [uniform(seed, i, purpose) for i in items]


def test_a_hundred_thousand_shards_are_planned_at_once() -> None:
    began = time.process_time()
    order = Order(np.full(100_000, 1000), seed=3)
    order.orders(np.arange(64) + 10**9)
    assert time.process_time() - began < 2
    assert len(pickle.dumps(order)) < 2_000_000


def test_blocks_are_read_one_after_the_other() -> None:
    order = Order([10] * 9, seed=3, block_shards=3)
    shards = [order.order(i)[1] for i in range(90)]
    blocks = [set(shards[k : k + 30]) for k in (0, 30, 60)]
    assert [len(block) for block in blocks] == [3, 3, 3]
    assert set.union(*blocks) == set(range(9))


def test_epochs_and_seeds_differ_and_jumping_changes_nothing() -> None:
    one = Order([50, 60], seed=0)
    first, second = ([one.order(e * 110 + i)[1:] for i in range(110)] for e in (0, 1))
    assert first != second
    assert first != [Order([50, 60], seed=1).order(i)[1:] for i in range(110)]
    jumping = Order([50, 60], seed=0)
    assert [jumping.order(i) for i in (10**9, 3, 10**6, 3)] == [one.order(i) for i in (10**9, 3, 10**6, 3)]
    assert pickle.loads(pickle.dumps(one)).order(17) == one.order(17)


@pytest.mark.parametrize("length", [3, 6, 20])
def test_positions_are_uniform(length: int) -> None:
    keys = 4000
    hits = [[0] * length for _ in range(length)]
    for key in range(keys):
        for i in range(length):
            hits[i][permute(i, length, mix(key))] += 1
    expected = keys / length
    chi2 = sum((h - expected) ** 2 / expected for row in hits for h in row)
    freedom = (length - 1) ** 2
    assert chi2 < freedom + 6 * (2 * freedom) ** 0.5


def test_neighbours_are_scattered() -> None:
    length = 10_007
    steps = {(permute(i + 1, length, 5) - permute(i, length, 5)) % length for i in range(500)}
    assert len(steps) > 480


def test_draws_are_uniform_and_independent_between_purposes() -> None:
    draws = {p: [uniform(0, i, p) for i in range(2000)] for p in (Purpose.CROP_X, Purpose.FLIP)}
    for values in draws.values():
        assert all(0 <= value < 1 for value in values)
        assert abs(sum(values) / 2000 - 0.5) < 0.03
    products = [(a - 0.5) * (b - 0.5) for a, b in zip(*draws.values(), strict=True)]
    assert abs(sum(products) / 2000) < 0.01
    assert uniform(1, 0, Purpose.FLIP) != uniform(0, 1, Purpose.FLIP)


def test_an_order_over_nothing_and_bad_arguments() -> None:
    with pytest.raises(IndexError):
        Order((0, 0), 0).order(0)
    with pytest.raises(IndexError):
        Order((0, 0), 0).orders(np.array([0]))
    for wrong in (Order((3,), 0).order, lambda i: Order((3,), 0).orders(np.array([4, i]))):
        with pytest.raises(IndexError, match="-1"):
            wrong(-1)
    with pytest.raises(IndexError, match="position -1 of 3"):
        permute_many(np.array([0, -1]), 3, 0)
    with pytest.raises(IndexError):
        permute(3, 3, 0)
    with pytest.raises(ValueError, match="block_shards is 0"):
        Order((3,), 0, block_shards=0)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 50), st.integers(0, 200))
@settings(max_examples=40, deadline=None)
def test_ranks_tile_the_global_batches(share: int, ranks: int, start: int, more: int) -> None:
    size = share * ranks
    samplers = [GlobalBatchSampler(size, start, start + more, rank, ranks) for rank in range(ranks)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(b) for b in batches} == {len(samplers[0])} == {-(-more // size)}
    joined = [i for parts in zip(*batches, strict=True) for part in parts for i in part]
    assert joined == list(range(start, start + len(samplers[0]) * size))


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=10 .* multiple of the 4 ranks; the nearest is 8"):
        GlobalBatchSampler(10, 0, 100, 0, 4)
    with pytest.raises(ValueError, match="the nearest is 4"):
        GlobalBatchSampler(0, 0, 100, 0, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        GlobalBatchSampler(4, 0, 8, 2, 2)
    with pytest.raises(ValueError, match="start=-1"):
        GlobalBatchSampler(4, -1, 8)
    assert list(GlobalBatchSampler(4, 8, 8)) == []
