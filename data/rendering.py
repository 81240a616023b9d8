"""Shards of samples that are pure functions of (seed, index): any size, any number of processes, same bytes.

What is drawn is the caller's: a function `(seed, index, resolution) -> (key, fields)` of a module that calls
`render_as_told` with it when it is run as a command. Beside the shards lies a plan, a small JSON of all that
the bytes depend on; a folder that holds something else is refused, and a stopped run goes on where it was.
Use: `write_rendered(folder, sample, RenderPlan("landscapes", 1, seed, 64, 1024), count=20_000, workers=2)`.

Other processes are such commands, `python -m data.landscapes`, which read their share of the work as JSON and
answer with what they finish. Those of multiprocessing would import the caller's main module first, which for
`train.py` takes five seconds of a core each; such a command's imports take a third of a second.
"""

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.shard_index import DataError, current_index, write_atomic
from data.writer import write_shard

#: (seed, index, resolution) -> (key, {field: bytes}).
MakeSample = Callable[[int, int, int], tuple[str, dict[str, bytes]]]
#: A shard's path, and the indices of its samples.
Job = tuple[Path, range]
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class RenderPlan:
    """Returns what the bytes of a folder depend on; `name` is also that of its plan file and its kind."""

    name: str
    version: int
    seed: int
    resolution: int
    shard_size: int

    def record(self) -> dict[str, int]:
        """Returns the content of the plan file, in which the name is not repeated."""
        return {key: value for key, value in asdict(self).items() if key != "name"}


