"""The index of a whole dataset: several shards joined, and the two sides of the held-out split.

`Index` knows every shard's size, checksum and count, and loads a shard's arrays (`data.shard_index`) on first
touch; it pickles as paths and counts, so loader workers start light. Missing `.idx` files are made on
opening. `IndexView` is what lies on one side of the split, a pure function of the keys: adding shards moves
no sample across.

Use: `train, val = open_split("shards/flowers", val_fraction=0.02)`.
"""

import hashlib
import logging
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from glob import glob
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from braceexpand import braceexpand

from data.shard_index import (
    IMAGE_FIELDS,
    INDEX_VERSION,
    DataError,
    Extent,
    ShardHeader,
    ShardIndex,
    build_index,
    index_path,
    key_hash,
    read_header,
    read_index,
    write_index,
)

__all__ = [
    "IMAGE_FIELDS",
    "INDEX_VERSION",
    "DataError",
    "Extent",
    "Index",
    "IndexView",
    "ShardHeader",
    "ShardIndex",
    "build_index",
    "find_shards",
    "index_path",
    "key_hash",
    "open_split",
    "read_header",
    "read_index",
    "write_index",
]

ALL_HASHES = 1 << 64
MAX_LOADED = 512  # shards whose arrays a process holds, about 150 kB for a thousand samples
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
HOW = "make shards from a folder of pictures with `python scripts/make_shards.py PICTURES {}`"

log = logging.getLogger(__name__)


class Index:
    """Several shards joined in the order of their paths; samples are counted through them from 0."""

    def __init__(
        self, headers: Sequence[ShardHeader], in_memory: dict[int, ShardIndex] | None = None
    ) -> None:
        self.headers = tuple(headers)
        self._in_memory = dict(in_memory or {})  # indexes that could not be written beside their shard
        self._loaded: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def open(cls, shards: str) -> "Index":
        """Returns the index of a folder of tars, a pattern (glob, braces) or one tar; makes missing `.idx`.

        Raises one DataError that lists everything missing, cut, changed or damaged, and one for keys that
        occur in two shards.
        """
        headers, in_memory, problems = [], {}, []
        for number, shard in enumerate(find_shards(shards)):
            try:
                if shard.is_file() and not index_path(shard).is_file():
                    built = _make_index(shard)
                    if not index_path(shard).is_file():
                        in_memory[number] = built
                    headers.append(built.header)
                else:
                    headers.append(read_header(shard))
            except DataError as error:
                problems.append(str(error))
        if problems:
            more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
            raise DataError("; ".join(problems[:20]) + more)
        index = cls(headers, in_memory)
        index._refuse_duplicates()
        return index

    def __getstate__(self) -> dict[str, Any]:
        return {"headers": self.headers, "_in_memory": self._in_memory, "_loaded": OrderedDict()}

    def __len__(self) -> int:
        return sum(header.count for header in self.headers)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of samples of each shard."""
        return tuple(header.count for header in self.headers)

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(self.counts))

    def locate(self, i: int) -> tuple[int, int]:
        """Returns (shard number, row) of sample `i`; raises IndexError outside [0, len)."""
        return _locate(self._ends, i)

    def shard(self, number: int) -> ShardIndex:
        """Returns one shard's index, loaded and verified on first touch; raises DataError if damaged."""
        if number in self._in_memory:
            return self._in_memory[number]
        if number not in self._loaded:
            while len(self._loaded) >= MAX_LOADED:
                self._loaded.popitem(last=False)
            self._loaded[number] = read_index(self.headers[number].shard)
        self._loaded.move_to_end(number)
        return self._loaded[number]

    def fingerprint(self) -> str:
        """Returns the dataset's identity in hex: SHA-256 over each shard's SHA-256 and count, in order."""
        lines = "".join(f"{header.sha256} {header.count}\n" for header in self.headers)
        return hashlib.sha256(lines.encode()).hexdigest()

    def _refuse_duplicates(self) -> None:
        hashes = np.concatenate([self.shard(number).key_hashes for number in range(len(self.headers))])
        ordered = np.argsort(hashes, kind="stable")
        twins = np.flatnonzero(hashes[ordered[1:]] == hashes[ordered[:-1]])
        for twin in twins:
            one, other = (self.locate(int(ordered[twin + step])) for step in (0, 1))
            key = self.shard(one[0]).key(one[1])
            if key == self.shard(other[0]).key(other[1]):
                paths = [str(self.headers[number].shard) for number, _ in (one, other)]
                raise DataError(
                    f"key {key!r} occurs in {paths[0]} and in {paths[1]} ({len(twins)} such keys); "
                    "write the shards again with keys that are unique"
                )


class IndexView:
    """The samples of an index whose key's hash lies in [low, high): one side of a split, or all."""

    def __init__(self, index: Index, low: int = 0, high: int = ALL_HASHES) -> None:
        self.index = index
        self.low, self.high = low, high
        self._rows: OrderedDict[int, np.ndarray] = OrderedDict()
        whole = low == 0 and high == ALL_HASHES
        self.counts = index.counts if whole else tuple(len(self.rows(n)) for n in range(len(index.headers)))
        self._ends = list(accumulate(self.counts))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": OrderedDict()}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, shard: int) -> np.ndarray:
        """Returns which rows of a shard belong to the view, int64, rising."""
        if shard not in self._rows:
            hashes = self.index.shard(shard).key_hashes
            inside = hashes >= np.uint64(self.low)
            if self.high < ALL_HASHES:
                inside &= hashes < np.uint64(self.high)
            while len(self._rows) >= MAX_LOADED:
                self._rows.popitem(last=False)
            self._rows[shard] = np.flatnonzero(inside)
        return self._rows[shard]

    def sample(self, shard: int, position: int) -> tuple[ShardIndex, int]:
        """Returns the shard's index and the row of the view's sample at `position` of that shard."""
        return self.index.shard(shard), int(self.rows(shard)[position])

    def locate(self, i: int) -> tuple[int, int]:
        """Returns (shard number, position in the view's part of it) of the view's sample `i`."""
        return _locate(self._ends, i)

    def fingerprint(self) -> str:
        """Returns the identity of the view in hex: that of the index and the hashes it keeps."""
        return hashlib.sha256(f"{self.index.fingerprint()} {self.low} {self.high}".encode()).hexdigest()


