"""The index of a shard (`00000.tar.idx`): where every field of every sample lies, and the checksums.

An index is a safetensors file: arrays, and one string of JSON metadata, each with a crc32c, so that a damaged
index is refused like a damaged shard. It is built in one pass that decodes nothing. `data.index` joins the
indexes of several shards. Use: `index = build_index(shard)`, `write_index(index)`, `read_index(shard)`.
"""

import hashlib
import json
import logging
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from safetensors.numpy import save

from data.tar import Member, TarError, scan
from data.transforms import image_size

INDEX_VERSION = 1
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp")
MAX_FIELDS = 64
MAX_INDEX_HEADER = 1 << 20
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {
    "crc32c": ("U32", np.dtype("<u4")),
    "heights": ("I32", np.dtype("<i4")),
    "key_ends": ("I64", np.dtype("<i8")),
    "key_hashes": ("U64", np.dtype("<u8")),
    "keys": ("U8", np.dtype("u1")),
    "offsets": ("I64", np.dtype("<i8")),
    "sizes": ("I64", np.dtype("<i8")),
    "widths": ("I32", np.dtype("<i4")),
}

log = logging.getLogger(__name__)


class DataError(Exception):
    """Says in one line what is wrong with the data (shard, key, field), why, and what to do."""

    def __str__(self) -> str:
        # A loader worker's error comes up in the main process with the worker's traceback for its text.
        text = super().__str__()
        return text.rstrip().rpartition("DataError: ")[2] if text.startswith("Caught DataError in") else text


class Extent(NamedTuple):
    """Where a field's bytes lie in its shard, in bytes, and their crc32c."""

    offset: int
    size: int
    crc32c: int


@dataclass(frozen=True)
class ShardHeader:
    """What is known of a shard without its arrays: `size` in bytes, `sha256` in hex, `count` of samples."""

    shard: Path
    size: int
    sha256: str
    count: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class ShardIndex:
    """One shard's header and arrays, S samples by F fields (`header.fields`, sorted); offset -1 where absent.

    `arrays` holds offsets, sizes int64 [S F], crc32c uint32 [S F], widths, heights int32 [S] (pixels upright,
    0 if unknown), keys uint8 (UTF-8, joined), key_ends int64 [S], key_hashes uint64 [S].
    """

    header: ShardHeader
    arrays: dict[str, np.ndarray]

    @property
    def shard(self) -> Path:
        """The tar itself."""
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
        ends = self.arrays["key_ends"]
        return self.arrays["keys"][ends[row - 1] if row else 0 : ends[row]].tobytes().decode()

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


def index_path(shard: Path) -> Path:
    """Returns where a shard's index is kept: beside it, `00000.tar` -> `00000.tar.idx`."""
    return shard.with_name(shard.name + ".idx")


def key_hash(key: str) -> int:
    """Returns the 64-bit hash of a key (blake2b) that splits the data and finds duplicates."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def split_name(name: str) -> tuple[str, str] | None:
    """Returns (key, field) of a member's name, None for names without a field (README, ._a.jpg).

    Raises TarError for a dotted key, which WebDataset would take for another sample's field.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not dot or not stem or not extension:
        return None
    if "." in extension:
        raise TarError(
            f"member {name!r} has a dotted key: key {stem!r} with field {extension!r}, or key "
            f"{base.rpartition('.')[0]!r}? Write it with other characters than dots"
        )
    return folder + slash + stem, extension.lower()


