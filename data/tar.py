"""A strict, streaming reader of tar archives: ustar, GNU long names and PAX paths, regular files only.

Python's `tarfile` takes a damaged header in mid-archive for the end of the archive, so a cut or flipped shard
silently becomes a short one. Here every header checksum, every padding byte and both end blocks are checked,
so each cut and each header flip is an error that names its byte offset. Nothing is ever extracted: a member's
name is data, not a path. `data.index` calls `scan` once per shard; training reads by offset and never comes
here.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import google_crc32c

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)
MAX_NAME_HEADER = 64 * 1024  # a long-name or PAX header above this is an attack, not a name
MAX_MEMBERS = 20_000_000
HEAD_BYTES = 1 << 20  # kept of each member: enough for an image's header with its EXIF and ICC profile
CHUNK = 1 << 20

REGULAR = {b"0", b"\0", b"7"}
DIRECTORY = b"5"
REFUSED = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"6": "pipe",
    b"S": "sparse file",
}


class TarError(Exception):
    """Says at which byte offset an archive is damaged or holds what a shard may not hold."""


class Digest(Protocol):
    """Anything that takes bytes as `hashlib` objects do."""

    def update(self, data: bytes, /) -> None:
        """Takes in more bytes."""


@dataclass(frozen=True)
class Member:
    """One regular file of an archive: where its bytes lie, their crc32c and the first of them."""

    name: str
    offset: int
    size: int
    crc32c: int
    head: bytes


class _Reader:
    """Reads exactly, counts the position and feeds every byte to the digest."""

    def __init__(self, stream: BinaryIO, digest: Digest, head_bytes: int) -> None:
        self.stream = stream
        self.digest = digest
        self.head_bytes = head_bytes
        self.position = 0

    def take(self, count: int, what: str) -> bytes:
        data = self.stream.read(count)
        self.digest.update(data)
        if len(data) != count:
            raise TarError(f"cut off at byte {self.position + len(data)}, inside {what}")
        self.position += count
        return data

    def payload(self, size: int, name: str) -> tuple[int, bytes]:
        """Returns the crc32c and the first `head_bytes` of the next `size` bytes; checks their padding."""
        crc, head, left = 0, b"", size
        while left:
            chunk = self.take(min(left, CHUNK), f"member {name!r}")
            crc = google_crc32c.extend(crc, chunk)
            if len(head) < self.head_bytes:
                head += chunk[: self.head_bytes - len(head)]
            left -= len(chunk)
        padding = self.take(-size % BLOCK, f"the padding of member {name!r}")
        if padding.strip(b"\0"):
            raise TarError(f"the padding of member {name!r} before byte {self.position} is not zero")
        return crc, head


def scan(stream: BinaryIO, digest: Digest | None = None, head_bytes: int = HEAD_BYTES) -> Iterator[Member]:
    """Yields every regular file of an archive, in order, reading each byte once; keeps `head_bytes` of each.

    `digest` is fed the whole file, so its value is the file's after the last member. Directories are passed
    over. Raises `TarError` for a cut, a damaged header, non-zero padding, a missing end mark, bytes after it,
    links, devices and sparse files. Source: POSIX.1-2001 pax interchange format; GNU tar manual, "Basic Tar
    Format".
    """
    reader = _Reader(stream, digest or hashlib.sha256(), head_bytes)
    name, size = None, None  # what an extension header says about the next member
    for _ in range(MAX_MEMBERS):
        start = reader.position
        header = reader.take(BLOCK, "a member's header or before the end mark")
        if header == ZERO_BLOCK:
            if name is not None or size is not None:
                raise TarError(f"an extension header before byte {start} belongs to no member")
            return _finish(reader)
        _check(header, start)
        kind = header[156:157]
        length = _number(header[124:136], start, "size")
        if kind in (b"L", b"x", b"g"):
            body = _extension(reader, length, start)
            if kind == b"L":
                name = _text(body.rstrip(b"\0"), start)
            else:
                name, size = _pax(body, start, kind == b"g", name, size)
            continue
        if kind in REFUSED or kind not in REGULAR | {DIRECTORY}:
            raise TarError(f"the member at byte {start} is a {REFUSED.get(kind, f'member of type {kind!r}')}")
        full, length = (
            name if name is not None else _name(header, start),
            size if size is not None else length,
        )
        name, size, offset = None, None, reader.position
        crc, head = reader.payload(length, full)
        if kind != DIRECTORY and not full.endswith("/"):
            yield Member(full, offset, length, crc, head)
    raise TarError(f"more than {MAX_MEMBERS} members")


def _finish(reader: _Reader) -> None:
    """Checks the second end block, and that nothing but zeros follows it."""
    start = reader.position
    if reader.take(BLOCK, "the end mark") != ZERO_BLOCK:
        raise TarError(f"the end mark at byte {start} is damaged")
    while chunk := reader.stream.read(CHUNK):
        reader.digest.update(chunk)
        reader.position += len(chunk)
        if chunk.strip(b"\0"):
            raise TarError(f"bytes that belong to no member after the end mark at byte {start}")
    if reader.position % BLOCK:
        raise TarError(f"cut off at byte {reader.position}, inside the end padding")


def _check(header: bytes, start: int) -> None:
    """Raises unless the header's checksum, unsigned or (old tars) signed, is right."""
    stated = _number(header[148:156], start, "checksum")
    blank = header[:148] + b" " * 8 + header[156:]
    unsigned = sum(blank)
    if stated != unsigned and stated != unsigned - 256 * sum(byte > 127 for byte in blank):
        raise TarError(f"the header at byte {start} is damaged (checksum {stated}, expected {unsigned})")


