"""Samples read from local shards at offsets: a map-style dataset whose item i is global sample i of the run.

Every field is read by `pread` through a descriptor of its own process and compared with its crc32c. A sample
that cannot be used is replaced by another one that is a function of (seed, index, attempt), written to
`bad_samples.jsonl`, and counted; too many stop the run. There is no iterator state: to resume, ask for the
next index. Use: `sample = ShardDataset(view, Order(view.counts, seed), Decoder(), ResizeCrop(64), seed)[0]`.
"""

import json
import math
import os
import time
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import google_crc32c
from torch import Tensor
from torch.utils.data import Dataset

from data.index import DataError, IndexView, ShardIndex
from data.order import Order, Purpose, mix, uniform
from data.transforms import BadSample, Decoder, ResizeCrop, decode_caption, decode_json

MAX_IN_A_ROW = 100
MAX_OPEN_FILES = 128
READ_ATTEMPTS = 4
FIRST_WAIT = 0.05  # seconds before a failed read is tried again; doubled each time


class MissingCaption(Enum):
    """What becomes of a sample whose caption is absent or blank: another sample, or an unconditional one."""

    SKIP = "skip"
    UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Sample:
    """One sample: `pixels` uint8 [3 H W], `caption` ("" is unconditional), `record` the JSON field or {}.

    `index` is the global sample index asked for; `key` names what was read; `substituted` says that they
    part.
    """

    index: int
    key: str
    pixels: Tensor
    caption: str
    record: dict[str, Any]
    substituted: bool


class _NoCaptionError(Exception):
    """The sample has no caption and the policy is to take another one."""


