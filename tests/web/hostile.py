"""Ten thousand ways to cheat a vote: requests that are replayed, raced, forged, foreign, oversized, broken.

`attack(site, count, seed, secrets)` mixes them with honest votes from several threads, and keeps what was
answered. Whoever asks never gets to know an entrant's name but in the answer to a vote of its own.
"""

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.web.serving import Answer, Browser, Site

TRAVERSALS = (
    *("/picture/../secret", "/picture/..%2f..%2fsecret", "/picture/%2e%2e%2farena.db", "/picture/..\\secret"),
    *(
        "/picture/%00",
        "/picture//etc/passwd",
        "/picture/....//secret",
        "/arena.db",
        "/secret",
        "/votes.jsonl",
    ),
    *("/pictures/", "/picture/", "/picture/x.png", "/picture/%252e%252e%252fsecret", "/../../arena/secret"),
)
FOREIGN: tuple[dict[str, str], ...] = (
    {"Origin": ""},
    {"Origin": "null"},
    {"Origin": "http://example.com"},
    {"Origin": "http://127.0.0.1:1"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Content-Type": "text/plain"},
    {"Content-Type": "multipart/form-data"},
    {"Cookie": ""},
    {"Cookie": "firstlight=admin"},
)
HOSTS = ("example.com", "example.com:{port}", "127.0.0.1.example.com:{port}", "localhost", "127.0.0.1:1", "")
SCRIPTS = ("<img src=x onerror=alert(1)>", "</script><script>alert(1)</script>", "javascript:alert(1)")
BROKEN = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET /arena\r\n\r\n",
    b"POST /api/arena/vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /api/arena/vote HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\nzz\r\n",
    b"GET http://example.com/ HTTP/1.1\r\nHost: example.com\r\n\r\n",
    b"A" * 70_000,
)


@dataclass
class Record:
    """What happened: answers by kind and status, honest votes that were accepted, and what leaked."""

    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, answer: Answer, secrets: Sequence[bytes], token: str = "") -> None:
        """Counts an answer, and searches it for what must not be in it."""
        seen = answer.everything
        if token and answer.status == 200:
            told = answer.json()
            told.pop("shown")
            seen = json.dumps(told).encode() + str(answer.headers).encode()
        found = [secret.decode() for secret in (*secrets, b"Traceback", b'File "') if secret in seen]
        with self.lock:
            self.statuses[kind, answer.status] += 1
            self.leaks += [f"{kind}: {each}" for each in found]
            if token and answer.status == 200:
                self.accepted[token] += 1


def attack(site: Site, count: int, seed: int, secrets: Sequence[bytes], threads: int = 6) -> Record:
    """Sends about `count` requests from some threads and returns what happened; `secrets` stay untold."""
    record = Record()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            attacker = _Attacker(site, random.Random(seed * 1_000 + number), record, secrets)
            for _ in attacker.requests(count // threads):
                pass
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(k,)) for k in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    return record


