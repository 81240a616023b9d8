"""Finds the shards that a location names, and their catalogue, making what is missing.

A location is a folder, a pattern (glob, braces), one tar, or the address of remote shards. In a folder one
listing is compared with its catalogue; indexes that are missing or of an older version are made, the
catalogue is written where the folder can be written. `data.index` is the caller.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from glob import glob
from pathlib import Path
from stat import S_ISREG

from braceexpand import braceexpand

from data.arrays import write_atomic
from data.cache import ShardCache
from data.catalogue import AGAIN, CATALOGUE, Catalogue, read_catalogue, refuse_repeated_keys, write_catalogue
from data.remote import AbsentError, list_shards, redact
from data.shard_index import (
    DataError,
    ShardIndex,
    index_path,
    is_address,
    is_outdated,
    make_index,
    read_summary,
    refuse_scheme,
)

THREADS = 16
FEW = 32  # shards that are read without threads
MAX_INDEX_BYTES = 1 << 30
HOW = "make shards from a folder of pictures with `python scripts/make_shards.py PICTURES {}`"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Opened:
    """A dataset's catalogue, the folder that holds it if any, and indexes that could not be written."""

    catalogue: Catalogue
    folder: Path | None
    in_memory: dict[int, ShardIndex]


def open_dataset(shards: str, cache: ShardCache | None = None) -> Opened:
    """Returns what a location names; makes indexes and the catalogue where they are missing.

    Raises one DataError that lists everything missing, cut, changed or damaged, and one for keys that occur
    in two shards.
    """
    if is_address(shards):
        return _open_addresses(shards, cache)
    refuse_scheme(shards)
    folder = Path(shards)
    if folder.is_dir():
        return _open_folder(folder)
    paths = find_shards(shards)
    indexes, made = _summaries(paths)
    catalogue = Catalogue.of(indexes, Path())
    return Opened(refuse_repeated_keys(catalogue, made), None, made)


def find_shards(shards: str) -> list[Path]:
    """Returns the tars a folder, pattern or path names, sorted; some that an index names may be missing.

    Raises DataError where there is nothing, or for a scheme such as file: or pipe:, which is never run.
    """
    refuse_scheme(shards)
    path = Path(shards)
    if path.is_dir():
        return [path / name for name in _names_in(path, _listing(path))]
    if not any(mark in shards for mark in "*?[{"):
        if not path.exists() and not index_path(path).exists():
            raise DataError(f"{shards}: no such file or folder; {HOW.format('OUT')}, or correct data.shards")
        if path.suffix != ".tar":
            raise DataError(f"{shards}: no .tar; name a shard or a folder of shards, or {HOW.format('OUT')}")
        return [path]
    found: set[str] = set()
    for pattern in expand(shards):
        found.update(glob(pattern) if any(mark in pattern for mark in "*?[") else [pattern])
    tars = sorted(Path(name) for name in found if name.endswith(".tar"))
    if not tars:
        raise DataError(f"{shards!r}: no .tar matches it; correct the pattern, or {HOW.format('OUT')}")
    return tars


def expand(shards: str) -> list[str]:
    """Returns what braces stand for; raises DataError where they do not match."""
    try:
        return list(braceexpand(shards))
    except ValueError as error:
        raise DataError(
            f"{shards!r}: its braces do not match; write it as 'folder/{{00000..00012}}.tar'"
        ) from error


# --- a folder -----------------------------------------------------------------------------------------------


Listing = dict[str, tuple[int, int]]


def _listing(folder: Path) -> Listing:
    """Returns name -> (bytes, modification time in ns) of each tar and index in a folder."""
    with os.scandir(folder) as entries:
        found = ((entry.name, entry.stat()) for entry in entries if entry.name.endswith((".tar", ".idx")))
        return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in found if S_ISREG(stat.st_mode)}


def _names_in(folder: Path, listing: Listing) -> list[str]:
    # An index without its shard shows that the shard is missing: reading its header will say so.
    names = {name.removesuffix(".idx") for name in listing if name.endswith((".tar", ".tar.idx"))}
    if names:
        return sorted(names)
    inside = sorted(path.name for path in folder.iterdir())
    parts = [name for name in inside if any((folder / name).glob("*.tar"))]
    if parts:
        raise DataError(
            f"{folder}: no .tar in it, but in its folders {', '.join(parts[:5])}; name one of them"
        )
    what = (
        f"no .tar among its {len(inside)} entries ({', '.join(inside[:3])}, ...)"
        if inside
        else "the folder is empty"
    )
    raise DataError(f"{folder}: {what}; {HOW.format(folder)}")


def _open_folder(folder: Path) -> Opened:
    listing = _listing(folder)
    known = None
    if CATALOGUE in listing:
        try:
            known = read_catalogue(folder)
        except DataError as error:
            if not any(name.endswith(".tar") for name in listing):
                raise
            log.warning("%s; it is made again", error)
    if known is not None and known.left_out:
        log.warning(
            "%s: %d damaged shards are left out (%s); once they are mended, %s",
            folder, len(known.left_out), ", ".join(known.left_out[:3]), AGAIN,
        )  # fmt: skip
        listing = {n: s for n, s in listing.items() if n.removesuffix(".idx") not in known.left_out}
    if known is not None and known.outside():
        _check_outside(folder, known, listing)
        return Opened(known, folder, {})
    kept = _current(known, listing) if known is not None else []
    if known is not None and len(kept) == len(known) == sum(name.endswith(".tar") for name in listing):
        return Opened(known, folder, {})
    return _refresh(folder, listing, known, kept)


