"""Precomputed moments from the page cache against copying the same bytes, in this process.

Batches of 64 records of 8 x 32 x 32 float32, 32 KiB each, with captions, as `MomentsDataset` gives them to a
loader's collation; beside it `numpy.copyto` of as many bytes, batch by batch, out of a buffer larger than the
caches. Use: `moments_arms(folder)`, then `interleave` them.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.index import Index, IndexView
from data.moments import MomentsDataset
from data.npy import encode_npy
from data.order import Order
from data.provenance import Preprocessing, Provenance
from data.writer import write_shard
from scripts.benches.measuring import Arm

SHAPE = (8, 32, 32)
RECORDS = 4096  # 128 MiB, more than most caches hold
SHARDS = 4
BATCH = 64
PASSES = 2  # over all records, in a round


def moments_arms(folder: Path) -> list[Arm]:
    """Returns the arms moments, memcpy and moments again, after writing the shards into `folder`.

    A unit is one record's bytes.
    """
    folder.mkdir(parents=True)
    for number in range(SHARDS):
        write_shard(folder / f"{number:05d}.tar", _records(number))
    view = IndexView(Index.open(str(folder)))
    made = Provenance("none", {}, Preprocessing(8 * SHAPE[1]), "float32", SHAPE)
    dataset = MomentsDataset(view, Order(view.counts, 0), made, 0)
    batches = [list(range(first, first + BATCH)) for first in range(0, RECORDS, BATCH)]

    def ours() -> int:
        return sum(len(dataset.__getitems__(batch).keys) for _ in range(PASSES) for batch in batches)

    source = np.random.default_rng(0).standard_normal((RECORDS, *SHAPE), np.float32)
    target = np.empty_like(source)

    def memcpy() -> int:
        for _ in range(PASSES):
            for first in range(0, RECORDS, BATCH):
                np.copyto(target[first : first + BATCH], source[first : first + BATCH])
        return PASSES * RECORDS

    return [Arm("moments", ours), Arm("memcpy", memcpy), Arm("moments again", ours)]


def _records(shard: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    rng = np.random.default_rng(shard)
    for row in range(RECORDS // SHARDS):
        key = f"{shard * RECORDS // SHARDS + row:08d}"
        record = encode_npy(rng.standard_normal(SHAPE, np.float32)[None])
        yield key, {"moments.npy": record, "txt": b"snowy mountains at sunset, the sun low on the left"}
