"""A real server on a loopback port, and a browser's manners in twenty lines: what the tests of web/ share."""

import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.servers import listens, wait_for
from web.app import Part, create_app
from web.security import Access, Buckets
from web.server import Server, listen


@dataclass
class Answer:
    """A response, its body read."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def everything(self) -> bytes:
        """Headers and body: all that a visitor can see."""
        return "\n".join(f"{k}: {v}" for k, v in self.headers.items()).encode() + b"\n\n" + self.body


@dataclass
class Browser:
    """Asks as a page of the server at `port` would, with a cookie once `enter` got one."""

    port: int
    cookie: str = ""
    seen: list[Answer] = field(default_factory=list)

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """One request; `headers` replace those a browser sends, and an empty one takes it away."""
        host = f"127.0.0.1:{self.port}"
        sent = {"Host": host, "Cookie": self.cookie, "Sec-Fetch-Site": "same-origin"}
        if method == "POST":
            sent |= {"Origin": f"http://{host}", "Content-Type": "application/json"}
        sent |= headers or {}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in sent.items():
                if value:
                    connection.putheader(name, value)
            if body is not None:
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            answer = Answer(
                response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
            )
        finally:
            connection.close()
        self.seen.append(answer)
        return answer

    def get(self, path: str, **headers: str) -> Answer:
        """A GET as a page of ours makes it."""
        return self.ask("GET", path, headers=headers)

    def post(self, path: str, values: Any, **headers: str) -> Answer:
        """A POST of JSON as a page of ours makes it."""
        return self.ask("POST", path, json.dumps(values).encode(), headers)

    def enter(self, token: str) -> Answer:
        """Opens the address with the token, and keeps the cookie."""
        answer = self.get(f"/?token={token}")
        self.cookie = answer.headers.get("set-cookie", "").split(";")[0]
        return answer


@dataclass(frozen=True)
class Site:
    """A server that runs."""

    port: int
    access: Access

    def browser(self) -> Browser:
        """A visitor who has opened the address with the token."""
        browser = Browser(self.port)
        assert browser.enter(self.access.token).status == 303
        return browser


@contextmanager
def serving(
    parts: Sequence[Part],
    idle_seconds: float = 15.0,
    visitors: Buckets | None = None,
    secret: bytes = b"s",
    names: Sequence[str] = (),
) -> Iterator[Site]:
    """Serves `parts` from a thread of this process."""
    listener = listen("127.0.0.1", 0)
    port = int(listener.getsockname()[1])
    access = Access.of("127.0.0.1", port, secret, names)
    strangers = Buckets(1e6, 1e6)
    server = Server(create_app(access, parts, visitors, strangers), listener, idle_seconds)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: listens(port))
        yield Site(port, access)
    finally:
        server.stop()
        thread.join(10)
        assert not thread.is_alive()
