"""What is to be known of a dataset before training on it, gathered from its index in one pass.

Counts, histograms and ranges of captions, pictures and JSON columns; duplicates; all as plain JSON, which
`data.index_report` turns into a page. Medians over more than a million samples are those of an even sample.
Use: `findings = survey(catalogue)`; `found = find_duplicates(catalogue, near=4)`.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.catalogue import Catalogue
from data.duplicates import group_near, image_identities, join_groups
from data.fields import BadSample, decode_caption
from data.index_builder import CAPTION_FIELD
from data.remote import redact
from data.repeats import each_shard, frequencies, repeats
from data.shard_index import IMAGE_FIELDS, NO_CAPTION, ShardIndex

SAMPLED = 1_000_000
EXAMPLES = 12
FREQUENT = 12
WORD_EDGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)
SIDE_EDGES = (1, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
ASPECT_EDGES = (0.0, 0.25, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 3.0, 4.0)
ARRAYS = ("heights", "numbers", "offsets", "strings", "widths", "words")

Tally = Callable[[int], None]


class Survey:
    """Takes in the indexes of shards one by one."""

    def __init__(self, shards: int) -> None:
        self.quota = max(1, SAMPLED // max(1, shards))
        self.samples = self.images = 0
        self.notes: Counter[str] = Counter()
        self.present: Counter[str] = Counter()
        self.words = np.zeros(NO_CAPTION + 1, np.int64)
        self.longest = (0, 0, 0)  # words, shard, row
        self.sides = np.zeros(len(SIDE_EDGES), np.int64)
        self.aspects = np.zeros(len(ASPECT_EDGES), np.int64)
        self.unknown = 0
        self.ranges: dict[str, list[float]] = {}  # samples, least, greatest
        self.values: dict[str, list[np.ndarray]] = {}
        self.strings: Counter[str] = Counter()
        self.distinct: dict[str, set[int]] = {}

    def add(self, number: int, index: ShardIndex) -> None:
        """Takes in shard `number`; `ARRAYS` must be loaded."""
        self.samples += index.count
        self.notes.update(index.notes)
        present = index.arrays["offsets"] >= 0
        for column, name in enumerate(index.fields):
            self.present[name] += int(np.count_nonzero(present[:, column]))
        pictures = [column for column, name in enumerate(index.fields) if name in IMAGE_FIELDS]
        has_image = np.any(present[:, pictures], axis=1)
        self.images += int(np.count_nonzero(has_image))
        words = index.arrays["words"]
        self.words += np.bincount(words, minlength=NO_CAPTION + 1)
        known = np.where(words == NO_CAPTION, 0, words)
        row = int(np.argmax(known))
        self.longest = max(self.longest, (int(known[row]), -number, row))
        self._sizes(index, has_image)
        self._columns(index)

    def _sizes(self, index: ShardIndex, has_image: Any) -> None:
        widths, heights = index.arrays["widths"], index.arrays["heights"]
        known = (widths > 0) & (heights > 0)
        self.unknown += int(np.count_nonzero(has_image & ~known))
        widths, heights = widths[known], heights[known]
        self.sides += _histogram(np.minimum(widths, heights), SIDE_EDGES)
        self.aspects += _histogram(widths / np.maximum(heights, 1), ASPECT_EDGES)
        for name, values in (("width", widths), ("height", heights)):
            self._take(f"{name} (measured)", values.astype(np.float64))

    def _columns(self, index: ShardIndex) -> None:
        for column, name in enumerate(index.number_names):
            values = index.arrays["numbers"][:, column]
            self._take(name, values[~np.isnan(values)])
        for column, name in enumerate(index.string_names):
            hashes = index.arrays["strings"][:, column]
            self.strings[name] += int(np.count_nonzero(hashes))
            seen = self.distinct.setdefault(name, set())
            if len(seen) <= 1000:
                seen.update(np.unique(hashes[hashes != 0])[:1001].tolist())

    def _take(self, name: str, values: np.ndarray) -> None:
        if not len(values):
            return
        held = self.ranges.setdefault(name, [0, np.inf, -np.inf])
        held[0] += len(values)
        held[1], held[2] = min(held[1], float(values.min())), max(held[2], float(values.max()))
        self.values.setdefault(name, []).append(values[:: max(1, -(-len(values) // self.quota))])

    def result(self) -> dict[str, Any]:
        """Returns the findings so far as JSON."""
        words = self.words[:NO_CAPTION]
        captioned = int(words.sum())
        columns = {name: self._range(name) for name in sorted(self.ranges)}
        sizes = {name: columns.pop(name) for name in list(columns) if name.endswith(" (measured)")}
        return {
            "samples": self.samples,
            "fields": {
                name: {"samples": count, "missing": self.samples - count}
                for name, count in sorted(self.present.items())
            },
            **{name: self.notes[name] for name in ("ignored", "bad_json", "bad_captions", "bad_images")},
            "captions": {
                "absent": int(self.words[NO_CAPTION]) - self.notes["bad_captions"],
                "empty": int(words[0]),
                "median_words": _median_of(words) if captioned else None,
                "most_words": int(np.flatnonzero(words)[-1]) if captioned else None,
                "words": _bars(_histogram(np.arange(NO_CAPTION), WORD_EDGES, words), WORD_EDGES),
            },
            "images": {
                "missing": self.samples - self.images,
                "unknown_size": self.unknown,
                "short_sides": _bars(self.sides, SIDE_EDGES),
                "aspects": _bars(self.aspects, ASPECT_EDGES),
                **{name.removesuffix(" (measured)"): size for name, size in sizes.items()},
            },
            "numbers": columns,
            "strings": {
                name: {"samples": count, "distinct": min(len(self.distinct[name]), 1001)}
                for name, count in sorted(self.strings.items())
            },
        }

    def _range(self, name: str) -> dict[str, Any]:
        samples, least, greatest = self.ranges[name]
        median = float(np.median(np.concatenate(self.values[name])))
        return {"samples": int(samples), "min": least, "median": median, "max": greatest}


def survey(catalogue: Catalogue) -> dict[str, Any]:
    """Returns what one pass over a dataset's index finds, as JSON."""
    gathered = Survey(len(catalogue))
    loaded = each_shard(lambda number: catalogue.load(number, ARRAYS), len(catalogue))
    for number, index in enumerate(loaded):
        gathered.add(number, index)
    found = gathered.result()
    words, number, row = gathered.longest
    if words:
        found["captions"]["longest"] = caption_of(catalogue, -number, row) | {"words": words}
    frequent, distinct = frequencies(
        lambda number: catalogue.load(number, ["captions"]).arrays["captions"],
        catalogue.arrays["counts"],
        FREQUENT,
    )
    found["captions"]["distinct"] = distinct
    found["captions"]["frequent"] = _examples(catalogue, frequent)
    return found


