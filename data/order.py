"""The order of the samples and every random draw, as pure functions of (seed, index, purpose).

A training position is one integer: samples consumed. Nothing here has state that a resume would need, and
nothing depends on ranks, workers or the Python version. Shards are permuted anew each epoch and read in
blocks, samples are permuted inside a block; permutations are Feistel networks, computed point by point.
What loads thousands of samples a second stands here twice, in plain integers and for arrays, and a test
compares the two. Changing any result changes every run: raise ORDER_VERSION and the golden vectors together.
Use: `epoch, shard, row = Order(counts, seed).order(index)`; `uniform(seed, index, Purpose.FLIP) < 0.5`.
"""

import math
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np

ORDER_VERSION = 1

MASK = (1 << 64) - 1
GOLDEN_GAMMA = 0x9E3779B97F4A7C15
ROUNDS = 8


class Purpose(IntEnum):
    """What a draw is for; draws for two purposes are independent. Numbers are for ever: only add."""

    CROP_X = 1
    CROP_Y = 2
    FLIP = 3
    CAPTION = 4
    CAPTION_DROPOUT = 5
    SUBSTITUTE = 6
    SHARD_ORDER = 7
    SAMPLE_ORDER = 8
    NOISE = 9
    TIME = 10
    POSTERIOR = 11
    SOURCE = 12
    BUCKET = 13
    VARIANT = 14


