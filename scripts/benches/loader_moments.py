"""Precomputed moments from the page cache against plain copies of the same bytes, in this process.

Batches of 64 records of 8 x 32 x 32 float32, 32 KiB each, with captions, as `MomentsDataset` gives them to a
loader's collation. Beside it the records alone are copied, the same in the same order, into one buffer that
stays: once by `preadv`, once out of a mapping of the shards; nothing is looked up, checked or decoded. Use:
`moments_arms(folder)`, then `interleave` them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.index import Index, IndexView
from data.moments import MomentsDataset
from data.npy import HEADER_BYTES, encode_npy
from data.order import Order
from data.provenance import Preprocessing, Provenance
from data.writer import write_shard
from scripts.benches.measuring import Arm

SHAPE = (8, 32, 32)
RECORDS = 4096  # 128 MiB, more than most caches hold
SHARDS = 4
BATCH = 64
PASSES = 2  # over all records, in a round


def moments_arms(folder: Path, shape: tuple[int, ...] = SHAPE, dtype: str = "float32") -> list[Arm]:
    """Returns the arms moments, pread, mapped and moments again, after writing the shards into `folder`.

    A unit is one record, an array of `shape` and `dtype`.
    """
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        write_shard(folder / f"{number:05d}.tar", _records(number, shape, dtype))
    view = IndexView(Index.open(str(folder)))
    made = Provenance("none", {}, Preprocessing(8 * shape[1]), dtype, shape)
    order = Order(view.counts, 0)
    dataset = MomentsDataset(view, order, made, 0)
    batches = [list(range(first, first + BATCH)) for first in range(0, RECORDS, BATCH)]

    def ours() -> int:
        return sum(len(dataset.__getitems__(batch).keys) for _ in range(PASSES) for batch in batches)

    names = [view.index.headers[number].shard for number in range(SHARDS)]
    handles = [os.open(name, os.O_RDONLY) for name in names]
    maps = [np.asarray(np.memmap(name, np.uint8, "r")) for name in names]
    extents = _extents(view, order)
    target = list(np.empty((BATCH, dataset.reader.record_bytes), np.uint8))

    def pread() -> int:
        for _ in range(PASSES):
            for number, (shard, start, _) in enumerate(extents):
                os.preadv(handles[shard], (target[number % BATCH].data,), start)
        return PASSES * RECORDS

    def mapped() -> int:
        for _ in range(PASSES):
            for number, (shard, start, end) in enumerate(extents):
                np.copyto(target[number % BATCH], maps[shard][start:end])
        return PASSES * RECORDS

    def close() -> None:
        for handle in handles:
            os.close(handle)

    copies = Arm("pread", pread, close=close), Arm("mapped", mapped)
    return [Arm("moments", ours), *copies, Arm("moments again", ours)]


def _extents(view: IndexView, order: Order) -> list[tuple[int, int, int]]:
    """Returns shard, first byte and end of the numbers of each record, in the order of the run."""
    found = []
    for i in range(RECORDS):
        _, number, position = order.order(i)
        index, row = view.sample(number, position)
        extent = index.extent(row, "moments.npy")
        assert extent is not None
        found.append((number, extent.offset + HEADER_BYTES, extent.offset + extent.size))
    return found


def _records(shard: int, shape: tuple[int, ...], dtype: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(shard)
    for row in range(RECORDS // SHARDS):
        key = f"{shard * RECORDS // SHARDS + row:08d}"
        record = encode_npy(rng.standard_normal(shape, np.float32)[None].astype(dtype))
        yield key, {"moments.npy": record, "txt": b"snowy mountains at sunset, the sun low on the left"}
