"""Reading from http and S3: every fault of a server is retried or named, and nothing partial is accepted."""

import hashlib
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import pytest

import data.http_store
import data.partial
import data.remote
from data.remote import (
    AbsentError,
    RetryPolicy,
    download,
    list_shards,
    read_small,
    redact,
)
from data.shard_index import DataError
from tests import servers
from tests.servers import FaultyServer, faulty_server, nginx, s3_server, status, wait_for, whole

PROJECT = Path(__file__).resolve().parents[2]
QUICK = RetryPolicy(attempts=3, first_wait=0.001, max_wait=0.01, connect_timeout=2.0, read_timeout=0.3)
BODY = np.random.default_rng(0).bytes(1_000_000)
SHA = hashlib.sha256(BODY).hexdigest()
SOME = 600_000  # bytes that arrive before a fault, more than one chunk


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture
def server(running: FaultyServer) -> FaultyServer:
    running.log.clear()
    running.files.clear()
    running.plan.clear()
    return running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "copy" / "a.tar"


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.glob("*"))


def ranges(server: FaultyServer, path: str = "/a.tar") -> list[str | None]:
    return [request.headers.get("Range") for request in server.asked(path)]


# --- faults that pass ---------------------------------------------------------------------------------------

RESUMED = "bytes=524288-"  # two chunks of 256 KiB are kept of what arrived

PASSING = {
    "500 twice": ([status(500), status(500), whole], [None] * 3),
    "502, 504": ([status(502), status(504), whole], [None] * 3),
    "503 with Retry-After": ([status(503, {"Retry-After": "0"}), whole], [None] * 2),
    "503 with a date": ([status(503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}), whole], [None] * 2),
    "429": ([status(429), whole], [None] * 2),
    "reset": ([servers.reset(0), whole], [None] * 2),
    "stall": ([servers.stall(SOME), whole], [None, RESUMED]),
    "short body": ([servers.cut(SOME), whole], [None, f"bytes={SOME}-"]),
    "short body, no ranges": ([servers.cut(SOME), servers.unranged], [None, f"bytes={SOME}-"]),
    "another range": ([servers.cut(SOME), servers.wrong_range, whole], [None, f"bytes={SOME}-", None]),
    "changed, heeds If-Range": ([servers.cut(SOME), servers.served('"two"')], [None, f"bytes={SOME}-"]),
    "changed, heeds nothing": (
        [servers.cut(SOME), servers.served('"two"', heed_if_range=False)],
        [None, f"bytes={SOME}-", None],
    ),
    "too long once": ([servers.stated(10), whole], [None] * 2),
    "too short once": ([servers.stated(-10), whole], [None] * 2),
    "chunks cut": ([servers.chunked(SOME), whole], [None] * 2),
    "chunks": ([servers.chunked(len(BODY))], [None]),
    "no length": ([servers.endless], [None]),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_tried_again(name: str, server: FaultyServer, target: Path) -> None:
    behaviours, asked = PASSING[name]
    address = server.add("/a.tar", BODY, *behaviours)
    assert download(address, target, len(BODY), SHA, QUICK) == SHA
    assert target.read_bytes() == BODY
    assert left(target) == ["a.tar"]
    assert ranges(server) == asked


def test_an_object_that_changes_midway_is_never_glued(server: FaultyServer, target: Path) -> None:
    other = bytes(reversed(BODY))
    address = server.add("/a.tar", other)

    def first(handler: servers.Handler, data: bytes) -> None:
        servers.cut(SOME)(handler, BODY)

    second = servers.served('"two"', heed_if_range=False)
    server.plan["/a.tar"] = [first, second]
    assert download(address, target, None, None, QUICK) == hashlib.sha256(other).hexdigest()
    assert target.read_bytes() == other


def test_a_reset_in_the_middle_is_resumed(server: FaultyServer, target: Path) -> None:
    address = server.add("/a.tar", BODY, servers.reset(SOME), whole)
    download(address, target, len(BODY), SHA, QUICK)
    assert target.read_bytes() == BODY
    assert len(server.asked("/a.tar")) == 2  # how much had arrived is up to the kernel


# --- faults that stay ---------------------------------------------------------------------------------------

