"""Several sources in one order: which source item i comes from, and that source's own next sample.

Shares are exact, not drawn: after n items each source has given n*w/W of them, but for about one a level of
the tree that splits them. Everything is a function of the item's number, in integers, so that a mixture
resumes like a single source. Use: `Mixture([order, other], [3.0, 1.0], seed).places(np.arange(64))`.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from data.index import IndexView, ShardIndex
from data.order import Order, Purpose, mix

PARTS = 1_000_000  # a weight is a whole number of so many parts of all weights
MAX_TOTAL = 1 << 31  # of the weights, so that no product passes 63 bits

log = logging.getLogger(__name__)


class Places(NamedTuple):
    """Where n samples lie, int64 [n] each: the source, its shard, and the position among its samples there.

    `shapes` numbers the size each is brought to; positions count the samples of that shape.
    """

    sources: np.ndarray
    shards: np.ndarray
    positions: np.ndarray
    shapes: np.ndarray


class Interleave:
    """Deals items 0, 1, 2, ... out to choices in proportion to whole weights, evenly spread.

    A balanced binary tree: of the first n items that come to a node, floor((n*A + offset) / (A + B)) go left,
    with A and B the weights below. `offsets` of the nodes are drawn from `seed`, so that two interleaves do
    not run in step. Raises ValueError for weights that are negative, all zero, or 2^31 and more together.
    """

    def __init__(self, weights: Sequence[int], seed: int = 0) -> None:
        if min(weights, default=0) < 0 or not 0 < sum(weights) < MAX_TOTAL:
            raise ValueError(f"weights {list(weights)[:20]}: not negative, not all 0, below 2^31 together")
        self.choices = len(weights)
        self.depth = math.ceil(math.log2(len(weights)))
        leaves = 1 << self.depth
        totals = [0] * leaves + list(weights) + [0] * (leaves - len(weights))
        for node in range(leaves - 1, 0, -1):
            totals[node] = totals[2 * node] + totals[2 * node + 1]
        self._totals = np.array(totals, np.int64)
        offsets = [mix(seed, Purpose.SOURCE, node) % max(1, total) for node, total in enumerate(totals)]
        self._offsets = np.array(offsets, np.int64)

    def choose(self, item: int) -> tuple[int, int]:
        """Returns the choice for one item, and how many items before it were given to the same choice."""
        node, count = 1, item
        for _ in range(self.depth):
            before, after = self._left(node, count), self._left(node, count + 1)
            count, node = (before, 2 * node) if after > before else (count - before, 2 * node + 1)
        return node - (1 << self.depth), count

    def choose_many(self, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns `choose` of each of `items` int64 [n]: choices and counts, int64 [n] each."""
        nodes, counts = np.ones_like(items), items
        for _ in range(self.depth):
            before, after = self._lefts(nodes, counts), self._lefts(nodes, counts + 1)
            left = after > before
            counts = np.where(left, before, counts - before)
            nodes = 2 * nodes + ~left
        return nodes - (1 << self.depth), counts

    def _left(self, node: int, count: int) -> int:
        total, left = int(self._totals[node]), int(self._totals[2 * node])
        return (count * left + int(self._offsets[node])) // total

    def _lefts(self, nodes: np.ndarray, counts: np.ndarray) -> np.ndarray:
        totals, left = self._totals[nodes], self._totals[2 * nodes]
        whole, rest = np.divmod(counts, totals)  # rest * left fits, counts * left might not
        return whole * left + (rest * left + self._offsets[nodes]) // totals


def whole_weights(weights: Sequence[float], parts: int = PARTS) -> list[int]:
    """Returns weights as whole parts of `parts`, at least 1 where they are above 0.

    Raises ValueError for negative and infinite ones, and where all are 0.
    """
    if any(not math.isfinite(weight) or weight < 0 for weight in weights) or not sum(weights) > 0:
        raise ValueError(f"weights {list(weights)[:20]} must be 0 or more, and not all 0")
    total = sum(weights)
    return [max(1, round(parts * weight / total)) if weight else 0 for weight in weights]


