"""Makes the indexes of many shards in parallel: what is whole is kept, damaged shards do not stop the others.

A job names a shard, local or remote, and where its index goes; remote shards pass through a folder, each
removed when it is read. `scripts/index.py` is the command. Use: `for outcome in index_shards(jobs, 4): ...`.
"""

import hashlib
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data.phash import perceptual_hash
from data.remote import download
from data.shard_index import DataError, ShardIndex, build_index, is_address, read_index, write_index


@dataclass(frozen=True)
class Job:
    """A shard to index: path or address, where its index goes, and the folder remote shards pass through.

    `hashed` asks for perceptual hashes too; `verify` for a look at every byte of a shard that has an index.
    """

    number: int
    shard: str
    index: Path
    spool: Path | None = None
    hashed: bool = False
    verify: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a job: the index without arrays, or why there is none; `kept` if it was there before."""

    job: Job
    index: ShardIndex | None
    problem: str = ""
    kept: bool = False


def index_shards(jobs: Sequence[Job], workers: int) -> Iterator[Outcome]:
    """Yields an outcome of each job as it is done; raises DataError if a worker dies, OSError of disks."""
    if min(workers, len(jobs)) < 2:  # starting a process takes longer than a small shard
        yield from map(run, jobs)
        return
    # Spawned, as forking a process that holds threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_quiet)
    done = False
    try:
        with _uninterrupted():
            futures = [pool.submit(run, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
        done = True
    except BrokenProcessPool as error:
        raise DataError(
            f"{jobs[0].index.parent}: a worker died, maybe out of memory; run again with fewer --workers"
        ) from error
    finally:
        if not done:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)


def run(job: Job) -> Outcome:
    """Returns what came of one job: the index that is there, or one made and written; raises OSError."""
    kept = _kept(job)
    if kept is not None:
        return Outcome(job, _bare(kept), kept=True)
    try:
        built = _build(job)
    except DataError as error:
        return Outcome(job, None, str(error))
    write_index(built)
    return Outcome(job, _bare(built))


def _kept(job: Job) -> ShardIndex | None:
    """Returns the index that is there if it is whole and of the shard as it is, as far as its size tells."""
    try:
        index = read_index(job.shard, job.verify, job.index)
    except DataError:
        return None
    return index if "phashes" in index.arrays or not job.hashed else None


def _build(job: Job) -> ShardIndex:
    hasher = perceptual_hash if job.hashed else None
    if not is_address(job.shard):
        return build_index(Path(job.shard), index=job.index, image_hash=hasher)
    assert job.spool is not None
    copy = job.spool / f"{hashlib.sha256(job.shard.encode()).hexdigest()[:32]}.tar"
    copy.parent.mkdir(parents=True, exist_ok=True)
    download(job.shard, copy, None, None)
    try:
        return build_index(copy, job.shard, job.index, hasher)
    finally:
        copy.unlink(missing_ok=True)


def _bare(index: ShardIndex) -> ShardIndex:
    return ShardIndex(index.header, {}, index.number_names, index.string_names, index.notes)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds interrupts back; processes started meanwhile never see one, and are ended by this one."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _quiet() -> None:
    """Leaves warnings to the report."""
    logging.disable(logging.WARNING)
