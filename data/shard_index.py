"""The index of a shard (`00000.tar.idx`): where every field of every sample lies, and the checksums.

An index is a file of `data.arrays`: any damage to it is found. It is built in one pass that decodes nothing
but text, and also holds what buckets and filters ask: image sizes, words of the caption, and the numbers and
short strings at the top level of the JSON field. `data.index` joins the indexes of several shards. Use:
`index = build_index(shard)`, `write_index(index)`, `read_index(shard)`.
"""

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.arrays import UNREADABLE, read_arrays, read_meta, text_at, write_arrays, write_atomic
from data.index_builder import IMAGE_FIELDS, NO_CAPTION, Builder, key_hash, split_name, string_hash
from data.tar import HEAD_BYTES, TarError, scan

__all__ = [
    "IMAGE_FIELDS",
    "INDEX_VERSION",
    "NO_CAPTION",
    "DataError",
    "Extent",
    "ShardHeader",
    "ShardIndex",
    "build_index",
    "current_index",
    "index_path",
    "is_address",
    "is_outdated",
    "key_hash",
    "load_index",
    "make_index",
    "read_header",
    "read_index",
    "read_summary",
    "refuse_scheme",
    "split_name",
    "string_hash",
    "write_atomic",
    "write_index",
]

INDEX_VERSION = 2
KIND = "shard index"
ADDRESSES = ("http://", "https://", "s3://")
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
WHOLE_IMAGE = 1 << 28  # bytes of an image that are kept where it is to be decoded

log = logging.getLogger(__name__)


class DataError(Exception):
    """Says in one line what is wrong with the data (shard, key, field), why, and what to do."""

    def __str__(self) -> str:
        # A loader worker's error comes up in the main process with the worker's traceback for its text.
        text = super().__str__()
        return text.rstrip().rpartition("DataError: ")[2] if text.startswith("Caught DataError in") else text


class _OldVersionError(ValueError):
    """The index is of another version; beside a local shard it is made again."""


class Extent(NamedTuple):
    """Where a field's bytes lie in its shard, in bytes, and their crc32c."""

    offset: int
    size: int
    crc32c: int


def is_address(shard: str) -> bool:
    """Returns whether text names a shard by an http(s) or s3 address rather than a path."""
    return shard.lower().startswith(ADDRESSES)


def refuse_scheme(shard: str) -> None:
    """Raises DataError for any other scheme, such as file: or pipe:, of which nothing is ever run."""
    if SCHEME.match(shard) and not is_address(shard):
        raise DataError(
            f"{shard!r}: only local files, http(s) and s3 are read; copy the shards and name their folder"
        )


@dataclass(frozen=True)
class ShardHeader:
    """What is known of a shard without its arrays: `size` in bytes, `sha256` in hex, `count` of samples.

    `shard` is a path or an http(s)/s3 address, `index` the local path of its index.
    """

    shard: str
    index: Path
    size: int
    sha256: str
    count: int
    fields: tuple[str, ...]

    @property
    def remote(self) -> bool:
        """Whether the shard's bytes come through a cache."""
        return is_address(self.shard)