def caption_of(catalogue: Catalogue, number: int, row: int) -> dict[str, Any]:
    """Returns {"shard", "key", "text"} of a sample; the text is None where the shard cannot be read here."""
    index = catalogue.load(number)
    text, extent = None, index.extent(row, CAPTION_FIELD)
    if extent is not None and not index.header.remote:
        try:
            with Path(index.shard).open("rb") as stream:
                stream.seek(extent.offset)
                text = decode_caption(stream.read(extent.size))
        except (OSError, BadSample):
            text = None
    return {"shard": redact(catalogue.names[number]), "key": index.key(row), "text": text}


def _examples(catalogue: Catalogue, frequent: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """Returns a sample of each of the frequent captions, and how often it occurs."""
    times = dict(frequent)
    places: dict[int, tuple[int, int]] = {}
    for number in range(len(catalogue)):
        if len(places) == len(times):
            break
        captions = catalogue.load(number, ["captions"]).arrays["captions"]
        for row in np.flatnonzero(np.isin(captions, np.array(list(times), np.uint64))).tolist():
            places.setdefault(int(captions[row]), (number, row))
    return [caption_of(catalogue, *places[value]) | {"times": count} for value, count in times.items()]


@dataclass(frozen=True)
class Found:
    """Duplicates: the (shard, row) of all but the first of each group, and what to say of them as JSON."""

    shards: np.ndarray
    rows: np.ndarray
    findings: dict[str, Any]


def find_duplicates(catalogue: Catalogue, near: int | None) -> Found:
    """Returns the duplicates among a dataset's pictures; given `near`, also those that differ in few bits.

    Pictures of the same bytes take memory for the duplicates alone; near ones about 60 bytes a sample.
    """
    identical = _identical(catalogue)
    counts = catalogue.arrays["counts"]
    ends = np.cumsum(counts)
    total = int(ends[-1])
    starts = ends - counts
    extra = identical.members[~identical.first]
    findings = _say(catalogue, ends, identical.members, identical.leaders)
    if near is None:
        dropped = extra
        near_findings = None
    else:
        loaded = each_shard(
            lambda number: catalogue.load(number, ["phashes"]).arrays["phashes"], len(catalogue)
        )
        alike = group_near(np.concatenate(list(loaded)), near)
        same = np.arange(total)
        same[identical.members] = identical.leaders
        groups = join_groups([same, alike], total)
        dropped = np.flatnonzero(groups != np.arange(total))
        only = np.setdiff1d(dropped, extra, assume_unique=True)
        members = np.union1d(only, groups[only])
        near_findings = _say(catalogue, ends, members, groups[members]) | {"extra": len(only), "bits": near}
    shards = np.searchsorted(ends, dropped, side="right")
    found = {"identical": findings, "near": near_findings, "extra": len(dropped)}
    return Found(shards, dropped - starts[shards], found)


@dataclass(frozen=True)
class _Identical:
    """Samples (counted through all shards) that share their image with others, and each group's first."""

    members: np.ndarray
    leaders: np.ndarray

    @property
    def first(self) -> np.ndarray:
        return self.members == self.leaders


def _identical(catalogue: Catalogue) -> _Identical:
    counts = catalogue.arrays["counts"]
    starts = np.cumsum(counts) - counts
    arrays = ("crc32c", "heights", "offsets", "sizes", "widths")
    members, leaders = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for group in repeats(lambda number: image_identities(catalogue.load(number, arrays)), counts):
        places = starts[group.shards] + group.rows
        firsts = group.firsts()
        members.append(places)
        leaders.append(places[firsts][np.cumsum(firsts) - 1])
    return _Identical(np.concatenate(members), np.concatenate(leaders))


def _say(catalogue: Catalogue, ends: np.ndarray, members: np.ndarray, leaders: np.ndarray) -> dict[str, Any]:
    """Returns how many groups and extra pictures there are, and the largest groups by shard and key."""
    values, sizes = np.unique(leaders, return_counts=True)
    largest = heapq.nsmallest(EXAMPLES, zip((-sizes).tolist(), values.tolist(), strict=True))
    examples = []
    for size, leader in largest:
        shown = np.sort(members[leaders == leader])[:4]
        named = []
        for place in shown.tolist():
            number = int(np.searchsorted(ends, place, side="right"))
            row = place - (int(ends[number - 1]) if number else 0)
            index = catalogue.load(number, ["keys", "key_ends"])
            named.append({"shard": redact(catalogue.names[number]), "key": index.key(row)})
        examples.append({"times": -size, "first": named})
    return {"groups": len(values), "extra": len(members) - len(values), "examples": examples}


def _histogram(values: np.ndarray, edges: tuple[float, ...], weights: np.ndarray | None = None) -> np.ndarray:
    """Returns how many values lie from each edge to the next; the last bin is open."""
    bins = np.searchsorted(np.array(edges), values, side="right") - 1
    counted = np.bincount(np.maximum(bins, 0), weights, minlength=len(edges))
    return counted.astype(np.int64)


def _bars(counts: np.ndarray, edges: tuple[float, ...]) -> list[list[float]]:
    return [[edge, int(count)] for edge, count in zip(edges, counts.tolist(), strict=True)]


def _median_of(counts: np.ndarray) -> int:
    """Returns the median of numbers of which `counts[n]` are n."""
    return int(np.searchsorted(np.cumsum(counts), (counts.sum() + 1) // 2))