def mix(*words: int) -> int:
    """Returns a 64-bit hash of integers (each taken modulo 2^64), the same on every machine.

    One splitmix64 step per word (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    state = 0
    for word in words:
        state = ((state ^ (word & MASK)) + GOLDEN_GAMMA) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state


def uniform(seed: int, index: int, purpose: Purpose) -> float:
    """Returns a number in [0, 1) with 53 random bits: the draw of global sample `index` for one purpose."""
    return (mix(seed, index, purpose) >> 11) * 2.0**-53


def uniforms(seed: int, indices: np.ndarray, purpose: Purpose) -> np.ndarray:
    """Returns `uniform` of each of `indices` int64 [n]: float64 [n]."""
    states = _next(np.uint64(mix(seed)) ^ indices.astype(np.uint64))
    states = _next(states ^ np.uint64(purpose))
    return (states >> np.uint64(11)) * 2.0**-53


def _next(states: np.ndarray) -> np.ndarray:
    """Returns one splitmix64 step of each of `states` uint64 [n]."""
    states = states + np.uint64(GOLDEN_GAMMA)
    states = (states ^ (states >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    states = (states ^ (states >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return states ^ (states >> np.uint64(31))


def permute(position: int, length: int, key: int) -> int:
    """Returns where a keyed permutation of range(length) sends `position`, in constant memory.

    A Feistel network over a*b >= length points with cycle walking (Black and Rogaway 2002, "Ciphers with
    arbitrary finite domains"); less than two walks are expected. Raises IndexError outside [0, length).
    """
    if not 0 <= position < length:
        raise IndexError(f"position {position} of {length}")
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    while True:
        right, left = divmod(position, a)
        for turn in range(0, ROUNDS, 2):
            left = (left + mix(key, turn, right)) % a
            right = (right + mix(key, turn + 1, left)) % b
        position = right * a + left
        if position < length:
            return position


def permute_many(positions: np.ndarray, length: int, key: int) -> np.ndarray:
    """Returns `permute` of each of `positions`, int64 [n]; raises IndexError outside [0, length)."""
    places = positions.astype(np.uint64)  # a negative position becomes one above every length
    if len(places) and int(places.max()) >= length:
        raise IndexError(f"position {positions[places.argmax()]} of {length}")
    a = math.isqrt(max(0, length - 1)) + 1
    b = -(-length // a)
    places = _walk(places, a, b, key)
    while len(outside := np.flatnonzero(places >= np.uint64(length))):
        places[outside] = _walk(places[outside], a, b, key)
    return places.astype(np.int64)


def _walk(places: np.ndarray, a: int, b: int, key: int) -> np.ndarray:
    """Returns one walk of `permute` from each of `places` uint64 [n] below a*b: uint64 [n].

    For the few points of a batch the cost is that of numpy's calls, which is least between arrays of one
    shape with a given place for the result: constants are therefore arrays too, and kept.
    """
    gamma, factor, factor2, by30, by27, by31 = _constants(len(places))
    sides = np.full_like(places, a), np.full_like(places, b)
    right = places // sides[0]
    left = places - right * sides[0]
    state, shifted = np.empty_like(places), np.empty_like(places)
    halves = (left, right)
    for turn, before in enumerate(_turns(key, len(places))):
        half, other, side = halves[turn % 2], halves[1 - turn % 2], sides[turn % 2]
        np.bitwise_xor(before, other, state)
        np.add(state, gamma, state)
        np.right_shift(state, by30, shifted)
        np.bitwise_xor(state, shifted, state)
        np.multiply(state, factor, state)
        np.right_shift(state, by27, shifted)
        np.bitwise_xor(state, shifted, state)
        np.multiply(state, factor2, state)
        np.right_shift(state, by31, shifted)
        np.bitwise_xor(state, shifted, state)
        np.remainder(state, side, state)  # before the sum, which would pass 64 bits
        np.add(half, state, half)
        np.remainder(half, side, half)
    return right * sides[0] + left


@lru_cache(maxsize=8)
def _constants(n: int) -> list[np.ndarray]:
    values = (GOLDEN_GAMMA, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 30, 27, 31)
    return [np.full(n, value, np.uint64) for value in values]


@lru_cache(maxsize=32)
def _turns(key: int, n: int) -> list[np.ndarray]:
    """Returns what `mix(key, turn, x)` is before its last word, for each turn, n times."""
    return [np.full(n, mix(key, turn), np.uint64) for turn in range(ROUNDS)]


class _Epoch:
    """The order of the shards in one epoch, and where each shard and each block ends in it."""

    def __init__(self, counts: np.ndarray, seed: int, epoch: int, block_shards: int) -> None:
        key = mix(seed, epoch, Purpose.SHARD_ORDER)
        self.shards = permute_many(np.arange(len(counts)), len(counts), key)
        self.ends = np.cumsum(counts[self.shards])
        self.block_ends = np.append(self.ends[block_shards - 1 : -1 : block_shards], self.ends[-1:])
        self.block_starts = np.append(0, self.block_ends[:-1])


class Order:
    """Maps a global sample index to its epoch, shard and row: every epoch is an exact permutation.

    `counts` are the samples of each shard; `block_shards` shards are mixed together at a time (what a local
    cache has to hold). Memory is O(shards); nothing is stored per sample.
    """

    def __init__(self, counts: Sequence[int] | np.ndarray, seed: int, block_shards: int = 64) -> None:
        if block_shards < 1:
            raise ValueError(f"block_shards is {block_shards}; it must be at least 1")
        self.counts = np.asarray(counts, np.int64)
        self.seed = seed
        self.block_shards = block_shards
        self.samples = int(self.counts.sum())
        self._epochs: dict[int, _Epoch] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_epochs": {}}

    def order(self, index: int) -> tuple[int, int, int]:
        """Returns (epoch, shard number, row) of global sample `index`.

        Raises IndexError for a negative index, and where there are no samples at all.
        """
        if index < 0 or not self.samples:
            raise IndexError(f"global sample index {index} of an endless order over {self.samples} samples")
        epoch, position = divmod(index, self.samples)
        plan = self._plan(epoch)
        block = int(plan.block_ends.searchsorted(position, "right"))
        start, end = int(plan.block_starts[block]), int(plan.block_ends[block])
        key = mix(self.seed, epoch, Purpose.SAMPLE_ORDER, block)
        position = start + permute(position - start, end - start, key)
        place = int(plan.ends.searchsorted(position, "right"))
        shard = int(plan.shards[place])
        return epoch, shard, position - int(plan.ends[place] - self.counts[shard])

    def orders(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns `order` of each of `indices` int64 [n]: epochs, shard numbers and rows, int64 [n] each."""
        if len(indices) and (not self.samples or int(indices.min()) < 0):
            raise IndexError(
                f"global sample index {indices.min()} of an endless order over {self.samples} samples"
            )
        epochs = indices // max(1, self.samples)
        shards, rows = np.empty_like(epochs), np.empty_like(epochs)
        for epoch, inside in _groups(epochs, np.arange(len(indices))):
            plan = self._plan(epoch)
            positions = indices[inside] - epoch * self.samples
            for block, part in _groups(plan.block_ends.searchsorted(positions, "right"), inside):
                start, end = int(plan.block_starts[block]), int(plan.block_ends[block])
                key = mix(self.seed, epoch, Purpose.SAMPLE_ORDER, block)
                there = indices[part] - (epoch * self.samples + start)
                there = permute_many(there, end - start, key) + start
                places = plan.ends.searchsorted(there, "right")
                found = plan.shards[places]
                shards[part] = found
                rows[part] = there - plan.ends[places] + self.counts[found]
        return epochs, shards, rows

    def _plan(self, epoch: int) -> _Epoch:
        """Returns an epoch's shard order; two are kept, as a batch may span two epochs."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = _Epoch(self.counts, self.seed, epoch, self.block_shards)
        return self._epochs[epoch]


def _groups(values: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each of `values` [n], rising, with those of `numbers` [n] that stand beside it."""
    if not len(values):
        return
    if (values == values[0]).all():
        yield int(values[0]), numbers
        return
    for value in np.unique(values).tolist():
        yield value, numbers[values == value]


class GlobalBatchSampler:
    """Yields this rank's slice of each global batch, as lists of global sample indices.

    Batch k after `start` samples is [start + k*G, start + (k + 1)*G) with G = `batch_size`, all ranks
    together; the last one is whole, even where that passes `stop`. Raises ValueError where G does not divide
    by the ranks.
    """

    def __init__(self, batch_size: int, start: int, stop: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size={batch_size} is the global batch and must be a positive multiple of the "
                f"{world_size} ranks; the nearest is {max(1, round(batch_size / world_size)) * world_size}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} of {world_size}")
        if start < 0:
            raise ValueError(f"start={start} samples consumed; it must not be negative")
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, -(-(self.stop - self.start) // self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        for batch in range(len(self)):
            first = self.start + batch * self.batch_size + self.rank * share
            yield list(range(first, first + share))
