"""The catalogue of a dataset (`catalogue.idx`): what all its shards are, in one small file.

With it a dataset opens in time that grows with the shards, not with the samples: names and sizes are compared
by one listing of the folder, and only what is new or changed is read again. It also says that keys were
compared across all shards. The catalogue of remote shards lies in a folder of its own beside their indexes,
written by `scripts/index.py`. `data.index` opens datasets; this file only knows the table. Use:
`write_catalogue(Catalogue.of(indexes, folder))`; `read_catalogue(folder)`.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.arrays import UNREADABLE, join_texts, read_arrays, text_at, write_arrays
from data.repeats import repeats
from data.shard_index import DataError, ShardHeader, ShardIndex, index_path, is_address, load_index

CATALOGUE = "catalogue.idx"
CATALOGUE_VERSION = 1
KIND = "catalogue"
MOST_COUNTED = 99  # further keys that occur twice are not counted
AGAIN = "run `python scripts/index.py` again"


@dataclass(frozen=True)
class Schema:
    """The names that a shard knows: its fields, and the numbers and strings of its JSON."""

    fields: tuple[str, ...]
    numbers: tuple[str, ...]
    strings: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """What is known of each of n shards, in their order.

    `arrays` holds names, indexes uint8 (UTF-8, joined; paths relative to `folder`, or absolute, or addresses;
    an empty index lies beside its shard), name_ends, index_ends, sizes, counts int64 [n], stamps int64 [n]
    (when the index was written, in ns, 0 unknown), sha256 uint8 [n 32] and schemas uint32 [n], numbers in
    `schemas`. `unique_keys` says that no key occurs in two shards.
    """

    folder: Path
    arrays: dict[str, np.ndarray]
    schemas: tuple[Schema, ...]
    unique_keys: bool = False
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, indexes: Sequence[ShardIndex], folder: Path, stamps: Sequence[int] | None = None
    ) -> "Catalogue":
        """Returns the catalogue of some shards in this order; names below `folder` are relative to it."""
        schemas: dict[Schema, int] = {}
        codes = [
            schemas.setdefault(Schema(i.fields, i.number_names, i.string_names), len(schemas))
            for i in indexes
        ]
        names = [_relative(index.shard, folder) for index in indexes]
        beside = [index.header.index == index_path(index.shard) for index in indexes]
        paths = [
            "" if b else _relative(str(index.header.index), folder)
            for b, index in zip(beside, indexes, strict=True)
        ]
        digests = np.frombuffer(b"".join(bytes.fromhex(index.sha256) for index in indexes), np.uint8)
        arrays = {
            **_texts(names, paths),
            "sizes": np.array([index.size for index in indexes], np.int64),
            "counts": np.array([index.count for index in indexes], np.int64),
            "stamps": np.array(stamps if stamps is not None else [0] * len(indexes), np.int64),
            "sha256": digests.reshape(-1, 32),
            "schemas": np.array(codes, np.uint32),
        }
        return cls(folder, arrays, tuple(schemas))

    def __len__(self) -> int:
        return len(self.arrays["counts"])

    @cached_property
    def names(self) -> list[str]:
        """The shards' names as they are written: relative to the folder, absolute, or addresses."""
        return list(_split(self.arrays["names"], self.arrays["name_ends"]))

    def header(self, number: int) -> ShardHeader:
        """Returns the header of one shard."""
        arrays = self.arrays
        shard = self._locate(text_at(arrays["names"], arrays["name_ends"], number))
        index = text_at(arrays["indexes"], arrays["index_ends"], number)
        return ShardHeader(
            shard=shard,
            index=self.folder / index if index else index_path(shard),
            size=int(arrays["sizes"][number]),
            sha256=arrays["sha256"][number].tobytes().hex(),
            count=int(arrays["counts"][number]),
            fields=self.schemas[int(arrays["schemas"][number])].fields,
        )

    def schema(self) -> Schema:
        """Returns all names that some shard knows, sorted."""
        fields, numbers, strings = (
            tuple(sorted({name for schema in self.schemas for name in names(schema)}))
            for names in (lambda s: s.fields, lambda s: s.numbers, lambda s: s.strings)
        )
        return Schema(fields, numbers, strings)

    def outside(self) -> bool:
        """Returns whether it names shards that do not lie in its folder: remote ones, or in other folders."""
        return b"/" in self.arrays["names"].tobytes()

    def load(self, number: int, names: Iterable[str] | None = None) -> ShardIndex:
        """Returns one shard's index, or some of its arrays; raises DataError where it is another one."""
        header = self.header(number)
        index = load_index(header.shard, header.index, None if names is None else set(names))
        if (index.sha256, index.count) != (header.sha256, header.count):
            remedy = AGAIN if self.outside() else f"delete {CATALOGUE} and it is made again"
            raise DataError(
                f"{header.index}: {index.count} samples of SHA-256 {index.sha256[:12]}..., but the catalogue "
                f"says {header.count} of {header.sha256[:12]}...; {remedy}"
            )
        return index

    def take(self, numbers: Sequence[int]) -> "Catalogue":
        """Returns the catalogue of some of its shards, in the order asked for."""
        chosen = np.array(numbers, np.int64)
        indexes = list(_split(self.arrays["indexes"], self.arrays["index_ends"]))
        texts = _texts([self.names[n] for n in numbers], [indexes[n] for n in numbers])
        rows = {
            name: self.arrays[name][chosen] for name in ("sizes", "counts", "stamps", "sha256", "schemas")
        }
        return replace(self, arrays={**texts, **rows}, unique_keys=False)

    def merge(self, other: "Catalogue") -> "Catalogue":
        """Returns the shards of both, sorted by name."""
        schemas = {schema: code for code, schema in enumerate(self.schemas)}
        codes = np.array([schemas.setdefault(s, len(schemas)) for s in other.schemas], np.uint32)
        joined = {
            name: np.concatenate([self.arrays[name], other.arrays[name]])
            for name in ("sizes", "counts", "stamps", "sha256")
        }
        joined["schemas"] = np.concatenate([self.arrays["schemas"], codes[other.arrays["schemas"]]])
        indexes = [
            text
            for each in (self, other)
            for text in _split(each.arrays["indexes"], each.arrays["index_ends"])
        ]
        names = self.names + other.names
        both = Catalogue(self.folder, {**_texts(names, indexes), **joined}, tuple(schemas))
        return both.take(sorted(range(len(names)), key=names.__getitem__))

    def _locate(self, name: str) -> str:
        return name if is_address(name) else str(self.folder / name)