def open_split(shards: str, val_fraction: float = 0.02) -> tuple[IndexView, IndexView]:
    """Returns (train, val), which never share a sample.

    A folder that holds `train/` and `val/` is split already, and `val_fraction` is not used; anything else is
    split by a hash of each key, `val_fraction` in [0, 1) of them held out. Raises DataError for a folder that
    is missing, empty or without shards, for no training samples, and for a picture on both sides; ValueError
    for the fraction.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    folder = Path(shards)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        train, val = (IndexView(Index.open(str(folder / side))) for side in ("train", "val"))
        _refuse_leak(train.index, val.index)
        return train, val
    index, border = Index.open(shards), int(val_fraction * ALL_HASHES)
    train, val = IndexView(index, low=border), IndexView(index, high=border)
    if not len(train):
        raise DataError(
            f"{shards}: val_fraction={val_fraction} leaves no training samples of {len(index)}; lower it"
        )
    if val_fraction and not len(val):
        log.warning(
            "%s: val_fraction=%s of %d samples holds none out; raise it", shards, val_fraction, len(index)
        )
    return train, val


def find_shards(shards: str) -> list[Path]:
    """Returns the tars a folder, pattern or path names, sorted; some that an index names may be missing.

    Raises DataError where there is nothing, or for a scheme such as http: or pipe:, which is never run.
    """
    if SCHEME.match(shards):
        raise DataError(f"{shards!r}: only local files are read; copy the shards to a folder and name that")
    path = Path(shards)
    if path.is_dir():
        return _in_folder(path)
    if not any(mark in shards for mark in "*?[{"):
        if not path.exists() and not index_path(path).exists():
            raise DataError(f"{shards}: no such file or folder; {HOW.format('OUT')}, or correct data.shards")
        if path.suffix != ".tar":
            raise DataError(f"{shards}: no .tar; name a shard or a folder of shards, or {HOW.format('OUT')}")
        return [path]
    try:
        patterns = list(braceexpand(shards))
    except ValueError as error:
        raise DataError(
            f"{shards!r}: its braces do not match; write it as 'folder/{{00000..00012}}.tar'"
        ) from error
    found: set[str] = set()
    for pattern in patterns:
        found.update(glob(pattern) if any(mark in pattern for mark in "*?[") else [pattern])
    tars = sorted(Path(name) for name in found if name.endswith(".tar"))
    if not tars:
        raise DataError(f"{shards!r}: no .tar matches it; correct the pattern, or {HOW.format('OUT')}")
    return tars


def _in_folder(folder: Path) -> list[Path]:
    names = {path.name for path in folder.glob("*.tar")}
    # An index without its shard shows that the shard is missing: reading its header will say so.
    names |= {path.name.removesuffix(".idx") for path in folder.glob("*.tar.idx")}
    if names:
        return [folder / name for name in sorted(names)]
    inside = sorted(path.name for path in folder.iterdir())
    parts = [name for name in inside if any((folder / name).glob("*.tar"))]
    if parts:
        raise DataError(
            f"{folder}: no .tar in it, but in its folders {', '.join(parts[:5])}; name one of them"
        )
    what = (
        f"no .tar among its {len(inside)} entries ({', '.join(inside[:3])}, ...)"
        if inside
        else "the folder is empty"
    )
    raise DataError(f"{folder}: {what}; {HOW.format(folder)}")


def _make_index(shard: Path) -> ShardIndex:
    """Returns the index of a shard that has none, and writes it where the folder can be written."""
    built = build_index(shard)
    try:
        log.info("%s: made its index, %d samples: %s", shard, built.count, write_index(built).name)
    except OSError as error:
        log.warning("%s: its index is kept in memory only (%s)", shard, error.strerror)
    return built


def _locate(ends: list[int], i: int) -> tuple[int, int]:
    if not 0 <= i < (ends[-1] if ends else 0):
        raise IndexError(f"sample {i} of {ends[-1] if ends else 0}")
    shard = bisect_right(ends, i)
    return shard, i - (ends[shard - 1] if shard else 0)


def _refuse_leak(train: Index, val: Index) -> None:
    """Raises DataError where the same key holds the same picture on both sides."""
    mine, theirs = (
        np.concatenate([side.shard(n).key_hashes for n in range(len(side.headers))]) for side in (train, val)
    )
    _, rows, others = np.intersect1d(mine, theirs, return_indices=True)
    for i, j in zip(rows.tolist(), others.tolist(), strict=True):
        (number, row), (other_number, other_row) = train.locate(i), val.locate(j)
        one, other = train.shard(number), val.shard(other_number)
        field = one.image_field(row)
        here, there = (one.extent(row, field), other.extent(other_row, field)) if field else (None, None)
        if here and there and here[1:] == there[1:]:
            raise DataError(
                f"key {one.key(row)!r} field {field} is the same picture in {one.shard} and {other.shard}: "
                "the held-out part is trained on; split the pictures again"
            )
