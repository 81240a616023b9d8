"""The index of a whole dataset: several shards joined, and the two sides of the held-out split.

`Index` knows every shard's size, checksum and count from the catalogue, and loads a shard's arrays
(`data.shard_index`) on first touch; it pickles as the catalogue, so loader workers start light. What is
missing is made on opening (`data.opening`). `IndexView` (`data.views`) is what lies on one side of the split,
a pure function of the keys: adding shards moves no sample across.

Use: `train, val = open_split("shards/flowers", val_fraction=0.02)`.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import UNREADABLE, read_meta, write_arrays
from data.cache import ShardCache
from data.catalogue import Catalogue, Headers
from data.changes import diff
from data.duplicates import DUPLICATES, Duplicates
from data.filters import Filter
from data.opening import find_shards, open_dataset
from data.repeats import each_shard
from data.shard_index import (
    IMAGE_FIELDS,
    INDEX_VERSION,
    DataError,
    Extent,
    ShardHeader,
    ShardIndex,
    build_index,
    current_index,
    index_path,
    key_hash,
    read_header,
    read_index,
    write_index,
)
from data.views import ALL_HASHES, IndexView, count_together, locate, refuse_empty

__all__ = [
    "ALL_HASHES",
    "IMAGE_FIELDS",
    "INDEX_VERSION",
    "DataError",
    "Extent",
    "Filter",
    "Index",
    "IndexView",
    "ShardHeader",
    "ShardIndex",
    "build_index",
    "current_index",
    "diff",
    "find_shards",
    "index_path",
    "key_hash",
    "open_split",
    "read_header",
    "read_index",
    "write_index",
]

MAX_LOADED = 512  # shards whose arrays a process holds, about 150 kB for a thousand samples

log = logging.getLogger(__name__)


class Index:
    """Several shards joined in the order of their names; samples are counted through them from 0.

    `folder` is where the catalogue lies, None for a pattern or addresses; `in_memory` holds the indexes that
    could not be written beside their shard.
    """

    def __init__(
        self, catalogue: Catalogue, folder: Path | None = None, in_memory: dict[int, ShardIndex] | None = None
    ) -> None:
        self.catalogue = catalogue
        self.folder = folder
        self._in_memory = dict(in_memory or {})
        self._loaded: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def open(cls, shards: str, cache: ShardCache | None = None) -> "Index":
        """Returns the index of a folder of tars, a pattern (glob, braces), one tar, or remote shards.

        Makes what is missing of local shards. Remote ones, http(s):// with braces or s3:// with a prefix or
        pattern, need a cache, and their `.idx` beside them; or name the folder that `scripts/index.py` wrote.
        Raises one DataError that lists everything missing, cut, changed or damaged, and one for keys that
        occur in two shards.
        """
        opened = open_dataset(shards, cache)
        return cls(opened.catalogue, opened.folder, opened.in_memory)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "catalogue": self.catalogue,
            "folder": self.folder,
            "_in_memory": self._in_memory,
            "_loaded": OrderedDict(),
        }

    def __len__(self) -> int:
        return int(self.catalogue.arrays["counts"].sum())

    @property
    def headers(self) -> Headers:
        """The shards' headers, each made when it is asked for."""
        return Headers(self.catalogue)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of samples of each shard."""
        return tuple(self.catalogue.arrays["counts"].tolist())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum(self.catalogue.arrays["counts"])

    def locate(self, i: int) -> tuple[int, int]:
        """Returns (shard number, row) of sample `i`; raises IndexError outside [0, len)."""
        return locate(self._ends, i)

    def shard(self, number: int) -> ShardIndex:
        """Returns one shard's index, loaded and verified on first touch; raises DataError if damaged."""
        if number in self._in_memory:
            return self._in_memory[number]
        if number not in self._loaded:
            while len(self._loaded) >= MAX_LOADED:
                self._loaded.popitem(last=False)
            self._loaded[number] = self.catalogue.load(number)
        self._loaded.move_to_end(number)
        return self._loaded[number]

    def load(self, number: int, names: Collection[str]) -> ShardIndex:
        """Returns a shard's index with some of its arrays, which are not kept; for passes over all shards."""
        return self._in_memory.get(number) or self.catalogue.load(number, names)

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """Yields (name, SHA-256 in hex, count) of each shard."""
        digests = self.catalogue.arrays["sha256"].tobytes().hex()
        for number, (name, count) in enumerate(zip(self.catalogue.names, self.counts, strict=True)):
            yield name, digests[64 * number : 64 * number + 64], count

    @cached_property
    def _fingerprint(self) -> str:
        lines = "".join(f"{sha256} {count}\n" for _, sha256, count in self.rows())
        return hashlib.sha256(lines.encode()).hexdigest()

    def fingerprint(self) -> str:
        """Returns the dataset's identity in hex: SHA-256 over each shard's SHA-256 and count, in order."""
        return self._fingerprint


