"""Shards of samples that are pure functions of (seed, index): any size, any number of processes, same bytes.

What is drawn is the caller's: a function `(seed, index, resolution) -> (key, fields)` of a module, since
other processes import it by name. Beside the shards lies a plan, a small JSON of all that the bytes depend
on; a folder that holds something else is refused, and a stopped run goes on where it was.
Use: `write_rendered(folder, sample, RenderPlan("landscapes", 1, seed, 64, 1024), count=20_000, workers=2)`.
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

from data.shard_index import DataError, current_index, write_atomic
from data.writer import write_shard

#: (seed, index, resolution) -> (key, {field: bytes}).
MakeSample = Callable[[int, int, int], tuple[str, dict[str, bytes]]]


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
    shard that is there with a valid index is kept, so a stopped run goes on where it was. `progress` is
    called with the number of samples of every shard that is finished. Raises DataError where the folder holds
    anything else, ValueError for a count or shard size below 1.
    """
    size = plan.shard_size
    if count < 1 or size < 1:
        raise ValueError(f"write_{plan.name}: count {count} and shard_size {size} must be 1 or more")
    folder.mkdir(parents=True, exist_ok=True)
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
    if min(workers, len(todo)) < 2:  # starting a process takes seconds
        for path, indices in todo:
            report(_write(path, sample, plan, indices))
    else:
        # Spawned, not forked: the caller may hold threads of torch, which a fork would leave locked.
        with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
            pending = [pool.submit(_write, path, sample, plan, indices) for path, indices in todo]
            for done in as_completed(pending):
                report(done.result())
    return [path for path, _ in jobs]


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
