"""One run, one process: a lock on the run's folder that says who holds it.

The lock is the operating system's (`flock`), so a process that dies lets go of it, whatever killed it; the
file's content only serves the message. Whoever holds it is the only one that writes checkpoints there, and so
sweeps away at once what a killed one has left of a save, also where the run turns out to be done.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data.progress import duration
from models.checkpoint_folders import remove_abandoned

LOCK = "lock.json"


class LockError(OSError):
    """Another process holds the run's folder."""


@contextmanager
def run_lock(folder: Path, pids: Sequence[int]) -> Iterator[None]:
    """Holds `folder/lock.json` meanwhile; a dead process's lock is taken over, and its half saves removed.

    Args:
        folder: of the run; made if it is not there.
        pids: of all ranks, for whoever wants to signal them.

    Raises:
        LockError: a live process holds it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LockError(_busy(folder, file.read())) from None
        file.truncate(0)
        content = {
            "host": socket.gethostname(), "pid": os.getpid(), "started": time.time(), "pids": list(pids),
        }  # fmt: skip
        file.write(json.dumps(content) + "\n")
        file.flush()
        for parent in folder.glob("*/checkpoints"):
            with contextlib.suppress(OSError):  # the next save meets what is wrong, and names it
                remove_abandoned(parent)
        try:
            yield
        finally:
            file.truncate(0)


def _busy(folder: Path, text: str) -> str:
    try:
        holder = json.loads(text)
        age = duration(max(0.0, time.time() - float(holder["started"])))
        who = f"process {holder['pid']} on {holder['host']}, for {age}"
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return f"{folder} is in use by {who}; wait for it or stop it, or give this run another name=..."