def write_rendered(
    folder: Path,
    sample: MakeSample,
    plan: RenderPlan,
    count: int,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """The shards `000000.tar` ... written to `folder`: samples 0 to `count` - 1 of the plan's seed.

    `workers` processes write whole shards; 0 writes them in this process. The bytes do not depend on it. A
    shard that is there with a valid index is kept, so a stopped run goes on where it was, with shards of the
    size that it began with. `progress` is called with the number of samples of every shard that is finished.
    Raises DataError where the folder holds anything else, ValueError for a count or shard size below 1,
    OSError where nothing can be written or a process ends in error.
    """
    if count < 1 or plan.shard_size < 1:
        raise ValueError(
            f"write_{plan.name}: count {count} and shard_size {plan.shard_size} must be 1 or more"
        )
    folder.mkdir(parents=True, exist_ok=True)
    size = _begun_with(folder, plan)
    plan = replace(plan, shard_size=size)
    jobs = [
        (folder / f"{number:06d}.tar", range(start, min(start + size, count)))
        for number, start in enumerate(range(0, count, size))
    ]
    _check_plan(folder, plan, {path.name for path, _ in jobs})
    report = progress if progress is not None else lambda done: None
    todo = []
    for path, indices in jobs:
        if _finished(path, len(indices)):
            report(len(indices))
        else:
            todo.append((path, indices))
    if min(workers, len(todo)) < 2:
        for path, indices in todo:
            report(_write(path, sample, plan, indices))
    else:
        shares = [todo[start::workers] for start in range(min(workers, len(todo)))]
        for finished in _written_elsewhere(sample, plan, shares):
            report(finished)
    return [path for path, _ in jobs]


def _written_elsewhere(
    sample: MakeSample, plan: RenderPlan, shares: Sequence[Sequence[Job]]
) -> Iterator[int]:
    """Yields the samples of each shard that one of the processes, one a share, has written.

    Raises DataError or OSError as soon as one of them cannot write or dies; the others are stopped then.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        with selectors.DefaultSelector() as all_said:
            for share in shares:
                process = _start(sample)
                processes.append(process)
                jobs = [(str(path.absolute()), each.start, each.stop) for path, each in share]
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # its exit code tells more
                    process.stdin.write(json.dumps({"plan": asdict(plan), "jobs": jobs}).encode() + b"\n")
                all_said.register(process.stdout, selectors.EVENT_READ, process)  # type: ignore[arg-type]
            while all_said.get_map():
                for key, _ in all_said.select():
                    if line := key.fileobj.readline():  # type: ignore[union-attr] # unbuffered, whole lines
                        yield _understood(json.loads(line))
                        continue
                    all_said.unregister(key.fileobj)
                    if code := key.data.wait():
                        raise OSError(_death(key.data.pid, code))
    finally:
        for process in processes:
            process.terminate()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()


def _start(sample: MakeSample) -> "subprocess.Popen[bytes]":
    """The command of the module of `sample`, which finds the project wherever it is started."""
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", sample.__module__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


def _understood(said: dict[str, Any]) -> int:
    """The samples that a process says it has written; its error is raised here instead."""
    if "data" in said:
        raise DataError(said["data"])
    if "system" in said:
        raise OSError(*said["system"])
    return int(said["written"])


def _death(pid: int, code: int) -> str:
    died = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    remedy = (
        "give the machine more memory, or start again with fewer processes" if code == -9 else "start again"
    )
    return f"a process that renders (pid {pid}) {died}; what is whole stays: {remedy}"


def render_as_told(sample: MakeSample) -> None:
    """Writes the shards that a line on stdin names, and says how many samples each has once it is there.

    For a module that has `sample` and is run as a command by `write_rendered`. It ends when stdin does, which
    whoever started it holds open.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this decides
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # and what is half done goes away
    told = json.loads(sys.stdin.readline())
    plan = RenderPlan(**told["plan"])
    threading.Thread(target=_end_with_input, daemon=True).start()
    answers = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anything else prints is no answer

    def answer(**said: Any) -> None:
        os.write(answers, json.dumps(said).encode() + b"\n")

    try:
        for path, start, stop in told["jobs"]:
            answer(written=_write(Path(path), sample, plan, range(start, stop)))
    except BrokenPipeError:
        sys.exit(5)  # whoever wanted them is gone, and cannot be told
    except DataError as error:
        answer(data=str(error))
    except OSError as error:
        parts = (error.errno, error.strerror, error.filename)
        answer(system=(str(error),) if error.errno is None else parts)


def _end_with_input() -> None:
    """Ends this process, and what is half done, once stdin ends: whoever held it open is gone."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _write(path: Path, sample: MakeSample, plan: RenderPlan, indices: range) -> int:
    """Writes one shard; returns how many samples it holds."""

    def samples() -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in indices:
            yield sample(plan.seed, index, plan.resolution)

    write_shard(path, samples())
    return len(indices)


def _finished(path: Path, count: int) -> bool:
    try:
        return current_index(path).count == count
    except DataError:
        return False


def _begun_with(folder: Path, plan: RenderPlan) -> int:
    """The shard size of what `folder` holds, if that is this plan's in all else; else the plan's own."""
    path = folder / f"{plan.name}.json"
    if not path.exists():
        return plan.shard_size
    found = json.loads(path.read_text())
    size = found.get("shard_size") if isinstance(found, dict) else None
    if isinstance(size, int) and size > 0 and found == plan.record() | {"shard_size": size}:
        return size
    return plan.shard_size


def _check_plan(folder: Path, plan: RenderPlan, names: set[str]) -> None:
    """Records what `folder` holds, or raises DataError where it already holds something else."""
    path, wanted = folder / f"{plan.name}.json", plan.record()
    others = sorted(shard.name for shard in folder.glob("*.tar") if shard.name not in names)
    if path.exists():
        found = json.loads(path.read_text())
        if found != wanted:
            raise DataError(
                f"{path}: made with {found}, not with {wanted}; choose an empty folder or delete this one"
            )
    elif any(folder.glob("*.tar")):
        raise DataError(
            f"{folder}: holds shards but no {path.name}, so not {plan.name}; choose an empty folder"
        )
    if others:
        raise DataError(
            f"{folder}: holds {len(others)} shards more than asked for, such as {others[0]}; delete them"
        )
    write_atomic(path, (json.dumps(wanted) + "\n").encode())
