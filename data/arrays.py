"""Arrays on disk that are whole or refused: one safetensors file, one line of JSON, a crc32c of each.

The indexes of shards, the catalogue of a dataset and what is cached of them are such files. The JSON carries
each array's type, shape and checksum and is preceded by its own, so that any flip or cut is found, and a few
arrays can be read without the others. Arrays are read, not mapped: a mapping keeps a file open, and a dataset
has more shards than a process may open files. Use: `write_arrays(path, {"kind": "x"}, {"counts": counts})`;
`meta, arrays = read_arrays(path, "x")`.
"""

import json
import logging
import os
import struct
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from safetensors.numpy import save

MAX_HEADER = 1 << 20
DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I32": "<i4", "I64": "<i8"}
DTYPES |= {"F32": "<f4", "F64": "<f8"}
CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}

#: Arrays by name.
Arrays = Mapping[str, np.ndarray]
#: What reading a damaged or missing file raises; turn it into a DataError that says what to do.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError)

log = logging.getLogger(__name__)


def checksum(array: np.ndarray) -> int:
    """Returns the crc32c of an array's bytes."""
    return int(google_crc32c.value(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))


def pack_arrays(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> bytes:
    """Returns the bytes of a file: `meta` must be JSON and needs a `kind`; the same in, the same out."""
    table = {
        name: {"dtype": CODES[array.dtype], "shape": list(array.shape), "crc32c": checksum(array)}
        for name, array in arrays.items()
    }
    text = json.dumps({**meta, "arrays": table}, sort_keys=True)
    # One string, its own checksum first: several would be written in an order that changes from run to run.
    line = f"{google_crc32c.value(text.encode()):08x} {text}"
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, {"index": line})


def write_arrays(path: Path, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file whole or not at all; raises OSError."""
    write_atomic(path, pack_arrays(meta, arrays))


def read_meta(path: Path) -> dict[str, Any]:
    """Returns a file's JSON, its checksum compared; raises one of `UNREADABLE`."""
    with path.open("rb") as stream:
        return _header(stream)[0]


def read_arrays(
    path: Path, kind: str | None = None, names: Collection[str] | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns a file's JSON and its arrays, or those of `names` that it has, checksums compared.

    Raises one of `UNREADABLE`, also where the file is of another `kind`.
    """
    with path.open("rb") as stream:
        meta, layout, start = _header(stream)
        if kind is not None and meta.get("kind") != kind:
            raise ValueError(f"it is no {kind}")
        wanted = [name for name in meta["arrays"] if names is None or name in names]
        arrays = {name: _array(stream, name, meta["arrays"][name], layout[name], start) for name in wanted}
    return meta, arrays


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


def read_kept(path: Path | None, kind: str, check: Callable[[Arrays], bool]) -> Arrays | None:
    """Returns the arrays kept at `path`, None where there are none or they are not what `check` accepts."""
    if path is None:
        return None
    try:
        _, arrays = read_arrays(path, kind)
        if not check(arrays):
            raise ValueError("it counts other shards")
        return arrays
    except FileNotFoundError:
        return None
    except UNREADABLE as error:
        log.warning("%s: %s; it is made again", path, error)
        return None


def keep(path: Path | None, kind: str, arrays: Arrays) -> None:
    """Keeps arrays at `path` for `read_kept`; a place that cannot be written is done without."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(path, {"kind": kind}, arrays)
    except OSError as error:
        log.warning("%s: not kept (%s)", path, error.strerror)


def join_texts(texts: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns (UTF-8 bytes joined, uint8; where each text ends, int64)."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(data) for data in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def text_at(joined: np.ndarray, ends: np.ndarray, i: int) -> str:
    """Returns text `i` of those that `join_texts` joined."""
    return joined[ends[i - 1] if i else 0 : ends[i]].tobytes().decode("utf-8", "surrogateescape")


def _header(stream: BinaryIO) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Returns the JSON, the arrays' layout and where the first one starts."""
    (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
    if length > MAX_HEADER:
        raise ValueError("its header is damaged")
    layout = json.loads(stream.read(length))
    stated, _, text = layout.pop("__metadata__")["index"].partition(" ")
    if stated != f"{google_crc32c.value(text.encode()):08x}":
        raise ValueError("the checksum of its header is wrong")
    return json.loads(text), layout, 8 + length


def _array(
    stream: BinaryIO, name: str, described: Mapping[str, Any], laid: Mapping[str, Any], start: int
) -> np.ndarray:
    begin, end = laid["data_offsets"]
    dtype = np.dtype(DTYPES[described["dtype"]])
    if not 0 <= begin <= end or end - begin != dtype.itemsize * int(np.prod(described["shape"])):
        raise ValueError(f"its array {name} is damaged")
    stream.seek(start + begin)
    data = np.frombuffer(stream.read(end - begin), np.uint8)
    if google_crc32c.value(data) != described["crc32c"]:
        raise ValueError(f"the checksum of its array {name} is wrong")
    return data.view(dtype).reshape(described["shape"])