@dataclass(frozen=True)
class ShardIndex:
    """One shard's header and arrays, S samples by F fields (`header.fields`, sorted); offset -1 where absent.

    `arrays` holds offsets, sizes int64 [S F], crc32c uint32 [S F], widths, heights int32 [S] (pixels upright,
    0 if unknown), keys uint8 (UTF-8, joined), key_ends int64 [S], key_hashes uint64 [S], words uint16 [S]
    (of the caption, 65535 if absent), captions uint64 [S] (its hash, 0 if absent or empty), numbers float64
    [S N] (of `number_names`, NaN if absent), strings uint64 [S K] (hashes, of `string_names`, 0 if absent)
    and, where asked for, phashes uint64 [S] (perceptual hash, 0 if none). One that is loaded in part holds
    some of them. `notes` counts what the pass ignored or could not read.
    """

    header: ShardHeader
    arrays: dict[str, np.ndarray]
    number_names: tuple[str, ...] = ()
    string_names: tuple[str, ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)

    @property
    def shard(self) -> str:
        """The tar itself, a path or an address."""
        return self.header.shard

    @property
    def size(self) -> int:
        """The shard's size in bytes."""
        return self.header.size

    @property
    def sha256(self) -> str:
        """The shard's SHA-256 in hex."""
        return self.header.sha256

    @property
    def count(self) -> int:
        """How many samples the shard holds."""
        return self.header.count

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of all fields that occur, sorted, lower case."""
        return self.header.fields

    @property
    def key_hashes(self) -> np.ndarray:
        """uint64 [S]: the first 8 bytes of each key's blake2b."""
        return self.arrays["key_hashes"]

    def key(self, row: int) -> str:
        """Returns the key of a sample."""
        return text_at(self.arrays["keys"], self.arrays["key_ends"], row)

    def extent(self, row: int, name: str) -> Extent | None:
        """Returns where a field lies, or None where the sample lacks it."""
        if name not in self.fields:
            return None
        column = self.fields.index(name)
        offset = int(self.arrays["offsets"][row, column])
        if offset < 0:
            return None
        return Extent(offset, int(self.arrays["sizes"][row, column]), int(self.arrays["crc32c"][row, column]))

    def image_field(self, row: int) -> str | None:
        """Returns the name of the sample's image field, or None where it has none."""
        return next((name for name in IMAGE_FIELDS if self.extent(row, name)), None)

    def image_size(self, row: int) -> tuple[int, int]:
        """Returns (width, height) in pixels of the sample's upright image; (0, 0) if unknown."""
        return int(self.arrays["widths"][row]), int(self.arrays["heights"][row])


def index_path(shard: Path | str) -> Path:
    """Returns where a local shard's index is kept: beside it, `00000.tar` -> `00000.tar.idx`."""
    return Path(f"{shard}.idx")