class _Builder:
    """Groups members into samples and turns them into arrays."""

    def __init__(self) -> None:
        self.samples: dict[str, dict[str, Member]] = {}
        self.image_sizes: list[tuple[int, int]] = []
        self.fields: set[str] = set()
        self.ignored = 0

    def add(self, member: Member) -> None:
        parts = split_name(member.name)
        if parts is None:
            self.ignored += 1
            return
        key, name = parts
        sample = self.samples.get(key)
        if sample is None:
            sample = self.samples[key] = {}
            self.image_sizes.append((0, 0))
        elif next(reversed(self.samples)) != key or name in sample:
            first = next(iter(sample.values())).offset
            raise TarError(
                f"key {key!r} occurs twice, at bytes {first} and {member.offset} (field {name!r}); "
                "the fields of a sample must lie side by side, each once (tar --sort=name)"
            )
        sample[name] = replace(member, head=b"")
        if name in IMAGE_FIELDS:
            self.image_sizes[-1] = image_size(member.head)
        self.fields.add(name)
        if len(self.fields) > MAX_FIELDS:
            raise TarError(f"more than {MAX_FIELDS} different fields, the last one {name!r} of key {key!r}")

    def arrays(self) -> dict[str, np.ndarray]:
        names = sorted(self.fields)
        shape = (len(self.samples), len(names))
        offsets, sizes = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
        crcs = np.zeros(shape, np.uint32)
        for row, sample in enumerate(self.samples.values()):
            for column, name in enumerate(names):
                if member := sample.get(name):
                    offsets[row, column], sizes[row, column] = member.offset, member.size
                    crcs[row, column] = member.crc32c
        encoded = [key.encode() for key in self.samples]
        widths_heights = np.array(self.image_sizes, np.int32).reshape(-1, 2)
        return {
            "offsets": offsets,
            "sizes": sizes,
            "crc32c": crcs,
            "widths": widths_heights[:, 0].copy(),
            "heights": widths_heights[:, 1].copy(),
            "keys": np.frombuffer(b"".join(encoded), np.uint8),
            "key_ends": np.cumsum([len(key) for key in encoded], dtype=np.int64),
            "key_hashes": np.array([key_hash(key) for key in self.samples], np.uint64),
        }


def build_index(shard: Path, named: Path | None = None) -> ShardIndex:
    """Returns the index of a shard, from one streaming pass that decodes nothing.

    `named` is the path the index and the messages give it, for a shard that is still to be renamed.

    Raises DataError for a shard that is missing, cut, damaged or empty, and for duplicate and dotted keys,
    links, devices and sparse files. A field that only some samples have is reported through `logging`, not
    refused.
    """
    digest, builder = hashlib.sha256(), _Builder()
    source, shard = shard, named or shard
    try:
        with source.open("rb") as stream:
            for member in scan(stream, digest):
                builder.add(member)
            size = stream.tell()
    except (TarError, OSError) as error:
        raise DataError(f"{shard}: {error}; copy or make the shard again") from error
    if not builder.samples:
        raise DataError(f"{shard}: no samples in it (members are named KEY.FIELD); make the shard again")
    header = ShardHeader(shard, size, digest.hexdigest(), len(builder.samples), tuple(sorted(builder.fields)))
    index = ShardIndex(header, builder.arrays())
    if builder.ignored:
        log.warning("%s: %d members without a field in their name are ignored", shard, builder.ignored)
    for column, name in enumerate(header.fields):
        absent = np.flatnonzero(index.arrays["offsets"][:, column] < 0)
        if len(absent):
            example = index.key(int(absent[0]))
            log.warning(
                "%s: %d of %d samples lack %s (first: %r)", shard, len(absent), header.count, name, example
            )
    return index


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    crc = 0
    for name in sorted(arrays):
        crc = google_crc32c.extend(crc, np.ascontiguousarray(arrays[name]).tobytes())
    return crc


