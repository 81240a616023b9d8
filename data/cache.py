"""The shards of a node: each remote one is downloaded once, verified, and kept within a bound.

A copy is named by its content (`<folder>/shards/<sha256>.tar`), so that two datasets never serve each other's
shards. One process of the node downloads a shard while the others wait for its lock, an flock that the kernel
frees however the holder ends. Room is made by removing the copies that were used longest ago; a download
under way counts with its full size. A removed copy stays readable to whoever has it open. The folder must lie
on a disk of the node. Use: `ShardCache(folder, max_bytes).path(shard, size, sha256)`.
"""

import fcntl
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data.remote import DEFAULT_POLICY, RetryPolicy, download, read_small, redact
from data.shard_index import DataError, is_address, refuse_scheme

SHA256 = re.compile(r"[0-9a-f]{64}")
TOUCH = 10.0  # seconds between two notes that a copy is used
IN_USE = 60.0  # seconds for which a used copy is safe from prefetching
LEFT_OVER = 86400.0  # seconds after which nobody goes on with a download that was broken off
RECHECK = 5.0  # seconds between two looks for room to prefetch into
PAUSE = 0.2  # seconds between two looks for room that downloads under way hold

Item = tuple[str, int, str]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Copy:
    """A file that may be removed for room; `mtime` in seconds since the epoch, `size` in bytes."""

    path: Path
    sha256: str
    size: int
    mtime: float

    def used_just_now(self) -> bool:
        return abs(time.time() - self.mtime) < IN_USE


class ShardCache:
    """Verified local copies of remote shards, shared by all processes of a node; pickles as its settings.

    Args:
        folder: where the copies lie; made when first needed.
        max_bytes: the bound on what lies there, downloads under way included.
        policy: how often and how long a read is tried.
        parallel: downloads that `prefetch` runs at a time.
    """

    def __init__(
        self, folder: Path, max_bytes: int, policy: RetryPolicy = DEFAULT_POLICY, parallel: int = 4
    ) -> None:
        if max_bytes <= 0 or parallel < 1:
            raise ValueError(f"max_bytes={max_bytes}, parallel={parallel}: both must be above 0")
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self.policy = policy
        self.parallel = parallel
        self._changed = threading.Condition()
        self._queue: deque[Item] = deque()
        self._wanted: frozenset[str] = frozenset()
        self._threads: list[threading.Thread] = []

    def __reduce__(self) -> tuple[type["ShardCache"], tuple[Path, int, RetryPolicy, int]]:
        return ShardCache, (self.folder, self.max_bytes, self.policy, self.parallel)

    def path(self, shard: str, size: int, sha256: str) -> Path:
        """Returns the local path of a shard: a local one as it is, a remote one's verified copy.

        Open it at once: a copy may be removed for room, its open descriptors stay good. Where it is gone by
        then, ask again. Raises DataError where the shard cannot be had or is larger than the cache, and
        OSError where the disk refuses.
        """
        refuse_scheme(shard)
        if not is_address(shard):
            return Path(shard)
        target = self._target(sha256)
        if _use(target, size):
            return target
        if size > self.max_bytes:
            raise DataError(
                f"{redact(shard)}: its {size:,} bytes do not fit the cache of {self.max_bytes:,} bytes in "
                f"{self.folder}; give the cache more room, or make smaller shards"
            )
        while not self._fetch(shard, size, sha256, gently=False):
            time.sleep(PAUSE)
        return target

    def drop(self, sha256: str) -> None:
        """Removes a copy that was found damaged; the next `path` downloads it again."""
        self._target(sha256).unlink(missing_ok=True)

    def prefetch(self, items: Sequence[Item]) -> None:
        """Downloads (shard, size, sha256) in the background, in order, in place of what was asked before.

        Removes for it nothing that this call names and nothing used in the last minute: it rather waits. What
        goes wrong is logged; `path` raises it.
        """
        remote = {sha256: (shard, size, sha256) for shard, size, sha256 in items if is_address(shard)}
        with self._changed:
            self._wanted = frozenset(remote)
            self._queue = deque(remote.values())
            self._changed.notify_all()
            while len(self._threads) < min(self.parallel, len(self._queue)):
                thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
                self._threads.append(thread)
                thread.start()

    def fetch_small(self, address: str, max_bytes: int) -> bytes:
        """Returns the bytes of a small file, which is not kept; raises AbsentError where there is none."""
        return read_small(address, max_bytes, self.policy)

    def _target(self, sha256: str) -> Path:
        if not SHA256.fullmatch(sha256):  # it becomes a file's name, and comes from an index
            raise DataError(f"{sha256!r} is no SHA-256 in hex; index the shards again (scripts/index.py)")
        return self.folder / "shards" / f"{sha256}.tar"

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                shard, size, sha256 = self._queue.popleft()
            try:
                while sha256 in self._wanted and size <= self.max_bytes:
                    if _use(self._target(sha256), size) or self._fetch(shard, size, sha256, gently=True):
                        break
                    with self._changed:
                        self._changed.wait(RECHECK)
            except Exception as error:
                log.warning("not prefetched: %s", error)

    def _fetch(self, shard: str, size: int, sha256: str, gently: bool) -> bool:
        """Returns whether the copy is there; False where there is no room for it at present."""
        target = self._target(sha256)
        with _locked(target.with_name(f"{sha256}.lock")) as lock:
            if _use(target, size):
                return True
            if not self._reserve(size, sha256, lock, gently):
                return False
            log.info("%s: downloading %.1f MB", redact(shard), size / 1e6)
            download(shard, target, size, sha256, self.policy)
            return True

    def _reserve(self, size: int, sha256: str, lock: int, gently: bool) -> bool:
        """Returns whether there is room for a shard now, after removing what was used longest ago.

        The room is reserved by writing the size into the shard's lock file, which other processes read.
        """
        with _locked(self.folder / "room.lock"):
            reserved, copies = _survey(self.folder / "shards", sha256)
            excess = reserved + sum(copy.size for copy in copies) + size - self.max_bytes
            chosen = []
            for copy in sorted(copies, key=lambda copy: (copy.sha256 in self._wanted, copy.mtime)):
                if excess <= 0:
                    break
                if not gently or not (copy.sha256 in self._wanted or copy.used_just_now()):
                    chosen.append(copy)
                    excess -= copy.size
            if excess > 0:
                return False
            for copy in chosen:
                _remove(copy.path)
            os.pwrite(lock, str(size).encode(), 0)
            return True


