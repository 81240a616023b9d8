"""Processes that start in a moment: a process that has imported everything forks a child for every trial.

Importing torch and lightning takes most of the time of a short run. A zygote imports them once, starts no
thread, and forks on request; the child then is what `python train.py ...` is after its imports: a process in
a group of its own that runs train.py as `__main__`. It also notes the hashes of every checkpoint at the
moment it gets its name, which a killed process cannot be asked for.

Use: `with Zygote(folder) as zygote: trial = zygote.start("train", words, cwd, log)`, `trial.wait(60)`.
"""

import contextlib
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

PROJECT = Path(__file__).resolve().parents[2]
#: Seconds a zygote may take to import everything.
START_SECONDS = 180.0
_QUIET = {
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
}  # fmt: skip


class Trial:
    """A process that a zygote forked, with everything it starts in one process group."""

    def __init__(self, zygote: "Zygote", pid: int, log: Path, launched: bool = False) -> None:
        self.zygote = zygote
        self.pid = pid
        self.log = log
        self.launched = launched
        self.began = time.monotonic()
        self._status: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self._status is None:
            self._status = self.zygote.ask({"poll": self.pid})["status"]
        return self._status

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None if it still runs after `seconds`."""
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        return self._status

    def kill(self) -> int:
        """Kills the whole group at once; the exit code."""
        self.signal_group(signal.SIGKILL)
        status = self.wait(30)
        if status is None:
            raise RuntimeError(f"process {self.pid} survives SIGKILL for 30 s")
        self.signal_group(signal.SIGKILL)  # what it had started meanwhile
        return status

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def ranks(self) -> list[int]:
        """The processes that train: its own, or those it launched."""
        return (children_of(self.pid) if self.launched else []) or [self.pid]

    def signal_group(self, number: int) -> None:
        """Sends a signal to the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def said(self) -> str:
        """What it has printed so far."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines = text.splitlines(keepends=True)
        return "".join(line for line in lines if not line.startswith(("nanobind: ", " - ", "See https:")))


class Zygote:
    """The controlling end: a process that forks trials on request.

    Args:
        log: where the zygote's own errors go.
    """

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, **_QUIET, "PYTHONPATH": str(PROJECT)}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scripts.faults.zygote"],
                cwd=PROJECT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                text=True, start_new_session=True,
            )  # fmt: skip
        self._log = log
        self._ready = False
        self._asking = threading.Lock()

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Sends one line and returns the answer, from any thread; RuntimeError if the zygote is gone."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        with self._asking:
            if not self._ready:  # the first answer comes when everything is imported
                self._ready = bool(stdout.readline())
            try:
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
                answer = stdout.readline()
            except (OSError, ValueError):  # ValueError: it was closed
                answer = ""
        if not answer:
            raise RuntimeError(f"a zygote ended by itself; see {self._log}")
        return dict(json.loads(answer))

    def start(
        self,
        what: str,
        words: Sequence[str],
        cwd: Path,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> Trial:
        """A new trial.

        Args:
            what: one of the keys of `children()`.
            words: its arguments.
            cwd: the folder it works in.
            log: gets what it prints, appended.
            environment: on top of this process's own.
        """
        question = {
            "start": what, "words": list(words), "cwd": str(cwd), "log": str(log),
            "environment": dict(environment or {}),
        }  # fmt: skip
        return Trial(self, int(self.ask(question)["pid"]), log, launched=what == "ranks")

    def close(self) -> None:
        """Ends the zygote and what it forked."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


def children() -> dict[str, Callable[[list[str]], None]]:
    """What a trial can be: name -> function of its words, which ends by returning or by SystemExit."""
    from scripts.faults.flips import damage
    from scripts.faults.resume import tell_measured
    from scripts.faults.saves import save_once

    return {
        "train": train, "ranks": launch_ranks, "save": _brief(save_once), "damage": _brief(damage),
        "resume": _brief(tell_measured),
    }  # fmt: skip


