"""Reads objects of http(s) servers and S3: shards whole and verified, indexes into memory, prefixes as lists.

A download goes to `<target>.part` and is renamed when its size and SHA-256 are right, so that nothing partial
ever has the final name. What broke off is resumed by range, also by a later process, but only while the
server says by its ETag (or date) that the object is still the same: the note `<target>.part.json` keeps that.
Retries are bounded, with exponential waits and full jitter. Use: `download(address, path, size, sha256)`.
"""

import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TypeVar

from braceexpand import braceexpand

from data.http_store import HttpStore
from data.partial import Partial, disk, refuse_html
from data.s3_store import S3Store, split_s3
from data.shard_index import DataError
from data.store import Store, StoreError, Stream

__all__ = [
    "AbsentError",
    "HttpStore",
    "RetryPolicy",
    "S3Store",
    "Store",
    "StoreError",
    "download",
    "list_shards",
    "read_small",
    "redact",
]

RANGE = re.compile(r"\{([+-]?\d{1,99})\.\.([+-]?\d{1,99})")
MAX_SHARDS = 10_000_000

log = logging.getLogger(__name__)
_jitter = random.SystemRandom()
_making = threading.Lock()
T = TypeVar("T")


class AbsentError(DataError):
    """Says that there is no object at an address (404, 410); raised by `read_small` alone."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long a read is tried: `attempts` in all; waits and timeouts in seconds.

    The k-th wait is uniform in [0, min(max_wait, first_wait * 2^(k-1))], and at least what the server's
    Retry-After asks for, up to `max_wait`. The timeouts are for a connection and for silence.
    """

    attempts: int = 6
    first_wait: float = 0.5
    max_wait: float = 30.0
    connect_timeout: float = 10.0
    read_timeout: float = 30.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or min(self.first_wait, self.max_wait) < 0:
            raise ValueError(f"{self}: at least one attempt, and no wait below 0")
        if min(self.connect_timeout, self.read_timeout) <= 0:
            raise ValueError(f"{self}: timeouts must be above 0 seconds")

    def wait(self, attempt: int, asked: float) -> float:
        """Returns the seconds to wait after attempt 1, 2, ...; `asked` is the server's Retry-After."""
        longest = min(self.max_wait, self.first_wait * 2.0 ** min(attempt - 1, 60))
        return max(_jitter.uniform(0.0, longest), min(asked, self.max_wait))


DEFAULT_POLICY = RetryPolicy()


def redact(address: str) -> str:
    """Returns an address as it may be shown: one line, no password, no query (it may be a signature)."""
    shown = address
    if not address.lower().startswith("s3://"):
        scheme, slashes, rest = address.partition("://")
        rest, question, _ = rest.partition("?")
        host, slash, path = rest.partition("/")
        userinfo, at, host = host.rpartition("@")
        user, colon, _ = userinfo.partition(":")
        secret = f"{user}:***@" if colon else "***@"
        shown = f"{scheme}{slashes}{secret if at else ''}{host}{slash}{path}{'?***' if question else ''}"
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def download(
    address: str, target: Path, size: int | None, sha256: str | None, policy: RetryPolicy = DEFAULT_POLICY
) -> str:
    """Returns the SHA-256 (hex) of an object after writing it to `target`, whole and verified.

    `size` in bytes and `sha256` are what the index says, None where nothing is known; without a SHA-256 the
    `.part` of another process is not trusted. Stopped at any moment, even by SIGKILL, it leaves a `.part`
    that the next call takes up. One process at a time may write a target (`data.cache` sees to it).

    Raises DataError naming the address, the attempts and the last status; OSError naming the file where the
    disk refuses (a full disk is first relieved of the `.part`).
    """
    part = Partial(target, redact(address))
    with disk(part):
        part.path.parent.mkdir(parents=True, exist_ok=True)
        part.recover() if sha256 is not None else part.clear()

    def attempt() -> str:
        try:
            return _attempt(address, part, size, sha256, policy)
        except StoreError as error:
            if error.restart:
                part.clear()
            raise

    digest = _retried(address, policy, attempt)
    with disk(part):
        part.accept(target)
    return digest


def read_small(address: str, max_bytes: int, policy: RetryPolicy = DEFAULT_POLICY) -> bytes:
    """Returns a small object whole; raises AbsentError on 404, DataError above `max_bytes` and otherwise."""

    def attempt() -> bytes:
        with closing(_store(address, policy).open(address, 0, "")) as stream:
            _check(stream, None)
            data = bytearray()
            for chunk in stream.chunks:
                data += chunk
                if len(data) > max_bytes:
                    raise StoreError(f"more than {max_bytes:,} bytes", "name another file")
            _check_length(len(data), stream.size)
            return bytes(data)

    return _retried(address, policy, attempt, AbsentError)


