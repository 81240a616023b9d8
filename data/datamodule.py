"""From plain options to loaders: `ShardData` opens two datasets, `DataModule` puts them into DataLoaders.

Loaders are ordinary ones, with a batch sampler that knows its length; a loader is made for a stretch of the
run, [start, stop) in samples consumed, so resuming is making the loader that starts later. Workers come from
a fork server: forking a process that holds torch's threads can deadlock. Use: `train, val =
ShardData("shards/flowers").open(seed=0)`; `loader = DataModule(train, val, tokenize, batch_size=64,
workers=2).train_loader(start=0, stop=100_000)`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data.batch import Batch, Collate
from data.buckets import BucketPlan, Buckets, Counted, bucket_shapes, write_left_out
from data.cache import ShardCache
from data.caption_choice import CaptionChoice
from data.index import IMAGE_FIELDS, DataError, IndexView, open_split
from data.index_builder import PAIR_STEMS
from data.loader import Loader, WorkerError
from data.mixture import Mixture, SamplePlan
from data.moments import MomentsCollate, MomentsDataset, open_moments
from data.order import GlobalBatchSampler, Order, Purpose, mix
from data.provenance import FILE, check_provenance, read_provenance
from data.reader import FieldReader
from data.shard_index import is_address
from data.shards import MissingCaption, ShardDataset, changes
from data.transforms import BadSample, Decoder, ResizeCrop, decode_json

VAL_SEED = 0  # the held-out pictures are read in one order whatever the run's seed, so that runs compare
FIRST_RECORDS = 100  # samples whose JSON shows which texts there are

#: Pixels from which on sparing the autoencoder pays for starting another process: about a minute of a core.
AHEAD_FROM = 2**28

__all__ = ["DataModule", "Loader", "Precompute", "ShardData", "WorkerError", "changes"]

log = logging.getLogger(__name__)


def holds_moments(folder: Path) -> bool:
    """Returns whether precomputed shards were made in `folder`, all of them or not."""
    return (folder / FILE).exists()


class Shares(dict[str, float]):
    """Names with their shares, as a default that a constructor's signature shows: a dict cannot be one."""

    __hash__ = object.__hash__  # type: ignore[assignment]


class Precompute(Enum):
    """Whether a run encodes its pictures once, ahead of the diffusion stage, instead of in every step; `auto`
    does where it pays."""

    auto = "auto"
    on = "on"
    off = "off"


