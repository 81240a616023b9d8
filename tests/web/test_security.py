"""The guard before every page: names, token, cookie, origin, sizes, rates, times, on a real server."""

import http.client
import socket
import time
from collections.abc import Iterator

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.web.serving import Browser, Site, serving
from web.app import Part, read_json
from web.security import Access, Buckets, RequestError, is_loopback, visitor_of


async def echo(request: Request) -> Response:
    return JSONResponse({"got": await read_json(request), "visitor": visitor_of(request)})


async def broken(request: Request) -> Response:
    raise ValueError("secret detail")


async def refused(request: Request) -> Response:
    raise RequestError(409, "not twice")


async def tagged(request: Request) -> Response:
    return Response("x", headers={"ETag": '"a"', "Server": "b", "Cache-Control": "public"})


PART = Part(
    "Test",
    "/test",
    [
        Route("/api/echo", echo, methods=["POST"]),
        Route("/api/large", echo, methods=["POST"]),
        Route("/api/broken", broken),
        Route("/broken", broken),
        Route("/api/refused", refused),
        Route("/tagged", tagged),
    ],
    {"/test": "icon.svg"},
    {"/api/large": 100_000},
)


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with serving([PART], idle_seconds=1.0) as site:
        yield site


@pytest.fixture
def browser(site: Site) -> Browser:
    return site.browser()


def test_the_token_becomes_a_cookie_and_leaves_the_address(site: Site) -> None:
    browser = Browser(site.port)
    answer = browser.get(f"/test?x=1&token={site.access.token}")
    assert answer.status == 303
    assert answer.headers["location"] == "/test?x=1"
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"firstlight-{site.port}=")
    assert cookie.endswith("; Path=/; HttpOnly; SameSite=Strict")
    browser.cookie = cookie.split(";")[0]
    assert browser.get("/test").status == 200
    assert "set-cookie" not in browser.get(f"/?token={site.access.token}").headers  # the same visitor


def test_a_link_from_elsewhere_is_led_on_by_a_page(site: Site) -> None:
    answer = Browser(site.port).get(f"/test?token={site.access.token}", **{"Sec-Fetch-Site": "cross-site"})
    assert answer.status == 200
    assert b'content="0; url=/test"' in answer.body
    assert "set-cookie" in answer.headers


@pytest.mark.parametrize("token", ["", "x", "%ff", "token&token=x"])
def test_another_token_opens_nothing(site: Site, token: str) -> None:
    answer = Browser(site.port).get(f"/?token={token}")
    assert answer.status == 403
    assert "set-cookie" not in answer.headers


def test_the_way_on_never_leaves_the_server(site: Site) -> None:
    answer = Browser(site.port).get(f"//evil.example/x?token={site.access.token}")
    assert answer.headers["location"] == "/evil.example/x"


@pytest.mark.parametrize(
    "cookie",
    [
        *("", "firstlight-{port}=", "firstlight-{port}=ab.cd", "firstlight-{port}={good}0", "other={good}"),
        *("firstlight-{port}={good}; firstlight-{port}={good}",),
    ],
)
def test_a_forged_or_missing_cookie_is_refused(site: Site, cookie: str) -> None:
    browser = Browser(site.port, cookie.format(port=site.port, good=site.access.session()[1]))
    assert browser.get("/test").status == 403


@pytest.mark.parametrize(
    "host",
    [
        *(
            "",
            "evil.example",
            "evil.example:{port}",
            "127.0.0.1",
            "127.0.0.1:1",
            "localhost.evil.example:{port}",
        ),
        *("127.0.0.1:{port}.evil.example", "[::ffff:127.0.0.1]:{port}", "0.0.0.0:{port}"),
    ],
)
def test_a_foreign_name_is_refused(site: Site, browser: Browser, host: str) -> None:
    assert browser.get("/test", Host=host.format(port=site.port)).status in (400, 421)


