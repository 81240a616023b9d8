"""The order of the samples and every random draw, as pure functions of (seed, index, purpose).

A training position is one integer: samples consumed. Nothing here has state that a resume would need, and
nothing depends on ranks, workers or the Python version. Shards are permuted anew each epoch and read in
blocks, samples are permuted inside a block; permutations are Feistel networks, computed point by point.
Changing any result here changes every run: raise ORDER_VERSION and the golden vectors of the test together.
Use: `epoch, shard, row = Order(counts, seed).order(index)`; `uniform(seed, index, Purpose.FLIP) < 0.5`.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import IntEnum
from itertools import accumulate
from typing import Any

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


class _Epoch:
    """The order of the shards in one epoch: block k is the samples [ends[k - 1], ends[k])."""

    def __init__(self, counts: Sequence[int], seed: int, epoch: int, block_shards: int) -> None:
        key = mix(seed, epoch, Purpose.SHARD_ORDER)
        shards = [permute(i, len(counts), key) for i in range(len(counts))]
        self.blocks = [shards[i : i + block_shards] for i in range(0, len(shards), block_shards)]
        self.inner_ends = [list(accumulate(counts[shard] for shard in block)) for block in self.blocks]
        self.ends = list(accumulate(ends[-1] for ends in self.inner_ends))


class Order:
    """Maps a global sample index to its epoch, shard and row: every epoch is an exact permutation.

    `counts` are the samples of each shard; `block_shards` shards are mixed together at a time (what a local
    cache has to hold). Memory is O(shards); nothing is stored per sample.
    """

    def __init__(self, counts: Sequence[int], seed: int, block_shards: int = 64) -> None:
        if block_shards < 1:
            raise ValueError(f"block_shards is {block_shards}; it must be at least 1")
        self.counts = tuple(counts)
        self.seed = seed
        self.block_shards = block_shards
        self.samples = sum(self.counts)
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
        block = bisect_right(plan.ends, position)
        start = plan.ends[block - 1] if block else 0
        key = mix(self.seed, epoch, Purpose.SAMPLE_ORDER, block)
        inner_ends = plan.inner_ends[block]
        position = permute(position - start, inner_ends[-1], key)
        place = bisect_right(inner_ends, position)
        return epoch, plan.blocks[block][place], position - (inner_ends[place - 1] if place else 0)

    def _plan(self, epoch: int) -> _Epoch:
        """Returns an epoch's shard order; two are kept, as a batch may span two epochs."""
        if epoch not in self._epochs:
            while len(self._epochs) >= 2:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = _Epoch(self.counts, self.seed, epoch, self.block_shards)
        return self._epochs[epoch]


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