def build_index(
    shard: Path,
    named: Path | str | None = None,
    index: Path | None = None,
    image_hash: Callable[[bytes], int] | None = None,
) -> ShardIndex:
    """Returns the index of a shard, from one streaming pass that decodes nothing but text.

    `named` is the path or address that the index and the messages give it, for a shard that is still to be
    renamed or is a copy; `index` where its index will lie, beside it if not given. `image_hash` is called
    with the bytes of each image and fills `phashes`.

    Raises DataError for a shard that is missing, cut, damaged or empty, and for duplicate and dotted keys,
    links, devices and sparse files. A field that only some samples have is reported through `logging`, not
    refused; bad JSON and captions are counted in `notes`.
    """
    digest, builder = hashlib.sha256(), Builder(image_hash)
    name = str(shard if named is None else named)
    try:
        with shard.open("rb") as stream:
            for member in scan(stream, digest, HEAD_BYTES if image_hash is None else WHOLE_IMAGE):
                builder.add(member)
            size = stream.tell()
    except (TarError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{name}: {reason}; copy or make the shard again") from error
    if not builder.samples:
        raise DataError(f"{name}: no samples in it (members are named KEY.FIELD); make the shard again")
    numbers, strings, columns = builder.columns()
    header = ShardHeader(
        shard=name,
        index=index_path(name) if index is None else index,
        size=size,
        sha256=digest.hexdigest(),
        count=len(builder.samples),
        fields=tuple(sorted(builder.fields)),
    )
    built = ShardIndex(header, {**builder.arrays(), **columns}, numbers, strings, builder.notes)
    _report(built)
    return built


def _report(index: ShardIndex) -> None:
    if index.notes["ignored"]:
        log.warning(
            "%s: %d members without a field in their name are ignored", index.shard, index.notes["ignored"]
        )
    for column, name in enumerate(index.fields):
        absent = np.flatnonzero(index.arrays["offsets"][:, column] < 0)
        if len(absent):
            example = index.key(int(absent[0]))
            lack = f"{len(absent)} of {index.count} samples lack {name}"
            log.warning("%s: %s (first: %r)", index.shard, lack, example)


def write_index(index: ShardIndex) -> Path:
    """Returns the path of the index after writing it, whole or not at all."""
    meta = {
        "kind": KIND,
        "index_version": INDEX_VERSION,
        "size": index.size,
        "sha256": index.sha256,
        "count": index.count,
        "fields": list(index.fields),
        "numbers": list(index.number_names),
        "strings": list(index.string_names),
        "notes": dict(index.notes),
    }
    if index.header.index != index_path(index.shard):
        meta["shard"] = index.shard  # beside its shard an index may move with it
    write_arrays(index.header.index, meta, index.arrays)
    return index.header.index


def read_index(shard: Path | str, verify: bool = False, index: Path | None = None) -> ShardIndex:
    """Returns a shard's index after comparing its checksums, and the size of a local shard with it.

    `index` is where it lies, beside the shard if not given. With `verify` the SHA-256 of a local shard is
    compared too, which reads it whole. Raises DataError naming the shard and what was expected and found.
    """
    name, path = str(shard), index_path(shard) if index is None else index
    size = _size(name, path)
    read = load_index(name, path)
    _check_size(read.header, size)
    if verify and not read.header.remote:
        with Path(name).open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != read.sha256:
            raise DataError(
                f"{name}: SHA-256 is {actual}, its index says {read.sha256}; copy the shard again"
            )
    return read


def load_index(shard: str, index: Path, names: Collection[str] | None = None) -> ShardIndex:
    """Returns a shard's index, or of its arrays those in `names`, without a look at the shard itself.

    Raises DataError where the index is missing or damaged.
    """
    try:
        meta, arrays = read_arrays(index, names=names)
        return _from_meta(shard, index, meta, arrays)
    except UNREADABLE as error:
        raise _index_error(shard, index, error) from error


def read_header(shard: Path | str) -> ShardHeader:
    """Returns a shard's header after comparing the shard's size with it; raises DataError."""
    return read_summary(shard).header


def read_summary(shard: Path | str, index: Path | None = None) -> ShardIndex:
    """Returns a shard's index without its arrays, the size of a local shard compared; raises DataError."""
    name, path = str(shard), index_path(shard) if index is None else index
    size = _size(name, path)
    try:
        read = _from_meta(name, path, read_meta(path), {})
    except UNREADABLE as error:
        raise _index_error(name, path, error) from error
    _check_size(read.header, size)
    return read


def current_index(shard: Path) -> ShardIndex:
    """Returns the index of a local shard, made again where it is missing or of an older version.

    Raises DataError for a shard that is missing, changed or damaged, and for a damaged index.
    """
    try:
        return read_index(shard)
    except DataError as error:
        path = index_path(shard)
        missing = isinstance(error.__cause__, FileNotFoundError) and shard.is_file() and not path.exists()
        if not missing and not isinstance(error.__cause__, _OldVersionError):
            raise
    return make_index(shard)


def make_index(shard: Path) -> ShardIndex:
    """Returns the index of a local shard after making it, and writing it where the folder can be written."""
    built = build_index(shard)
    try:
        log.info("%s: made its index, %d samples: %s", shard, built.count, write_index(built).name)
    except OSError as error:
        log.warning("%s: its index is kept in memory only (%s)", shard, error.strerror)
    return built


def is_outdated(error: DataError) -> bool:
    """Returns whether an index could not be read because another version of the program wrote it."""
    return isinstance(error.__cause__, _OldVersionError)


def _from_meta(shard: str, path: Path, meta: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> ShardIndex:
    if meta["index_version"] != INDEX_VERSION:
        raise _OldVersionError(
            f"it has index_version {meta['index_version']}, this program reads {INDEX_VERSION}"
        )
    if meta.get("shard", shard) != shard:
        raise ValueError(f"it is the index of {meta['shard']}")
    header = ShardHeader(shard, path, meta["size"], meta["sha256"], meta["count"], tuple(meta["fields"]))
    return ShardIndex(header, arrays, tuple(meta["numbers"]), tuple(meta["strings"]), meta["notes"])


def _size(shard: str, index: Path) -> int | None:
    """Returns the size of a local shard, None of a remote one; raises DataError where it is missing."""
    try:
        return None if is_address(shard) else os.stat(shard).st_size
    except OSError as error:
        raise _index_error(shard, index, error) from error


def _check_size(header: ShardHeader, actual: int | None) -> None:
    if actual is not None and actual != header.size:
        raise DataError(
            f"{header.shard}: {actual} bytes, but its index says {header.size}: the shard was cut or "
            f"changed; copy it again, or delete {header.index.name} if the change is meant"
        )


def _index_error(shard: str, path: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{error.filename}: missing; copy the shard and its index again")
    plain = isinstance(error, OSError) or type(error) in (ValueError, _OldVersionError)
    reason = str(error) if plain else "its header is damaged"
    if path == index_path(shard):
        return DataError(f"{path}: {reason}; delete it and it is made again from the shard")
    return DataError(f"{path}: {reason}; delete it and run `python scripts/index.py` again for {shard}")
