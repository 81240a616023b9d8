"""Ways of loading pictures that are compared: ours, and the raw decode ceiling.

Both have as many processes, which live through all rounds; each round starts and ends with empty queues, so
that no work of one falls into the time of another. `scripts.benches.loader_plain` is the third way.
"""

import multiprocessing
import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext

import numpy as np
import torch

from data.datamodule import DataModule
from data.index import IMAGE_FIELDS
from data.shards import ShardDataset
from data.transforms import BadSample, Decoder, ResizeCrop
from models.text_encoder import Tokenizer
from scripts.benches.measuring import Arm

BATCH = 64
CONTEXT_LENGTH = 77

#: A picture's field in its shard: path, offset, bytes, the field's name.
Extent = tuple[str, int, int, str]


def ours(name: str, train: ShardDataset, val: ShardDataset, images: int, workers: int) -> Arm:
    """Returns the arm that loads as training does: `DataModule.train_loader`, captions tokenised."""
    tokenizer = Tokenizer(CONTEXT_LENGTH)
    module = DataModule(train, val, tokenizer, BATCH, workers, dropped=tokenizer.dropped)
    loader = module.train_loader(0, images)

    def run() -> int:
        return sum(len(batch) for batch in loader)

    return Arm(name, run, lambda: [each.pid or 0 for each in loader.processes], loader.kill)


# --- the ceiling --------------------------------------------------------------------------------------------


def ceiling(train: ShardDataset, images: int, workers: int) -> Arm:
    """Returns the arm that reads, decodes and crops the same pictures, and drops them.

    The same decoder and the same shares of the same order, but no checksum, caption, batch or hand-over:
    what a loader cannot surpass without another decoder.
    """
    extents = _extents(train, images)
    context = process_context()
    pipes, processes = [], []
    for worker in range(workers):
        share = [
            e
            for first in range(worker * BATCH, images, workers * BATCH)
            for e in extents[first : first + BATCH]
        ]
        here, there = context.Pipe()
        arguments = (there, share, train.crop.resolution)
        process = context.Process(target=_decode, args=arguments, daemon=True)  # type: ignore[attr-defined]
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)

    def run() -> int:
        for pipe in pipes:
            pipe.send(True)
        return sum(pipe.recv() for pipe in pipes)

    def close() -> None:
        for process in processes:
            process.kill()
            process.join()

    return Arm("ceiling", run, lambda: [process.pid for process in processes], close)


def _extents(train: ShardDataset, images: int) -> list[Extent]:
    found = []
    columns = (column.tolist() for column in train.plan.places(np.arange(images)))
    for place in zip(*columns, strict=True):
        shard, row = train.plan.sample(train.views, place)
        name = next(field for field in IMAGE_FIELDS if shard.extent(row, field))
        extent = shard.extent(row, name)
        assert extent is not None
        found.append((str(shard.shard), extent.offset, extent.size, name))
    return found


def _decode(pipe: Connection, extents: list[Extent], side: int) -> None:
    """One process of the ceiling: a round each time it is asked."""
    torch.set_num_threads(1)
    decoder, crop = Decoder(), ResizeCrop(side)
    handles = {path: os.open(path, os.O_RDONLY) for path in {extent[0] for extent in extents}}
    with suppress(EOFError):
        while pipe.recv():
            for path, offset, size, name in extents:
                with suppress(BadSample):
                    crop(decoder(os.pread(handles[path], size, offset), name, side=side))
            pipe.send(len(extents))


def process_context() -> BaseContext:
    """Returns how an arm's processes are started."""
    return multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
