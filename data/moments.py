"""Training from precomputed shards: moments, and text embeddings where they were made, instead of pictures.

The order, the split and the rules for unusable samples are those of pictures: sample i of a run has the same
key either way. The moments of a batch are read by `preadv` into one buffer, their headers into another; a
sample costs one system call, a crc32c and no copy. Captions are read where the text encoder is trained; where
its output is cached they are not.

Use: `check_provenance(folder, ...)`; `train, val = open_moments("moments/flowers", seed=0)`; a DataLoader
over `train` with `MomentsCollate(tokenize)` gives batches with `moments`, and `text` if `with_text`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Batch
from data.cache import ShardCache
from data.fields import BadSample, append_line
from data.handover import Handover
from data.index import IndexView, open_split
from data.moments_reader import CAPTION, MomentsReader, Place, Table, Text, place_of
from data.npy import HEADER_BYTES
from data.order import Order, Purpose, mix, uniforms
from data.provenance import Provenance, read_provenance
from data.shard_index import DataError
from data.shards import MissingCaption

MAX_IN_A_ROW = 100
MAX_TABLES = 512  # shards of which a process holds what reading asks
VAL_SEED = 0  # the held-out samples are read in one order whatever the run's seed


@dataclass(frozen=True)
class MomentsRows:
    """What is read of B samples: `moments` [B 2C h w], `text` of B captions or None where it is not read.

    `captions` are "" where text is read. `substituted` counts the samples that stand for an unusable one.
    """

    moments: Tensor
    text: list[Text] | None
    indices: list[int]
    captions: list[str]
    keys: list[str]
    substituted: int


class MomentsDataset(Dataset[MomentsRows]):
    """Item i is global sample i of an endless order, `len` is one epoch; many at a time by `__getitems__`.

    A sample whose caption is missing, or which is damaged, is replaced as `data.shards.ShardDataset` replaces
    it. Of several variants the draw for the mirroring chooses one: with two and no random crop that is the
    picture that training from pictures sees. `held_out` samples are of the last variant, never mirrored.
    """

    def __init__(
        self,
        view: IndexView,
        order: Order,
        provenance: Provenance,
        seed: int,
        with_text: bool = False,
        held_out: bool = False,
        missing_caption: MissingCaption = MissingCaption.SKIP,
        max_bad_fraction: float = 0.001,
        bad_samples: Path | None = None,
    ) -> None:
        if with_text and provenance.text is None:
            raise DataError("the shards hold no text embeddings; precompute again with --text")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction}; it must be from 0 to 1")
        self.view = view
        self.order = order
        self.reader = MomentsReader(provenance)
        self.seed = seed
        self.with_text = with_text
        self.held_out = held_out
        self.missing_caption = missing_caption
        self.max_bad_fraction = max_bad_fraction
        self.bad_samples = bad_samples
        self._bad: set[tuple[str, str]] = set()
        self._handover = Handover()
        self._tables: dict[int, Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def __len__(self) -> int:
        return len(self.view)

    def fingerprint(self) -> str:
        """Returns the identity of what is read, in hex: shards, split."""
        return self.view.fingerprint()

    def describe(self) -> dict[str, Any]:
        """Returns what is read, as `data.shards.ShardDataset` describes itself, for telling what changed."""
        return {"sources": [self.view.describe()], "captions": {"txt": 1.0}, "plan": {"moments": "stored"}}

    def __getitem__(self, index: int) -> MomentsRows:
        """Returns global sample `index` as a batch of one; raises as `__getitems__`."""
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> MomentsRows:
        """Returns the global samples `indices`, or their substitutes, in one buffer.

        Raises DataError where too many samples are bad or a shard cannot be read, IndexError for a negative
        index.
        """
        reader, count = self.reader, len(indices)
        buffer = self._handover.room((count * reader.record_bytes,))
        records = buffer.numpy().reshape(count, reader.record_bytes)
        headers = np.empty((count, HEADER_BYTES), np.uint8)
        places = self._places(indices)
        captions = [""] * count
        texts: list[Text | None] = [None] * count
        waiting, substituted = list(range(count)), 0
        for attempt in range(MAX_IN_A_ROW):
            faults = reader.read(places, waiting, headers, records, None if self.with_text else captions)
            if self.with_text:
                self._read_texts(places, [slot for slot in waiting if slot not in faults], texts, faults)
            elif self.missing_caption is MissingCaption.SKIP:
                blank = (slot for slot in waiting if not captions[slot] and slot not in faults)
                faults |= {slot: _NoCaptionError(CAPTION, "no caption") for slot in blank}
            failed = {slot: self._judge(places[slot], error) for slot, error in faults.items()}
            waiting = sorted(failed)
            if not waiting:
                break
            substituted = len(waiting) if not attempt else substituted
            for slot in waiting:
                place = mix(self.seed, indices[slot], Purpose.SUBSTITUTE, attempt + 1) % len(self.view)
                places[slot] = self._places([place])[0]
        else:
            raise DataError(
                f"{MAX_IN_A_ROW} unusable samples in a row, the last one {failed[waiting[-1]]}; precompute "
                "again, or set data.missing_caption=UNCONDITIONAL where captions are missing"
            )
        return MomentsRows(
            self._choose(self._handover.give(buffer), indices),
            [text for text in texts if text is not None] if self.with_text else None,
            list(indices),
            captions,
            [table.key(entry) for table, entry in places],
            substituted,
        )

    def _places(self, indices: Sequence[int]) -> list[Place]:
        _, shards, positions = self.order.orders(np.asarray(indices, np.int64))
        tables = self._tables
        for number in set(shards.tolist()).difference(tables):
            tables[number] = Table(self.view.index.shard(number), self.view.rows(number))
        places = [tables[n].place(p) for n, p in zip(shards.tolist(), positions.tolist(), strict=True)]
        while len(tables) > MAX_TABLES:
            tables.pop(next(iter(tables)))
        return places

    def _read_texts(
        self,
        places: list[Place],
        slots: list[int],
        texts: list[Text | None],
        faults: dict[int, BadSample],
    ) -> None:
        """Reads the embeddings of the captions at `slots`, and adds what is wrong with them to `faults`."""
        for slot in slots:
            table, entry = places[slot]
            try:
                texts[slot] = found = self.reader.text(table.index, entry[0])
                if not len(found[0]) and self.missing_caption is MissingCaption.SKIP:
                    raise _NoCaptionError(CAPTION, "no caption")
            except BadSample as error:
                faults[slot] = error

    def _choose(self, buffer: Tensor, indices: list[int]) -> Tensor:
        """Returns one variant of each sample, [B 2C h w]; a view where there is only one."""
        dtype = getattr(torch, self.reader.dtype.name)
        variants, *shape = self.reader.record_shape
        every = buffer.view(dtype).view(len(indices), variants, *shape)
        if self.held_out or variants == 1:
            return every[:, -1]
        draws = uniforms(self.seed, np.asarray(indices, np.int64), Purpose.FLIP) * variants
        return every[torch.arange(len(indices)), torch.from_numpy(draws.astype(np.int64))]

    def _judge(self, place: Place, error: BadSample) -> str:
        """Returns what is wrong with a sample, after counting and writing down damage; raises DataError."""
        index, row = place[0].index, place[1][0]
        said = f"{place_of(index, row)} {error}"
        named = (str(index.shard), index.key(row))
        if isinstance(error, _NoCaptionError) or named in self._bad:
            return said
        self._bad.add(named)
        if self.bad_samples is not None:
            entry = {"shard": named[0], "key": named[1], "field": error.field, "reason": error.reason}
            append_line(self.bad_samples, json.dumps(entry))
        allowed = math.ceil(self.max_bad_fraction * len(self.view))
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} bad samples, {allowed} of {len(self.view)} allowed, the last one {said}; "
                "copy the shards again or precompute them again, or raise data.max_bad_fraction"
            )
        return said


class _NoCaptionError(BadSample):
    """The sample has no caption and the policy is to take another one."""


class MomentsCollate:
    """Makes a Batch of what MomentsDataset gives; `tokenize` turns B captions into int64 [B L].

    With text read there are no tokens, [B 0]. Text is padded to the longest of the batch.
    """

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, rows: MomentsRows | Sequence[MomentsRows]) -> Batch:
        """Returns the batch of one MomentsRows, or of several joined."""
        if not isinstance(rows, MomentsRows):
            rows = _join(rows)
        count = len(rows.keys)
        text = None if rows.text is None else _pad(rows.text)
        return Batch(
            pixels=torch.empty(count, 0, dtype=torch.uint8),
            tokens=self.tokenize(rows.captions) if text is None else torch.empty(count, 0, dtype=torch.int64),
            indices=torch.tensor(rows.indices, dtype=torch.int64),
            captions=rows.captions,
            keys=rows.keys,
            substituted=rows.substituted,
            moments=rows.moments,
            text=text,
        )


def _join(parts: Sequence[MomentsRows]) -> MomentsRows:
    texts = [part.text for part in parts]
    return MomentsRows(
        torch.cat([part.moments for part in parts]),
        None if None in texts else [entry for text in texts if text is not None for entry in text],
        [index for part in parts for index in part.indices],
        [caption for part in parts for caption in part.captions],
        [key for part in parts for key in part.keys],
        sum(part.substituted for part in parts),
    )


def _pad(texts: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens [B L D], mask [B L], pooled [B D]; a row without a valid token has no caption."""
    length = max(1, *(len(states) for states, _ in texts))
    first = texts[0][0]
    tokens = np.zeros((len(texts), length, first.shape[1]), first.dtype)
    mask = np.zeros((len(texts), length), np.bool_)
    for i, (states, _) in enumerate(texts):
        tokens[i, : len(states)], mask[i, : len(states)] = states, True
    pooled = np.stack([vector for _, vector in texts])
    return torch.from_numpy(tokens), torch.from_numpy(mask), torch.from_numpy(pooled)