def list_shards(address: str, policy: RetryPolicy = DEFAULT_POLICY) -> list[str]:
    """Returns the addresses of the shards that an address names, sorted.

    `{00000..00009}` is expanded; in s3 also a prefix (`s3://bucket/folder/`: its tars, not those of deeper
    folders) and the globs `*`, `?`, `[...]`, which do not cross a slash. Raises DataError where nothing is
    found, and for a folder or glob of http, which cannot be listed.
    """
    ranges = [abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(address)]
    if math.prod(ranges) > MAX_SHARDS:  # braceexpand would make them all before it gives the first
        raise DataError(f"{redact(address)}: more than {MAX_SHARDS:,} shards; correct its braces")
    try:
        expanded = list(braceexpand(address))
    except ValueError as error:
        raise DataError(
            f"{redact(address)}: its braces do not match; write it as '.../{{00000..00012}}.tar'"
        ) from error
    found: set[str] = set()
    for each in expanded:
        found.update(_list_s3(each, policy) if each.lower().startswith("s3:") else [_listed_http(each)])
    if not found:
        raise DataError(f"{redact(address)}: no .tar there; correct data.shards")
    return sorted(found)


def _listed_http(address: str) -> str:
    path = address.partition("://")[2].partition("?")[0].partition("/")[2]
    if not path or path.endswith("/") or any(mark in path for mark in "*["):
        raise DataError(
            f"{redact(address)}: http has no list of files; write braces, such as "
            "https://host/shards/{00000..00009}.tar"
        )
    return address


def _list_s3(address: str, policy: RetryPolicy) -> list[str]:
    if not any(mark in address for mark in "*?["):
        if address.endswith(".tar"):
            return [address]
        address = address.rstrip("/") + "/*.tar"
    pattern = address.partition("://")[2].partition("/")[2]
    literal = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    # A folder is listed alone, not with all that lies below it; a glob in a folder's name needs it all.
    delimiter = "" if "/" in pattern[len(literal) :] else "/"

    def attempt() -> list[str]:
        bucket, _ = split_s3(address)
        with _making:
            store = _s3(os.getpid(), policy.connect_timeout, policy.read_timeout)
        keys = store.list(bucket, literal, delimiter)
        return [f"s3://{bucket}/{key}" for key in keys if key.endswith(".tar") and _matches(key, pattern)]

    return _retried(address, policy, attempt)


def _matches(key: str, pattern: str) -> bool:
    names, patterns = key.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


# --- one read: attempts and checks --------------------------------------------------------------------------


@cache
def _http(pid: int, connect_timeout: float, read_timeout: float) -> HttpStore:
    return HttpStore(connect_timeout, read_timeout)


@cache
def _s3(pid: int, connect_timeout: float, read_timeout: float) -> S3Store:
    return S3Store(connect_timeout, read_timeout)


def _store(address: str, policy: RetryPolicy) -> Store:
    """Returns this process's store for an address: connections are shared by threads, not by forks."""
    make = _s3 if address.lower().startswith("s3:") else _http
    with _making:
        return make(os.getpid(), policy.connect_timeout, policy.read_timeout)


def _retried(
    address: str, policy: RetryPolicy, action: Callable[[], T], absent: type[DataError] = DataError
) -> T:
    """Returns what the action returns, after as many attempts as the policy allows; raises DataError."""
    status: int | None = None
    for number in range(1, policy.attempts + 1):
        try:
            return action()
        except StoreError as error:
            status = error.status or status
            if not error.retry or number == policy.attempts:
                tried = f"{number} attempt{'s' if number > 1 else ''}, last status {status or 'none'}"
                kind = absent if error.status in (404, 410) else DataError
                raise kind(f"{redact(address)}: {error.reason} ({tried}); {error.remedy}") from error
            wait = policy.wait(number, error.wait)
            log.warning(
                "%s: %s; %d of %d attempts, the next in %.1f s",
                redact(address),
                error.reason,
                number,
                policy.attempts,
                wait,
            )
        time.sleep(wait)
    raise AssertionError("unreachable")


def _attempt(address: str, part: "Partial", size: int | None, sha256: str | None, policy: RetryPolicy) -> str:
    if size is not None and part.held > size:
        part.clear()
    if part.held == 0 or part.held != size:
        start = part.held if part.version else 0
        with closing(_store(address, policy).open(address, start, part.version)) as stream:
            _check(stream, size, part)
            whole = stream.size if size is None else size
            with disk(part):
                if stream.start == 0:
                    part.restart(stream.version)
            part.append(stream.chunks, whole)
        _check_length(part.held, whole)
        if whole is not None and part.held > whole:
            raise part.mismatch(f"more than {whole:,} bytes")
    digest = part.digest.hexdigest()
    if sha256 is not None and digest != sha256:
        raise part.mismatch(f"its SHA-256 is {digest}, the index says {sha256}")
    return digest


def _check(stream: Stream, size: int | None, part: "Partial | None" = None) -> None:
    """Raises StoreError for an answer that cannot be the object, before its body is read."""
    if stream.content_type.lower().startswith(("text/html", "application/xhtml")):
        refuse_html()
    if not stream.ends and size is None:
        raise StoreError("the server does not say how long it is", "serve it with Content-Length", 200)
    if part is not None and size is not None and stream.size not in (None, size):
        raise part.mismatch(f"{stream.size:,} bytes, the index says {size:,}")


def _check_length(held: int, whole: int | None) -> None:
    if whole is not None and held < whole:
        raise StoreError(
            f"short body: {held:,} of {whole:,} bytes", "try again later", status=200, retry=True
        )
