"""A loader that says what became of its workers: torch's DataLoader with deaths and hangs made into errors.

torch waits for a stuck worker for ever, and tells of a dead one without saying why. Here the wait is cut into
ticks of a second; a worker found dead, or none answering for the time allowed, is a `WorkerError` that names
the process, the signal and what to do, with the stacks of the stuck ones in the log. Workers leave the
signals of the process group to the main process, which may be saving, and end when it does.
Use: `for batch in Loader(dataset, batch_sampler, collate, workers=4, timeout=300.0): ...`.
"""

import atexit
import contextlib
import faulthandler
import gc
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch

PREFETCH = 4  # batches each worker prepares ahead
TICK = 1.0  # seconds between two looks at the workers
EXIT_WAIT = 10.0  # seconds until a worker whose end of a pipe is gone has an exit code
STACKS_WAIT = 1.0  # seconds a stuck worker has to write its stacks
#: What the process group is sent, and the main process decides upon.
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM} | ({signal.SIGUSR1} if hasattr(signal, "SIGUSR1") else set())
#: Words of errors that come of too little shared memory, or too few descriptors, and the remedy.
SHORTAGES = {
    "unable to write to file </torch_": "enlarge /dev/shm (docker run --shm-size=8g), or lower data.workers",
    "unable to allocate shared memory": "enlarge /dev/shm (docker run --shm-size=8g), or lower data.workers",
    "unable to open shared memory": "raise the limit of open files (ulimit -n), or lower data.workers",
    "Too many open files": "raise the limit of open files (ulimit -n 65536), or lower data.workers",
    "received 0 items of ancdata": "raise the limit of open files (ulimit -n 65536), or lower data.workers",
}
HINTS = {
    "SIGKILL": "memory ran out, or somebody ended it: lower data.workers, or give the machine more RAM",
    "SIGBUS": "/dev/shm is full: enlarge it (docker run --shm-size=8g), or lower data.workers",
}

log = logging.getLogger(__name__)
_all: list[BaseProcess] = []  # every worker that may still run


class WorkerError(RuntimeError):
    """Says in one line which loader worker died or hangs, how, and what to do; the run can be resumed."""