class _Files:
    """Open shards of this process, the least recently used closed first; a copy in another opens its own."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.handles: OrderedDict[Path, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"pid": -1, "handles": OrderedDict()}

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """Returns `size` bytes from `offset`, fewer where the file ends; raises OSError."""
        if self.pid != os.getpid():
            self.pid, self.handles = os.getpid(), OrderedDict()
        handle = self.handles.get(path)
        if handle is None:
            while len(self.handles) >= MAX_OPEN_FILES:
                os.close(self.handles.popitem(last=False)[1])
            handle = self.handles[path] = os.open(path, os.O_RDONLY)
        self.handles.move_to_end(path)
        data = os.pread(handle, size, offset)
        while len(data) < size and (more := os.pread(handle, size - len(data), offset + len(data))):
            data += more
        return data

    def forget(self, path: Path) -> None:
        """Closes one shard, so that the next read opens it anew (a network file system may have lost it)."""
        handle = self.handles.pop(path, None)
        if handle is not None and self.pid == os.getpid():
            os.close(handle)


class ShardDataset(Dataset[Sample]):
    """Item i is global sample i, for any i >= 0: the run's order is endless, `len` is one epoch.

    `max_bad_fraction` of an epoch's samples, rounded up, may be unusable in one process, and no 100 in a row;
    then DataError. `bad_samples` is the file that collects them, a JSON object a line; None writes none.
    """

    def __init__(
        self,
        view: IndexView,
        order: Order,
        decoder: Decoder,
        crop: ResizeCrop,
        seed: int,
        missing_caption: MissingCaption = MissingCaption.SKIP,
        max_bad_fraction: float = 0.001,
        bad_samples: Path | None = None,
    ) -> None:
        if order.counts != view.counts:
            raise ValueError("the order is over other shards than the view; make it from view.counts")
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction}; it must be from 0 to 1")
        self.view = view
        self.order = order
        self.decoder = decoder
        self.crop = crop
        self.seed = seed
        self.missing_caption = missing_caption
        self.max_bad_fraction = max_bad_fraction
        self.bad_samples = bad_samples
        self._files = _Files()
        self._bad: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self.view)

    def fingerprint(self) -> str:
        """Returns the identity of what is read, in hex: shards, split."""
        return self.view.fingerprint()

    def __getitem__(self, index: int) -> Sample:
        """Returns global sample `index`, or its substitute.

        Raises DataError where too many samples are bad or a shard cannot be read, IndexError for a negative
        index.
        """
        last = "nothing was tried"
        for attempt in range(MAX_IN_A_ROW):
            place = index
            if attempt:
                place = mix(self.seed, index, Purpose.SUBSTITUTE, attempt) % len(self.view)
            _, number, position = self.order.order(place)
            shard, row = self.view.sample(number, position)
            try:
                return self._load(index, shard, row, substituted=attempt > 0)
            except _NoCaptionError:
                last = f"{shard.shard} key {shard.key(row)!r}: no caption"
            except BadSample as error:
                last = f"{shard.shard} key {shard.key(row)!r} {error}"
                self._count((number, row), shard, error)
        raise DataError(
            f"{MAX_IN_A_ROW} unusable samples in a row, the last one {last}; "
            "make the shards again, or set data.missing_caption=UNCONDITIONAL where captions are missing"
        )

    def _load(self, index: int, shard: ShardIndex, row: int, substituted: bool) -> Sample:
        field = shard.image_field(row)
        if field is None:
            raise BadSample("jpg", "no image field (jpg, jpeg, png or webp)")
        caption = self._caption(shard, row)
        record = {}
        if shard.extent(row, "json"):
            record = decode_json(self._read(shard, row, "json"))
        image = self.decoder(self._read(shard, row, field), field, side=self.crop.resolution)
        draws = (uniform(self.seed, index, p) for p in (Purpose.CROP_X, Purpose.CROP_Y, Purpose.FLIP))
        return Sample(index, shard.key(row), self.crop(image, *draws), caption, record, substituted)

    def _caption(self, shard: ShardIndex, row: int) -> str:
        caption = decode_caption(self._read(shard, row, "txt")) if shard.extent(row, "txt") else ""
        if not caption and self.missing_caption is MissingCaption.SKIP:
            raise _NoCaptionError
        return caption

    def _read(self, shard: ShardIndex, row: int, field: str) -> bytes:
        """Returns a field's bytes; raises BadSample if they are damaged, DataError if they cannot be read."""
        extent = shard.extent(row, field)
        if extent is None:
            raise BadSample(field, "absent")
        where = f"{shard.shard} key {shard.key(row)!r} field {field}"
        for attempt in range(READ_ATTEMPTS):
            try:
                data = self._files.read(shard.shard, extent.offset, extent.size)
                break
            except OSError as error:
                if attempt == READ_ATTEMPTS - 1:
                    raise DataError(
                        f"{where}: read failed {READ_ATTEMPTS} times ({error.strerror}); check the disk"
                    ) from error
                self._files.forget(shard.shard)
                time.sleep(FIRST_WAIT * 2**attempt)
        if len(data) < extent.size:
            raise DataError(f"{where}: the shard was cut while in use; copy it again")
        if (actual := google_crc32c.value(data)) != extent.crc32c:
            raise BadSample(field, f"crc32c is {actual:08x}, its index says {extent.crc32c:08x}")
        return data

    def _count(self, place: tuple[int, int], shard: ShardIndex, error: BadSample) -> None:
        """Writes a bad sample down the first time this process meets it; raises DataError above the cap."""
        if place in self._bad:
            return
        self._bad.add(place)
        entry = {
            "shard": str(shard.shard),
            "key": shard.key(place[1]),
            "field": error.field,
            "reason": error.reason,
        }
        if self.bad_samples is not None:
            _append(self.bad_samples, json.dumps(entry) + "\n")
        allowed = math.ceil(self.max_bad_fraction * len(self.view))
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} bad samples, {allowed} of {len(self.view)} allowed, the last one "
                f"{shard.shard} key {entry['key']!r} {error}; make the shards again, "
                "or raise data.max_bad_fraction"
            )


def _append(path: Path, line: str) -> None:
    """Appends a line in one write, so that lines of several processes do not mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)