class Headers(Sequence[ShardHeader]):
    """The headers of a catalogue's shards, each made when it is asked for."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def __len__(self) -> int:
        return len(self.catalogue)

    @overload
    def __getitem__(self, number: int) -> ShardHeader: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[ShardHeader, ...]: ...
    def __getitem__(self, number: int | slice) -> ShardHeader | tuple[ShardHeader, ...]:
        """Returns one header, or those of a slice."""
        if isinstance(number, slice):
            return tuple(self.catalogue.header(n) for n in range(len(self))[number])
        return self.catalogue.header(range(len(self))[number])


def read_catalogue(folder: Path) -> Catalogue | None:
    """Returns the catalogue in a folder, None where there is none; raises DataError where it is damaged."""
    path = folder / CATALOGUE
    try:
        meta, arrays = read_arrays(path, KIND)
        if meta["catalogue_version"] != CATALOGUE_VERSION:
            raise ValueError(
                f"it has version {meta['catalogue_version']}, this program reads {CATALOGUE_VERSION}"
            )
        rows = json.loads(arrays.pop("schema_json").tobytes())
        schemas = tuple(Schema(*(tuple(names) for names in row)) for row in rows)
        return Catalogue(folder, arrays, schemas, meta["unique_keys"], tuple(meta["left_out"]))
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        reason = str(error) if isinstance(error, OSError) or type(error) is ValueError else "it is damaged"
        raise DataError(f"{path}: {reason}; delete it, and {AGAIN}") from error


def write_catalogue(catalogue: Catalogue) -> Path:
    """Returns the path of a catalogue after writing it into its folder; raises OSError."""
    rows = [[schema.fields, schema.numbers, schema.strings] for schema in catalogue.schemas]
    meta: dict[str, Any] = {
        "kind": KIND,
        "catalogue_version": CATALOGUE_VERSION,
        "shards": len(catalogue),
        "samples": int(catalogue.arrays["counts"].sum()),
        "unique_keys": catalogue.unique_keys,
        "left_out": list(catalogue.left_out[:1000]),
    }
    schema_json = np.frombuffer(json.dumps(rows).encode(), np.uint8)
    path = catalogue.folder / CATALOGUE
    write_arrays(path, meta, {**catalogue.arrays, "schema_json": schema_json})
    return path


def key_hashes(catalogue: Catalogue, in_memory: dict[int, ShardIndex], number: int) -> np.ndarray:
    """Returns the hashes of one shard's keys, uint64 [S]."""
    index = in_memory.get(number) or catalogue.load(number, ["key_hashes"])
    return index.key_hashes