def open_split(
    shards: str,
    val_fraction: float = 0.02,
    where: str = "",
    unique: bool = False,
    cache: ShardCache | None = None,
) -> tuple[IndexView, IndexView]:
    """Returns (train, val), which never share a sample.

    A folder that holds `train/` and `val/` is split already, and `val_fraction` is not used; anything else is
    split by a hash of each key, `val_fraction` in [0, 1) of them held out. `where` is a filter
    (`data.filters`), `unique` leaves out all but the first of each group of duplicates that
    `scripts/index.py` found. `cache` keeps what a pass over the index found, and remote shards. Raises
    DataError for a folder that is missing, empty or without shards, for a bad filter, for no training
    samples, and for a picture on both sides; ValueError for the fraction.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    folder, wanted = Path(shards), Filter(where)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        parts = [str(folder / side) for side in ("train", "val")]
        indexes = [Index.open(part, cache) for part in parts]
        train, val = (
            IndexView(index, 0, ALL_HASHES, wanted, _duplicates(index, part) if unique else None, cache)
            for index, part in zip(indexes, parts, strict=True)
        )
        _refuse_leak(train.index, val.index, cache)
        refuse_empty(train, parts[0])
        return train, val
    index, border = Index.open(shards, cache), int(val_fraction * ALL_HASHES)
    duplicates = _duplicates(index, shards) if unique else None
    train = IndexView(index, border, ALL_HASHES, wanted, duplicates, cache)
    val = IndexView(index, 0, border, wanted, duplicates, cache)
    count_together([train, val])
    if not len(train):
        refuse_empty(train, shards)
        raise DataError(
            f"{shards}: val_fraction={val_fraction} leaves no training samples of {len(index)}; lower it"
        )
    if val_fraction and not len(val):
        log.warning(
            "%s: val_fraction=%s of %d samples holds none out; raise it", shards, val_fraction, len(train)
        )
    return train, val


def _duplicates(index: Index, shards: str) -> Duplicates:
    if index.folder is None:
        raise DataError(
            f"{shards}: data.unique=true needs a folder that `python scripts/index.py '{shards}' OUT` wrote; "
            "run it and set data.shards=OUT"
        )
    return Duplicates(index.folder / DUPLICATES, index.fingerprint(), shards)


def _refuse_leak(train: Index, val: Index, cache: ShardCache | None) -> None:
    """Raises DataError where the same key holds the same picture on both sides; once for the same data."""
    both = hashlib.sha256(f"leak {train.fingerprint()} {val.fingerprint()}".encode()).hexdigest()
    done = cache.folder / "views" / f"{both}.idx" if cache is not None else None
    try:
        if done is not None and read_meta(done)["kind"] == "leak":
            return
    except UNREADABLE:
        pass
    names = ["key_hashes"]
    held = [val.load(number, names).key_hashes for number in range(len(val.headers))]
    hashes = np.concatenate(held)
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]

    def shared(number: int) -> np.ndarray:
        return np.flatnonzero(np.isin(train.load(number, names).key_hashes, ordered))

    for number, rows in enumerate(each_shard(shared, len(train.headers))):
        for row in rows.tolist():
            value = train.load(number, names).key_hashes[row]
            other = val.locate(int(order[np.searchsorted(ordered, value)]))
            _refuse_same(train.shard(number), row, val.shard(other[0]), other[1])
    if done is not None:
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            write_arrays(done, {"kind": "leak"}, {})
        except OSError as error:
            log.info("%s: not kept (%s)", done, error.strerror)


def _refuse_same(one: ShardIndex, row: int, other: ShardIndex, other_row: int) -> None:
    field = one.image_field(row)
    here, there = (one.extent(row, field), other.extent(other_row, field)) if field else (None, None)
    if here and there and here[1:] == there[1:]:
        raise DataError(
            f"key {one.key(row)!r} field {field} is the same picture in {one.shard} and {other.shard}: "
            "the held-out part is trained on; split the pictures again"
        )
