"""One object in a store of shards, opened once: what every kind of store gives, and what can go wrong.

A store tries once: what went wrong comes out as a `StoreError` that knows whether another attempt can help,
so that retries, waits and resumption are written once (`data.remote`). The stores are `data.http_store` and
`data.s3_store`.
"""

import contextlib
import email.utils
import http.client
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn, Protocol

CHUNK = 1 << 18  # bytes of one piece of a stream
POOL = 16  # connections kept open to a host
RETRIED = (429, 500, 502, 503, 504)
LATER = "the server is overloaded or down: try again later"
NETWORK = "check the network and the address, or try again later"


class StoreError(Exception):
    """Says why an object could not be read, and what to do.

    Args:
        reason: what happened, to be put behind the address.
        remedy: what to do.
        status: the HTTP status of the answer, None where there was none.
        retry: whether another attempt may succeed.
        wait: seconds that the server asked to wait.
        restart: what is already held belongs to another version of the object.
    """

    def __init__(
        self,
        reason: str,
        remedy: str,
        status: int | None = None,
        retry: bool = False,
        wait: float = 0.0,
        restart: bool = False,
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy
        self.status = status
        self.retry = retry
        self.wait = wait
        self.restart = restart


@dataclass(frozen=True)
class Stream:
    """An open object: its bytes from `start` on.

    `size` is that of the whole object in bytes, None where not stated; `version` names its state (a strong
    ETag or a date), empty where the server gives none; `ends` says that a cut body cannot pass for a whole.
    """

    chunks: Iterator[bytes]
    start: int
    size: int | None
    version: str
    content_type: str
    ends: bool
    close: Callable[[], None]


class Store(Protocol):
    """Where objects are read from."""

    def open(self, address: str, start: int, version: str) -> Stream:
        """Returns the object from byte `start` on, or from 0 where it is no longer `version`.

        Raises StoreError.
        """


def refuse(status: int, phrase: str, headers: Mapping[str, str], secrets: str) -> NoReturn:
    """Raises the StoreError of an answer that is not the object; `phrase` is the server's word for it."""
    said = f"answers {status} {phrase or http.client.responses.get(status, '')}".rstrip()
    if status in (401, 403):
        raise StoreError(f"{said}: access denied", secrets, status)
    if status in (404, 410):
        raise StoreError(f"{said}: no such object", "check the address, or copy the file there", status)
    if status in RETRIED:
        raise StoreError(said, LATER, status, retry=True, wait=_retry_after(headers))
    if status in (412, 416):
        changed(status)
    raise StoreError(said, "check the address with the server's owner", status)


def changed(status: int) -> NoReturn:
    """Raises the StoreError of an object that is no longer the version asked for."""
    raise StoreError(
        "the object changed while it was read",
        "wait until its upload is finished",
        status,
        retry=True,
        restart=True,
    )


def whole_size(content_range: str, start: int, status: int) -> int | None:
    """Returns the whole object's size by a Content-Range; raises StoreError unless it begins at `start`."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range.strip())
    if match is None or int(match[1]) != start:
        raise StoreError(
            f"sends {content_range or 'an unnamed part'!r} where bytes from {start} were asked for",
            "the server must answer Range or send the whole file",
            status,
            retry=True,
            restart=True,
        )
    return None if match[2] == "*" else int(match[2])


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds of a Retry-After header, given as a number or a date; 0 where there is none."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if text.isdecimal():
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return 0.0