def write_index(index: ShardIndex) -> Path:
    """Returns the path of the index after writing it beside its shard, whole or not at all."""
    meta = {
        "index_version": INDEX_VERSION,
        "arrays_crc32c": _checksum(index.arrays),
        "size": index.size,
        "sha256": index.sha256,
        "count": index.count,
        "fields": list(index.fields),
    }
    text = json.dumps(meta, sort_keys=True)
    path = index_path(index.shard)
    # One string, its own checksum first: several would be written in an order that changes from run to run.
    write_atomic(path, save(index.arrays, {"index": f"{google_crc32c.value(text.encode()):08x} {text}"}))
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Writes a file under a temporary name, fsyncs it and renames it into place."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read_header(shard: Path) -> tuple[ShardHeader, dict[str, Any], dict[str, Any], int]:
    """Returns the header, the metadata, the arrays' layout and where they start; raises ValueError."""
    with index_path(shard).open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
        if length > MAX_INDEX_HEADER:
            raise ValueError("its header is damaged")
        layout = json.loads(stream.read(length))
    stated, _, text = layout.pop("__metadata__")["index"].partition(" ")
    if stated != f"{google_crc32c.value(text.encode()):08x}":
        raise ValueError("the checksum of its header is wrong")
    meta = json.loads(text)
    if meta["index_version"] != INDEX_VERSION:
        raise ValueError(f"it has index_version {meta['index_version']}, this program reads {INDEX_VERSION}")
    header = ShardHeader(shard, meta["size"], meta["sha256"], meta["count"], tuple(meta["fields"]))
    return header, meta, layout, 8 + length


def _load_arrays(header: ShardHeader, layout: dict[str, Any], start: int) -> dict[str, np.ndarray]:
    """Returns the arrays; raises ValueError where the layout is not the one written."""
    if sorted(layout) != sorted(DTYPES):
        raise ValueError("its arrays are not those of an index")
    # Read, not mapped: a mapping keeps a file open, and a dataset has more shards than a process may open
    # files.
    blob = np.fromfile(index_path(header.shard), np.uint8)
    rows: tuple[int, ...] = (header.count,)
    shapes = dict.fromkeys(DTYPES, rows)
    for name in ("offsets", "sizes", "crc32c"):
        shapes[name] = (header.count, len(header.fields))
    shapes["keys"] = (-1,)
    arrays = {}
    for name, (code, dtype) in DTYPES.items():
        begin, end = layout[name]["data_offsets"]
        if layout[name]["dtype"] != code or not 0 <= begin <= end <= len(blob) - start:
            raise ValueError(f"its array {name} is damaged")
        arrays[name] = blob[start + begin : start + end].view(dtype).reshape(shapes[name])
    return arrays


def read_header(shard: Path) -> ShardHeader:
    """Returns a shard's header after comparing the shard's size with it; raises DataError."""
    try:
        actual = shard.stat().st_size
        header = _read_header(shard)[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _index_error(shard, error) from error
    if actual != header.size:
        raise DataError(
            f"{shard}: {actual} bytes, but its index says {header.size}: the shard was cut or changed; "
            f"copy it again, or delete {index_path(shard).name} if the change is meant"
        )
    return header


def read_index(shard: Path, verify: bool = False) -> ShardIndex:
    """Returns a shard's index after comparing the checksums of its header and arrays.

    With `verify` the shard's SHA-256 is compared too, which reads it whole. Raises DataError naming the shard
    and what was expected and found.
    """
    header = read_header(shard)
    try:
        _, meta, layout, start = _read_header(shard)
        arrays = _load_arrays(header, layout, start)
        if meta["arrays_crc32c"] != _checksum(arrays):
            raise ValueError("the checksum of its arrays is wrong")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _index_error(shard, error) from error
    if verify:
        with shard.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
        if actual != header.sha256:
            raise DataError(
                f"{shard}: SHA-256 is {actual}, its index says {header.sha256}; copy the shard again"
            )
    return ShardIndex(header, arrays)


def _index_error(shard: Path, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(f"{error.filename}: missing; copy the shard and its index again")
    path = index_path(shard)
    reason = (
        str(error) if isinstance(error, OSError) or type(error) is ValueError else "its header is damaged"
    )
    return DataError(f"{path}: {reason}; delete it and it is made again from the shard")