@dataclass(frozen=True)
class ShardData:
    """The options of a dataset of shards, plain values only.

    `shards` is a folder, a pattern, a tar or an address; without one, and without `sources`, the landscapes
    are rendered. `sources` are several such places with their weights, `where` a filter on what the index
    knows of a sample, `unique` leaves out duplicates. `captions` are fields with probabilities, `txt` or
    `json.NAME`. `resolution` in pixels; with `buckets` above 1 pictures keep their shape as nearly as so many
    shapes allow, long sides up to `max_aspect` short ones. `val_fraction` is held out where the folder has no
    train/ and val/; `random_crop` and `flip` concern training only; `background` is the (R, G, B) transparent
    pixels are laid on; `block_shards` are mixed together at a time, and remote ones are kept in the folder
    `cache` up to `cache_gb` GB; `workers` processes load, 0 loads in place, and one that gives nothing for
    `worker_timeout` seconds is given up. The diffusion stage reads moments from the folder `precomputed`
    where one is given; else the run makes them itself, into its own folder, where `precompute` says so:
    with `auto` if that is at most half of the encoding that the steps would do, and more than a minute of it
    is spared. `allow_change` lets a run go on with other samples than it began with. With `before`
    samples are pairs: that is the name of the picture that the caption tells how to edit, such as "before"
    for `<key>.before.jpg` beside `<key>.jpg`; both are cropped and mirrored alike.
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
    sources: dict[str, float] = Shares()  # noqa: RUF009 - nobody changes it
    where: str = ""
    unique: bool = False
    captions: dict[str, float] = Shares(txt=1.0)  # noqa: RUF009 - nobody changes it
    buckets: int = 1
    max_aspect: float = 2.0
    cache: str = "cache"
    cache_gb: float = 50.0
    worker_timeout: float = 300.0
    precomputed: str | None = None
    precompute: Precompute = Precompute.auto
    allow_change: bool = False
    before: str = ""

    def __post_init__(self) -> None:
        if self.shards is not None and self.sources:
            raise ValueError("shards and sources are both set; put the shards among the sources")
        if self.cache_gb <= 0 or self.worker_timeout <= 0:
            raise ValueError(
                f"cache_gb={self.cache_gb}, worker_timeout={self.worker_timeout}; both must be above 0"
            )
        if self.buckets != 1:
            bucket_shapes(self.resolution, 1, self.buckets, self.max_aspect)
        for values in (self.sources, self.captions):
            if wrong := [name for name, value in values.items() if type(value) not in (int, float)]:
                raise ValueError(f"{wrong[0]} is given {values[wrong[0]]!r}, which is no number")
        if self.before and self.before not in PAIR_STEMS:
            raise ValueError(
                f"before is {self.before!r}, but must be one of {', '.join(PAIR_STEMS)}, or empty"
            )
        if self.before and self.precomputed is not None:
            raise ValueError(
                "before and precomputed are both set, but pairs are not precomputed; leave out one"
            )
        storable = self._is_storable  # which refuses captions that cannot be chosen from
        if self.precompute is Precompute.on and self.precomputed is not None:
            raise ValueError("precomputed is given, and precompute=on would make another; leave out one")
        if self.precompute is Precompute.on and (self.random_crop or self.where or not storable):
            raise ValueError(
                "precompute=on stores all pictures of one source, as every epoch sees them, in squares, with "
                "the captions of txt; leave out random_crop, where, before, sources, unique, buckets and "
                "captions"
            )
        if self.precomputed is not None and not storable:
            raise ValueError(
                "precomputed shards are of one source, in squares, with the captions of txt; leave out "
                "sources, unique, buckets and captions"
            )

    @property
    def _is_storable(self) -> bool:
        """Whether precomputed shards can hold what these options read."""
        plain = CaptionChoice(self.captions).is_plain
        return plain and not (self.sources or self.unique or self.buckets != 1 or self.before)

    @property
    def variants(self) -> int:
        """How many pictures training sees of each that is stored, where it is not cropped at random."""
        return 2 if self.flip else 1

    def encodes_ahead(self, samples: int, images: int) -> bool:
        """Whether a run that sees `images`, of `samples` different ones, encodes them ahead of its steps.

        That depends on nothing that is measured, so that a run which is begun again decides alike.
        """
        if self.precompute is not Precompute.auto or self.precomputed is not None:
            return self.precompute is Precompute.on
        ahead = self.variants * samples
        spared = (images - ahead) * self.resolution**2
        same = self._is_storable and not self.random_crop and not self.where
        return same and images >= 2 * ahead and spared >= AHEAD_FROM

    @property
    def is_given(self) -> bool:
        """Whether there are shards to read; else the landscapes are rendered."""
        return self.shards is not None or bool(self.sources)

    def weights(self) -> dict[str, float]:
        """Returns where the shards are, each with its weight; raises ValueError where nothing is given."""
        if self.sources:
            return self.sources
        if self.shards is None:
            raise ValueError("shards is not set; give the folder of the shards")
        return {self.shards: 1.0}

    def open(
        self, seed: int, bad_samples: Path | None = None, divisor: int = 1, records: bool = False
    ) -> tuple[ShardDataset, ShardDataset]:
        """Returns (train, val); val may be empty. Raises DataError for shards, ValueError for options.

        Sides of pictures are multiples of `divisor`: what the networks halve them by. Samples that fit no
        shape are written to `left_out.jsonl` beside `bad_samples`. Held-out samples come with their JSON,
        those of train only with `records`.
        """
        places = {where: weight for where, weight in self.weights().items() if weight}
        cache = self._shard_cache()
        splits = [open_split(where, self.val_fraction, self.where, self.unique, cache) for where in places]
        train_views, val_views = ([split[side] for split in splits] for side in (0, 1))
        check_room(train_views, self.block_shards, cache)
        reader, captions = FieldReader(cache), CaptionChoice(self.captions)
        for where, view in zip(places, train_views, strict=True):
            fields = view.index.catalogue.schema().fields
            captions.check(where, fields, partial(_texts, view, reader))
            if self.before and not any(f"{self.before}.{name}" in fields for name in IMAGE_FIELDS):
                raise DataError(
                    f"{where}: before={self.before}, but no sample has a field {self.before}.jpg, .jpeg, "
                    f".png or .webp; there are {', '.join(fields)}"
                )
        decoder = Decoder(background=self.background)
        common = (self.missing_caption, self.max_bad_fraction, bad_samples, captions, reader)
        train = ShardDataset(
            train_views,
            self._plan(train_views, list(places.values()), seed, divisor, bad_samples),
            decoder,
            ResizeCrop(self.resolution, self.random_crop, self.flip),
            seed,
            *common,
            records=records,
            before=self.before,
        )
        counts = [count for view in val_views for count in view.counts]
        val = ShardDataset(
            val_views,
            Order(counts, VAL_SEED, max(1, len(counts))),
            decoder,
            ResizeCrop(self.resolution),
            VAL_SEED,
            *common,
            before=self.before,
        )
        return train, val

    def open_moments(
        self, seed: int, autoencoder: str, text: Mapping[str, Any] | None, bad_samples: Path | None = None
    ) -> tuple[MomentsDataset, MomentsDataset]:
        """Returns (train, val) of the folder `precomputed`, in the order of the pictures it was made from.

        `autoencoder` is the fingerprint of the run's averaged autoencoder, `text` the identity of its text
        encoder where nothing of that is trained, else None: then captions are read, never text embeddings.
        Raises DataError where something else made the folder.
        """
        assert self.precomputed is not None
        folder = Path(self.precomputed)
        text = text if read_provenance(folder).text is not None else None
        preprocessing = {
            "random_crop": self.random_crop, "flip": self.flip, "background": list(self.background)
        }  # fmt: skip
        check_provenance(folder, autoencoder, self.resolution, text, preprocessing)
        return open_moments(
            str(folder), seed, self.val_fraction, self.block_shards, text is not None, self.missing_caption,
            self.max_bad_fraction, bad_samples, self.where, self._shard_cache(),
        )  # fmt: skip

    def _shard_cache(self) -> ShardCache:
        return ShardCache(Path(self.cache), int(self.cache_gb * 1e9))

    def _plan(
        self,
        views: Sequence[IndexView],
        weights: Sequence[float],
        seed: int,
        divisor: int,
        bad_samples: Path | None,
    ) -> SamplePlan:
        # A source's order is its own, but that of the first is what it would be alone.
        seeds = [seed, *(mix(seed, Purpose.SOURCE, number) for number in range(1, len(views)))]
        if self.buckets == 1:
            orders = [Order(v.counts, s, self.block_shards) for v, s in zip(views, seeds, strict=True)]
            return Mixture(orders, weights, seed)
        shapes = bucket_shapes(self.resolution, divisor, self.buckets, self.max_aspect)
        counted = [Counted(view, Buckets(shapes, Decoder().max_aspect)) for view in views]
        if bad_samples is not None:
            write_left_out(bad_samples.with_name("left_out.jsonl"), counted)
        if sum(len(each.left) for each in counted) == sum(len(view) for view in views):
            raise DataError("no sample fits a shape: the index knows no picture's size; set data.buckets=1")
        return BucketPlan(counted, weights, 1, seeds, self.block_shards)


def check_room(views: Sequence[IndexView], block_shards: int, cache: ShardCache) -> None:
    """Raises ValueError where a block of remote shards does not fit into half of the cache.

    The block that is read and the next one, which is fetched meanwhile, have to lie there together.
    """
    needed = 0
    for view in views:
        catalogue = view.index.catalogue
        remote = np.fromiter(map(is_address, catalogue.names), bool, len(catalogue.names))
        sizes = np.sort(catalogue.arrays["sizes"][remote])
        needed += int(sizes[-block_shards:].sum())
    if needed > cache.max_bytes / 2:
        raise ValueError(
            f"block_shards={block_shards}: a block of remote shards is up to {needed / 1e9:.3g} GB, and half "
            f"of the cache is {cache.max_bytes / 2e9:.3g} GB; raise data.cache_gb to "
            f"{2.1 * needed / 1e9:.3g} or lower data.block_shards"
        )


def _texts(view: IndexView, reader: FieldReader) -> set[str]:
    """Returns the names of texts in the JSON of the first samples of a view."""
    names: set[str] = set()
    for position in range(min(FIRST_RECORDS, view.counts[first := int(np.argmax(view.counts))])):
        index, row = view.sample(first, position)
        with suppress(BadSample):
            data = reader.read(index, row, frozenset(["json"])).take("json")
            names |= {k for k, value in decode_json(data or b"{}").items() if isinstance(value, str)}
    return names


class _Prefetching:
    """The lists of another batch sampler; ahead of them, the shards they need are fetched into the cache.

    Each time half a block's samples have gone by, the cache is told all shards of the next block's worth.
    """

    def __init__(self, sampler: GlobalBatchSampler, dataset: ShardDataset) -> None:
        self.sampler = sampler
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[list[int]]:
        window, cache = self.dataset.plan.window(), self.dataset.reader.cache
        assert cache is not None  # else no remote shard could be opened
        told = -window
        for batch in self.sampler:
            if batch[0] >= told + window // 2:
                told = batch[0]
                cache.prefetch(self._needed(told, told + max(window, self.sampler.batch_size)))
            yield batch

    def _needed(self, first: int, last: int) -> list[tuple[str, int, str]]:
        """Returns (shard, size, sha256) of the remote shards of samples [first, last), in order of use."""
        sources, shards, _, _ = self.dataset.plan.places(np.arange(first, last))
        pairs = np.stack([sources, shards], 1)
        _, at = np.unique(pairs, axis=0, return_index=True)
        headers = (self.dataset.views[s].index.headers[n] for s, n in pairs[np.sort(at)].tolist())
        return [(header.shard, header.size, header.sha256) for header in headers if header.remote]


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
    """Makes the loaders of a run. `batch_size` is global; `tokenize` turns B captions into int64 [B L].

    `dropped` says how many tokens of each caption find no room (`Batch.truncated`); None counts none.
    """

    def __init__(
        self,
        train: ShardDataset | MomentsDataset,
        val: ShardDataset | MomentsDataset,
        tokenize: Callable[[list[str]], Tensor],
        batch_size: int,
        workers: int = 1,
        worker_timeout: float = 300.0,
        dropped: Callable[[list[str]], list[int]] | None = None,
    ) -> None:
        if workers < 0:
            raise ValueError(f"workers={workers}; it must be 0 or more")
        self.val = val
        self.collate: Callable[[Any], Batch]
        if isinstance(train, MomentsDataset):
            self.train: ShardDataset | MomentsDataset = train
            self.collate = MomentsCollate(tokenize)
        else:
            self.train = train.for_batches(batch_size)
            self.collate = Collate(tokenize, dropped)
        self.batch_size = batch_size
        self.workers = workers
        self.worker_timeout = worker_timeout

    def fingerprint(self) -> str:
        """Returns the identity of the training data in hex, to be kept in checkpoints."""
        return self.train.fingerprint()

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The sizes (width, height) in pixels of training batches; none of precomputed moments."""
        return () if isinstance(self.train, MomentsDataset) else self.train.shapes

    def probe(self, size: int) -> Batch:
        """Returns `size` training samples of one shape, the first of a run with such batches."""
        if isinstance(self.train, MomentsDataset):
            return self.collate(self.train.__getitems__(list(range(size))))
        return self.collate(self.train.for_batches(size).__getitems__(list(range(size))))

    def held_out(self, count: int) -> Batch:
        """Returns the first `count` held-out samples as one batch, fewer where fewer are held out."""
        return self.collate([self.val[i] for i in range(min(count, len(self.val)))])

    def train_loader(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Loader:
        """Returns this rank's batches of the samples [start, stop) of the run, in the run's order.

        Each batch holds batch_size / world_size samples; the last global batch is whole and may pass `stop`.
        Raises ValueError where the batch does not divide by the ranks, or where shapes would mix.
        """
        if len(self.shapes) > 1 and start % self.batch_size:
            raise ValueError(
                f"start={start} is no multiple of batch_size={self.batch_size}, which data.buckets needs"
            )
        if self.batch_size > len(self.train):
            log.warning(
                "%d training samples are fewer than the global batch of %d: batches repeat them",
                len(self.train), self.batch_size,
            )  # fmt: skip
        sampler = GlobalBatchSampler(self.batch_size, start, stop, rank, world_size)
        if isinstance(self.train, MomentsDataset) or not self.train.is_remote:
            return self._loader(self.train, sampler)
        return self._loader(self.train, _Prefetching(sampler, self.train))

    def val_loader(self, images: int, rank: int = 0, world_size: int = 1, parts: int = 1) -> Loader:
        """Returns this rank's share of the first `images` held-out samples, in an order no seed changes.

        Central crops, no flips; fewer where fewer are held out, maybe none. A batch is a rank's share of a
        global one, or where it is computed in `parts`, one of these. Keep the loader: its workers persist.
        """
        images = min(images, len(self.val))
        first, last = (images * r // world_size for r in (rank, rank + 1))
        return self._loader(self.val, _Batches(first, last, max(1, self.batch_size // (world_size * parts))))

    def _loader(self, dataset: ShardDataset | MomentsDataset, sampler: Iterable[list[int]]) -> Loader:
        return Loader(dataset, sampler, self.collate, self.workers, self.worker_timeout)