@pytest.mark.parametrize("host", ["127.0.0.1:{port}", "localhost:{port}", "LOCALHOST:{port}", "[::1]:{port}"])
def test_our_own_names_are_accepted(site: Site, browser: Browser, host: str) -> None:
    assert browser.get("/test", Host=host.format(port=site.port)).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Sec-Fetch-Site": ""}, 200),
        ({"Content-Type": "application/json; charset=utf-8"}, 200),
        ({"Origin": ""}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://example.com"}, 403),
        ({"Origin": "http://127.0.0.1"}, 403),
        ({"Origin": "https://127.0.0.1:{port}"}, 403),
        ({"Origin": "http://localhost:{port}"}, 403),
        ({"Origin": "http://127.0.0.1:{port}.evil.example"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Cookie": ""}, 403),
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content-Type": ""}, 415),
    ],
)
def test_a_change_comes_from_our_own_page_as_json(
    site: Site, browser: Browser, headers: dict[str, str], status: int
) -> None:
    filled = {name: value.format(port=site.port) for name, value in headers.items()}
    answer = browser.post("/api/echo", {"a": 1}, **filled)
    assert answer.status == status
    assert status != 200 or answer.json()["got"] == {"a": 1}


def test_a_name_that_was_given_may_be_that_of_a_proxy_with_tls() -> None:
    with serving([PART], names=["Example.com"]) as site:
        browser = site.browser()
        behind = {"Host": "example.com"}
        for origin, status in (
            *(("https://example.com", 200), ("http://example.com", 200)),
            *(("https://example.org", 403), (f"https://127.0.0.1:{site.port}", 403)),
        ):
            assert browser.post("/api/echo", {}, **behind, Origin=origin).status == status


def test_a_picture_in_a_foreign_page_is_refused(browser: Browser) -> None:
    foreign = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert browser.get("/test", **foreign).status == 403
    assert browser.get("/test", **{**foreign, "Sec-Fetch-Mode": "navigate"}).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff", b"[" * 16_000, b'"x"'])
def test_what_is_no_object_is_refused(browser: Browser, body: bytes) -> None:
    answer = browser.ask("POST", "/api/echo", body)
    assert answer.status == 400
    assert "error" in answer.json()


def test_sizes_are_bounded(browser: Browser) -> None:
    assert browser.post("/api/echo", {"a": "x" * 16_000}).status == 200
    assert browser.post("/api/echo", {"a": "x" * 17_000}).status == 413
    assert browser.post("/api/large", {"a": "x" * 17_000}).status == 200
    assert browser.post("/api/large", {"a": "x" * 100_000}).status == 413
    assert browser.get("/" + "x" * 2_100).status == 414
    assert browser.get("/test", **{"X-A": "x" * 9_000}).status == 431
    assert browser.get("/test", **{f"X-{k}": "x" for k in range(70)}).status == 431
    assert browser.get("/test", **{"X-A": "x" * 40_000}).status in (400, 431)


def test_a_body_in_chunks_is_bounded_as_well(site: Site, browser: Browser) -> None:
    head = (
        f"POST /api/echo HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nOrigin: http://127.0.0.1:{site.port}\r\n"
        f"Cookie: {browser.cookie}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"1000\r\n" + b"x" * 4_096 + b"\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as raw:
        raw.sendall(head.encode() + chunk * 5)
        assert raw.recv(1_000).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
def test_other_methods_are_refused(browser: Browser, method: str) -> None:
    assert browser.ask(method, "/test").status == 405


def test_a_header_twice_is_refused(site: Site, browser: Browser) -> None:
    head = f"GET /test HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nHost: evil.example\r\n\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as raw:
        raw.sendall(head.encode())
        assert raw.recv(1_000).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize(
    "path",
    [
        *("/../etc/passwd", "/..%2f..%2fetc/passwd", "/%2e%2e/%2e%2e/app.py", "/test/", "/pages/base.css"),
        *("/test%00.svg", "/..\\app.py", "//etc/passwd", "/base.css/", "/web/app.py", "/test;x", "/TEST"),
    ],
)
def test_no_address_becomes_a_path(browser: Browser, path: str) -> None:
    assert browser.get(path).status == 404


def test_every_answer_carries_the_policy_and_tells_nothing_of_the_server(browser: Browser) -> None:
    answers = [browser.get(path) for path in ("/test", "/none", "/tagged", "/broken", "/api/refused", "/")]
    assert [answer.status for answer in answers] == [200, 404, 200, 500, 409, 303]
    for answer in answers:
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert not {"etag", "last-modified", "server", "date", "access-control-allow-origin"} & set(
            answer.headers
        )


def test_an_error_is_one_line_without_a_traceback(browser: Browser) -> None:
    for path in ("/broken", "/api/broken"):
        answer = browser.get(path)
        assert answer.status == 500
        assert b"secret detail" not in answer.everything
        assert b"Traceback" not in answer.everything
        assert len(answer.body.splitlines()) == 1
    assert browser.get("/api/broken").json() == {"error": "this did not work; the server's log says why"}
    assert browser.get("/api/refused").json() == {"error": "not twice"}


def test_a_slow_head_is_cut_off_and_others_are_served(site: Site, browser: Browser) -> None:
    slow = [socket.create_connection(("127.0.0.1", site.port), timeout=10) for _ in range(20)]
    try:
        for raw in slow:
            raw.sendall(b"GET / HTTP/1.1\r\nX-A: ")
        began = time.monotonic()
        assert browser.get("/test").status == 200
        for raw in slow:
            assert raw.recv(100) == b""
        assert time.monotonic() - began < 5
    finally:
        for raw in slow:
            raw.close()


def test_a_connection_that_is_used_now_and_then_stays_open(site: Site, browser: Browser) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=10)
    connection.connect()
    first = connection.sock
    for _ in range(15):
        connection.request("GET", "/test", headers={"Cookie": browser.cookie})
        assert connection.getresponse().read()
        assert connection.sock is first
        time.sleep(0.13)
    connection.close()


def test_a_slow_body_is_cut_off(site: Site, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("web.security.BODY_SECONDS", 0.3)
    head = (
        f"POST /api/echo HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nOrigin: http://127.0.0.1:{site.port}\r\n"
        f"Cookie: {browser.cookie}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{"
    )
    with socket.create_connection(("127.0.0.1", site.port), timeout=10) as raw:
        raw.sendall(head.encode())
        assert raw.recv(1_000).startswith(b"HTTP/1.1 408")


def test_rates_are_bounded_for_each_visitor() -> None:
    with serving([PART], visitors=Buckets(0.001, 5)) as site:
        one, other = site.browser(), site.browser()
        assert [one.get("/test").status for _ in range(8)] == [200] * 5 + [429] * 3
        assert other.get("/test").status == 200


def test_a_bucket_fills_again_and_their_number_is_bounded() -> None:
    buckets = Buckets(rate=2.0, burst=3.0, capacity=10)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert not buckets.take("a", 0.4)
    assert buckets.take("a", 0.6)
    for k in range(1_000):
        buckets.take(str(k), 1.0)
    assert len(buckets.levels) == 10


def test_every_address_needs_a_name() -> None:
    with pytest.raises(ValueError, match=r"--name"):
        Access.of("0.0.0.0", 80, b"s")
    access = Access.of("0.0.0.0", 80, b"s", ["Arena.example.com"])
    assert "arena.example.com" in access.hosts
    assert "localhost" in access.hosts
    assert access.token not in repr(access)


def test_loopback_is_known() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "example.com", "::"))
