"""The cache of shards: one download a node, within the bound, whole or not there, however a process ends."""

import hashlib
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from data.cache import ShardCache
from data.remote import AbsentError, RetryPolicy
from data.shard_index import DataError
from tests import servers
from tests.servers import FaultyServer, faulty_server, status, wait_for, whole

PROJECT = Path(__file__).resolve().parents[2]
QUICK = RetryPolicy(attempts=2, first_wait=0.001, max_wait=0.01, connect_timeout=2.0, read_timeout=20.0)
SIZE = 300_000
LONG_AGO = 1_000_000_000.0

Item = tuple[str, int, str]


@pytest.fixture(scope="module")
def running() -> Iterator[FaultyServer]:
    with faulty_server() as server:
        yield server


@pytest.fixture
def server(running: FaultyServer) -> FaultyServer:
    running.log.clear()
    running.plan.clear()
    return running


@pytest.fixture
def shards(server: FaultyServer) -> list[Item]:
    """Five remote shards as (address, size, sha256)."""
    generator = np.random.default_rng(1)
    made = []
    for number in range(5):
        body = generator.bytes(SIZE)
        made.append((server.add(f"/{number}.tar", body), SIZE, hashlib.sha256(body).hexdigest()))
    return made


def held(cache: ShardCache, shards: list[Item]) -> list[int]:
    """Which of the shards are in the cache."""
    return [n for n, (_, _, sha) in enumerate(shards) if (cache.folder / "shards" / f"{sha}.tar").exists()]


def age(cache: ShardCache, item: Item, seconds: float = LONG_AGO) -> None:
    os.utime(cache.folder / "shards" / f"{item[2]}.tar", (seconds, seconds))


def files(cache: ShardCache) -> list[str]:
    return sorted(path.name.partition(".")[2] for path in (cache.folder / "shards").iterdir())


def test_a_local_path_is_returned_untouched(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1)
    assert cache.path("somewhere/a.tar", 5, "no hash") == Path("somewhere/a.tar")
    cache.prefetch([("somewhere/a.tar", 5, "no hash")])
    assert not cache.folder.exists()
    with pytest.raises(DataError, match="only local files, http"):
        cache.path("pipe:touch X", 5, "0" * 64)


