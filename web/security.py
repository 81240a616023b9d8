"""Who may come in, and what a request may be: one ASGI middleware before every page.

A page on a loopback port can be reached by every web site that the user's browser has open (ComfyUI
CVE-2024-10481, MLflow CVE-2025-14279). So: the Host header must be one of ours to the letter (else a foreign
name was bound to this address), the visitor must have opened the address with the token once, which becomes
a SameSite=Strict cookie, and what changes something must come from our own origin as JSON. Sizes, times and
rates are bounded, and no answer carries a traceback. Use: `Guard(app, Access.of("127.0.0.1", 8000, secret))`.
"""

import asyncio
import hashlib
import hmac
import html
import ipaddress
import json
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlencode

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

#: What a request may weigh in bytes, and how many headers it may have.
MAX_ADDRESS, MAX_HEADERS, MAX_HEADER_BYTES, MAX_BODY = 2_048, 64, 8_192, 16_384
#: The body of a request must have come after so many seconds.
BODY_SECONDS = 10.0
#: Addresses that mean "every address of this machine".
WILDCARDS = ("", "0.0.0.0", "::")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

#: Nothing from elsewhere, no script or style inside a page, no other page around ours.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
#: What would tell two answers apart, or the server.
UNTOLD = (b"etag", b"last-modified", b"server", b"date", *(name.encode() for name in HEADERS))


class RequestError(Exception):
    """A request that is not answered: an HTTP status and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Access:
    """The names that the page answers to, and what opens it.

    Args:
        hosts: every accepted Host header.
        secret: signs the cookies; a visitor is the same one as long as it lives.
        token: opens the page, as `/?token=...`; several people may use it.
        cookie: name of the cookie; of the port too, since browsers share cookies between ports.
        names: those of the hosts that a proxy with TLS may answer for.
    """

    hosts: frozenset[str]
    secret: bytes = field(repr=False)
    token: str = field(repr=False)
    cookie: str
    names: frozenset[str] = frozenset()

    def is_own(self, origin: str, host: str) -> bool:
        """Returns whether a page of ours, opened by the name `host`, is of that Origin header."""
        return origin == f"http://{host}" or (host in self.names and origin == f"https://{host}")

    @classmethod
    def of(cls, host: str, port: int, secret: bytes, names: Sequence[str] = ()) -> "Access":
        """Returns the access of a page that listens on `host` and `port`, with a new token.

        `names` are further accepted Host headers, such as `arena.example.com:8000`. Raises ValueError where
        the page would listen on every address without a name to be called by.
        """
        if host in WILDCARDS and not names:
            raise ValueError(
                f"host {host or '(empty)'} is every address of this machine; say as well by which name the "
                f"page is opened, such as --name arena.example.com:{port}"
            )
        own = [host] if ":" not in host else [f"[{host}]"]
        given = frozenset(name.lower() for name in names)
        hosts = {f"{name}:{port}" for name in (*LOOPBACK, *own)} | given
        if port == 80:
            hosts |= {name.removesuffix(":80") for name in hosts}
        return cls(frozenset(hosts), secret, secrets.token_urlsafe(24), f"firstlight-{port}", given)

    def sign(self, kind: str, text: str) -> str:
        """Returns the HMAC-SHA256 of a text under the secret, 32 hex digits, for one kind of use."""
        data = f"{kind}\0{text}".encode("utf-8", "surrogatepass")
        return hmac.new(self.secret, data, hashlib.sha256).hexdigest()[:32]

    def session(self) -> tuple[str, str]:
        """Returns a new visitor's opaque id, and the value of the cookie that proves it."""
        visitor = secrets.token_hex(8)
        return visitor, f"{visitor}.{self.sign('session', visitor)}"

    def visitor(self, value: str) -> str | None:
        """Returns the visitor that a cookie's value proves, None for none."""
        visitor, _, proof = value.partition(".")
        proven = hmac.compare_digest(self.sign("session", visitor).encode(), proof.encode())
        return visitor if proven else None


