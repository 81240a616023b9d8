"""Duplicates among a dataset's pictures: found once, kept in `duplicates.idx`, left out where asked for.

Pictures of the same bytes share size, checksum and dimensions; near ones have perceptual hashes that differ
in a few bits. A group is all that is linked by such pairs; its first sample, in the order of shards and rows,
stays. `scripts/index.py` writes the file, `open_split(..., unique=True)` uses it.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data.arrays import UNREADABLE, read_arrays, write_arrays
from data.shard_index import IMAGE_FIELDS, DataError, ShardIndex

DUPLICATES = "duplicates.idx"
KIND = "duplicates"
HASH_BITS = 64
SPARE_BITS = 3  # a band may be this many bits short of telling every two of the hashes apart

Load = Callable[[int], np.ndarray]


class Duplicates:
    """The rows to leave out, by shard, as the file says; it is read again in each process that asks."""

    def __init__(self, path: Path, fingerprint: str, shards: str) -> None:
        self.path = path
        self.shards = shards
        self._arrays: dict[str, np.ndarray] | None = None
        how = f"run `python scripts/index.py {shards}`"
        try:
            meta, self._arrays = read_arrays(path, KIND)
        except FileNotFoundError as error:
            raise DataError(
                f"{path}: missing, but data.unique=true asks which pictures occur twice; {how}"
            ) from error
        except UNREADABLE as error:
            raise DataError(f"{path}: damaged ({error}); {how} again") from error
        if meta.get("fingerprint") != fingerprint:
            raise DataError(f"{path}: the shards have changed since duplicates were looked for; {how} again")
        self._digest = hashlib.sha256(
            self._arrays["ends"].tobytes() + self._arrays["rows"].tobytes()
        ).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}

    def rows(self, shard: int) -> np.ndarray:
        """Returns the rows of a shard that are left out, uint32, rising."""
        if self._arrays is None:
            self._arrays = read_arrays(self.path, KIND)[1]
        ends = self._arrays["ends"]
        return self._arrays["rows"][ends[shard - 1] if shard else 0 : ends[shard]]

    def fingerprint(self) -> str:
        """Returns the identity of what is left out, in hex."""
        return self._digest


def write_duplicates(
    folder: Path, fingerprint: str, shards: np.ndarray, rows: np.ndarray, count: int
) -> Path:
    """Returns the path of the file after writing which (shard, row) to leave out of `count` shards."""
    order = np.lexsort((rows, shards))
    ends = np.cumsum(np.bincount(shards, minlength=count)[:count]).astype(np.int64)
    path = folder / DUPLICATES
    arrays: dict[str, np.ndarray] = {"ends": ends, "rows": rows[order].astype(np.uint32)}
    write_arrays(path, {"kind": KIND, "fingerprint": fingerprint}, arrays)
    return path


def image_identities(index: ShardIndex) -> np.ndarray:
    """Returns uint64 [S]: a hash of each image's size, crc32c and dimensions, 0 where there is none.

    Needs the arrays offsets, sizes, crc32c, widths and heights.
    """
    arrays, known = index.arrays, np.zeros(index.count, bool)
    sizes, crcs = np.zeros(index.count, np.uint64), np.zeros(index.count, np.uint64)
    for name in IMAGE_FIELDS:
        if name in index.fields:
            column = index.fields.index(name)
            take = ~known & (arrays["offsets"][:, column] >= 0)
            sizes[take] = arrays["sizes"][take, column]
            crcs[take] = arrays["crc32c"][take, column]
            known |= take
    sides = (arrays["widths"].astype(np.uint64) << np.uint64(32)) | arrays["heights"].astype(np.uint64)
    mixed = _mix(_mix(_mix(sizes) ^ crcs) ^ sides)
    return np.where(known, np.where(mixed == 0, np.uint64(1), mixed), np.uint64(0))


def _mix(values: np.ndarray) -> np.ndarray:
    """Returns 64-bit values stirred so that each bit depends on all (Stafford 2011, variant 13)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# --- near ones ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Banding:
    """How near hashes are found: `bands` parts of the bits, of which `chosen` must be equal."""

    bands: int
    chosen: int

    @classmethod
    def of(cls, count: int, near: int) -> "Banding":
        """Returns the fewest bands whose equal part tells `count` hashes apart, but for a few.

        Two hashes that differ in `near` bits differ in at most `near` of the bands, so at least
        `bands - near` are equal (the pigeonhole principle; Manku, Jain and Das Sarma 2007, section 3).
        """
        wanted = max(1, count).bit_length() - SPARE_BITS
        for bands in range(near + 1, 2 * near + 2):
            if HASH_BITS * (bands - near) // bands >= wanted:
                break
        return cls(bands, bands - near)

    def masks(self) -> Iterator[np.uint64]:
        """Yields the bits of each choice of bands."""
        edges = [HASH_BITS * band // self.bands for band in range(self.bands + 1)]
        parts = [(1 << high) - (1 << low) for low, high in pairwise(edges)]
        for choice in combinations(parts, self.chosen):
            yield np.uint64(sum(choice))


def near_pairs(hashes: np.ndarray, near: int, banding: Banding | None = None) -> np.ndarray:
    """Returns int64 [P 2]: all pairs i < j of distinct hashes uint64 [N] with at most `near` bits between."""
    banding = banding or Banding.of(len(hashes), near)
    found: list[np.ndarray] = [np.zeros((0, 2), np.int64)]
    for mask in banding.masks():
        order = np.argsort(hashes & mask, kind="stable")
        ordered = hashes[order]
        keys = ordered & mask
        first, step = np.arange(len(keys) - 1), 1
        while len(first):
            first = first[keys[first] == keys[first + step]]
            close = first[np.bitwise_count(ordered[first] ^ ordered[first + step]) <= near]
            found.append(np.stack([order[close], order[close + step]], 1))
            step += 1
            first = first[first + step < len(keys)]
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0)


def groups_of(pairs: np.ndarray, count: int) -> np.ndarray:
    """Returns int64 [count]: for each thing the least number among those that pairs [P 2] link it with."""
    labels = np.arange(count)
    while True:
        least = np.minimum(labels[pairs[:, 0]], labels[pairs[:, 1]])
        before = labels.copy()
        np.minimum.at(labels, pairs[:, 0], least)
        np.minimum.at(labels, pairs[:, 1], least)
        labels = labels[labels]
        if np.array_equal(labels, before):
            return labels


def group_near(hashes: np.ndarray, near: int) -> np.ndarray:
    """Returns int64 [N]: of each hash the number of the first one of its group, its own if it is alone.

    Hashes uint64 [N] are linked where they differ in at most `near` bits; 0 is no hash and links nothing.
    """
    groups = np.arange(len(hashes))
    known = np.flatnonzero(hashes != 0)
    unique, first, which = np.unique(hashes[known], return_index=True, return_inverse=True)
    # Equal hashes are one before pairs are sought: a thousand equal pictures would be half a million pairs.
    labels = groups_of(near_pairs(unique, near), len(unique)) if near else np.arange(len(unique))
    firsts = np.full(len(unique), len(hashes))
    np.minimum.at(firsts, labels, known[first])
    groups[known] = firsts[labels[which]]
    return groups


def join_groups(parts: Sequence[np.ndarray], count: int) -> np.ndarray:
    """Returns the groups [count] that several groupings of the same things make together."""
    pairs = [np.stack([np.arange(count), part], 1)[part != np.arange(count)] for part in parts]
    return groups_of(np.concatenate(pairs or [np.zeros((0, 2), np.int64)]), count)
