"""From plain options to loaders: `ShardData` opens two datasets, `DataModule` puts them into DataLoaders.

Loaders are ordinary ones, with a batch sampler that knows its length; a loader is made for a stretch of the
run, [start, stop) in samples consumed, so resuming is making the loader that starts later. Workers come from
a fork server: forking a process that holds torch's threads can deadlock. Use: `train, val =
ShardData("shards/flowers").open(seed=0)`; `loader = DataModule(train, val, tokenize, batch_size=64,
workers=2).train_loader(start=0, stop=100_000)`.
"""

import logging
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch import Batch, Collate
from data.index import open_split
from data.order import GlobalBatchSampler, Order
from data.shards import MissingCaption, ShardDataset
from data.transforms import Decoder, ResizeCrop

VAL_SEED = 0  # the held-out pictures are read in one order whatever the run's seed, so that runs compare
PREFETCH = 4  # batches each worker prepares ahead

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardData:
    """The options of a dataset of shards, plain values only.

    `shards` is a folder, a pattern or a tar; without one the landscapes are rendered; `resolution` in pixels;
    `val_fraction` is held out where the folder has no train/ and val/; `random_crop` and `flip` concern
    training only; `background` is the (R, G, B) transparent pixels are laid on; `block_shards` are mixed
    together at a time; `workers` processes load, 0 loads in place.
    """

    shards: str | None = None
    resolution: int = 64
    val_fraction: float = 0.02
    random_crop: bool = False
    flip: bool = False
    background: tuple[int, ...] = (255, 255, 255)
    missing_caption: MissingCaption = MissingCaption.SKIP
    max_bad_fraction: float = 0.001
    block_shards: int = 64
    workers: int = 1

    def open(self, seed: int, bad_samples: Path | None = None) -> tuple[ShardDataset, ShardDataset]:
        """Returns (train, val); val may be empty. Raises DataError for shards, ValueError for options."""
        if self.shards is None:
            raise ValueError("shards is not set; give the folder of the shards")
        train_view, val_view = open_split(self.shards, self.val_fraction)
        decoder = Decoder(background=self.background)
        train = ShardDataset(
            train_view,
            Order(train_view.counts, seed, self.block_shards),
            decoder,
            ResizeCrop(self.resolution, self.random_crop, self.flip),
            seed,
            self.missing_caption,
            self.max_bad_fraction,
            bad_samples,
        )
        val = ShardDataset(
            val_view,
            Order(val_view.counts, VAL_SEED, max(1, len(val_view.counts))),
            decoder,
            ResizeCrop(self.resolution),
            VAL_SEED,
            self.missing_caption,
            self.max_bad_fraction,
            bad_samples,
        )
        return train, val


class _Batches:
    """Lists of the indices [first, last), `size` at a time, the last one shorter."""

    def __init__(self, first: int, last: int, size: int) -> None:
        self.indices = range(first, last)
        self.size = size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self.indices), self.size):
            yield list(self.indices[start : start + self.size])


class DataModule:
    """Makes the loaders of a run. `batch_size` is global; `tokenize` turns B captions into int64 [B L]."""

    def __init__(
        self,
        train: ShardDataset,
        val: ShardDataset,
        tokenize: Callable[[list[str]], Tensor],
        batch_size: int,
        workers: int = 1,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers={workers}; it must be 0 or more")
        self.train = train
        self.val = val
        self.collate = Collate(tokenize)
        self.batch_size = batch_size
        self.workers = workers

    def fingerprint(self) -> str:
        """Returns the identity of the training data in hex, to be kept in checkpoints."""
        return self.train.fingerprint()

    def held_out(self, count: int) -> Batch:
        """Returns the first `count` held-out samples as one batch, fewer where fewer are held out."""
        return self.collate([self.val[i] for i in range(min(count, len(self.val)))])

    def train_loader(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
        """Returns this rank's batches of the samples [start, stop) of the run, in the run's order.

        Each batch holds batch_size / world_size samples; the last global batch is whole and may pass `stop`.
        Raises ValueError where the batch does not divide by the ranks.
        """
        if self.batch_size > len(self.train):
            log.warning(
                "%d training samples are fewer than the global batch of %d: batches repeat them",
                len(self.train), self.batch_size,
            )  # fmt: skip
        return self._loader(self.train, GlobalBatchSampler(self.batch_size, start, stop, rank, world_size))

    def val_loader(self, images: int, rank: int = 0, world_size: int = 1) -> DataLoader[Batch]:
        """Returns this rank's share of the first `images` held-out samples, in an order no seed changes.

        Central crops, no flips; fewer where fewer are held out, maybe none. Keep the loader: its workers
        persist.
        """
        images = min(images, len(self.val))
        first, last = (images * r // world_size for r in (rank, rank + 1))
        return self._loader(self.val, _Batches(first, last, max(1, self.batch_size // world_size)))

    def _loader(self, dataset: ShardDataset, sampler: GlobalBatchSampler | _Batches) -> DataLoader[Batch]:
        # Its type parameter is the samples' type in torch, whatever the collate function makes of them.
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.workers,
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            multiprocessing_context=_context() if self.workers else None,
            persistent_workers=self.workers > 0,
            prefetch_factor=PREFETCH if self.workers else None,
            # Without one of its own, a loader draws from torch's global generator and moves it.
            generator=torch.Generator().manual_seed(0),
        )
        return loader


def _context() -> BaseContext:
    """Returns how workers are started: by a fork server where there is one, else spawned."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    # The server imports torch once, so that each worker starts in milliseconds.
    context.set_forkserver_preload(["__main__", "data.batch"])
    return context