class SamplePlan(Protocol):
    """What decides which sample each item of a run is: a pure function, so that a run resumes anywhere."""

    samples: int
    #: The sizes (width, height) in pixels that pictures are brought to; empty where there is only the square.
    shapes: tuple[tuple[int, int], ...]

    def places(self, items: np.ndarray) -> Places:
        """Returns where the items int64 [n] lie; raises IndexError for a negative one."""

    def substitute(self, item: int, draw: int) -> Places:
        """Returns where the sample lies that stands for an unusable item, chosen by `draw`, 64 bits."""

    def sample(self, views: Sequence[IndexView], place: tuple[int, int, int, int]) -> tuple[ShardIndex, int]:
        """Returns the index and row of a sample, given its source, shard, position and shape."""

    def for_batches(self, batch_size: int) -> "SamplePlan":
        """Returns the plan for global batches of that many samples."""

    def window(self) -> int:
        """Returns for about how many items every source stays within one block of shards."""

    def describe(self) -> dict[str, Any]:
        """Returns what decides the plan besides the samples and the seed, as JSON."""


class Mixture:
    """Item i is the next sample of the source `Interleave` gives it to; one source is its order alone."""

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.orders = tuple(orders)
        self.weights = whole_weights([w if o.samples else 0.0 for w, o in zip(weights, orders, strict=True)])
        self.interleave = Interleave(self.weights, seed)
        self.samples = sum(o.samples for o, weight in zip(orders, self.weights, strict=True) if weight)
        self.shapes: tuple[tuple[int, int], ...] = ()
        if empty := [i for i, order in enumerate(orders) if weights[i] and not order.samples]:
            log.warning("sources %s hold no samples and are left out", empty)

    def places(self, items: np.ndarray) -> Places:
        """Returns where the items int64 [n] lie; raises IndexError for a negative one."""
        sources, counts = self.interleave.choose_many(items)
        shards, positions = np.empty_like(items), np.empty_like(items)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            _, shards[chosen], positions[chosen] = self.orders[source].orders(counts[chosen])
        return Places(sources, shards, positions, np.zeros_like(items))

    def substitute(self, item: int, draw: int) -> Places:
        """Returns where the sample lies that stands for an unusable item, chosen by `draw`, 64 bits."""
        return self.places(np.array([draw % self.samples], np.int64))

    def sample(self, views: Sequence[IndexView], place: tuple[int, int, int, int]) -> tuple[ShardIndex, int]:
        """Returns the index and row of a sample, given its source, shard, position and shape."""
        return views[place[0]].sample(place[1], place[2])

    def for_batches(self, batch_size: int) -> "Mixture":
        """Returns the plan itself, which no batch size changes."""
        return self

    def describe(self) -> dict[str, Any]:
        """Returns what decides the plan besides the samples and the seed, as JSON."""
        return {"weights": self.weights} if len(self.weights) > 1 else {}

    def window(self) -> int:
        """Returns for about how many items every source stays within one block of shards."""
        total = sum(self.weights)
        lasting = [
            _block_samples(order) * total / weight
            for order, weight in zip(self.orders, self.weights, strict=True)
            if weight
        ]
        return max(1, int(min(lasting)))


class Joined:
    """One order over the shards of several sources, one source's after another's; one source is just that."""

    def __init__(self, order: Order, shards: Sequence[int]) -> None:
        self.order = order
        self.samples = order.samples
        self.shapes: tuple[tuple[int, int], ...] = ()
        self._starts = np.cumsum([0, *shards])[:-1]

    def places(self, items: np.ndarray) -> Places:
        """Returns where the items int64 [n] lie; raises IndexError for a negative one."""
        _, numbers, positions = self.order.orders(items)
        sources = self._starts.searchsorted(numbers, "right") - 1
        return Places(sources, numbers - self._starts[sources], positions, np.zeros_like(items))

    def substitute(self, item: int, draw: int) -> Places:
        """Returns where the sample lies that stands for an unusable item, chosen by `draw`, 64 bits."""
        return self.places(np.array([draw % self.samples], np.int64))

    def sample(self, views: Sequence[IndexView], place: tuple[int, int, int, int]) -> tuple[ShardIndex, int]:
        """Returns the index and row of a sample, given its source, shard, position and shape."""
        return views[place[0]].sample(place[1], place[2])

    def for_batches(self, batch_size: int) -> "Joined":
        """Returns the plan itself, which no batch size changes."""
        return self

    def describe(self) -> dict[str, Any]:
        """Returns what decides the plan besides the samples and the seed: nothing."""
        return {}

    def window(self) -> int:
        """Returns for about how many items the order stays within one block of shards."""
        return max(1, int(_block_samples(self.order)))


def _block_samples(order: Order) -> float:
    """Returns how many samples a block of an order holds on average."""
    return order.samples / max(1, len(order.counts)) * min(order.block_shards, len(order.counts))