def _refresh(folder: Path, listing: Listing, known: Catalogue | None, kept: list[int]) -> Opened:
    """Returns the catalogue after reading the shards that it does not know as they are now."""
    names = set(known.names) if known is not None else set()
    names.update(_names_in(folder, listing) if not names else _tars(listing))
    same = {known.names[number] for number in kept} if known is not None else set()
    paths = [folder / name for name in sorted(names - same)]
    indexes, made = _summaries(paths)
    stamps = [
        index.header.index.stat().st_mtime_ns if number not in made else 0
        for number, index in enumerate(indexes)
    ]
    catalogue = Catalogue.of(indexes, folder, stamps)
    if known is not None and kept:
        catalogue = known.take(kept).merge(catalogue)
    places = {name: number for number, name in enumerate(catalogue.names)}
    in_memory = {places[paths[number].name]: index for number, index in made.items()}
    catalogue = refuse_repeated_keys(catalogue, in_memory)
    if known is not None:
        catalogue = replace(catalogue, left_out=known.left_out)
    if not in_memory:
        try:
            write_catalogue(catalogue)
        except OSError as error:
            log.info("%s: its catalogue is not kept (%s)", folder, error.strerror)
    return Opened(catalogue, folder, in_memory)


def _tars(listing: Listing) -> list[str]:
    return [name.removesuffix(".idx") for name in listing if name.endswith((".tar", ".tar.idx"))]


def _current(known: Catalogue, listing: Listing) -> list[int]:
    """Returns the numbers of the shards that are as the catalogue says: size, and when they were indexed."""
    none = (-1, -1)
    rows = zip(known.names, known.arrays["sizes"].tolist(), known.arrays["stamps"].tolist(), strict=True)
    return [
        number
        for number, (name, size, stamp) in enumerate(rows)
        if listing.get(name, none)[0] == size and listing.get(f"{name}.idx", none)[1] == stamp
    ]


def _check_outside(folder: Path, known: Catalogue, listing: Listing) -> None:
    """Raises DataError listing what a catalogue of shards elsewhere names and is not there as it was."""
    problems = []
    places: dict[Path, Listing] = {}
    for number in range(len(known)):
        header = known.header(number)
        if header.index.parent == folder and header.index.name not in listing:
            problems.append(f"{header.index}: missing; copy it again, or {AGAIN}")
        if header.remote:
            continue
        shard = Path(header.shard)
        if shard.parent not in places:
            places[shard.parent] = _listing(shard.parent) if shard.parent.is_dir() else {}
        stat = places[shard.parent].get(shard.name)
        if stat is None:
            problems.append(f"{shard}: missing; copy the shard again")
        elif stat[0] != header.size:
            problems.append(
                f"{shard}: {stat[0]} bytes, but the catalogue says {header.size}: the shard was cut or "
                f"changed; copy it again, or {AGAIN} if the change is meant"
            )
    _raise(problems)


def _raise(problems: Sequence[str]) -> None:
    if problems:
        more = f" (and {len(problems) - 20} more)" if len(problems) > 20 else ""
        raise DataError("; ".join(problems[:20]) + more)


def _summaries(paths: Sequence[Path]) -> tuple[list[ShardIndex], dict[int, ShardIndex]]:
    """Returns an index without arrays of each shard, made where it is missing or old, and by their number
    those that could not be written; raises DataError listing all that is missing or damaged."""

    def summary(path: Path) -> ShardIndex | DataError:
        try:
            if not index_path(path).is_file() and path.is_file():
                return make_index(path)
            try:
                return read_summary(path)
            except DataError as error:
                if not is_outdated(error):
                    raise
                return make_index(path)
        except DataError as error:
            return error

    if len(paths) <= FEW:
        found = [summary(path) for path in paths]
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(summary, paths))
    _raise([_with_hint(error) for error in found if isinstance(error, DataError)])
    indexes = [index for index in found if isinstance(index, ShardIndex)]
    made = {number: i for number, i in enumerate(indexes) if i.arrays and not i.header.index.is_file()}
    return [ShardIndex(i.header, {}, i.number_names, i.string_names, i.notes) for i in indexes], made


def _with_hint(error: DataError) -> str:
    text = str(error)
    if ".tar: missing" in text:
        return text + f" (or delete {CATALOGUE} and its .idx if it was removed on purpose)"
    return text


# --- addresses ----------------------------------------------------------------------------------------------


def _open_addresses(shards: str, cache: ShardCache | None) -> Opened:
    """Returns the catalogue of remote shards whose indexes lie beside them."""
    how = f"run `python scripts/index.py '{redact(shards)}' OUT` and set data.shards=OUT"
    if cache is None:
        raise DataError(f"{redact(shards)}: remote shards are read through a cache folder; {how}")
    folder = cache.folder / "indexes"
    folder.mkdir(parents=True, exist_ok=True)

    def fetch(address: str) -> ShardIndex | DataError:
        try:
            data = cache.fetch_small(f"{address}.idx", MAX_INDEX_BYTES)
        except AbsentError:
            return DataError(f"{redact(address)}: it has no index ({redact(address)}.idx is absent); {how}")
        path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.idx"
        if not path.is_file() or path.read_bytes() != data:
            write_atomic(path, data)
        try:
            return read_summary(address, index=path)
        except DataError as error:
            return DataError(f"{redact(address)}: {error}; {how}")

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(fetch, list_shards(shards)))
    _raise([str(error) for error in found if isinstance(error, DataError)])
    catalogue = Catalogue.of([index for index in found if isinstance(index, ShardIndex)], Path())
    return Opened(refuse_repeated_keys(catalogue, {}), None, {})