AFTER_3 = r" \(3 attempts, last status {}\); .*try again later$"
LASTING = {
    "500": (status(500), r"answers 500 Internal Server Error" + AFTER_3.format(500)),
    "503": (status(503, {"Retry-After": "9999"}), r"answers 503 Service Unavailable" + AFTER_3.format(503)),
    "429": (status(429), r"answers 429 Too Many Requests" + AFTER_3.format(429)),
    "reset": (servers.reset(0), r"the connection broke \(Connection reset by peer\)" + AFTER_3.format(200)),
    "stall": (servers.stall(SOME), r"no data for 0\.3 s" + AFTER_3.format("20[06]")),
    "short body": (servers.cut(SOME), r"short body: the connection ended early" + AFTER_3.format(200)),
    "chunks cut": (servers.chunked(SOME), r"short body: the connection ended early" + AFTER_3.format(200)),
    "no length, cut": (
        lambda handler, data: servers.endless(handler, data[:SOME]),
        r"short body: 600,000 of 1,000,000 bytes" + AFTER_3.format(200),
    ),
    "other size": (
        servers.stated(-10),
        r"999,990 bytes, the index says 1,000,000 \(2 attempts, last status 200\); index the .*old",
    ),
    "other bytes": (
        lambda handler, data: whole(handler, data[::-1]),
        rf"its SHA-256 is \w+, the index says {SHA} \(2 attempts, last status 200\); index the shards again",
    ),
    "longer": (
        lambda handler, data: servers.chunked(len(data) + 1)(handler, data + b"x"),
        r"more than 1,000,000 bytes \(2 attempts, .*\); index the shards again",
    ),
    "HTML": (servers.html, r"an HTML page where a shard .*\(1 attempt, last status 200\); .*in a browser"),
    "HTML unnamed": (servers.unnamed_html, r"an HTML page where .*\(1 attempt, last status 200\)"),
    "401": (
        status(401),
        r"answers 401 .*access denied \(1 attempt, .*401\); give user and password in the a",
    ),
    "403": (
        status(403),
        r"answers 403 .*access denied \(1 attempt.*403\); .*~/\.netrc is not read; a signed",
    ),
    "404": (status(404), r"answers 404 .*no such object \(1 attempt, last status 404\); check the address"),
    "410": (status(410), r"answers 410 .*no such object \(1 attempt, last status 410\)"),
    "418": (status(418), r"answers 418 .*\(1 attempt, last status 418\); check the address"),
    "encoded": (servers.zipped, r"sent as Content-Encoding gzip \(1 attempt.*serve the file as it is"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_named_and_leaves_nothing(name: str, server: FaultyServer, target: Path) -> None:
    behaviour, message = LASTING[name]
    address = server.add("/a.tar", BODY, behaviour)
    with pytest.raises(DataError) as caught:
        download(address, target, len(BODY), SHA, QUICK)
    assert re.match(re.escape(address) + ": " + message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is DataError  # its text survives the way out of a loader's worker
    assert not target.exists()


def test_nobody_listening_is_named(target: Path) -> None:
    address = f"http://127.0.0.1:{servers.free_port()}/a.tar"
    with pytest.raises(
        DataError, match=r"cannot connect \(Connection refused\) \(3 attempts, last status none\)"
    ):
        download(address, target, len(BODY), SHA, QUICK)


def test_a_body_of_unknown_length_is_refused_where_nothing_checks_it(
    server: FaultyServer, target: Path
) -> None:
    address = server.add("/a.tar", BODY, servers.endless)
    with pytest.raises(DataError, match=r"does not say how long it is .*serve it with Content-Length"):
        download(address, target, None, None, QUICK)
    assert left(target) == []


@pytest.mark.parametrize("address", ["http://", "http://x:port/a.tar", "s3://", "s3://-/a.tar"])
def test_what_is_no_address_is_said_to_be_none(address: str, target: Path) -> None:
    with pytest.raises(DataError, match=r"no (valid )?address.*; write "):
        download(address, target, None, None, QUICK)


def test_retry_after_is_heeded_up_to_the_longest_wait(server: FaultyServer, target: Path) -> None:
    policy = RetryPolicy(attempts=3, first_wait=1.0, max_wait=30.0)
    assert all(0 <= policy.wait(k, 0.0) <= 2.0 ** (k - 1) for k in range(1, 5) for _ in range(50))
    assert max(policy.wait(20, 0.0) for _ in range(50)) <= 30.0
    assert max(policy.wait(3, 0.0) for _ in range(200)) > 2.0  # it does grow
    assert policy.wait(1, 7.0) == 7.0
    assert policy.wait(1, 9999.0) == 30.0
    with pytest.raises(ValueError, match="at least one attempt"):
        RetryPolicy(attempts=0)


# --- what was stopped goes on -------------------------------------------------------------------------------


def test_an_interrupt_leaves_a_part_that_is_resumed(server: FaultyServer, target: Path) -> None:
    address = server.add("/a.tar", BODY, servers.stall(SOME), whole)
    part = target.with_name("a.tar.part")
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        wait_for(lambda: part.exists() and part.stat().st_size >= 524_288)
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    patient = RetryPolicy(attempts=1, read_timeout=20.0)
    with pytest.raises(KeyboardInterrupt):
        download(address, target, len(BODY), SHA, patient)
    thread.join()
    assert left(target) == ["a.tar.part", "a.tar.part.json"]
    download(address, target, len(BODY), SHA, QUICK)
    assert ranges(server) == [None, RESUMED]
    assert target.read_bytes() == BODY


def test_a_part_is_taken_up_only_where_it_can_be_checked(server: FaultyServer, target: Path) -> None:
    address = server.add("/a.tar", BODY, servers.cut(SOME))
    once = RetryPolicy(attempts=1)
    for known in (None, SHA):
        server.log.clear()
        server.plan["/a.tar"] = [servers.cut(SOME), whole]
        with pytest.raises(DataError, match="short body"):
            download(address, target, len(BODY), SHA, once)
        assert download(address, target, None, known, once) == SHA
        assert ranges(server) == [None, f"bytes={SOME}-" if known else None]


@pytest.mark.parametrize("fault", ["flip", "longer", "note", "other address", "whole"])
def test_a_part_that_is_not_what_it_says_is_fetched_anew(
    fault: str, server: FaultyServer, target: Path
) -> None:
    address = server.add("/a.tar", BODY, servers.cut(SOME), whole)
    with pytest.raises(DataError, match="short body"):
        download(address, target, len(BODY), SHA, RetryPolicy(attempts=1))
    part, note = target.with_name("a.tar.part"), target.with_name("a.tar.part.json")
    held = part.read_bytes()
    assert held == BODY[:SOME]
    if fault == "flip":
        part.write_bytes(b"?" + held[1:])
    if fault == "longer":
        part.write_bytes(BODY + b"x")
    if fault == "note":
        note.write_text('{"version": ')
    if fault == "other address":
        note.write_text(note.read_text().replace("127.0.0.1", "127.0.0.2"))
    if fault == "whole":
        part.write_bytes(BODY)
    download(address, target, len(BODY), SHA, QUICK)
    assert target.read_bytes() == BODY
    assert left(target) == ["a.tar"]
    resumed = {"flip": [f"bytes={SOME}-", None], "whole": []}
    assert ranges(server)[1:] == resumed.get(fault, [None])


FULL_DISK = """
import resource, sys
from pathlib import Path
from data.remote import RetryPolicy, download
resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, 700_000))
try:
    download(sys.argv[1], Path(sys.argv[2]), None, None, RetryPolicy(attempts=2))
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_gets_its_room_back(server: FaultyServer, target: Path) -> None:
    address = server.add("/a.tar", BODY)
    command = [sys.executable, "-c", FULL_DISK, address, str(target)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True)
    assert re.search(r"free some, or give the cache .*: '.*a\.tar\.part'", done.stdout), done.stdout
    assert left(target) == []


# --- redirects and credentials ------------------------------------------------------------------------------


def test_redirects_are_followed_to_five(server: FaultyServer, target: Path) -> None:
    server.add("/a.tar", BODY)
    for number in range(6):
        to = "/a.tar" if number == 0 else f"/hop{number - 1}"
        server.add(f"/hop{number}", b"", servers.redirect(to))
    download(f"{server.address}/hop4", target, len(BODY), SHA, QUICK)
    with pytest.raises(DataError, match=r"more than 5 redirects \(1 attempt, last status 302\)"):
        download(f"{server.address}/hop5", target, len(BODY), SHA, QUICK)


@pytest.mark.parametrize(
    ("to", "message"),
    [
        ("http:/" + "/169.254.169.254/latest/meta-data", r"redirects to the link-local address of 169\.254"),
        ("http:/" + "/2852039166/", r"redirects to the link-local address"),
        ("http:/" + "/[::ffff:169.254.169.254]/", r"redirects to the link-local address"),
        ("http:/" + "/[64:ff9b::a9fe:a9fe]/", r"redirects to the link-local address"),
        ("http:/" + "/[fe80::1]/", r"redirects to the link-local address"),
        ("http:/" + "/x\\@169.254.169.254/", r"no address for the host x|redirects to"),
        ("file:///etc/passwd", r"redirects to file:; only http and https are followed"),
        ("s3://bucket/a.tar", r"redirects to s3:"),
    ],
)
def test_a_redirect_into_the_machine_is_refused(
    to: str, message: str, server: FaultyServer, target: Path
) -> None:
    address = server.add("/a.tar", BODY, servers.redirect(to))
    with pytest.raises(DataError) as caught:
        download(address, target, len(BODY), SHA, QUICK)
    assert re.search(message.replace("; ", r" \(.*\); "), str(caught.value)), str(caught.value)
    assert "traceback" not in str(caught.value).lower()


def test_redirects_from_a_public_host_inside_and_down_to_http_are_refused(
    server: FaultyServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from urllib3.util import parse_url

    known = {"example.com": "93.184.216.34", "127.0.0.1": "127.0.0.1", "10.0.0.7": "10.0.0.7"}
    monkeypatch.setattr(data.http_store, "addresses", lambda host: [ip_address(known[host])])
    redirected = data.http_store._redirected
    public = parse_url("https://example.com/a.tar")
    for inside in ("127.0.0.1", "10.0.0.7"):
        with pytest.raises(data.http_store.StoreError, match="from a public host to the private address of"):
            redirected(public, f"https://{inside}/x")
    with pytest.raises(data.http_store.StoreError, match="from https to http"):
        redirected(public, "http://example.com/a.tar")
    assert redirected(public, "/b.tar").url == "https://example.com/b.tar"
    # The same, by a server that is taken for public.
    known["127.0.0.1"] = known["example.com"]
    address = server.add("/a.tar", BODY, servers.redirect(f"http://{'10.0.0.7'}/a.tar"))
    with pytest.raises(
        DataError, match=r"to the private address of 10\.0\.0\.7 \(1 attempt.*; the redirect is"
    ):
        download(address, target, len(BODY), SHA, QUICK)


def test_credentials_go_to_their_own_host_alone(server: FaultyServer, target: Path) -> None:
    with faulty_server() as other:
        there = other.add("/a.tar", BODY)
        server.add("/far.tar", b"", servers.redirect(there))
        server.add("/near.tar", b"", servers.redirect("/a.tar"))
        server.add("/a.tar", BODY)
        mine = server.address.replace("://", "://me:p%40ss@")
        for name in ("far", "near"):
            download(f"{mine}/{name}.tar", target, len(BODY), SHA, QUICK)
        secret = "Basic bWU6cEBzcw=="
        assert [request.headers.get("Authorization") for request in server.log] == [secret] * 3
        assert [request.headers.get("Authorization") for request in other.log] == [None]


def test_no_message_and_no_file_shows_a_secret(
    server: FaultyServer, target: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.add("/a.tar", BODY, status(503), servers.cut(SOME), status(403))
    address = server.address.replace("://", "://me:hidden@") + "/a.tar?signature=hidden"
    with caplog.at_level(logging.DEBUG, "data"), pytest.raises(DataError) as caught:
        download(address, target, len(BODY), SHA, QUICK)
    assert "://me:***@127.0.0.1" in str(caught.value)
    assert "/a.tar?***: answers 403" in str(caught.value)
    notes = "".join(path.read_text() for path in target.parent.glob("*.json"))
    assert "me:***" in notes
    assert "answers 503" in caplog.text
    assert "hidden" not in str(caught.value) + caplog.text + notes


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://host/a.tar", "https://host/a.tar"),
        ("https://x:y@host/a@b.tar", "https://x:***@host/a@b.tar"),
        ("https://x@host", "https://***@host"),
        ("http://host:80?a@b", "http://host:80?***"),
        ("s3://bucket/what?.tar", "s3://bucket/what?.tar"),
        ("http://host/a\n\x1b[1m.tar", "http://host/a??[1m.tar"),
    ],
)
def test_redaction(address: str, shown: str) -> None:
    assert redact(address) == shown


# --- small files, lists, schemes ----------------------------------------------------------------------------


def test_small_files(server: FaultyServer) -> None:
    address = server.add("/a.idx", b"index", status(500), whole)
    assert read_small(address, 5, QUICK) == b"index"
    with pytest.raises(DataError, match=r"a\.idx: more than 4 bytes \(1 attempt"):
        read_small(address, 4, QUICK)
    with pytest.raises(AbsentError, match=r"/b\.idx: answers 404"):
        read_small(f"{server.address}/b.idx", 4, QUICK)
    with pytest.raises(DataError, match="an HTML page"):
        read_small(server.add("/c.idx", b"", servers.html), 100, QUICK)
    with pytest.raises(DataError, match="short body"):
        read_small(server.add("/d.idx", BODY, servers.cut(9)), 10**7, QUICK)
    with pytest.raises(DataError, match="how long"):
        read_small(server.add("/e.idx", b"x", servers.endless), 9, QUICK)


def test_http_lists_are_written_in_braces() -> None:
    assert list_shards("https://host/{00008..00010}.tar?k={1,2}")[::5] == [
        "https://host/00008.tar?k=1",
        "https://host/00010.tar?k=2",
    ]
    assert list_shards("https://x:y@host/a.tar?sig=*") == ["https://x:y@host/a.tar?sig=*"]
    for address in ("https://host", "https://host/shards/", "https://host/*.tar", "http://host/[ab].tar"):
        with pytest.raises(
            DataError, match=r"http has no list of files; write braces, such as .*\{00000\.\."
        ):
            list_shards(address)
    with pytest.raises(DataError, match="its braces do not match"):
        list_shards("https://host/{0..1.tar")
    with pytest.raises(DataError, match=r"more than .* shards; correct its braces"):
        list_shards("https://host/{0..99999999999}.tar")


def test_importing_is_cheap() -> None:
    code = "import sys, data.cache; print([m for m in ('torch', 'urllib3', 'boto3') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# --- nginx --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "a.tar").write_bytes(BODY)
    with nginx(folder / "nginx", folder) as address:
        yield address, folder


def test_nginx_serves_whole_and_closed_shards(site: tuple[str, Path], target: Path) -> None:
    address, _ = site
    assert download(f"{address}/a.tar", target, len(BODY), SHA, QUICK) == SHA
    closed = f"{address}/closed/a.tar"
    with pytest.raises(DataError, match=r"answers 401 .*: access denied"):
        download(closed, target, len(BODY), SHA, QUICK)
    download(closed.replace("://", "://x:y@"), target, len(BODY), SHA, QUICK)
    with pytest.raises(DataError, match="answers 404 Not"):
        download(f"{address}/b.tar", target, len(BODY), SHA, QUICK)


DOWNLOAD = """
import sys
from pathlib import Path
from data.remote import download
download(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
"""


def kill_midway(address: str, target: Path) -> int:
    """Starts a download and kills it; returns how many bytes it leaves."""
    part = target.with_name("a.tar.part")
    command = [sys.executable, "-c", DOWNLOAD, address, str(target), str(len(BODY)), SHA]
    with subprocess.Popen(command, cwd=PROJECT) as process:
        wait_for(lambda: part.exists() and part.stat().st_size > 0)
        process.kill()
    assert left(target) == ["a.tar.part", "a.tar.part.json"]
    assert 0 < part.stat().st_size < len(BODY)
    return part.stat().st_size


def test_a_killed_download_is_resumed_by_range(site: tuple[str, Path], target: Path) -> None:
    address, folder = site[0] + "/slow/a.tar", site[1]
    held = kill_midway(address, target)
    assert download(address, target, len(BODY), SHA) == SHA
    assert target.read_bytes() == BODY
    assert left(target) == ["a.tar"]
    assert f'/slow/a.tar 206 "bytes={held}-"' in (folder / "nginx" / "access.log").read_text()


def test_a_killed_download_of_what_has_changed_begins_anew(site: tuple[str, Path], target: Path) -> None:
    address, folder = site[0] + "/slow/b.tar", site[1]
    file, other = folder / "b.tar", BODY[:400_000][::-1]
    file.write_bytes(BODY)
    held = kill_midway(address, target)
    file.unlink()
    file.write_bytes(other)
    sha256 = hashlib.sha256(other).hexdigest()
    target.with_name("a.tar.part").write_bytes(BODY[:held])
    assert download(address, target, len(other), sha256) == sha256
    assert target.read_bytes() == other
    assert f'/slow/b.tar 200 "bytes={held}-"' in (folder / "nginx" / "access.log").read_text()


# --- S3 -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a bucket with shards, in an S3 that the environment points at."""
    point_at(s3, monkeypatch)
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    client.create_bucket(Bucket="shards")
    for key in ("set/00001.tar", "set/00000.tar", "set/00000.tar.idx", "set/deep/00002.tar", "other/x-3.tar"):
        client.put_object(Bucket="shards", Key=key, Body=BODY)
    client.close()
    return "shards"


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    data.remote._s3.cache_clear()


def test_s3_is_listed(bucket: str) -> None:
    both = ["s3://shards/set/00000.tar", "s3://shards/set/00001.tar"]
    for address in (
        "s3://shards/set/",
        "s3://shards/set",
        "s3://shards/set/*.tar",
        "s3://shards/set/0000[01]*",
    ):
        assert list_shards(address, QUICK) == both
    assert list_shards("s3://shards/set/{00000..00001}.tar", QUICK) == both
    assert list_shards("s3://shards/*/*", QUICK) == ["s3://shards/other/x-3.tar", *both]
    assert list_shards("s3://shards/{set,set/deep}/", QUICK)[-1] == "s3://shards/set/deep/00002.tar"
    with pytest.raises(DataError, match=r"s3://shards/none/: no \.tar there; correct data\.shards"):
        list_shards("s3://shards/none/", QUICK)
    with pytest.raises(DataError, match=r"s3://nowhere/.*: answers 404 NoSuchBucket: no such object"):
        list_shards("s3://nowhere/", QUICK)


def test_s3_is_read_and_resumed(bucket: str, target: Path) -> None:
    address = "s3://shards/set/00000.tar"
    assert download(address, target, len(BODY), SHA, QUICK) == SHA
    part, note = target.with_name("a.tar.part"), target.with_name("a.tar.part.json")
    store = data.remote._store(address, QUICK)
    stream = store.open(address, 0, "")
    stream.close()
    assert stream.size == len(BODY)
    rest = store.open(address, 900_000, stream.version)
    assert b"".join(rest.chunks) == BODY[900_000:]
    rest.close()
    with pytest.raises(data.remote.StoreError, match="changed while") as caught:
        store.open(address, 900_000, '"other"')
    assert caught.value.restart
    for version in (stream.version, '"other"'):  # the second time the object has changed since
        part.write_bytes(BODY[:900_000])
        note.write_text(data.partial.json.dumps({"address": address, "version": version}))
        target.unlink()
        download(address, target, len(BODY), SHA, QUICK)
        assert target.read_bytes() == BODY
    with pytest.raises(
        DataError, match=r"answers 404 NoSuchKey: no such object \(1 attempt, last status 404\)"
    ):
        download("s3://shards/none.tar", target, None, None, QUICK)


def test_s3_faults(server: FaultyServer, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_at(server.address, monkeypatch)
    address, path = "s3://bucket/a.tar", "/bucket/a.tar"
    server.add(path, BODY, status(503, {"Retry-After": "0"}), servers.cut(SOME), whole)
    download(address, target, len(BODY), SHA, QUICK)
    assert ranges(server, path)[:2] == [None, None]
    assert target.read_bytes() == BODY
    target.unlink()
    lasting = {
        "answers 500.*3 attempts, last status 500.*try again later": status(500),
        "short body|the connection broke": servers.cut(10),
        "no data within the time limit .3 attempts": servers.stall(10),
        "an HTML page": servers.html,
        "answers 403.*access denied .1 attempt.*AWS_ACCESS_KEY_ID.*AWS_PROFILE.*renew them": status(403),
    }
    for message, behaviour in lasting.items():
        server.add(path, BODY, behaviour)
        server.log.clear()
        with pytest.raises(DataError, match=message):
            download(address, target, len(BODY), SHA, QUICK)
        assert not target.exists()
    expired = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
    server.add(
        path, b"", lambda handler, _: handler.answer(400, {"Content-Length": str(len(expired))}, expired)
    )
    with pytest.raises(
        DataError, match=r"answers 403 ExpiredToken: access denied \(1 attempt.*AWS_SESSION_TOKEN"
    ):
        download(address, target, len(BODY), SHA, QUICK)


def test_s3_without_credentials_asks_unsigned(
    server: FaultyServer, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("/bucket/a.tar", BODY)
    point_at(server.address, monkeypatch)
    download("s3://bucket/a.tar", target, len(BODY), SHA, QUICK)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    data.remote._s3.cache_clear()
    download("s3://bucket/a.tar", target, len(BODY), SHA, QUICK)
    assert ["Authorization" in request.headers for request in server.log] == [True, False]
    monkeypatch.setenv("AWS_PROFILE", "absent")
    data.remote._s3.cache_clear()
    with pytest.raises(DataError, match=r"S3 cannot be asked \(.*absent.*AWS_PROFILE"):
        download("s3://bucket/a.tar", target, len(BODY), SHA, QUICK)