class _Attacker:
    """One thread's visitors and tricks."""

    def __init__(self, site: Site, rng: random.Random, record: Record, secrets: Sequence[bytes]) -> None:
        self.site = site
        self.rng = rng
        self.record = record
        self.secrets = secrets
        self.sent = 0
        self.victim, self.thief = site.browser(), site.browser()
        self.used: list[str] = []
        self.pair = self._next()

    def requests(self, count: int) -> Iterator[None]:
        """Sends requests until there were `count`."""
        tricks: list[Callable[[], None]] = [
            *(self.honest, self.replayed, self.stolen, self.forged, self.raced, self.foreign, self.traversal),
            *(self.oversized, self.rebound, self.scripted, self.others_picture, self.broken, self.odd),
        ]
        while self.sent < count:
            self.rng.choice(tricks)()
            yield

    def ask(
        self,
        kind: str,
        browser: Browser,
        method: str,
        path: str,
        body: Any = None,
        token: str = "",
        **headers: str,
    ) -> Answer:
        """One request, recorded."""
        data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = browser.ask(method, path, data, headers)
        self.record.note(kind, answer, self.secrets, token)
        self.sent += 1
        return answer

    def vote(self, kind: str, browser: Browser, body: Any, **headers: str) -> Answer:
        """A vote that is not honest: none of these may count."""
        answer = self.ask(kind, browser, "POST", "/api/arena/vote", body, **headers)
        assert answer.status != 200, (kind, body, headers)
        return answer

    def _next(self) -> dict[str, Any]:
        pair = self.victim.get("/api/arena/next").json()["pair"]
        if pair is None:  # this voter has seen everything
            self.victim = self.site.browser()
            pair = self.victim.get("/api/arena/next").json()["pair"]
        assert isinstance(pair, dict)
        return pair

    def honest(self) -> None:
        """Looks at both pictures and votes."""
        for side in ("left", "right"):
            assert self.ask("picture", self.victim, "GET", self.pair[side]).status == 200
        token, outcome = self.pair["token"], self.rng.choice(("left", "right", "tie", "both_bad"))
        body = {"token": token, "outcome": outcome}
        answer = self.ask("honest", self.victim, "POST", "/api/arena/vote", body, token)
        assert answer.status == 200, answer
        self.used.append(token)
        self.pair = answer.json()["pair"] or self._next()

    def replayed(self) -> None:
        """A token that was used."""
        if self.used:
            self.vote("replayed", self.victim, {"token": self.rng.choice(self.used), "outcome": "left"})

    def stolen(self) -> None:
        """A good token in the hands of another visitor."""
        self.vote("stolen", self.thief, {"token": self.pair["token"], "outcome": "left"})

    def forged(self) -> None:
        """A token that was never given out."""
        name, _, proof = self.pair["token"].partition(".")
        token = self.rng.choice(
            (f"{name}.{proof[::-1]}", f"{'0' * 32}.{proof}", name, "." + proof, "", "é.", f"{name}.{proof}.x")
        )
        self.vote("forged", self.victim, {"token": token, "outcome": "left"})

    def raced(self) -> None:
        """One vote posted by several at the same time."""
        token = self.pair["token"]
        body = {"token": token, "outcome": self.rng.choice(("left", "right"))}
        answers: list[Answer] = []

        def post() -> None:
            answers.append(self.ask("raced", self.victim, "POST", "/api/arena/vote", body, token))

        racers = [threading.Thread(target=post) for _ in range(5)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join()
        assert sorted(answer.status for answer in answers) == [200, 409, 409, 409, 409]
        self.used.append(token)
        self.pair = self._next()

    def foreign(self) -> None:
        """A good vote, sent by another site."""
        body = {"token": self.pair["token"], "outcome": "left"}
        self.vote("foreign", self.victim, body, **self.rng.choice(FOREIGN))

    def traversal(self) -> None:
        """An address that wants to be a path."""
        assert self.ask("traversal", self.victim, "GET", self.rng.choice(TRAVERSALS)).status == 404

    def oversized(self) -> None:
        """Too much of something."""
        body = {"token": self.pair["token"], "outcome": "left", "more": "x" * 20_000}
        assert self.vote("oversized", self.victim, body).status == 413
        assert self.ask("oversized", self.victim, "GET", "/arena?" + "x" * 3_000).status == 414

    def rebound(self) -> None:
        """A good vote under a foreign name that was bound to this address."""
        host = self.rng.choice(HOSTS).format(port=self.site.port)
        body = {"token": self.pair["token"], "outcome": "left"}
        self.vote("rebound", self.victim, body, Host=host, Origin=f"http://{host}")

    def scripted(self) -> None:
        """Markup where a prompt or an outcome is expected."""
        text = self.rng.choice(SCRIPTS)
        self.vote("scripted", self.victim, {"token": self.pair["token"], "outcome": text})
        answer = self.ask("scripted", self.victim, "POST", "/api/arena/prompt", {"text": text})
        assert answer.status == 404
        assert text.encode() not in answer.everything

    def others_picture(self) -> None:
        """A picture that is before somebody else."""
        assert self.ask("others", self.thief, "GET", self.pair["left"]).status == 404

    def broken(self) -> None:
        """Bytes that are no request."""
        with socket.create_connection(("127.0.0.1", self.site.port), timeout=10) as raw:
            try:
                raw.sendall(self.rng.choice(BROKEN))
                data = raw.recv(65_536)
            except OSError:
                data = b""
        self.record.note("broken", Answer(int(data[9:12] or 0), {}, data), self.secrets)
        self.sent += 1

    def odd(self) -> None:
        """JSON that is no vote, and methods that nobody answers."""
        body = self.rng.choice(
            (
                *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 9_000, b'{"token": 1, "outcome": "left"}'),
                *(
                    b'{"outcome": "left"}',
                    b'{"token": ["x"], "outcome": "left"}',
                    b'{"token": {}, "outcome": []}',
                ),
                json.dumps({"token": self.pair["token"], "outcome": "left", "voter": "other"}).encode(),
            )
        )
        assert self.vote("odd", self.victim, body).status == 400
        method = self.rng.choice(("PUT", "DELETE", "PATCH", "OPTIONS"))
        assert self.ask("odd", self.victim, method, "/api/arena/vote").status == 405
