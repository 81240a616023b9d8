"""Starts one process for each rank on this machine and stays with them until they have ended.

The same command is run again for each rank, with its place in the environment, as torchrun does. What is sent
to the parent is passed on; a rank that dies takes the others with it, so that nothing hangs. Ranks that are
orphaned end by themselves. (torchrun itself ends with 1 whatever its workers end with, and sends SIGTERM to
ranks that are saving: the exit codes and the stop protocol would be lost.)

Use: `sys.exit(launch(2))` in the process that a user started.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from types import FrameType

#: Seconds that the other ranks get to end by themselves once one has ended in error.
_GRACE = 15.0
#: Environment variable: the process that this one ends with.
PARENT = "FIRSTLIGHT_PARENT"
_LOST = 5  # exit code: environment
#: A rank that had not yet begun to listen dies of the signal itself; that is being stopped too.
_STOPPED = {int(signal.SIGTERM): 143, int(signal.SIGINT): 130}


def launch(size: int, name: str = "train", again: str = "resume=true") -> int:
    """The exit code of the `size` ranks, all started with this process's own command.

    143 or 130 where one was asked to stop; else that of the rank which ended in error first, and 5
    where a rank was killed; then it is said that `name`.py goes on with `again`.
    """
    port = _free_port()
    ranks = [_start(rank, size, port) for rank in range(size)]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, pass_on)
    try:
        return _watch(ranks, name, again)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """The exit code of `command`, run as a process group of its own that ends with it and with this process.

    What is sent to this process is passed on to the command alone, which passes it on to what it started; 130
    and 143 are those of a command that was asked to stop. `environment` is added to this process's own.
    """
    added = {**(environment or {}), PARENT: str(os.getpid())}
    process = subprocess.Popen(list(command), env=os.environ | added, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        if process.poll() is None:
            process.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        code = process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started and left behind as well
        for number, handler in before.items():
            signal.signal(number, handler)
    return _STOPPED.get(-code, _LOST) if code < 0 else code


def stay_with_parent() -> None:
    """Ends this process soon after the one that launched it, if that is killed."""
    # Taken out: what this process starts has another parent, a job that sbatch gives this environment too.
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def look() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.2)
        os._exit(_LOST)

    threading.Thread(target=look, name="parent watch", daemon=True).start()


def _start(rank: int, size: int, port: int) -> "subprocess.Popen[bytes]":
    place = {
        "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, PARENT: os.getpid(),
    }  # fmt: skip
    # The reducer would warn on each rank about an option that is set on purpose (strategies.py).
    environment = (
        {"TORCH_CPP_LOG_LEVEL": "ERROR"} | os.environ | {key: str(value) for key, value in place.items()}
    )
    return subprocess.Popen([sys.executable, *sys.orig_argv[1:]], env=environment)


def _watch(ranks: list["subprocess.Popen[bytes]"], script: str, again: str) -> int:
    """Waits for all ranks; after the first that fails, at most `_GRACE` seconds for the others."""
    failed: list[int] = []
    deadline = float("inf")
    while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
        for rank, process in enumerate(ranks):
            ended = process.poll()
            if ended is None or ended == 0 or rank in failed:
                continue
            failed.append(rank)
            deadline = min(deadline, time.monotonic() + _GRACE)
            if ended < 0 and -ended not in _STOPPED and len(failed) == 1:
                name = signal.Signals(-ended).name
                print(
                    f"{script}.py: rank {rank} (process {process.pid}) was killed by {name}, from outside or "
                    f"for want of memory; the others end too; continue with {again}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
        time.sleep(0.02)
    waiting = [rank for rank, process in enumerate(ranks) if process.poll() is None]
    if waiting and (code := ranks[failed[0]].returncode) > 0:
        print(
            f"{script}.py: rank {failed[0]} (process {ranks[failed[0]].pid}) ended with code {code} while "
            f"{len(waiting)} waited for it; all end; what it said is above",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    ended_by = [process.poll() or 0 for process in ranks]
    codes = [_STOPPED.get(-code, _LOST) if code < 0 else code for code in ended_by]
    asked = [code for code in codes if code in _STOPPED.values()]
    first = codes[failed[0]] if failed else next((code for code in codes if code), 0)
    return max(asked) if asked else first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
