"""Pictures of several shapes without stretching: each sample belongs to one shape, each batch holds one.

The shape of a sample follows from its size in the index, before any picture is read. Global batch g is of the
bucket that `Interleave` gives it by the buckets' sizes, and holds that bucket's next samples in an order of
its own, so that batches, ranks and resuming stay functions of one integer. Comparisons are in integers, the
same on every machine. Use: `Buckets(bucket_shapes(256, 16, 5, 2.0)).assign(widths, heights)`.
"""

import json
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import Arrays, keep, read_kept, write_atomic
from data.index import IndexView, ShardIndex
from data.mixture import Interleave, Mixture, Places, whole_weights
from data.order import Order, Purpose, mix
from data.repeats import each_shard

Shape = tuple[int, int]

FULL = 0.8  # of the pixels of a square a shape should have at least
REASONS = ("size unknown", "longer than max_aspect of the decoder", "smaller than max_upscale allows")
MAX_LOADED = 512  # shards whose rows are kept sorted by bucket
KIND = "buckets"
FINE_PARTS = 1_000_000_000

log = logging.getLogger(__name__)


def bucket_shapes(resolution: int, divisor: int, count: int, max_aspect: float) -> tuple[Shape, ...]:
    """Returns at most `count` shapes (width, height) in pixels, from upright to wide, the square among them.

    Sides are multiples of `divisor`; no shape has more pixels than the square, and where possible none less
    than 0.8 of them. Raises ValueError for an even or small count, an aspect below 1, or a resolution that
    the divisor does not divide.
    """
    if count < 1 or count % 2 == 0:
        raise ValueError(
            f"buckets={count}; it must be odd, the square and as many upright as wide shapes: "
            f"{max(1, count - 1)} or {max(1, count + 1)}"
        )
    if not (math.isfinite(max_aspect) and max_aspect >= 1):
        raise ValueError(f"max_aspect={max_aspect}; it must be at least 1")
    if count > 1 and resolution % divisor:
        raise ValueError(f"resolution={resolution} is no multiple of {divisor}, as buckets>1 needs")
    wide = []
    for width in range(resolution + divisor, int(resolution * max_aspect) + 1, divisor):
        height = resolution * resolution // width // divisor * divisor
        if height and width <= max_aspect * height:
            wide.append((width, height))
    full = [(w, h) for w, h in wide if w * h >= FULL * resolution * resolution]
    wide = full or wide
    chosen = set()
    for step in range(1, count // 2 + 1):
        wanted = math.log(max_aspect) * step / (count // 2)
        if wide:
            chosen.add(min(wide, key=lambda shape: (abs(math.log(shape[0] / shape[1]) - wanted), shape)))
    ordered = sorted(chosen, key=lambda shape: (shape[0] / shape[1], shape))
    return (*((h, w) for w, h in reversed(ordered)), (resolution, resolution), *ordered)


class Buckets:
    """Assigns samples to shapes by the nearest logarithm of width over height.

    Left out: a size that is not known, a long side of more than `max_side_ratio` short ones, and a picture
    that would have to grow in both directions by more than `max_upscale`.
    """

    def __init__(
        self, shapes: Sequence[Shape], max_side_ratio: float = 16.0, max_upscale: float = math.inf
    ) -> None:
        self.shapes = tuple(shapes)
        self.max_side_ratio = max_side_ratio
        self.max_upscale = max_upscale

    def assign(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Returns the bucket of each size int32 [n], int64 [n]; -1 - r where left out for REASONS[r]."""
        w, h = widths.astype(np.int64), heights.astype(np.int64)
        buckets = np.zeros(len(w), np.int64)
        for (w1, h1), (w2, h2) in zip(self.shapes[:-1], self.shapes[1:], strict=True):
            buckets += w * w * (h1 * h2) > h * h * (w1 * w2)  # above the mean of both logarithms
        targets = np.array(self.shapes, np.float64)[buckets]
        if math.isfinite(self.max_upscale):
            small = (targets[:, 0] > w * self.max_upscale) & (targets[:, 1] > h * self.max_upscale)
            buckets[small] = -3
        buckets[np.maximum(w, h) > self.max_side_ratio * np.minimum(w, h)] = -2
        buckets[(w <= 0) | (h <= 0)] = -1
        return buckets

    def describe(self) -> dict[str, Any]:
        """Returns what decides the assignment, as JSON."""
        ratio = None if math.isinf(self.max_upscale) else self.max_upscale
        return {
            "shapes": [list(shape) for shape in self.shapes],
            "max_side_ratio": self.max_side_ratio,
            "max_upscale": ratio,
        }


class Counted:
    """How many samples of a view lie in each shard and bucket, int64 [S K], and which are left out.

    `left` int64 [M 3] holds shard, row and reason. One pass over the index, kept in the view's cache.
    """

    def __init__(self, view: IndexView, buckets: Buckets) -> None:
        self.view = view
        self.buckets = buckets
        self.counts, self.left = self._load() or self._count()

    def _path(self) -> Path | None:
        if self.view.views is None:
            return None
        text = json.dumps([self.view.fingerprint(), self.buckets.describe()], sort_keys=True)
        return self.view.views / f"buckets-{mix(*text.encode()):016x}{mix(1, *text.encode()):016x}.idx"

    def _load(self) -> tuple[np.ndarray, np.ndarray] | None:
        shape = (len(self.view.counts), len(self.buckets.shapes))

        def fits(arrays: Arrays) -> bool:
            return arrays["counts"].shape == shape and arrays["left"].shape[1:] == (3,)

        arrays = read_kept(self._path(), KIND, fits)
        return None if arrays is None else (arrays["counts"], arrays["left"])

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        index, kinds = self.view.index, len(self.buckets.shapes)
        names = sorted({*self.view.arrays(), "widths", "heights"})

        def one(number: int) -> tuple[np.ndarray, np.ndarray]:
            loaded = index.load(number, names)
            rows = np.flatnonzero(self.view.keeps(number, loaded))
            found = self.buckets.assign(loaded.arrays["widths"][rows], loaded.arrays["heights"][rows])
            out = found < 0
            left = np.stack([np.full(out.sum(), number), rows[out], -1 - found[out]], 1)
            return np.bincount(found[~out], minlength=kinds), left

        results = list(each_shard(one, len(self.view.counts)))
        counts = np.array([counts for counts, _ in results], np.int64).reshape(-1, kinds)
        left = np.concatenate([part for _, part in results] or [np.zeros((0, 3))]).astype(np.int64)
        keep(self._path(), KIND, {"counts": counts, "left": left})
        return counts, left


def write_left_out(path: Path, counted: Sequence[Counted]) -> int:
    """Returns how many samples are in no bucket, after writing a line of JSON for each to `path`."""
    lines = []
    for each in counted:
        for number in np.unique(each.left[:, 0]).tolist():
            index = each.view.index.shard(number)
            for _, row, reason in each.left[each.left[:, 0] == number].tolist():
                entry = {"shard": index.shard, "key": index.key(row), "reason": REASONS[reason]}
                lines.append(json.dumps(entry))
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n".join(lines) + "\n").encode())
        log.warning("%d samples fit no shape and are left out: %s", len(lines), path)
    return len(lines)


def merge(sizes: Sequence[int], shapes: Sequence[Shape], least: int) -> list[int]:
    """Returns the bucket that each bucket becomes, so that none but a last one has fewer than `least`.

    The smallest is joined to the neighbour whose shape is nearest, again and again; of two as near, to the
    one closer to the square.
    """
    becomes = list(range(len(sizes)))
    held = dict(enumerate(sizes))
    while len(held) > 1 and min(held.values()) < least:
        small = min(held, key=lambda i: (held[i], i))
        order = sorted(held)
        place = order.index(small)
        near = order[max(0, place - 1) : place] + order[place + 1 : place + 2]
        target = min(near, key=lambda i: (*_distance(shapes[i], shapes[small]), i))
        held[target] += held.pop(small)
        becomes = [target if i == small else i for i in becomes]
    return becomes


def _distance(one: Shape, other: Shape) -> tuple[float, float]:
    """Returns how far apart the aspects are, as a ratio, and how far `one` is from the square."""
    ratio = one[0] * other[1] / (one[1] * other[0])
    return max(ratio, 1 / ratio), max(one) / min(one)


class BucketPlan:
    """Places of the samples of global batches of G = `batch_size`, each batch wholly of one shape.

    Sample g*G + j of the run is sample n*G + j of the bucket of batch g, n batches of which came before; a
    bucket mixes the sources by weight times their share of it. Buckets of fewer than G samples are merged.
    """

    def __init__(
        self,
        counted: Sequence[Counted],
        weights: Sequence[float],
        batch_size: int,
        seeds: Sequence[int],
        block_shards: int,
    ) -> None:
        self.batch_size = batch_size
        self.counted = tuple(counted)
        self.weights, self.seeds, self.block_shards = tuple(weights), tuple(seeds), block_shards
        shapes = counted[0].buckets.shapes
        sizes = [each.counts.sum(0) for each in counted]
        active = [bool(weight and size.sum()) for weight, size in zip(weights, sizes, strict=True)]
        together = sum(size for size, used in zip(sizes, active, strict=True) if used)
        self.becomes = np.array(merge(np.asarray(together).tolist(), shapes, batch_size), np.int64)
        kept = [i for i in sorted(set(self.becomes.tolist())) if together[self.becomes == i].sum()]
        self.shapes = tuple(shapes[i] for i in kept)
        self.number = np.array([kept.index(i) if i in kept else -1 for i in self.becomes.tolist()], np.int64)
        shares = [
            [
                weight * size[self.number == b].sum() / max(1, size.sum()) if used else 0.0
                for weight, size, used in zip(weights, sizes, active, strict=True)
            ]
            for b in range(len(kept))
        ]
        self.mixtures = [
            Mixture(
                [
                    Order(each.counts[:, self.number == b].sum(1), seed, block_shards)
                    for each, seed in zip(counted, seeds, strict=True)
                ],
                shares[b],
                seeds[0],
            )
            for b in range(len(kept))
        ]
        if sum(active) == 1 and sum(m.samples for m in self.mixtures) < 1 << 31:
            parts = [mixture.samples for mixture in self.mixtures]
        else:
            parts = whole_weights([sum(share) for share in shares], FINE_PARTS)
        self.parts = parts
        self.interleave = Interleave(parts, mix(seeds[0], Purpose.BUCKET))
        self.samples = sum(mixture.samples for mixture in self.mixtures)
        self._sorted: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sorted": OrderedDict()}

    def places(self, items: np.ndarray) -> Places:
        """Returns where the samples int64 [n] of the run lie; raises IndexError for a negative one."""
        if len(items) and int(items.min()) < 0:
            raise IndexError(f"global sample index {items.min()}; it must not be negative")
        batches, inside = np.divmod(items, self.batch_size)
        shapes, before = self.interleave.choose_many(batches)
        found = Places(np.empty_like(items), np.empty_like(items), np.empty_like(items), shapes)
        for shape in np.unique(shapes).tolist():
            chosen = shapes == shape
            part = self.mixtures[shape].places(before[chosen] * self.batch_size + inside[chosen])
            for target, values in zip(found[:3], part[:3], strict=True):
                target[chosen] = values
        return found

    def substitute(self, item: int, draw: int) -> Places:
        """Returns where a sample of the same shape lies that stands for an unusable one, chosen by `draw`."""
        shape = self.interleave.choose(item // self.batch_size)[0]
        found = self.mixtures[shape].substitute(item, draw)
        return found._replace(shapes=np.full_like(found.shapes, shape))

    def sample(self, views: Sequence[IndexView], place: tuple[int, int, int, int]) -> tuple[ShardIndex, int]:
        """Returns the index and row of a sample, given its source, shard, position and shape."""
        source, shard, position, shape = place
        view = views[source]
        index = view.index.shard(shard)
        if (source, shard) not in self._sorted:
            while len(self._sorted) >= MAX_LOADED:
                self._sorted.popitem(last=False)
            rows = view.rows(shard)
            found = self.counted[source].buckets.assign(
                index.arrays["widths"][rows], index.arrays["heights"][rows]
            )
            rows, numbers = rows[found >= 0], self.number[found[found >= 0]]
            order = np.argsort(numbers, kind="stable")
            starts = np.searchsorted(numbers[order], np.arange(len(self.shapes)))
            self._sorted[source, shard] = rows[order], starts
        rows, starts = self._sorted[source, shard]
        return index, int(rows[starts[shape] + position])

    def for_batches(self, batch_size: int) -> "BucketPlan":
        """Returns the plan for global batches of that many samples."""
        if batch_size == self.batch_size:
            return self
        return BucketPlan(self.counted, self.weights, batch_size, self.seeds, self.block_shards)

    def describe(self) -> dict[str, Any]:
        """Returns what decides the plan besides samples, seed and batch size, as JSON."""
        weights = {"weights": whole_weights(self.weights)} if len(self.weights) > 1 else {}
        return {**weights, **self.counted[0].buckets.describe()}

    def window(self) -> int:
        """Returns for about how many items every source stays within one block of shards."""
        total = sum(self.parts)
        windows = (m.window() * total / part for m, part in zip(self.mixtures, self.parts, strict=True))
        return max(1, int(min(windows)))