def _survey(folder: Path, own: str) -> tuple[int, list[_Copy]]:
    """Returns the bytes that others' downloads under way will take, and what may be removed.

    What a broken download left is removed here once it is old, and a lock that nobody holds. The `.part` of
    the shard `own` counts nowhere: it becomes part of the copy that room is made for.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    locks = (name.removesuffix(".lock") for name in names if name.endswith(".lock"))
    under_way = {sha256: _reserved(folder / f"{sha256}.lock") for sha256 in locks if sha256 != own}
    live = {sha256: size for sha256, size in under_way.items() if size is not None}
    copies = []
    for name in names:
        sha256, _, kind = name.partition(".")
        broken_off = kind in ("tar.part", "tar.part.json") and sha256 != own and sha256 not in live
        if kind != "tar" and not broken_off:
            continue
        with suppress(FileNotFoundError):  # dropped by another process meanwhile
            stat = (folder / name).stat()
            if broken_off and time.time() - stat.st_mtime > LEFT_OVER:
                _remove(folder / name)
            elif kind != "tar.part.json":
                copies.append(_Copy(folder / name, sha256, stat.st_size, stat.st_mtime))
    return sum(live.values()), copies


def _reserved(path: Path) -> int | None:
    """Returns the bytes that the holder of a lock has reserved; None where nobody holds it."""
    with suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_named(
                handle, path
            ):  # one survey at a time (room.lock), so nobody else puts a new one here
                path.unlink()
        except BlockingIOError:
            text = os.pread(handle, 32, 0)
            return int(text) if text.isdigit() else 0
        finally:
            os.close(handle)
    return None


def _remove(path: Path) -> None:
    log.info("%s: removed for room", path)
    path.unlink(missing_ok=True)
    if path.suffix == ".part":
        path.with_name(path.name + ".json").unlink(missing_ok=True)


def _use(target: Path, size: int) -> bool:
    """Returns whether the copy is there, and notes that it is used."""
    try:
        stat = target.stat()
        if stat.st_size != size:
            return False
        if abs(time.time() - stat.st_mtime) > TOUCH:
            os.utime(target)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Holds an exclusive lock on a file, as its descriptor; the file goes when the lock does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _lock(path)
    while not _is_named(handle, path):  # its former holder removed it while this one waited
        os.close(handle)
        handle = _lock(path)
    try:
        os.ftruncate(handle, 0)  # what a holder that was killed had reserved
        yield handle
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
    except BaseException as error:
        os.close(handle)
        if isinstance(error, OSError):
            reason = f"{error.strerror}; the cache of shards must lie on a disk of this machine"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    return handle


def _is_named(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False