def repeated_keys(catalogue: Catalogue, in_memory: dict[int, ShardIndex]) -> Iterator[tuple[str, str, str]]:
    """Yields (key, shard, other shard) for keys that occur in two shards; reads 8 bytes a sample."""
    if len(catalogue) < 2:
        return
    found = repeats(lambda number: key_hashes(catalogue, in_memory, number), catalogue.arrays["counts"])
    for group in found:
        firsts = group.firsts()
        first = 0
        for place in range(len(group)):
            if firsts[place]:
                first = place
                continue
            # Hashes of 64 bits meet by chance once in ten thousand datasets of a hundred million samples.
            keys, shards = [], []
            for member in (first, place):
                number = int(group.shards[member])
                index = in_memory.get(number) or catalogue.load(number, ["keys", "key_ends"])
                keys.append(index.key(int(group.rows[member])))
                shards.append(index.shard)
            if keys[0] == keys[1]:
                yield keys[0], shards[0], shards[1]


def refuse_repeated_keys(catalogue: Catalogue, in_memory: dict[int, ShardIndex]) -> Catalogue:
    """Returns the catalogue, its keys compared; raises DataError for a key that occurs in two shards."""
    found = repeated_keys(catalogue, in_memory)
    example = next(found, None)
    if example is not None:
        key, shard, other = example
        more = 1 + sum(1 for _ in zip(range(MOST_COUNTED), found, strict=False))
        at_least = " at least" if more > MOST_COUNTED else ""
        raise DataError(
            f"key {key!r} occurs in {shard} and in {other} ({more} such keys{at_least}); "
            "write the shards again with keys that are unique"
        )
    return replace(catalogue, unique_keys=True)


def _relative(path: str, folder: Path) -> str:
    if is_address(path):
        return path
    inside = Path(path)
    if inside.is_relative_to(folder):
        return inside.relative_to(folder).as_posix()
    return str(inside.absolute())


def _texts(names: Sequence[str], indexes: Sequence[str]) -> dict[str, np.ndarray]:
    joined, ends = join_texts(names)
    index_joined, index_ends = join_texts(indexes)
    return {"names": joined, "name_ends": ends, "indexes": index_joined, "index_ends": index_ends}


def _split(joined: np.ndarray, ends: np.ndarray) -> Iterator[str]:
    data, begin = joined.tobytes(), 0
    for end in ends.tolist():
        yield data[begin:end].decode("utf-8", "surrogateescape")
        begin = end
