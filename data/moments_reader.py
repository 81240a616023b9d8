"""Reads the arrays of precomputed shards: at offsets, into memory that the caller gives, checked on the way.

Nothing is parsed that could be compared: the header of a record is known before it is read, so a batch's
headers are compared in one go. A sample's record costs one `preadv`, which brings the caption too where that
follows, one crc32c and no copy. Used by `data.moments`.
"""

import math
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np

from data.fields import BadSample, decode_caption
from data.npy import HEADER_BYTES, npy_header, parse_header
from data.provenance import Provenance
from data.shard_index import DataError, ShardIndex

MOMENTS, TEXT, POOLED, CAPTION = "moments.npy", "text.npy", "pooled.npy", "txt"
AROUND = 1 << 13  # bytes after a record, its caption among them, that are read with it
MAX_OPEN_FILES = 128
READ_ATTEMPTS = 4
FIRST_WAIT = 0.05  # seconds before a failed read is tried again; doubled each time

#: The valid states [L D] of a caption and its pooled vector [D]; L is 0 where there is no caption.
Text = tuple[np.ndarray, np.ndarray]
#: A shard's table and one of its rows.
Place = tuple["Table", list[int]]


class Table:
    """What reading asks of a shard's index, so that a sample is one look: int64 [n 9] of n chosen rows.

    Columns: the row; where its key begins and ends in `keys`; offset, size and crc32c of the moments; the
    bytes from their end to that of the caption, 0 where it is absent or not close by; its size and crc32c.
    """

    def __init__(self, index: ShardIndex, rows: np.ndarray) -> None:
        self.index = index
        self.shard = index.header.shard
        self.keys = index.arrays["keys"].tobytes()
        ends = index.arrays["key_ends"]
        (offsets, sizes, crcs), (starts, lengths, caption_crcs) = (
            [_column(index, name, field)[rows] for name in ("offsets", "sizes", "crc32c")]
            for field in (MOMENTS, CAPTION)
        )
        between = starts - offsets - sizes
        near = (starts >= 0) & (between >= 0) & (between + lengths <= AROUND)
        tails = np.where(near, between + lengths, 0)
        columns = (offsets, sizes, crcs, tails, lengths, caption_crcs)
        self.entries = np.stack([rows, np.append(0, ends)[rows], ends[rows], *columns], 1)

    def place(self, position: int) -> Place:
        """Returns the place of one of the rows that were chosen."""
        return self, self.entries[position].tolist()

    def key(self, entry: list[int]) -> str:
        """Returns the key of one of `entries`."""
        return self.keys[entry[1] : entry[2]].decode("utf-8", "surrogateescape")