def open_moments(
    folder: str,
    seed: int,
    val_fraction: float = 0.02,
    block_shards: int = 64,
    with_text: bool = False,
    missing_caption: MissingCaption = MissingCaption.SKIP,
    max_bad_fraction: float = 0.001,
    bad_samples: Path | None = None,
    where: str = "",
    cache: ShardCache | None = None,
) -> tuple[MomentsDataset, MomentsDataset]:
    """Returns (train, val) of a folder that scripts/precompute.py filled; val may be empty.

    Split and order are those of the pictures it was made from; `where` filters by JSON values, and `cache`
    keeps what that found. Raises DataError. Call `check_provenance`
    first: here nothing is compared with the networks.
    """
    provenance = read_provenance(Path(folder))
    views = open_split(folder, val_fraction, where, cache=cache)
    train, val = (
        MomentsDataset(
            view,
            # Blocks as `data.datamodule` chooses them, so that sample i is the same picture's.
            Order(view.counts, VAL_SEED, max(1, len(view.counts))) if held_out
            else Order(view.counts, seed, block_shards),
            provenance,
            VAL_SEED if held_out else seed,
            with_text,
            held_out,
            missing_caption,
            max_bad_fraction,
            bad_samples,
        )
        for view, held_out in zip(views, (False, True), strict=True)
    )  # fmt: skip
    return train, val