def test_a_shard_is_downloaded_once_and_stays(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    cache = pickle.loads(pickle.dumps(ShardCache(tmp_path / "cache", 10 * SIZE, QUICK)))
    path = cache.path(*shards[0])
    assert path == tmp_path / "cache" / "shards" / f"{shards[0][2]}.tar"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == shards[0][2]
    assert cache.path(*shards[0]) == path
    assert len(server.log) == 1
    assert files(cache) == ["tar"]
    cache.drop(shards[0][2])
    cache.drop(shards[0][2])
    assert not path.exists()
    cache.path(*shards[0])
    assert len(server.log) == 2
    path.write_bytes(b"cut")
    assert cache.path(*shards[0]).stat().st_size == SIZE
    assert len(server.log) == 3


def test_small_files_come_whole(server: FaultyServer, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 1, QUICK)
    assert cache.fetch_small(server.add("/a.idx", b"index", status(503), whole), 5) == b"index"
    with pytest.raises(AbsentError, match="answers 404"):
        cache.fetch_small(f"{server.address}/b.idx", 5)


def test_what_is_longest_unused_goes_first(shards: list[Item], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 3 * SIZE, QUICK)
    for item in shards[:3]:
        cache.path(*item)
    for number in (0, 1, 2):
        age(cache, shards[number], LONG_AGO + number)
    cache.path(*shards[0])  # used again
    cache.path(*shards[3])
    assert held(cache, shards) == [0, 2, 3]
    with cache.path(*shards[2]).open("rb") as stream:
        for number in (0, 2, 3):
            age(cache, shards[number], LONG_AGO + (number != 2))
        cache.path(*shards[4])
        assert held(cache, shards) == [0, 3, 4]
        assert hashlib.sha256(stream.read()).hexdigest() == shards[2][2]  # gone, and still readable


def test_what_can_never_fit_is_refused(server: FaultyServer, shards: list[Item], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", SIZE - 1, QUICK)
    with pytest.raises(
        DataError, match=r"0\.tar: its 300,000 bytes do not fit the cache of 299,999 bytes in .*more"
    ):
        cache.path(*shards[0])
    with pytest.raises(DataError, match=r"'\.\./x' is no SHA-256 in hex; index the shards again"):
        cache.path(shards[0][0], 5, "../x")
    with pytest.raises(ValueError, match="must be above 0"):
        ShardCache(tmp_path, 0)
    assert server.log == []


def test_parts_count_and_old_ones_go(server: FaultyServer, shards: list[Item], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK)
    folder = cache.folder / "shards"
    folder.mkdir(parents=True)
    old, young = folder / f"{'a' * 64}.tar.part", folder / f"{'b' * 64}.tar.part"
    for part in (old, young):
        part.write_bytes(bytes(SIZE // 2))
        part.with_name(part.name + ".json").write_text("{}")
    for path in (old, old.with_name(old.name + ".json")):
        os.utime(path, (time.time() - 90_000,) * 2)
    cache.path(*shards[0])
    assert files(cache) == ["tar", "tar.part", "tar.part.json"]
    assert young.exists()
    cache.path(*shards[1])  # now its room is needed
    assert files(cache) == ["tar", "tar"]


def test_a_failed_download_leaves_no_copy_and_no_lock(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK)
    server.plan["/0.tar"] = [servers.cut(SIZE // 2)]
    with pytest.raises(DataError, match=r"0\.tar: short body: .*2 attempts"):
        cache.path(*shards[0])
    assert files(cache) == ["tar.part", "tar.part.json"]
    server.plan["/0.tar"] = [whole]
    cache.path(*shards[0])
    assert files(cache) == ["tar"]
    assert server.log[-1].headers["Range"] == f"bytes={SIZE // 2}-"


def test_a_cache_that_cannot_be_written_is_named(shards: list[Item], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/shards"):
        ShardCache(tmp_path / "file", 10 * SIZE, QUICK).path(*shards[0])


# --- several processes --------------------------------------------------------------------------------------

PATH = """
import sys
from pathlib import Path
from data.cache import ShardCache
cache = ShardCache(Path(sys.argv[1]), int(sys.argv[2]))
items = [item.split() for item in sys.argv[3:]]
for address, size, sha256 in items:
    while True:
        try:
            print(len(cache.path(address, int(size), sha256).read_bytes()), flush=True)
            break
        except FileNotFoundError:  # removed for room between the two calls
            pass
"""


def process(folder: Path, max_bytes: int, *items: Item) -> "subprocess.Popen[str]":
    words = [" ".join(map(str, item)) for item in items]
    command = [sys.executable, "-c", PATH, str(folder), str(max_bytes), *words]
    return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True)


def slowly(seconds: float) -> servers.Behaviour:
    def behave(handler: servers.Handler, data: bytes) -> None:
        time.sleep(seconds)
        whole(handler, data)

    return behave


def test_processes_download_a_shard_once(server: FaultyServer, shards: list[Item], tmp_path: Path) -> None:
    server.plan["/0.tar"] = [slowly(1.0)]
    processes = [process(tmp_path / "cache", SIZE, shards[0]) for _ in range(3)]
    assert [each.communicate(timeout=30)[0] for each in processes] == [f"{SIZE}\n"] * 3
    assert len(server.log) == 1
    assert files(ShardCache(tmp_path / "cache", SIZE)) == ["tar"]


def test_a_killed_holder_frees_its_lock_and_its_part_is_resumed(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK)
    part = cache.folder / "shards" / f"{shards[0][2]}.tar.part"
    server.plan["/0.tar"] = [servers.stall(SIZE - 1), whole]
    first = process(cache.folder, cache.max_bytes, shards[0])
    wait_for(lambda: part.exists() and part.stat().st_size > 0)
    second = process(cache.folder, cache.max_bytes, shards[0])
    with pytest.raises(subprocess.TimeoutExpired):
        second.communicate(timeout=1.5)  # waits for the first
    assert len(server.log) == 1
    first.kill()
    first.communicate()
    assert second.communicate(timeout=30)[0] == f"{SIZE}\n"
    assert [request.headers.get("Range") for request in server.log] == [None, "bytes=262144-"]
    assert files(cache) == ["tar"]


def test_a_killed_holder_reserves_nothing(server: FaultyServer, shards: list[Item], tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", SIZE, QUICK)
    server.plan["/0.tar"] = [servers.stall(10)]
    lock = cache.folder / "shards" / f"{shards[0][2]}.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("9" * 20)  # of a holder that was killed before
    holder = process(cache.folder, SIZE, shards[0])
    wait_for(lambda: lock.exists() and lock.read_text() == str(SIZE))
    waiting = threading.Thread(target=cache.path, args=shards[1])
    waiting.start()
    time.sleep(0.5)
    assert server.asked("/1.tar") == []  # no room while the other is under way
    holder.kill()
    holder.communicate()
    waiting.join(10)
    assert held(cache, shards) == [1]
    assert "lock" not in files(cache)


def test_the_bound_holds_while_processes_compete(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    bound = 2 * SIZE + 1000
    for number in range(5):
        server.plan[f"/{number}.tar"] = [slowly(0.02)]
    turns = (shards * 2, shards[::-1] * 2, (shards[2:] + shards[:2]) * 2)
    processes = [process(tmp_path / "cache", bound, *turn) for turn in turns]
    most, folder = 0, tmp_path / "cache" / "shards"
    while any(each.poll() is None for each in processes):
        most = max(most, sum(_sizes(folder)))
        time.sleep(0.002)
    assert [each.communicate()[0].split() for each in processes] == [[str(SIZE)] * 10] * 3
    assert SIZE < most <= bound


def _sizes(folder: Path) -> Iterator[int]:
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                yield entry.stat().st_size


# --- prefetching --------------------------------------------------------------------------------------------


def test_prefetch_keeps_order_and_takes_each_once(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, QUICK, parallel=1)
    cache.path(*shards[3])
    order = [2, 0, 2, 3, 1, 0]
    cache.prefetch([("local.tar", 1, ""), *(shards[n] for n in order)])
    wait_for(lambda: held(cache, shards) == [0, 1, 2, 3])
    assert [request.path for request in server.log] == ["/3.tar", "/2.tar", "/0.tar", "/1.tar"]
    assert cache.path(*shards[1]).stat().st_size == SIZE
    assert len(server.log) == 4


def test_prefetch_runs_in_parallel_and_the_foreground_waits_for_it(
    server: FaultyServer, shards: list[Item], tmp_path: Path
) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, QUICK, parallel=2)
    meeting = threading.Barrier(2, timeout=10)

    def together(handler: servers.Handler, data: bytes) -> None:
        meeting.wait()
        slowly(0.3)(handler, data)

    server.plan["/0.tar"] = server.plan["/1.tar"] = [together]
    cache.prefetch(shards[:2])
    wait_for(lambda: len(server.log) == 2)
    assert cache.path(*shards[0]).stat().st_size == SIZE
    assert cache.path(*shards[1]).stat().st_size == SIZE
    assert len(server.log) == 2


def test_prefetch_evicts_nothing_in_use_and_waits_for_room(
    server: FaultyServer, shards: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.cache.RECHECK", 0.05)
    cache = ShardCache(tmp_path / "cache", 2 * SIZE, QUICK, parallel=2)
    cache.path(*shards[0])
    cache.path(*shards[1])
    cache.prefetch(shards[2:4])
    time.sleep(0.4)
    assert held(cache, shards) == [0, 1]
    assert len(server.log) == 2
    age(cache, shards[0])
    wait_for(lambda: 0 not in held(cache, shards) and len(held(cache, shards)) == 2)
    time.sleep(0.2)
    assert 1 in held(cache, shards)
    # The foreground does not wait: it takes the place of what was not asked for, however young.
    prefetched = held(cache, shards)[1]
    cache.path(*shards[4])
    assert held(cache, shards) == [prefetched, 4]
    # A new call ends what was asked for before.
    cache.prefetch([])
    age(cache, shards[4])
    time.sleep(0.2)
    assert held(cache, shards) == [prefetched, 4]


def test_an_error_of_a_prefetch_is_logged_and_raised_by_the_foreground(
    server: FaultyServer, shards: list[Item], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * SIZE, QUICK, parallel=1)
    server.plan["/0.tar"] = [status(403)]
    with caplog.at_level(logging.WARNING, "data.cache"):
        cache.prefetch(shards[:2])
        wait_for(lambda: held(cache, shards) == [1])
    assert "not prefetched: " in caplog.text
    assert "answers 403" in caplog.text
    with pytest.raises(DataError, match="answers 403"):
        cache.path(*shards[0])
