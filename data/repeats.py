"""Finds what occurs twice among the samples of many shards, in bounded memory.

Values are 64-bit hashes. Where there are more than fit, they are looked at range by range, each range in a
pass of its own over all shards: a pass reads 8 bytes a sample. Keys (`data.catalogue`), images and captions
(`data.duplicates`) are compared this way. Use: `for found in repeats(load, counts): ...`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

BUDGET = 1 << 24  # values held at a time; with what sorting them takes, about 0.5 GB
THREADS = 8
BATCH = 64 * THREADS

Load = Callable[[int], np.ndarray]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Repeats:
    """Samples that share their value with others: values uint64 [M] rising, shards, rows int64 [M].

    Equal values lie side by side, in the order of shard and row.
    """

    values: np.ndarray
    shards: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def firsts(self) -> np.ndarray:
        """Returns bool [M]: whether a sample is the first one with its value."""
        return np.concatenate([[True], self.values[1:] != self.values[:-1]])[: len(self)]


def each_shard(work: Callable[[int], Result], shards: int) -> Iterator[Result]:
    """Yields work(0), work(1), ... of all shards in order, some threads ahead; few results wait at a time."""
    if shards < THREADS:
        yield from map(work, range(shards))
        return
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, shards, BATCH):
            yield from pool.map(work, range(start, min(start + BATCH, shards)))


def repeats(load: Load, counts: np.ndarray, budget: int = BUDGET) -> Iterator[Repeats]:
    """Yields the samples whose value occurs at least twice, a range of values at a time; 0 is no value.

    `load(n)` gives the values uint64 [counts[n]] of shard n.
    """
    passes = max(1, -(-int(counts.sum()) // budget))
    for number in range(passes):
        values, shards, rows = _gather(load, len(counts), number, passes)
        order = np.argsort(values, kind="stable")
        values = values[order]
        same = values[1:] == values[:-1]
        twin = np.concatenate([[False], same]) | np.concatenate([same, [False]])
        twin = twin[: len(values)]
        if twin.any():
            chosen = order[twin]
            yield Repeats(values[twin], shards[chosen].astype(np.int64), rows[chosen].astype(np.int64))


def frequencies(
    load: Load, counts: np.ndarray, most: int, budget: int = BUDGET
) -> tuple[list[tuple[int, int]], int]:
    """Returns the `most` frequent values that occur twice or more as (value, times), and how many differ."""
    passes = max(1, -(-int(counts.sum()) // budget))
    top: list[tuple[int, int]] = []
    distinct = 0
    for number in range(passes):
        values, _, _ = _gather(load, len(counts), number, passes)
        unique, times = np.unique(values, return_counts=True)
        distinct += len(unique)
        best = np.argsort(-times, kind="stable")[:most]
        best = best[times[best] > 1]
        top += zip(unique[best].tolist(), times[best].tolist(), strict=True)
        top = sorted(top, key=lambda pair: (-pair[1], pair[0]))[:most]
    return top, distinct


def _gather(load: Load, shards: int, number: int, passes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns values, shards uint32 and rows uint32 of the samples whose value lies in range `number`."""
    low, high = ((1 << 64) * edge // passes for edge in (number, number + 1))

    def some(shard: int) -> tuple[np.ndarray, np.ndarray]:
        values = load(shard)
        kept = values != 0
        if passes > 1:
            kept &= (values >= np.uint64(low)) & (values <= np.uint64(high - 1))
        rows = np.flatnonzero(kept)
        return values[rows], rows.astype(np.uint32)

    parts = list(each_shard(some, shards))
    lengths = [len(rows) for _, rows in parts]
    empty = np.zeros(0, np.uint64)
    return (
        np.concatenate([values for values, _ in parts] or [empty]),
        np.repeat(np.arange(shards, dtype=np.uint32), lengths),
        np.concatenate([rows for _, rows in parts] or [empty.astype(np.uint32)]),
    )
