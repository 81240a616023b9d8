"""Workers that die, hang or are left alone: really killed, put to sleep and orphaned."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
import torch
from torch.utils.data import Dataset
from data.loader import Loader, WorkerError

class Numbers(Dataset):
    def __getitem__(self, index):
        if what == "busy":  # tensors of shared memory, whose handing over breaks in the middle
            return torch.full((3, 16, 16), index)
        if index == 30:
            time.sleep(1e6)
        return os.getpid() if index >= 0 else index

def first(items):
    return items[0]

what = sys.argv[1]
if __name__ == "__main__" and what == "busy":
    for number in range(5):
        loader = Loader(Numbers(), [[i] for i in range(100_000)], first, 1, timeout=60.0)
        batches = iter(loader)
        for _ in range(3 + 5 * number):
            next(batches)
        (worker,) = loader.processes
        os.kill(worker.pid, signal.SIGKILL)
        try:
            sum(1 for _ in batches)
        except WorkerError as error:
            print(f"worker {worker.pid} was killed by SIGKILL" in str(error), flush=True)
        loader.kill()
elif __name__ == "__main__":
    stop = 60 if what == "hang" else 24
    loader = Loader(Numbers(), [[i] for i in range(stop)], first, 2, timeout=2.0)
    assert len(loader) == stop
    batches = iter(loader)
    pids = {next(batches), next(batches)}
    assert pids == {each.pid for each in loader.processes}
    print(*pids, flush=True)
    if what == "kill":
        os.kill(min(pids), signal.SIGKILL)
    if what == "group":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
            os.killpg(0, number)
        time.sleep(0.5)
    if what == "orphan":
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        print(sum(1 for _ in batches))
    except WorkerError as error:
        print("WorkerError", error)
"""


def run(tmp_path: Path, what: str) -> tuple[list[int], str, str]:
    """Returns the workers' ids, and what a process that loads so printed and logged."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, str(script), what],
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        stdout=(out := (tmp_path / "out").open("w+")),
        stderr=(err := (tmp_path / "err").open("w+")),
        timeout=120,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == (-signal.SIGKILL if what == "orphan" else 0), (tmp_path / "err").read_text()
    out.close()
    err.close()
    first, _, rest = (tmp_path / "out").read_text().partition("\n")
    return [int(word) for word in first.split()], rest.strip(), (tmp_path / "err").read_text()


def ended(pid: int, seconds: float = 15.0) -> bool:
    """Whether a process ends in time; one that nobody waited for has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
class TestWorkers:
    def test_a_killed_worker_is_named_with_its_signal(self, tmp_path: Path) -> None:
        pids, text, _ = run(tmp_path, "kill")
        assert text.startswith(f"WorkerError loader worker {min(pids)} was killed by SIGKILL: memory ran out")
        assert "lower data.workers" in text
        assert "resume=true" in text
        assert all(ended(pid) for pid in pids)

    def test_a_worker_killed_while_it_hands_over_is_named_too(self, tmp_path: Path) -> None:
        """The pipe breaks before the worker's exit is known: the error of the pipe says nothing of it."""
        script = tmp_path / "script.py"
        script.write_text(SCRIPT)
        root = str(Path(__file__).resolve().parents[2])
        done = subprocess.run(
            [sys.executable, str(script), "busy"],
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.stdout.split() == ["True"] * 5, done.stderr

    def test_a_stuck_worker_is_named_and_shows_its_stack(self, tmp_path: Path) -> None:
        pids, text, log = run(tmp_path, "hang")
        assert text.startswith("WorkerError loader workers ")
        assert "raise data.worker_timeout" in text
        assert any(str(pid) in text for pid in pids)
        assert "in __getitem__" in log
        assert all(ended(pid) for pid in pids)

    def test_signals_to_the_group_are_left_to_the_main_process(self, tmp_path: Path) -> None:
        pids, text, _ = run(tmp_path, "group")
        assert text == "22"
        assert all(ended(pid) for pid in pids)

    def test_workers_end_with_a_killed_main_process(self, tmp_path: Path) -> None:
        pids, _, _ = run(tmp_path, "orphan")
        assert all(ended(pid) for pid in pids)
