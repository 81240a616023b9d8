"""Groups the members of a tar into samples, and turns what is known of them into the arrays of an index.

Nothing is decoded but text: the JSON field gives columns that filters use, the caption its number of words.
`data.shard_index.build_index` is the only caller.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data.arrays import join_texts
from data.fields import BadSample, decode_caption, decode_json, image_size
from data.tar import Member, TarError

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
#: Names of a second picture of a sample, the one before an edit, and its fields: `before.jpg`, ...
PAIR_STEMS = ("before", "source", "input", "original")
PAIR_FIELDS = frozenset(f"{stem}.{name}" for stem in PAIR_STEMS for name in IMAGE_FIELDS)
CAPTION_FIELD = "txt"
RECORD_FIELD = "json"
MAX_FIELDS = 64
MAX_COLUMNS = 128  # of each kind; of a shard's JSON names the ones that most samples have
MAX_COLUMN_NAME = 100
MAX_STRING = 128  # characters of a JSON string that can be compared; longer ones are text, not labels
NO_CAPTION = 65535


def key_hash(key: str) -> int:
    """Returns the 64-bit hash of a key (blake2b) that splits the data and finds duplicates."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def string_hash(text: str) -> int:
    """Returns the 64-bit hash of a JSON string or caption (blake2b), never 0."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


def split_name(name: str) -> tuple[str, str] | None:
    """Returns (key, field) of a member's name, None for names without a field (README, ._a.jpg).

    A field is all that follows the first dot of the last part, as in WebDataset; two parts are a field where
    the second is `npy` (`moments.npy`), and where they name a second picture (`before.jpg`). Raises TarError
    for other dotted keys, which WebDataset would take for another sample's field.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        return None
    extension = extension.lower()
    if "." in extension.removesuffix(".npy") and extension not in PAIR_FIELDS:
        raise TarError(
            f"member {name!r} has a dotted key: key {stem!r} with field {extension!r}, or key "
            f"{base.rpartition('.')[0]!r}? Write it with other characters than dots"
        )
    return folder + slash + stem, extension


class Builder:
    """Collects members; `image_hash` turns an image's bytes into its perceptual hash, 0 where it has none."""

    def __init__(self, image_hash: Callable[[bytes], int] | None = None) -> None:
        self.image_hash = image_hash
        self.samples: dict[str, dict[str, Member]] = {}
        self.fields: set[str] = set()
        self.notes = {"ignored": 0, "bad_json": 0, "bad_captions": 0, "bad_images": 0}
        self._image_sizes: list[tuple[int, int]] = []
        self._image_hashes: list[int] = []
        self._words: list[int] = []
        self._captions: list[int] = []
        self._records: list[dict[str, float | str]] = []

    def add(self, member: Member) -> None:
        """Takes in the next member of the tar; raises TarError where samples are not side by side."""
        parts = split_name(member.name)
        if parts is None:
            self.notes["ignored"] += 1
            return
        key, name = parts
        sample = self.samples.get(key)
        if sample is None:
            sample = self.samples[key] = {}
            self._image_sizes.append((0, 0))
            self._image_hashes.append(0)
            self._words.append(NO_CAPTION)
            self._captions.append(0)
            self._records.append({})
        elif next(reversed(self.samples)) != key or name in sample:
            first = next(iter(sample.values())).offset
            raise TarError(
                f"key {key!r} occurs twice, at bytes {first} and {member.offset} (field {name!r}); "
                "the fields of a sample must lie side by side, each once (tar --sort=name)"
            )
        sample[name] = replace(member, head=b"")
        if name == next((field for field in IMAGE_FIELDS if field in sample), None):
            self._picture(member)
        elif name == CAPTION_FIELD:
            self._caption(member.head)
        elif name == RECORD_FIELD:
            self._record(member.head)
        self.fields.add(name)
        if len(self.fields) > MAX_FIELDS:
            raise TarError(f"more than {MAX_FIELDS} different fields, the last one {name!r} of key {key!r}")

    def _picture(self, member: Member) -> None:
        self._image_sizes[-1] = image_size(member.head)
        if self.image_hash is not None:
            try:
                self._image_hashes[-1] = self.image_hash(member.head)
            except BadSample:
                self.notes["bad_images"] += 1

    def _caption(self, data: bytes) -> None:
        try:
            text = decode_caption(data)
        except BadSample:
            self.notes["bad_captions"] += 1
            return
        self._words[-1] = min(len(text.split()), NO_CAPTION - 1)
        self._captions[-1] = string_hash(text) if text else 0

    def _record(self, data: bytes) -> None:
        try:
            self._records[-1] = _plain(decode_json(data))
        except BadSample:
            self.notes["bad_json"] += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays of an index but for those of the JSON columns."""
        names = sorted(self.fields)
        shape = (len(self.samples), len(names))
        offsets, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        crcs = np.zeros(shape, np.uint32)
        columns = {name: column for column, name in enumerate(names)}
        for row, sample in enumerate(self.samples.values()):
            for name, member in sample.items():
                column = columns[name]
                offsets[row, column], sizes[row, column] = member.offset, member.size
                crcs[row, column] = member.crc32c
        keys, ends = join_texts(self.samples)
        widths_heights = np.array(self._image_sizes, np.int32).reshape(-1, 2)
        arrays: dict[str, np.ndarray] = {
            "offsets": offsets,
            "sizes": sizes,
            "crc32c": crcs,
            "widths": widths_heights[:, 0].copy(),
            "heights": widths_heights[:, 1].copy(),
            "keys": keys,
            "key_ends": ends,
            "key_hashes": np.array([key_hash(key) for key in self.samples], np.uint64),
            "words": np.array(self._words, np.uint16),
            "captions": np.array(self._captions, np.uint64),
        }
        if self.image_hash is not None:
            arrays["phashes"] = np.array(self._image_hashes, np.uint64)
        return arrays

    def columns(self) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, np.ndarray]]:
        """Returns the names of the JSON numbers and strings, and arrays numbers [S N], strings [S K]."""
        number_names = _most_common(self._records, float)
        string_names = _most_common(self._records, str)
        numbers = np.full((len(self._records), len(number_names)), np.nan)
        strings = np.zeros((len(self._records), len(string_names)), np.uint64)
        for row, record in enumerate(self._records):
            for column, name in enumerate(number_names):
                value = record.get(name)
                if isinstance(value, float):
                    numbers[row, column] = value
            for column, name in enumerate(string_names):
                value = record.get(name)
                if isinstance(value, str):
                    strings[row, column] = string_hash(value)
        return number_names, string_names, {"numbers": numbers, "strings": strings}


def _plain(record: Mapping[str, Any]) -> dict[str, float | str]:
    """Returns the numbers, truth values (1 and 0) and short strings at the top level of a record."""
    kept: dict[str, float | str] = {}
    for name, value in record.items():
        if len(name) > MAX_COLUMN_NAME:
            continue
        if isinstance(value, bool | int | float):
            # 1e999 is infinite to Python's JSON, and an integer may be too large for a float.
            number = float(value) if abs(value) < 1e308 else math.inf
            if math.isfinite(number):
                kept[name] = number
        elif isinstance(value, str) and len(value) <= MAX_STRING:
            kept[name] = value
    return kept


def _most_common(records: Sequence[Mapping[str, object]], kind: type) -> tuple[str, ...]:
    counts = Counter(name for record in records for name, value in record.items() if isinstance(value, kind))
    ranked = sorted(counts, key=lambda name: (-counts[name], name))
    return tuple(sorted(ranked[:MAX_COLUMNS]))