def is_loopback(host: str) -> bool:
    """Returns whether only this machine can reach what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Buckets:
    """A token bucket for each key: `rate` a second, `burst` at once; the `capacity` latest keys are known."""

    def __init__(self, rate: float, burst: float, capacity: int = 4_096) -> None:
        self.rate = rate
        self.burst = burst
        self.capacity = capacity
        self.levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key: str, now: float) -> bool:
        """Returns whether one more is allowed at time `now`, in seconds, and counts it."""
        level, then = self.levels.pop(key, (self.burst, now))
        level = min(self.burst, level + (now - then) * self.rate)
        self.levels[key] = (max(level - 1, 0.0) if level >= 1 else level, now)
        if len(self.levels) > self.capacity:
            self.levels.popitem(last=False)
        return level >= 1


class Guard:
    """The middleware. A visitor's id is in the scope of what passes: see `visitor_of`.

    Args:
        app: what is guarded.
        access: who may come in.
        body_limits: path -> bytes that a body may have there; elsewhere `MAX_BODY`.
        visitors: how often one visitor may ask.
        strangers: how often one address may ask that shows no cookie.
        clock: seconds.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        body_limits: Mapping[str, int] | None = None,
        visitors: Buckets | None = None,
        strangers: Buckets | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.app = app
        self.access = access
        self.body_limits = dict(body_limits or {})
        self.visitors = visitors if visitors is not None else Buckets(60.0, 300.0)
        self.strangers = strangers if strangers is not None else Buckets(40.0, 300.0)
        self.clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or lets the application answer it."""
        if scope["type"] != "http":
            return  # nothing here speaks websocket; without an answer the server closes it
        started = False

        async def told(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                kept = [pair for pair in message["headers"] if pair[0].lower() not in UNTOLD]
                message["headers"] = kept + [(k.encode(), v.encode()) for k, v in HEADERS.items()]
            await send(message)

        try:
            await self._answer(scope, receive, told)
        except RequestError as refusal:
            await respond(scope, told, refusal.status, refusal.message)
        except Exception as error:
            log.error("%s %s: %s: %s", scope["method"], scope["path"][:80], type(error).__name__, error)
            if not started:
                await respond(scope, told, 500, "this did not work; the server's log says why")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _headers(scope)
        if headers.get("host", "").lower() not in self.access.hosts:
            raise RequestError(421, "this server does not go by that name")
        visitor = self.access.visitor(_cookie(headers.get("cookie", ""), self.access.cookie))
        address = scope["client"][0] if scope.get("client") else ""
        buckets, key = (self.visitors, visitor) if visitor else (self.strangers, address)
        if not buckets.take(key, self.clock()):
            raise RequestError(429, "too many requests; wait a few seconds")
        if scope["method"] in ("GET", "HEAD"):
            if int(headers.get("content-length", "0")) or "transfer-encoding" in headers:
                raise RequestError(400, "a question has no body")
            query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
            given = [value for name, value in query if name == "token"]
            if given:
                await self._enter(scope, send, headers, visitor, given, query)
                return
        elif scope["method"] != "POST":
            raise RequestError(405, "only GET, HEAD and POST are answered")
        if visitor is None:
            raise RequestError(
                403, "open the address that the server printed when it started; it has a token"
            )
        _check_fetch(scope, headers)
        if scope["method"] == "POST":
            self._check_post(headers)
            limit = self.body_limits.get(scope["path"], MAX_BODY)
            receive = await _read_body(receive, headers, limit)
        scope["visitor"] = visitor
        await self.app(scope, receive, send)

    def _check_post(self, headers: Mapping[str, str]) -> None:
        """What changes something must be sent by a page of ours, as JSON."""
        if not self.access.is_own(headers.get("origin", "").lower(), headers["host"].lower()):
            raise RequestError(403, "this request does not come from a page of this server")
        if headers.get("content-type", "").lower().replace(" ", "") not in (
            "application/json",
            "application/json;charset=utf-8",
        ):
            raise RequestError(415, "send application/json")

    async def _enter(
        self,
        scope: Scope,
        send: Send,
        headers: Mapping[str, str],
        visitor: str | None,
        given: Sequence[str],
        query: Sequence[tuple[str, str]],
    ) -> None:
        """Turns the token into a cookie, and sends the visitor to the same address without it."""
        mine = self.access.token.encode()
        if len(given) != 1 or not hmac.compare_digest(given[0].encode("utf-8", "replace"), mine):
            raise RequestError(403, "this token opens nothing; use the address that the server printed last")
        rest = urlencode([pair for pair in query if pair[0] != "token"])
        path = "/" + scope["raw_path"].decode("latin-1").split("?")[0].lstrip("/\\")
        place = path + (f"?{rest}" if rest else "")
        extra = [("location", place)]
        if visitor is None:
            value = self.access.session()[1]
            extra += [("set-cookie", f"{self.access.cookie}={value}; Path=/; HttpOnly; SameSite=Strict")]
        if headers.get("sec-fetch-site") == "cross-site":
            # A link in another site's page: the browser would not send a Strict cookie along a redirect.
            page = f'<!doctype html><meta http-equiv="refresh" content="0; url={html.escape(place)}">'
            await _send(send, 200, "text/html; charset=utf-8", page.encode(), extra[1:])
        else:
            await _send(send, 303, "text/plain; charset=utf-8", b"", extra)


def visitor_of(connection: HTTPConnection) -> str:
    """Returns the opaque id of who asks; the guard has checked it."""
    return str(connection.scope["visitor"])


async def respond(scope: Scope, send: Send, status: int, message: str) -> None:
    """Sends an error: one line of JSON to what asks as a program, else one line of HTML."""
    if scope["method"] == "POST" or scope["path"].startswith("/api/"):
        body = json.dumps({"error": message}).encode()
        await _send(send, status, "application/json", body)
        return
    title = f"{status} {HTTPStatus(status).phrase}"
    page = f'<!doctype html><html lang="en"><title>{title}</title><p>{html.escape(message)}</p></html>\n'
    await _send(send, status, "text/html; charset=utf-8", page.encode())


async def _send(
    send: Send, status: int, kind: str, body: bytes, extra: Sequence[tuple[str, str]] = ()
) -> None:
    pairs = [("content-type", kind), ("content-length", str(len(body))), *extra]
    headers = [(name.encode(), value.encode("latin-1")) for name, value in pairs]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _headers(scope: Scope) -> dict[str, str]:
    """The headers of a request whose address and headers are of a sane size, those that count only once."""
    if len(scope.get("raw_path") or b"") + len(scope["query_string"]) > MAX_ADDRESS:
        raise RequestError(414, f"the address is longer than {MAX_ADDRESS:,} bytes")
    pairs = scope["headers"]
    if len(pairs) > MAX_HEADERS or sum(len(k) + len(v) for k, v in pairs) > MAX_HEADER_BYTES:
        raise RequestError(431, f"more than {MAX_HEADERS} headers, or {MAX_HEADER_BYTES:,} bytes of them")
    found: dict[str, str] = {}
    for name, value in ((k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in pairs):
        if name in ("host", "origin", "content-type", "content-length", "sec-fetch-site") and name in found:
            raise RequestError(400, f"the header {name} is given twice")
        found[name] = f"{found[name]}; {value}" if name in found else value
    return found


def _cookie(header: str, name: str) -> str:
    """The value of a cookie that is there exactly once, else an empty one."""
    pairs = [part.strip().partition("=") for part in header.split(";")]
    values = [value for key, _, value in pairs if key == name]
    return values[0] if len(values) == 1 else ""


def _check_fetch(scope: Scope, headers: Mapping[str, str]) -> None:
    """A browser says from where a request was made; only a link that is followed may come from elsewhere."""
    site = headers.get("sec-fetch-site", "same-origin")
    navigates = scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
    if site not in ("same-origin", "none") and not navigates:
        raise RequestError(403, "this request was made by another site")


async def _read_body(receive: Receive, headers: Mapping[str, str], limit: int) -> Receive:
    """Reads a body whole and returns what gives it to the application."""
    if int(headers.get("content-length", "0")) > limit:
        raise RequestError(413, f"more than {limit:,} bytes")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            more = True
            while more:
                message = await receive()
                if message["type"] != "http.request":
                    raise RequestError(400, "the request ended early")
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limit:
                    raise RequestError(413, f"more than {limit:,} bytes")
    except TimeoutError:
        raise RequestError(408, f"the request took longer than {BODY_SECONDS:g} seconds to arrive") from None
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    return replay