class Loader:
    """The batches of one stretch of a run, as an iterable of known length.

    `workers` processes load, 0 loads in place; one that gives nothing for `timeout` seconds is taken for
    stuck. Every batch of `batch_sampler` is a list of indices that `dataset` and then `collate` are given.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_sampler: Sampler[list[int]] | Any,
        collate: Callable[..., Batch],
        workers: int = 0,
        timeout: float = 300.0,
    ) -> None:
        self.timeout = timeout
        self.processes: list[BaseProcess] = []
        self._stacks = tempfile.mkdtemp(prefix="loader-") if workers else None
        if self._stacks:
            weakref.finalize(self, shutil.rmtree, self._stacks, ignore_errors=True)
        with warnings.catch_warnings():
            # How many workers there are is the user's to say.
            warnings.filterwarnings("ignore", "This DataLoader will create")
            self._loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_sampler=batch_sampler,
                num_workers=workers,
                collate_fn=collate,
                pin_memory=torch.cuda.is_available(),
                timeout=TICK if workers else 0,
                worker_init_fn=_Start(self._stacks) if self._stacks else None,
                multiprocessing_context=_context() if workers else None,
                persistent_workers=workers > 0,
                prefetch_factor=PREFETCH if workers else None,
                # Without one of its own, a loader draws from torch's global generator and moves it.
                generator=torch.Generator().manual_seed(0),
            )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        """Yields the batches; raises WorkerError where a worker died or hangs, and the dataset's errors."""
        before = set(multiprocessing.active_children())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This DataLoader will create")
            batches = iter(self._loader)
        if not self.processes and self._stacks is not None:
            self.processes = [each for each in multiprocessing.active_children() if each not in before]
            _all[:] = [each for each in (*_all, *self.processes) if each.is_alive()]
        while True:
            try:
                yield self._next(batches)
            except StopIteration:
                return

    def _next(self, batches: Iterator[Batch]) -> Batch:
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except (RuntimeError, OSError, EOFError) as error:
                if problem := self._problem(error, time.monotonic() - began):
                    self.kill()
                    raise WorkerError(problem) from error
                if not str(error).startswith("DataLoader timed out"):
                    raise

    def _problem(self, error: Exception, waited: float) -> str | None:
        """Returns what an error of torch's says of the workers, None where it is nothing of theirs."""
        if self._stacks is None:
            return None
        if isinstance(error, (ConnectionError, EOFError)):  # of a worker that ended while it handed over
            multiprocessing.connection.wait([each.sentinel for each in self.processes], EXIT_WAIT)
        dead = [each for each in self.processes if each.exitcode is not None]
        if dead and not str(error).startswith("Caught "):
            return "; ".join(_death(each) for each in dead) + "; then go on with resume=true"
        for words, remedy in SHORTAGES.items():
            if words in str(error):
                return f"a loader worker cannot hand its batch over ({words}): {remedy}"
        if str(error).startswith("DataLoader timed out") and waited >= self.timeout:
            stuck = [each for each in self.processes if each.is_alive()]
            self._dump(stuck)
            return (
                f"loader workers {', '.join(str(each.pid) for each in stuck)} gave nothing for "
                f"{waited:.0f} s (their stacks are in the log): check the disk or network the shards are on, "
                "or raise data.worker_timeout; then go on with resume=true"
            )
        return None

    def _dump(self, stuck: list[BaseProcess]) -> None:
        """Writes to the log where each of the stuck workers stands."""
        assert self._stacks is not None
        for each in stuck:
            with contextlib.suppress(OSError):
                os.kill(each.pid or 0, signal.SIGUSR2)
        time.sleep(STACKS_WAIT)
        for each in stuck:
            path = Path(self._stacks) / str(each.pid)
            text = path.read_text(errors="replace") if path.is_file() else ""
            log.error("stack of loader worker %s:\n%s", each.pid, text or "(it does not answer)")

    def kill(self) -> None:
        """Ends the workers at once, whatever they do; they hold nothing that could be lost."""
        for each in self.processes:
            each.kill()


def _death(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"loader worker {process.pid} ended with code {code}: look for its last words above"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = HINTS.get(name, "look for its last words above")
    return f"loader worker {process.pid} was killed by {name}: {hint}"


class _Start:
    """What a worker does first: leaves signals to the main process, readies its stacks, ends with it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, worker: int) -> None:
        gc.freeze()  # torch's own objects are many and stay: looking through them costs a sixth of the time
        for number in GROUP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if sys.platform != "win32":
            # Kept open as long as the process lives.
            handle = os.open(Path(self.folder) / str(os.getpid()), os.O_WRONLY | os.O_CREAT, 0o600)
            faulthandler.register(signal.SIGUSR2, file=handle, all_threads=True)
        main = multiprocessing.parent_process()
        if main is not None:
            threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: BaseProcess) -> None:
    # torch's own watch is for the parent, which is the fork server and outlives the main process: every
    # worker holds the pipe by which the server would learn of its end.
    main.join()
    os._exit(1)


def start_server() -> None:
    """Starts what workers are forked from, which imports for seconds while this process does other things.

    The first loader with workers does so otherwise, and waits.
    """
    _context()


def _context() -> BaseContext:
    """Returns how workers are started: by a fork server where there is one, else spawned."""
    if sys.platform == "win32":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    # The server imports torch once, so that each worker starts in milliseconds. It is named by itself, as the
    # server finds the project only where that is the working directory.
    context.set_forkserver_preload(["__main__", "torch.utils.data", "data.batch"])
    multiprocessing.resource_tracker.ensure_running()  # which unblocks signals when it starts
    # The server, and a worker before its first line, get the group's signals too: they inherit this mask.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@atexit.register
def _kill_all() -> None:
    # multiprocessing waits at exit for its children, and these do not mind SIGTERM. What is registered last
    # runs first, and `multiprocessing.util` is imported above.
    for each in _all:
        each.kill()