def _number(field: bytes, start: int, what: str) -> int:
    """Returns an octal or base-256 number of a header."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567") or not digits:
        raise TarError(f"the header at byte {start} is damaged ({what} is {field!r})")
    return int(digits, 8)


def _text(raw: bytes, start: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TarError(f"the name in the header at byte {start} is no UTF-8 ({raw[:60]!r})") from error


def _name(header: bytes, start: int) -> str:
    """Returns the name a plain header carries; the ustar prefix is used where the magic is POSIX's."""
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0]
    if prefix and header[257:263] == b"ustar\0":
        name = prefix + b"/" + name
    return _text(name, start)


def _extension(reader: _Reader, length: int, start: int) -> bytes:
    if length > MAX_NAME_HEADER:
        raise TarError(
            f"the extension header at byte {start} has {length} bytes, at most {MAX_NAME_HEADER} allowed"
        )
    body = reader.take(length, "an extension header")
    if reader.take(-length % BLOCK, "an extension header").strip(b"\0"):
        raise TarError(f"the padding of the extension header at byte {start} is not zero")
    return body


def _pax(
    body: bytes, start: int, shared: bool, name: str | None, size: int | None
) -> tuple[str | None, int | None]:
    """Returns the name and size after a PAX header; one shared by all members may set neither."""
    while body:
        digits, space, _ = body.partition(b" ")
        if (
            not space
            or not digits.isdigit()
            or len(digits) > 6
            or not len(digits) + 3 <= int(digits) <= len(body)
        ):
            raise TarError(f"the PAX header at byte {start} is damaged")
        record, body = body[len(digits) + 1 : int(digits)], body[int(digits) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise TarError(f"the PAX header at byte {start} is damaged")
        if key.startswith(b"GNU.sparse"):
            raise TarError(f"the member after byte {start} is a sparse file")
        if key in (b"path", b"size") and shared:
            raise TarError(f"the global PAX header at byte {start} sets {key.decode()} for all members")
        if key == b"path":
            name = _text(value[:-1], start)
        elif key == b"size":
            size = _number(b"%o" % int(value[:-1]), start, "size") if value[:-1].isdigit() else None
            if size is None:
                raise TarError(f"the PAX header at byte {start} is damaged (size is {value!r})")
    return name, size
