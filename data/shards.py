"""Samples read from shards at offsets: a map-style dataset whose item i is global sample i of the run.

Which sample that is, of which source and in which shape, is the plan's to say (`data.mixture`,
`data.buckets`). A sample that cannot be used is replaced by another one that is a function of (seed, index,
attempt), written to `bad_samples.jsonl`, and counted; too many stop the run. There is no iterator state: to
resume, ask for the next index. Use: `sample = ShardDataset(view, Order(view.counts, seed), Decoder(),
ResizeCrop(64), seed)[0]`.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from data.caption_choice import CaptionChoice
from data.fields import append_line
from data.handover import Handover
from data.index import IMAGE_FIELDS, DataError, IndexView, ShardIndex, diff
from data.mixture import Joined, SamplePlan
from data.order import Order, Purpose, mix, uniform, uniforms
from data.reader import FieldReader, Record
from data.shard_index import is_address
from data.transforms import BadSample, Decoder, ResizeCrop, decode_json, image_size

MAX_IN_A_ROW = 100
PLAIN = CaptionChoice({"txt": 1.0})


class MissingCaption(Enum):
    """What becomes of a sample whose caption is absent or blank: another sample, or an unconditional one."""

    SKIP = "skip"
    UNCONDITIONAL = "unconditional"


@dataclass(frozen=True)
class Sample:
    """One sample: `pixels` uint8 [3 H W], `caption` ("" is unconditional), `record` the JSON or {}.

    `index` is the global sample index asked for; `key` names what was read; `substituted` says that they
    part. `before` is the picture before the edit that the caption asks for, cropped as `pixels`.
    """

    index: int
    key: str
    pixels: Tensor
    caption: str
    record: dict[str, Any]
    substituted: bool
    before: Tensor | None = None


class Rows(list[Sample]):
    """Samples of one shape whose pixels are the rows of one tensor, `pixels` uint8 [B 3 H W]."""

    def __init__(self, samples: Sequence[Sample], pixels: Tensor) -> None:
        super().__init__(samples)
        self.pixels = pixels


class _NoCaptionError(Exception):
    """The sample has no caption and the policy is to take another one."""


class ShardDataset(Dataset[Sample]):
    """Item i is global sample i, for any i >= 0: the run's order is endless, `len` is one epoch.

    `views` are the sources and `order` what decides between and within them; an Order goes through the
    sources' shards together. `max_bad_fraction` of an epoch's samples, rounded up, may be unusable in one
    process, and no 100 in a row; then DataError. `bad_samples` is the file that collects them, a JSON object
    a line; None writes none. Without `records` the JSON is read only where captions come from it. With
    `before`, such as "before", samples are pairs, and that is the name of the first picture's field.
    """

    def __init__(
        self,
        views: IndexView | Sequence[IndexView],
        order: Order | SamplePlan,
        decoder: Decoder,
        crop: ResizeCrop,
        seed: int,
        missing_caption: MissingCaption = MissingCaption.SKIP,
        max_bad_fraction: float = 0.001,
        bad_samples: Path | None = None,
        captions: CaptionChoice = PLAIN,
        reader: FieldReader | None = None,
        records: bool = True,
        before: str = "",
    ) -> None:
        self.views = (views,) if isinstance(views, IndexView) else tuple(views)
        if isinstance(order, Order):
            counts = [count for view in self.views for count in view.counts]
            if not np.array_equal(order.counts, counts):
                raise ValueError("the order is over other shards than the view; make it from view.counts")
            order = Joined(order, [len(view.counts) for view in self.views])
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={max_bad_fraction}; it must be from 0 to 1")
        self.plan: SamplePlan = order
        self.decoder = decoder
        self.crop = crop
        self.seed = seed
        self.missing_caption = missing_caption
        self.max_bad_fraction = max_bad_fraction
        self.bad_samples = bad_samples
        self.captions = captions
        self.reader = reader or FieldReader()
        self.records = records
        self._before = tuple(f"{before}.{name}" for name in IMAGE_FIELDS) if before else ()
        self._wanted = frozenset(
            (*IMAGE_FIELDS, *self._before, *captions.names, *(["json"] if records else []))
        )
        self._bad: set[tuple[str, int]] = set()
        self._handover = Handover()

    def __len__(self) -> int:
        return self.plan.samples

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The sizes (width, height) in pixels that pictures come in."""
        return self.plan.shapes or ((self.crop.resolution, self.crop.resolution),)

    def fingerprint(self) -> str:
        """Returns the identity of what is read, in hex: shards, split, and what is not as by default."""
        if len(self.views) == 1 and self.captions.is_plain and not self.plan.shapes:
            return self.views[0].fingerprint()
        parts = [[view.fingerprint() for view in self.views], self.captions.fields, self.plan.describe()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Returns what the dataset is, as JSON for checkpoints; `changes` compares two of them."""
        sources = [view.describe() for view in self.views]
        return {"sources": sources, "captions": self.captions.fields, "plan": self.plan.describe()}

    @cached_property
    def is_remote(self) -> bool:
        """Whether any shard's bytes come through a cache."""
        return any(is_address(name) for view in self.views for name in view.index.catalogue.names)

    def for_batches(self, batch_size: int) -> "ShardDataset":
        """Returns the dataset whose batches [k*G, (k + 1)*G) of G = `batch_size` samples are of one shape."""
        dataset = copy.copy(self)
        dataset.plan = self.plan.for_batches(batch_size)
        return dataset

    def __getitem__(self, index: int) -> Sample:
        """Returns global sample `index`, or its substitute; raises as `__getitems__`."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Returns the global samples `indices`, or their substitutes.

        Raises DataError where too many samples are bad or a shard cannot be read, IndexError for a negative
        index.
        """
        items = np.array(indices, np.int64)
        places = self.plan.places(items)
        rows = zip(*(column.tolist() for column in places), strict=True)
        draws = self._draws(items)
        pixels = None
        if len(items) and (places.shapes == places.shapes[0]).all():
            width, height = self.shapes[int(places.shapes[0])]
            pixels = self._handover.room((len(items), 3, height, width))
        outs = [None] * len(items) if pixels is None else pixels.unbind()
        samples = [self._sample(*each) for each in zip(indices, rows, draws, outs, strict=True)]
        if pixels is None:
            return samples
        given = self._handover.give(pixels)
        if given is not pixels:
            samples = [replace(s, pixels=each) for s, each in zip(samples, given.unbind(), strict=True)]
        return Rows(samples, given)

    def _draws(self, items: np.ndarray) -> list[tuple[float, float, float]]:
        """Returns three draws for the crop of each item; what the crop does not use is not drawn."""
        middle = [0.5] * len(items)
        x, y, mirror = middle, middle, middle
        if self.crop.random_crop:
            x, y = (uniforms(self.seed, items, p).tolist() for p in (Purpose.CROP_X, Purpose.CROP_Y))
        if self.crop.flip:
            mirror = uniforms(self.seed, items, Purpose.FLIP).tolist()
        return list(zip(x, y, mirror, strict=True))

    def _sample(
        self,
        index: int,
        place: tuple[int, int, int, int],
        draws: tuple[float, float, float],
        out: Tensor | None,
    ) -> Sample:
        last = "nothing was tried"
        for attempt in range(MAX_IN_A_ROW):
            if attempt:
                draw = mix(self.seed, index, Purpose.SUBSTITUTE, attempt)
                source, number, position, shape = self.plan.substitute(index, draw)
                place = int(source[0]), int(number[0]), int(position[0]), int(shape[0])
            shard, row = self.plan.sample(self.views, place)
            target = self.plan.shapes[place[3]] if self.plan.shapes else None
            try:
                return self._load(index, shard, row, (*draws, target, out), attempt > 0)
            except _NoCaptionError:
                last = f"{shard.shard} key {shard.key(row)!r}: no caption"
            except BadSample as error:
                last = f"{shard.shard} key {shard.key(row)!r} {error}"
                self._count((shard.shard, row), shard, error)
        raise DataError(
            f"{MAX_IN_A_ROW} unusable samples in a row, the last one {last}; "
            "make the shards again, or set data.missing_caption=UNCONDITIONAL where captions are missing"
        )

    def _load(
        self,
        index: int,
        shard: ShardIndex,
        row: int,
        crop: tuple[float, float, float, tuple[int, int] | None, Tensor | None],
        substituted: bool,
    ) -> Sample:
        fields = self.reader.read(shard, row, self._wanted)
        field = next((name for name in IMAGE_FIELDS if name in fields.found), None)
        if field is None:
            raise BadSample("jpg", "no image field (jpg, jpeg, png or webp)")
        record: dict[str, Any] = {}
        if self.captions.needs_json and (data := fields.take("json")) is not None:
            record = decode_json(data)
        caption = self.captions.choose(
            fields.take, record, lambda: uniform(self.seed, index, Purpose.CAPTION)
        )
        if not caption and self.missing_caption is MissingCaption.SKIP:
            raise _NoCaptionError
        if self.records and not self.captions.needs_json and (data := fields.take("json")) is not None:
            record = decode_json(data)
        picture = fields.take(field)
        assert picture is not None
        target = crop[3]
        side = self.crop.resolution if target is None else _short_side(shard.image_size(row), target)
        image = self.decoder(picture, field, side=side)
        before = self._first_of_pair(fields, image.size, shard.image_size(row), side, crop)
        return Sample(index, shard.key(row), self.crop(image, *crop), caption, record, substituted, before)

    def _first_of_pair(
        self,
        fields: Record,
        decoded: tuple[int, int],
        size: tuple[int, int],
        side: int,
        crop: tuple[float, float, float, tuple[int, int] | None, Tensor | None],
    ) -> Tensor | None:
        """Returns the picture before the edit, cropped and mirrored as the one after it, of `size` pixels.

        None where samples are no pairs. Raises BadSample where it is missing, or of another size.
        """
        if not self._before:
            return None
        field = next((name for name in self._before if name in fields.found), None)
        if field is None:
            raise BadSample(self._before[0], "no picture before the edit; a pair has both")
        data = fields.take(field)
        assert data is not None
        image = self.decoder(data, field, side=side)
        if image.size != decoded and (mine := image_size(data)) != size:
            raise BadSample(
                field,
                f"{mine[0]}x{mine[1]}, and the picture after it {size[0]}x{size[1]}; a pair has one size",
            )
        return self.crop(image, *crop[:4])

    def _count(self, place: tuple[str, int], shard: ShardIndex, error: BadSample) -> None:
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
            append_line(self.bad_samples, json.dumps(entry))
        samples = sum(len(view) for view in self.views)
        allowed = math.ceil(self.max_bad_fraction * samples)
        if len(self._bad) > allowed:
            raise DataError(
                f"{len(self._bad)} bad samples, {allowed} of {samples} allowed, the last one "
                f"{shard.shard} key {entry['key']!r} {error}; make the shards again, "
                "or raise data.max_bad_fraction"
            )


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns how two datasets differ, a line each, from what their `describe` gave."""
    found = []
    if len(before["sources"]) != len(now["sources"]):
        found.append(f"{len(before['sources'])} sources, now {len(now['sources'])}")
    for number, (old, new) in enumerate(zip(before["sources"], now["sources"], strict=False)):
        name = f"source {number + 1}: " if len(now["sources"]) > 1 else ""
        found += [name + line for line in diff(old, new)]
    if before["captions"] != now["captions"]:
        found.append(f"captions were {before['captions']}, now {now['captions']}")
    for key in sorted(before["plan"].keys() | now["plan"].keys()):
        if before["plan"].get(key) != now["plan"].get(key):
            found.append(f"{key} were {before['plan'].get(key)}, now {now['plan'].get(key)}")
    return found


def _short_side(size: tuple[int, int], target: tuple[int, int]) -> int:
    """Returns how many pixels the short side has of a picture (width, height) that just covers `target`."""
    scale = max(target[0] / size[0], target[1] / size[1])
    return max(1, math.ceil(min(size) * scale))
