"""Objects of http and https servers, by urllib3: ranges, timeouts, and redirects that are followed by hand.

A redirect is never followed from https to http, to a link-local address (where clouds answer with
credentials), or from a public host into a private network, and the address's user and password go to its own
host alone. urllib3 is imported when a store is made. Use: `data.remote.download`.
"""

import base64
import ipaddress
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote, urljoin

from data.store import CHUNK, LATER, NETWORK, POOL, StoreError, Stream, changed, refuse, whole_size

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse
    from urllib3.util import Url

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
#: What clouds answer with credentials at, besides the link-local addresses.
METADATA = ("fd00:ec2::254", "100.100.100.200")
SECRETS = (
    "give user and password in the address (https://x:***@host/...), ~/.netrc is not read; a signed address "
    "may have expired"
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class HttpStore:
    """Objects of http and https servers; `connect_timeout`, `read_timeout` in seconds without progress."""

    def __init__(self, connect_timeout: float = 10.0, read_timeout: float = 30.0) -> None:
        import urllib3

        self._timeouts = connect_timeout, read_timeout
        timeout = urllib3.Timeout(connect=connect_timeout, read=read_timeout)
        self._pool = urllib3.PoolManager(maxsize=POOL, retries=False, timeout=timeout)

    def open(self, address: str, start: int = 0, version: str = "") -> Stream:
        """Returns the object from `start` on (Range, If-Range), or from 0 where the server sends it whole."""
        from urllib3.util import parse_url

        headers = {"Accept-Encoding": "identity"}
        if start:
            headers |= {"Range": f"bytes={start}-", "If-Range": version}
        with _urllib3_errors(*self._timeouts):
            url = parse_url(address)
        response = self._follow(url, headers)
        try:
            return self._stream(response, start, version)
        except BaseException:
            response.close()
            raise

    def _follow(self, url: "Url", headers: dict[str, str]) -> "BaseHTTPResponse":
        home, secret = _origin(url), _basic_auth(url)
        for _ in range(MAX_REDIRECTS + 1):
            bare = url._replace(auth=None, fragment=None)
            sent = headers | secret if _origin(url) == home else headers
            with _urllib3_errors(*self._timeouts):
                response = self._pool.request(
                    "GET", bare.url, headers=sent, preload_content=False, redirect=False, retries=False
                )
            location = response.headers.get("Location")
            if response.status not in REDIRECTS or location is None:
                return response
            response.close()
            url = _redirected(bare, location)
        raise StoreError(
            f"more than {MAX_REDIRECTS} redirects", "name the address that they lead to", response.status
        )

    def _stream(self, response: "BaseHTTPResponse", start: int, version: str) -> Stream:
        status, headers = response.status, response.headers
        if status not in (200, 206):
            refuse(status, response.reason or "", headers, SECRETS)
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise StoreError(
                f"sent as Content-Encoding {headers['Content-Encoding']}", "serve the file as it is", status
            )
        now = _version(headers)
        length = headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() else None
        if status == 206:
            size = whole_size(headers.get("Content-Range", ""), start, status)
            if now != version:
                changed(status)
        return Stream(
            chunks=self._chunks(response),
            start=start if status == 206 else 0,
            size=size,
            version=now,
            content_type=headers.get("Content-Type", ""),
            ends=length.isdecimal() or "chunked" in headers.get("Transfer-Encoding", "").lower(),
            close=response.close,
        )

    def _chunks(self, response: "BaseHTTPResponse") -> Iterator[bytes]:
        with _urllib3_errors(*self._timeouts, response.status):
            yield from response.stream(CHUNK, decode_content=False)


def _version(headers: Mapping[str, str]) -> str:
    """Returns what If-Range can compare: a strong ETag, else the date of the last change."""
    etag = headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")


def _origin(url: "Url") -> tuple[str | None, str | None, int | None]:
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme or "")


def _basic_auth(url: "Url") -> dict[str, str]:
    if not url.auth:
        return {}
    return {"Authorization": f"Basic {base64.b64encode(unquote(url.auth).encode()).decode()}"}


def _redirected(before: "Url", location: str) -> "Url":
    """Returns where a redirect leads; raises StoreError where it must not be followed."""
    from urllib3.util import parse_url

    # Parsed by what connects: two parsers that disagree on the host would let a crafted address through.
    with _urllib3_errors():
        after = parse_url(urljoin(before.url, location))
    if after.scheme not in ("http", "https") or not after.host:
        raise StoreError(f"redirects to {after.scheme}:", "only http and https are followed")
    remedy = "the redirect is refused: name the address of the file itself, if you trust it"
    if (before.scheme, after.scheme) == ("https", "http"):
        raise StoreError(f"redirects from https to http (host {after.host})", remedy)
    there = addresses(after.host)
    if any(_is_link_local(address) for address in there):
        raise StoreError(f"redirects to the link-local address of {after.host}", remedy)
    inside = any(not address.is_global for address in there)
    if inside and any(address.is_global for address in addresses(before.host or "")):
        raise StoreError(f"redirects from a public host to the private address of {after.host}", remedy)
    return after


def addresses(host: str) -> list[Address]:
    """Returns the addresses of a host, an IPv4 address carried in IPv6 as itself; raises StoreError."""
    try:
        found = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StoreError(f"no address for the host {host}", NETWORK, retry=True) from error
    return [_carried(ipaddress.ip_address(item[4][0])) for item in found]


def _carried(address: Address) -> Address:
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _is_link_local(address: Address) -> bool:
    return address.is_link_local or str(address) in METADATA


@contextmanager
def _urllib3_errors(
    connect_timeout: float = 0.0, read_timeout: float = 0.0, status: int | None = None
) -> Iterator[None]:
    """Turns what urllib3 raises into StoreError; its own texts hold the query, which may be a signature."""
    from urllib3 import exceptions

    try:
        yield
    except exceptions.LocationValueError as error:
        raise StoreError("no valid address", "write https://host/path/00000.tar") from error
    except exceptions.ReadTimeoutError as error:
        raise StoreError(f"no data for {read_timeout:g} s", LATER, status, retry=True) from error
    except exceptions.NewConnectionError as error:
        raise StoreError(
            f"cannot connect ({_cause(error) or 'no such host'})", NETWORK, retry=True
        ) from error
    except exceptions.ConnectTimeoutError as error:
        raise StoreError(f"no connection within {connect_timeout:g} s", NETWORK, retry=True) from error
    except exceptions.SSLError as error:
        certificate = isinstance(error.args[0], ssl.SSLCertVerificationError)
        remedy = "trust its authority by SSL_CERT_FILE" if certificate else NETWORK
        raise StoreError(
            f"no secure connection ({_cause(error) or 'no TLS'})", remedy, retry=not certificate
        ) from error
    except (exceptions.HTTPError, OSError) as error:
        ended = (
            "the connection ended without an answer"
            if status is None
            else "short body: the connection ended early"
        )
        cause = _cause(error)
        reason = f"the connection broke ({cause})" if cause else ended
        raise StoreError(reason, LATER, status, retry=True) from error


def _cause(error: BaseException) -> str:
    """Returns the system's words for what lies under an error; empty where it has none."""
    below: BaseException | None = error
    while below is not None:
        inner = next((item for item in below.args if isinstance(item, OSError)), None)
        for each in (below, inner):
            if isinstance(each, OSError) and each.strerror:
                return each.strerror
        below = below.__cause__ or below.__context__
    return ""
