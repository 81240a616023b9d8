"""What of an index a run reads: one side of the split, filtered, without duplicates; and its counts, kept.

Which samples a view has is a function of the index alone, so opening needs only how many each shard keeps.
The first time that takes a pass over all indexes; the counts are then kept in `<cache>/views/`, a few bytes a
shard, and the rows of a shard are found when it is first read. Use: `view = IndexView(index, low, high,
Filter("width >= 512"), cache=cache)`; `count_together([train, val])` saves a pass.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.arrays import keep, read_kept
from data.cache import ShardCache
from data.changes import describe_shards
from data.duplicates import Duplicates
from data.filters import ARRAYS, Filter
from data.repeats import each_shard
from data.shard_index import DataError, ShardIndex

if TYPE_CHECKING:
    from data.index import Index
    from data.progress import Progress

ALL_HASHES = 1 << 64
MAX_LOADED = 512  # shards whose rows a process holds
KIND = "view"
QUIET = 2.0  # seconds that a pass may take without saying so


class IndexView:
    """The samples of an index whose key's hash lies in [low, high) and that `where` and `duplicates` keep."""

    def __init__(
        self,
        index: "Index",
        low: int = 0,
        high: int = ALL_HASHES,
        where: Filter | None = None,
        duplicates: Duplicates | None = None,
        cache: ShardCache | None = None,
    ) -> None:
        self.index = index
        self.low, self.high = low, high
        self.where = where if where is not None else Filter()
        self.duplicates = duplicates
        self.views = cache.folder / "views" if cache is not None else None
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()
        if self.where:
            schema = index.catalogue.schema()
            self.where.check(schema.numbers, schema.strings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def is_whole(self) -> bool:
        """Whether the view keeps every sample."""
        return self.low == 0 and self.high == ALL_HASHES and not self.where and self.duplicates is None

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of the view's samples in each shard."""
        count_together([self])
        return tuple(self.__dict__["counts"])

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(np.array(self.counts, np.int64))

    def rows(self, shard: int) -> np.ndarray:
        """Returns which rows of a shard belong to the view, int64, rising."""
        if shard not in self._rows:
            while len(self._rows) >= MAX_LOADED:
                self._rows.popitem(last=False)
            self._rows[shard] = np.flatnonzero(self.keeps(shard, self.index.shard(shard)))
        return self._rows[shard]

    def keeps(self, number: int, index: ShardIndex) -> np.ndarray:
        """Returns bool [S]: which samples of a shard, whose index is given, belong to the view."""
        if self.low > 0 or self.high < ALL_HASHES:
            inside = index.key_hashes >= np.uint64(self.low)
            if self.high < ALL_HASHES:
                inside &= index.key_hashes < np.uint64(self.high)
        else:
            inside = np.ones(index.count, bool)
        if self.where:
            inside &= self.where.keep(index)
        if self.duplicates is not None:
            inside[self.duplicates.rows(number)] = False
        return inside

    def arrays(self) -> tuple[str, ...]:
        """Returns the names of the arrays that `keeps` looks at."""
        split = ("key_hashes",) if self.low > 0 or self.high < ALL_HASHES else ()
        return split + (ARRAYS if self.where else ())

    def sample(self, shard: int, position: int) -> tuple[ShardIndex, int]:
        """Returns the shard's index and the row of the view's sample at `position` of that shard."""
        return self.index.shard(shard), int(self.rows(shard)[position])

    def locate(self, i: int) -> tuple[int, int]:
        """Returns (shard number, position in the view's part of it) of the view's sample `i`."""
        return locate(self._ends, i)

    def fingerprint(self) -> str:
        """Returns the identity of the view in hex: that of the index, the hashes, filter, duplicates."""
        parts = [self.index.fingerprint(), str(self.low), str(self.high)]
        if self.where:
            parts.append(f"where {self.where}")
        if self.duplicates is not None:
            parts.append(f"unique {self.duplicates.fingerprint()}")
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns what the view is, as JSON for checkpoints; `data.changes.diff` compares two of them."""
        described = {"low": f"{self.low:x}", "high": f"{self.high:x}"}
        return {
            **described,
            "where": str(self.where),
            "unique": self.duplicates is not None,
            "samples": len(self),
            **describe_shards(self.index.rows()),
        }

    def _kept(self) -> Path | None:
        return self.views / f"{self.fingerprint()}.idx" if self.views is not None else None

    def load_counts(self) -> bool:
        """Returns whether the counts are known without a pass over the index, and takes them."""
        if self.is_whole:
            self.__dict__["counts"] = self.index.counts
        if "counts" not in self.__dict__:
            shape = (len(self.index.headers),)
            arrays = read_kept(self._kept(), KIND, lambda arrays: arrays["counts"].shape == shape)
            if arrays is not None:
                self.__dict__["counts"] = tuple(arrays["counts"].tolist())
        return "counts" in self.__dict__

    def set_counts(self, counts: np.ndarray) -> None:
        """Takes the counts and keeps them in the cache; a cache that cannot be written is done without."""
        self.__dict__["counts"] = tuple(counts.tolist())
        keep(self._kept(), KIND, {"counts": counts})


def count_together(views: Sequence[IndexView]) -> None:
    """Counts the samples of views over one index, in one pass for those whose counts are not kept."""
    todo = [view for view in views if not view.load_counts()]
    if not todo:
        return
    index = todo[0].index
    names = sorted({name for view in todo for name in view.arrays()})

    def count(number: int) -> list[int]:
        loaded = index.load(number, names)
        return [int(np.count_nonzero(view.keeps(number, loaded))) for view in todo]

    counts = np.zeros((len(todo), len(index.headers)), np.int64)
    with _Watch(sum(index.counts)) as watch:
        for number, found in enumerate(each_shard(count, len(index.headers))):
            counts[:, number] = found
            watch.advance(index.counts[number])
    for view, row in zip(todo, counts, strict=True):
        view.set_counts(row)


def refuse_empty(view: IndexView, shards: str) -> None:
    """Raises DataError where a view's filter keeps nothing, saying which clause leaves nothing."""
    if not view.where or len(view):
        return
    clauses = view.where.clauses()
    left = np.zeros(len(clauses) + 1, np.int64)
    alone = np.zeros(len(clauses), np.int64)
    for number in range(len(view.index.headers)):
        loaded = view.index.load(number, ARRAYS)
        kept = np.ones(loaded.count, bool)
        left[0] += loaded.count
        for place, clause in enumerate(clauses):
            mask = clause.keep(loaded)
            alone[place] += np.count_nonzero(mask)
            kept &= mask
            left[place + 1] += np.count_nonzero(kept)
    if left[-1]:
        return
    guilty = int(np.argmin(left[1:] > 0))
    before = f" of the {left[guilty]:,} that the clauses before it keep" if guilty else f" of {left[0]:,}"
    by_itself = f" ({alone[guilty]:,} by itself)" if guilty and alone[guilty] else ""
    raise DataError(
        f"{shards}: where={view.where.text!r} keeps no sample: {str(clauses[guilty])!r} keeps none"
        f"{before}{by_itself}; ask for less"
    )


def locate(ends: np.ndarray, i: int) -> tuple[int, int]:
    """Returns (shard number, position) of sample `i` where shard n ends before sample ends[n]."""
    total = int(ends[-1]) if len(ends) else 0
    if not 0 <= i < total:
        raise IndexError(f"sample {i} of {total}")
    shard = int(np.searchsorted(ends, i, side="right"))
    return shard, i - (int(ends[shard - 1]) if shard else 0)


class _Watch:
    """Shows progress of a pass once it has taken some seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.began = time.monotonic()
        self.progress: Progress | None = None

    def __enter__(self) -> "_Watch":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.progress is not None:
            self.progress.__exit__(*error)

    def advance(self, more: int) -> None:
        self.done += more
        if self.progress is None and time.monotonic() - self.began > QUIET and self.done < self.total:
            from data.progress import Progress  # a bar's library is loaded only where there is one

            self.progress = Progress("counting samples", self.total).__enter__()
        if self.progress is not None:
            self.progress.update(self.done)