class _OpenShards:
    """Descriptors of this process, the one opened first closed first; a copy in another opens its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.handles: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"pid": -1, "handles": {}}

    def here(self) -> None:
        """Forgets the descriptors of the process this one was forked from; to be called before a batch."""
        if self.pid != os.getpid():
            self.pid, self.handles = os.getpid(), {}

    def handle(self, shard: str) -> int:
        """Returns the descriptor of a shard; raises OSError."""
        handle = self.handles.get(shard)
        if handle is None:
            while len(self.handles) >= MAX_OPEN_FILES:
                os.close(self.handles.pop(next(iter(self.handles))))
            handle = self.handles[shard] = os.open(shard, os.O_RDONLY)
        return handle

    def forget(self, shard: str) -> None:
        """Closes one shard, so that the next read opens it anew (a network file system may have lost it)."""
        handle = self.handles.pop(shard, None)
        if handle is not None:
            os.close(handle)


class MomentsReader:
    """Reads and checks the arrays of single samples, into memory that the caller gives.

    `variants` arrays of `provenance.shape` lie in a record, `record_bytes` long without its header.
    """

    def __init__(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self.dtype = np.dtype(provenance.dtype)
        self.record_shape = (provenance.preprocessing.variants, *provenance.shape)
        self.record_bytes = math.prod(self.record_shape) * self.dtype.itemsize
        self.header = np.frombuffer(npy_header(provenance.dtype, self.record_shape), np.uint8)
        self._header_crc = google_crc32c.value(self.header.tobytes())
        self._tail = memoryview(bytearray(AROUND))
        self._files = _OpenShards()

    def __reduce__(self) -> tuple[type["MomentsReader"], tuple[Provenance]]:
        return MomentsReader, (self.provenance,)

    def read(
        self,
        places: Sequence[Place],
        slots: Sequence[int],
        headers: np.ndarray,
        records: np.ndarray,
        captions: list[str] | None = None,
    ) -> dict[int, BadSample]:
        """Returns what is wrong with the samples at `slots` of `places`, after reading each into its slot.

        `headers` uint8 [B 128], `records` uint8 [B record_bytes]; `captions` [B] are read where there is such
        a list, "" where a sample has none. Raises DataError for a record that is of another shape or cannot
        be read.
        """
        self._files.here()
        faults: dict[int, BadSample] = {}
        wanted, header_crc, handle = HEADER_BYTES + self.record_bytes, self._header_crc, self._files.handle
        heads, rows = list(headers), list(records)
        for slot in slots:
            table, (row, _, _, offset, size, crc32c, tail, length, caption_crc) = places[slot]
            if size != wanted:
                faults[slot] = self._other_size(table.index, row)
                continue
            head, record, more = heads[slot], rows[slot], 0 if captions is None else tail
            targets: tuple[Any, ...] = (head, record, self._tail[:more]) if more else (head, record)
            try:
                found = os.preadv(handle(table.shard), targets, offset)
            except OSError:
                found = self._insist(table.index, row, MOMENTS, targets, offset)
            if found != wanted + more:
                raise _cut(table.index, row, MOMENTS)
            # As if the header were the one it should be; whether it is, is looked at below for all at once.
            if google_crc32c.extend(header_crc, record) != crc32c:
                if google_crc32c.extend(google_crc32c.value(head), record) == crc32c:
                    self._refuse(table.index, row)
                faults[slot] = _mismatch(MOMENTS, crc32c)
            elif captions is not None:
                try:
                    data = bytes(self._tail[more - length : more]) if more else None
                    captions[slot] = self._caption(table.index, row, data, caption_crc)
                except BadSample as error:
                    faults[slot] = error
        for place in np.flatnonzero((headers[slots] != self.header).any(1)).tolist():
            faults.setdefault(slots[place], BadSample(MOMENTS, "its header is damaged"))
        return faults

    def text(self, index: ShardIndex, row: int) -> Text:
        """Returns the states [L D] and the pooled vector [D] of a row's caption; L is 0 where it has none.

        Raises as `read`.
        """
        assert self.provenance.text is not None
        width = int(self.provenance.text["dim"])
        if absent(index, row, TEXT):
            return np.zeros((0, width), self.dtype), np.zeros(width, self.dtype)
        states, pooled = (self._array(index, row, field) for field in (TEXT, POOLED))
        length = states.size // width
        if states.size != length * width or not length or pooled.size != width:
            raise DataError(
                f"{place_of(index, row)}: its text embeddings are not {width} wide; precompute again"
            )
        return states.reshape(length, width), pooled

    def _caption(self, index: ShardIndex, row: int, data: bytes | None, crc32c: int) -> str:
        """Returns the caption of a row, "" where it has none; `data` are its bytes where they were read."""
        if data is None:
            return "" if absent(index, row, CAPTION) else decode_caption(self._bytes(index, row, CAPTION))
        if google_crc32c.value(data) != crc32c:
            raise _mismatch(CAPTION, crc32c)
        return decode_caption(data)

    def _array(self, index: ShardIndex, row: int, field: str) -> np.ndarray:
        data = self._bytes(index, row, field)
        dtype, shape = _parse(data[:HEADER_BYTES], index, row, field)
        if dtype != self.dtype.name or math.prod(shape) * self.dtype.itemsize != len(data) - HEADER_BYTES:
            raise DataError(
                f"{place_of(index, row)} field {field}: {dtype} {shape}; precompute the shard again"
            )
        return np.frombuffer(data, self.dtype, offset=HEADER_BYTES).reshape(shape)

    def _bytes(self, index: ShardIndex, row: int, field: str) -> bytes:
        offset, size, crc32c = _extent(index, row, field)
        data = bytearray(size)
        self._fill(index, row, field, (data,), offset, size)
        whole = bytes(data)
        if google_crc32c.value(whole) != crc32c:
            raise _mismatch(field, crc32c)
        return whole

    def _fill(
        self, index: ShardIndex, row: int, field: str, targets: tuple[Any, ...], offset: int, size: int
    ) -> None:
        """Fills `targets`, `size` writable bytes, from `offset` of the shard; raises DataError."""
        shard = index.header.shard
        try:
            read = os.preadv(self._files.handle(shard), targets, offset)
        except OSError:
            read = self._insist(index, row, field, targets, offset)
        if read != size:  # local files are read whole, unless they end
            raise _cut(index, row, field)

    def _insist(self, index: ShardIndex, row: int, field: str, targets: tuple[Any, ...], offset: int) -> int:
        """Returns the bytes read after opening the shard anew, a few times; raises DataError."""
        shard = index.header.shard
        for attempt in range(1, READ_ATTEMPTS):
            self._files.forget(shard)
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
            try:
                return os.preadv(self._files.handle(shard), targets, offset)
            except OSError as error:
                reason = error.strerror
        raise DataError(
            f"{place_of(index, row)} field {field}: read failed {READ_ATTEMPTS} times ({reason}); "
            "check the disk"
        )

    def _other_size(self, index: ShardIndex, row: int) -> BadSample:
        """Returns that a sample has no moments; raises DataError where it has others than are stated."""
        if not absent(index, row, MOMENTS):
            self._refuse(index, row)
        return BadSample(MOMENTS, "absent")

    def _refuse(self, index: ShardIndex, row: int) -> None:
        """Raises DataError: the record is not of the shape or type that the folder states."""
        data = bytearray(HEADER_BYTES)
        self._fill(index, row, MOMENTS, (data,), _extent(index, row, MOMENTS)[0], HEADER_BYTES)
        dtype, shape = _parse(bytes(data), index, row, MOMENTS)
        raise DataError(
            f"{place_of(index, row)} field {MOMENTS}: {dtype} {shape}, but precomputed.json says "
            f"{self.dtype.name} {self.record_shape}; precompute the shard again"
        )


@lru_cache(maxsize=256)
def _columns(fields: tuple[str, ...]) -> dict[str, int]:
    return {name: column for column, name in enumerate(fields)}


def _column(index: ShardIndex, name: str, field: str) -> np.ndarray:
    """Returns an array of an index for one field, int64 [S]; offsets are -1 where no sample has the field."""
    column = _columns(index.header.fields).get(field)
    if column is None:
        return np.full(index.count, -1 if name == "offsets" else 0)
    return index.arrays[name][:, column].astype(np.int64)


def absent(index: ShardIndex, row: int, field: str) -> bool:
    """Returns whether a sample lacks a field."""
    column = _columns(index.fields).get(field)
    return column is None or index.arrays["offsets"].item(row, column) < 0


def _extent(index: ShardIndex, row: int, field: str) -> tuple[int, int, int]:
    """Returns (offset, size, crc32c) of a field; raises BadSample where the sample lacks it."""
    arrays, column = index.arrays, _columns(index.header.fields).get(field)
    if column is None or (offset := arrays["offsets"].item(row, column)) < 0:
        raise BadSample(field, "absent")
    return offset, arrays["sizes"].item(row, column), arrays["crc32c"].item(row, column)


def _cut(index: ShardIndex, row: int, field: str) -> DataError:
    return DataError(f"{place_of(index, row)} field {field}: the shard was cut while in use; copy it again")


def _mismatch(field: str, crc32c: int) -> BadSample:
    return BadSample(field, f"its crc32c is not {crc32c:08x}, as the index says")


def _parse(header: bytes, index: ShardIndex, row: int, field: str) -> tuple[str, tuple[int, ...]]:
    try:
        return parse_header(header)
    except ValueError as error:
        raise DataError(
            f"{place_of(index, row)} field {field}: {error}; precompute the shard again"
        ) from None


def place_of(index: ShardIndex, row: int) -> str:
    """Returns which sample a message is about."""
    return f"{index.shard} key {index.key(row)!r}"
