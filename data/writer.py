"""Writes shards: plain WebDataset tars whose bytes are a function of their samples alone, and their index.

Modification times and owners are zero, so the same samples give the same file on any machine. A shard is
written under a temporary name and renamed when it is whole, and the index follows; a crash between the two
leaves a good shard without an index, which `Index.open` makes again. Use: `write_shard(folder / "00000.tar",
samples)`.
"""

import os
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from data.index_builder import PAIR_FIELDS
from data.shard_index import DataError, ShardIndex, build_index, index_path, write_index
from data.tar import BLOCK

KEY = re.compile(r"[^/.\x00-\x1f\x7f][^.\x00-\x1f\x7f]*(?<!/)")
FIELD = re.compile(r"[a-z0-9_]+(\.npy)?")
RECORD = 20 * BLOCK  # what tar pads an archive to


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> ShardIndex:
    """Returns the index of the shard it writes from (key, {field: bytes}), fields in alphabetical order.

    The same samples give the same bytes. An existing shard is replaced whole or not at all. Raises DataError
    for a key that is empty, repeated, or holds dots or control characters, a field that is not lower-case
    letters and digits (maybe with `.npy` after it) nor a second picture's, a sample without fields, and no
    samples; OSError where the disk refuses.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as stream:
            for key, fields in samples:
                _write_sample(stream, path, key, fields)
            stream.write(bytes(2 * BLOCK))
            stream.write(bytes(-stream.tell() % RECORD))
            stream.flush()
            os.fsync(stream.fileno())
        index = build_index(part, named=path)
        # The old index goes first: a crash here must not leave it beside a shard it does not describe.
        index_path(path).unlink(missing_ok=True)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)
    write_index(index)
    return index


def _write_sample(stream: BinaryIO, path: Path, key: str, fields: dict[str, bytes]) -> None:
    if not KEY.fullmatch(key):
        raise DataError(
            f"{path}: key {key!r} must have characters, none of them a dot or a control character"
        )
    if not fields:
        raise DataError(f"{path}: key {key!r} has no fields; give it at least one")
    for name in sorted(fields):
        if not FIELD.fullmatch(name) and name not in PAIR_FIELDS:
            raise DataError(f"{path}: key {key!r} has a field {name!r}; name it with a-z, 0-9 and _")
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode = len(fields[name]), 0o444
        stream.write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict"))
        stream.write(fields[name])
        stream.write(bytes(-info.size % BLOCK))


def _sync_folder(folder: Path) -> None:
    """Makes a rename durable; file systems that cannot sync a folder are left alone."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