def _brief(work: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """`work`, then the end of the process at once: taking all modules down takes longer than the work."""

    def run(words: list[str]) -> None:
        code: Any = 0
        try:
            work(words)
        except SystemExit as stop:
            code = stop.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return run


def train(words: list[str]) -> None:
    """Is `python train.py WORDS`, and notes every checkpoint in `$TORTURE_SAVED`.

    Only the preflight's probe is shorter, which takes as long as many steps and is not what is broken here.
    """
    import train as program
    from conf.cli import main
    from models.stages import preflight

    saved = os.environ.get("TORTURE_SAVED")
    if saved:
        record_saves(Path(saved))
    preflight.seconds_a_call = _seconds_of_one
    script = str(PROJECT / "train.py")
    sys.argv = [script, *words]
    sys.orig_argv = [sys.executable, *sys.argv]  # what ranks are started with
    main("train", program.train)


def _seconds_of_one(call: Callable[[], object], device: Any, budget: float = 0.0) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def launch_ranks(words: list[str]) -> None:
    """Is `python train.py trainer.devices=N ...`, with N the first word: the launcher, and N forked ranks.

    The ranks are forked beforehand and wait for the environment that the launcher wants to start them with.
    """
    waiting: list[_Rank] = []
    for _ in range(int(words[0])):
        rank = _Rank.fork()
        if rank is None:
            train(words[1:])
            return
        waiting.append(rank)

    def start(command: Sequence[str], env: Mapping[str, str]) -> _Rank:
        return waiting.pop(0).go(env)

    with mock.patch("models.stages.launch.subprocess.Popen", start):
        from models.stages.launch import launch

        sys.exit(launch(len(waiting)))


class _Rank:
    """A forked process in the place of the one that a launcher starts; what it needs of Popen."""

    def __init__(self, pid: int, gate: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._gate = gate

    @staticmethod
    def fork() -> "_Rank | None":
        """The parent's handle of a new process; in the process itself None, once it may go."""
        inner, outer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(inner)
            return _Rank(pid, outer)
        os.close(outer)
        with open(inner) as gate:
            line = gate.readline()
        if not line:
            os._exit(1)
        os.environ.update(json.loads(line))
        return None

    def go(self, environment: Mapping[str, str]) -> "_Rank":
        """Lets the process run with `environment`."""
        os.write(self._gate, (json.dumps(dict(environment)) + "\n").encode())
        os.close(self._gate)
        return self

    def poll(self) -> int | None:
        """As Popen's."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """As Popen's."""
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """As Popen's."""
        self.send_signal(signal.SIGKILL)


def children_of(pid: int) -> list[int]:
    """The living processes that `pid` has started, oldest first."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == pid and status[0] != "Z":
                    found.append((int(status[19]), int(entry.name)))
    return [child for _, child in sorted(found)]


def record_saves(path: Path) -> None:
    """From now on every checkpoint that gets its name adds a line to `path`: stage, name, files' SHA-256."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "os.rename":
            return
        source, target = Path(os.fsdecode(arguments[0])), Path(os.fsdecode(arguments[1]))
        if not target.name.startswith("images-") or not source.name.endswith(".part"):
            return
        with contextlib.suppress(OSError, ValueError, KeyError):
            files = json.loads((source / "manifest.json").read_text())["files"]
            hashes = {name: entry["sha256"] for name, entry in files.items()}
            entry = {"stage": target.parents[1].name, "name": target.name, "files": hashes}
            os.write(handle, (json.dumps(entry) + "\n").encode())

    sys.addaudithook(note)


def preload() -> None:
    """Imports what a run imports, and starts no thread."""
    import torch

    torch.set_num_threads(1)
    import conf.cli
    import data.datamodule
    import evaluation.report
    import models.checkpoint_writer
    import models.pipeline
    import models.stages.autoencoder
    import models.stages.diffusion
    import models.stages.fit
    from models.text_encoder import Tokenizer

    Tokenizer(context_length=12)(["its table is read once"])
    assert all((conf.cli, data.datamodule, evaluation.report, models.checkpoint_writer))


def serve() -> None:
    """Answers requests until its input ends; a forked child leaves by what it runs."""
    preload()
    known, living = children(), set[int]()
    gc.collect()
    gc.freeze()  # what all children share is looked through in none of them
    _tell({"ready": os.getpid(), "threads": len(os.listdir("/proc/self/task"))})
    while line := sys.stdin.readline():
        request = json.loads(line)
        if "poll" in request:
            _tell({"status": _status(request["poll"], living)})
            continue
        pid = os.fork()
        if pid == 0:
            _become(request)
            known[request["start"]](request["words"])
            return
        with contextlib.suppress(OSError):  # the child does it too; whoever comes first
            os.setpgid(pid, pid)
        living.add(pid)
        _tell({"pid": pid})
    for pid in living:
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)


def _become(request: dict[str, Any]) -> None:
    """Makes a forked child a process group of its own with its own folder, output and environment."""
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  the inherited one holds the controller's next lines
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])


def _status(pid: int, living: set[int]) -> int | None:
    if pid not in living:
        return -signal.SIGKILL
    ended, status = os.waitpid(pid, os.WNOHANG)
    if not ended:
        return None
    living.discard(pid)
    return os.waitstatus_to_exitcode(status)


def _tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
