"""Who runs a trial: this machine, a process group for each, or SLURM, a job for each.

A trial is a command. Started, it is a `Job`, which a later `sweep.py` finds again by what the first one wrote
down: a job of SLURM goes on whatever happens to the sweep, a process on this machine ends with it.
"""

import contextlib
import hashlib
import os
import shlex
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data.arrays import write_atomic
from models.stages.launch import PARENT
from models.stages.ranks import VARIABLES

#: Seconds that a trial gets to save and end, when it is asked to.
_GRACE = 120.0
#: Exit code of a job of which SLURM tells none.
_UNKNOWN = 5
#: Seconds that a command of SLURM gets to answer.
_PATIENCE = 60.0
#: States in which SLURM's accounting shows a job that goes on, or will.
_GOES_ON = ("PENDING", "RUNNING", "REQUEUED", "RESIZING", "SUSPENDED", "CONFIGURING", "COMPLETING")


class Job(ABC):
    """Interface: a trial that was started."""

    @abstractmethod
    def ended(self) -> int | None:
        """Its exit code; None while it goes on."""

    @abstractmethod
    def stop(self) -> None:
        """Asks it to save and end, and waits until it has."""


class Runner(ABC):
    """Interface: starts trials, so many at a time."""

    parallel: int

    @abstractmethod
    def start(self, number: int, command: Sequence[str], log: Path) -> Job:
        """Starts trial `number`; what it prints is added to `log`."""

    def find(self, number: int) -> Job | None:
        """The job of a trial that an earlier sweep started and that goes on; None where there is none."""
        return None


class ProcessJob(Job):
    """A process group on this machine."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process

    def ended(self) -> int | None:
        code = self.process.poll()
        return None if code is None else code if code >= 0 else 128 - code

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Here(Runner):
    """This machine, whose devices or cores are shared out among the trials.

    Args:
        parallel: trials at a time.
        devices: processes of each.
    """

    def __init__(self, parallel: int, devices: int) -> None:
        self.parallel = parallel
        self.devices = devices
        self._jobs: list[ProcessJob | None] = [None] * parallel

    def start(self, number: int, command: Sequence[str], log: Path) -> Job:
        slot = next(k for k, job in enumerate(self._jobs) if job is None or job.ended() is not None)
        environment = _unplaced()
        environment[PARENT] = str(os.getpid())
        if torch.cuda.is_available():
            first = slot * self.devices
            mine = range(first, first + self.devices)
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, mine))
        with log.open("ab") as file:
            process = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env=environment, start_new_session=True,
            )  # fmt: skip
        job = ProcessJob(process)
        self._jobs[slot] = job
        return job


@dataclass(frozen=True)
class SlurmJob(Job):
    """A job of SLURM, by its id."""

    id: str

    def ended(self) -> int | None:
        waiting = _ask("squeue", "--noheader", "--jobs", self.id, "--format=%T")
        if waiting:
            return None
        told = _ask("sacct", "--noheader", "--parsable2", "-X", "--jobs", self.id, "--format=State,ExitCode")
        if not told:
            return None  # the accounting comes a moment later
        state, _, code = told.splitlines()[0].partition("|")
        if state.startswith(_GOES_ON):
            return None  # squeue did not answer
        number, _, by_signal = code.partition(":")
        if state.startswith("COMPLETED"):
            return 0
        if state.startswith("CANCELLED"):
            return 143
        return int(number or 0) or (128 + int(by_signal) if by_signal.strip("0") else _UNKNOWN)

    def stop(self) -> None:
        _ask("scancel", "--signal=TERM", "--batch", self.id)
        deadline = time.monotonic() + _GRACE
        while self.ended() is None and time.monotonic() < deadline:
            time.sleep(1.0)
        if self.ended() is None:
            _ask("scancel", self.id)


class Slurm(Runner):
    """SLURM: a batch script for each trial, submitted by sbatch.

    Args:
        parallel: jobs at a time.
        folder: for scripts, and for the ids of jobs.
        options: of sbatch, such as `--gres=gpu:8 --time=4:00:00`, for each job.
    """

    def __init__(self, parallel: int, folder: Path, options: Sequence[str]) -> None:
        self.parallel = parallel
        self.folder = folder
        self.options = list(options)

    def start(self, number: int, command: Sequence[str], log: Path) -> Job:
        script = self.folder / f"{number:03d}.sbatch"
        lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in self.options)]
        lines += [f"#SBATCH --job-name={self._name(number)}", f"#SBATCH --output={log}"]
        lines += ["#SBATCH --open-mode=append", "#SBATCH --requeue"]
        # exec: the signal that SLURM sends to the batch shell reaches train.py, which saves.
        lines += [f"cd {shlex.quote(str(Path.cwd()))}", f"exec {shlex.join(command)}"]
        write_atomic(script, ("\n".join(lines) + "\n").encode())
        job = SlurmJob(_ask("sbatch", "--parsable", str(script), wanted=True).partition(";")[0])
        write_atomic(self.folder / f"{number:03d}.job", job.id.encode())
        return job

    def find(self, number: int) -> Job | None:
        # By name first: a sweep that was killed may have submitted a job and not written down which.
        name = f"--name={self._name(number)}"
        ids = _ask("squeue", "--noheader", "--me", name, "--format=%i", wanted=True).split()
        if ids:
            return SlurmJob(ids[0])
        path = self.folder / f"{number:03d}.job"
        return SlurmJob(path.read_text().strip()) if path.exists() else None

    def _name(self, number: int) -> str:
        """What the job of a trial is called: of this folder alone, whatever other sweeps there are."""
        place = hashlib.sha256(str(self.folder.absolute()).encode()).hexdigest()[:8]
        return f"{self.folder.name}-{place}-{number:03d}"


def _unplaced() -> dict[str, str]:
    """The environment without the place that a launcher gave this process among others."""
    return {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "LOCAL_WORLD_SIZE")}


def _ask(*command: str, wanted: bool = False) -> str:
    """What a command of SLURM prints; "" where it fails, unless that is `wanted`.

    Raises:
        OSError: SLURM is not here, or what was wanted failed.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, env=_unplaced())
    except FileNotFoundError:
        raise OSError(f"{command[0]} is not here; where=slurm needs SLURM's commands on PATH") from None
    except subprocess.TimeoutExpired:
        if wanted:
            raise OSError(f"{command[0]} did not answer in {_PATIENCE:g} seconds; try again later") from None
        return ""
    if done.returncode and wanted:
        raise OSError(f"{command[0]} failed: {done.stderr.strip()[:200]}")
    return "" if done.returncode else done.stdout.strip()
