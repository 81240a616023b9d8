"""Bytes of samples, from local shards and copies of remote ones, each field compared with its crc32c.

The fields of a sample lie side by side in a tar, so the small ones are one `pread`. Descriptors are of the
process that opened them. A failed read is tried again through a new descriptor of the same shard, so fields
of two shards never mix. Use: `record = FieldReader().read(index, row, frozenset(["jpg"]))`;
`record.take("jpg")`.
"""

import os
import time
from collections import OrderedDict
from functools import lru_cache
from typing import Any

import google_crc32c

from data.cache import ShardCache
from data.fields import BadSample
from data.shard_index import DataError, ShardIndex

MAX_OPEN_FILES = 128
READ_ATTEMPTS = 4
FIRST_WAIT = 0.05  # seconds before a failed read is tried again; doubled each time
MAX_COPY = 1 << 15  # bytes of a field above which copying it out of others costs more than a call
MAX_GAP = 1 << 14  # bytes of other fields that are read along rather than to read twice
STILL_USED = 30.0  # seconds after which the cache is told that a copy is in use


class Record:
    """The fields read of one sample; a field is compared with its checksum when it is taken."""

    def __init__(self, reader: "FieldReader", index: ShardIndex, row: int) -> None:
        self._reader = reader
        self._index = index
        self._row = row
        self._fresh = False
        self.found: dict[str, tuple[bytes, int]] = {}  # name -> bytes, crc32c

    def take(self, name: str) -> bytes | None:
        """Returns a field's bytes, None where it is absent; raises BadSample where they are damaged."""
        entry = self.found.get(name)
        if entry is None:
            return None
        data, crc = entry
        actual = google_crc32c.value(data)
        if actual == crc:
            return data
        if self._index.header.remote and not self._fresh:
            # The copy was whole when it came, so the disk changed it. A new one is had once a sample.
            self.found = self._reader.read_anew(self._index, self._row, frozenset(self.found)).found
            self._fresh = True
            return self.take(name)
        raise BadSample(name, f"crc32c is {actual:08x}, its index says {crc:08x}")


class FieldReader:
    """Reads at offsets; the least recently used shards are closed first, and a copy opens its own."""

    def __init__(self, cache: ShardCache | None = None) -> None:
        self.cache = cache
        self.pid = os.getpid()
        self.handles: OrderedDict[str, tuple[int, float]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "pid": -1, "handles": OrderedDict()}

    def read(self, index: ShardIndex, row: int, names: frozenset[str]) -> Record:
        """Returns those of the fields `names` that the sample has; raises DataError as `bytes_at`."""
        record, arrays = Record(self, index, row), index.arrays
        offsets, sizes = arrays["offsets"][row].tolist(), arrays["sizes"][row].tolist()
        crcs = arrays["crc32c"][row].tolist()
        present = []
        for i, name in _columns(index.header.fields, names):
            if sizes[i] > MAX_COPY and offsets[i] >= 0:
                record.found[name] = self.bytes_at(index, row, offsets[i], sizes[i]), crcs[i]
            elif offsets[i] >= 0:
                present.append((i, name))
        if not present:
            return record
        first = min([offsets[i] for i, _ in present])
        end = max([offsets[i] + sizes[i] for i, _ in present])
        if end - first > sum([sizes[i] for i, _ in present]) + MAX_GAP:
            for i, name in present:
                record.found[name] = self.bytes_at(index, row, offsets[i], sizes[i]), crcs[i]
            return record
        data = self.bytes_at(index, row, first, end - first)
        for i, name in present:
            start = offsets[i] - first
            record.found[name] = data[start : start + sizes[i]], crcs[i]
        return record

    def read_anew(self, index: ShardIndex, row: int, names: frozenset[str]) -> Record:
        """Returns `read` of a remote sample from another copy of its shard."""
        self.forget(index.shard)
        if self.cache is not None:
            self.cache.drop(index.sha256)
        return self.read(index, row, names)

    def bytes_at(self, index: ShardIndex, row: int, offset: int, size: int) -> bytes:
        """Returns `size` bytes of a shard; raises DataError where they cannot be read, or it is cut."""
        shard = index.header.shard
        for attempt in range(READ_ATTEMPTS):
            path = self._path(index)
            try:
                data = self._pread(shard, path, offset, size)
                break
            except OSError as error:
                if attempt == READ_ATTEMPTS - 1:
                    raise DataError(
                        f"{_where(index, row, offset)}: read failed {READ_ATTEMPTS} times "
                        f"({error.strerror}); check the disk"
                    ) from error
                self.forget(shard)
                time.sleep(FIRST_WAIT * 2**attempt)
        if len(data) < size:
            raise DataError(f"{_where(index, row, offset)}: the shard was cut while in use; copy it again")
        return data

    def _path(self, index: ShardIndex) -> str | None:
        """Returns where the shard's bytes lie; None where they are open and nobody need know."""
        header = index.header
        if self.pid != os.getpid():
            self.pid, self.handles = os.getpid(), OrderedDict()
        known = self.handles.get(header.shard)
        if known is not None and (not header.remote or time.monotonic() - known[1] < STILL_USED):
            return None
        if not header.remote:
            return header.shard
        if self.cache is None:
            raise DataError(f"{header.shard}: a remote shard is read through a cache; give one")
        path = str(self.cache.path(header.shard, header.size, header.sha256))
        if known is not None:
            self.handles[header.shard] = known[0], time.monotonic()
            return None
        return path

    def _pread(self, shard: str, path: str | None, offset: int, size: int) -> bytes:
        if path is not None:
            while len(self.handles) >= MAX_OPEN_FILES:
                os.close(self.handles.popitem(last=False)[1][0])
            self.handles[shard] = os.open(path, os.O_RDONLY), time.monotonic()
        handle = self.handles[shard][0]
        self.handles.move_to_end(shard)
        data = os.pread(handle, size, offset)
        while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
            data += more
        return data

    def forget(self, shard: str) -> None:
        """Closes one shard, so that the next read opens it anew (a network file system may have lost it)."""
        known = self.handles.pop(shard, None)
        if known is not None and self.pid == os.getpid():
            os.close(known[0])


@lru_cache(maxsize=256)
def _columns(fields: tuple[str, ...], names: frozenset[str]) -> list[tuple[int, str]]:
    """Returns the columns of an index in which the fields `names` stand, each with its name."""
    return [(i, name) for i, name in enumerate(fields) if name in names]


def _where(index: ShardIndex, row: int, offset: int) -> str:
    offsets = index.arrays["offsets"][row].tolist()
    name = index.fields[offsets.index(offset)]
    return f"{index.shard} key {index.key(row)!r} field {name}"
