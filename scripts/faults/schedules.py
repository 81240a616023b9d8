"""Runs that go on with other ranks and other loader workers than before, which must not change what is read.

Every schedule is a run that is stopped at random steps, by SIGTERM or SIGKILL, and goes on with another
number of ranks and workers each time. Its samples, in the order of the global batches and with replays taken
off, have to be those of the uninterrupted run: there is one order.
"""

import functools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.faults.jobs import Jobs, Report
from scripts.faults.kills import wait_for
from scripts.faults.runs import BATCH, PATIENCE, Bench, tail
from scripts.faults.zygote import Trial, Zygote

#: Ranks and workers of each, and in a short torture, whose kills have the workers.
WAYS, FEW_WAYS = [(ranks, workers) for ranks in (1, 2) for workers in (0, 1, 3)], [(1, 0), (2, 0)]
#: How often a schedule changes, and in a short torture.
SWITCHES, FEW_SWITCHES = 3, 1
GRACE = 60.0

Order = tuple[str, ...]


def run_schedules(jobs: Jobs, bench: Bench, report: Report, schedules: int) -> dict[str, Any]:
    """Figures of `schedules` schedules: how many orders of the keys they had, with the uninterrupted run's.

    Args:
        jobs: that run them.
        bench: of runs of one process.
        report: told of failures.
        schedules: how many.
    """
    wanted = order_of(_Steps().add(bench.whole.folder, 1), bench.images)
    tasks: list[Callable[[Zygote], Order]] = [
        functools.partial(_schedule, bench, report, number, wanted) for number in range(schedules)
    ]
    orders = {wanted, *jobs.run(tasks)}
    return {"schedules": schedules, "key_orders": len(orders)}


def _schedule(bench: Bench, report: Report, number: int, wanted: Order, zygote: Zygote) -> Order:
    """The keys of one schedule in their order."""
    chance = report.random("schedules", number)
    ways, switches = (FEW_WAYS, FEW_SWITCHES) if report.short else (WAYS, SWITCHES)
    # Every way begins a schedule before one does twice.
    way, broken, steps, told = ways[number % len(ways)], bench.place(f"schedule-{number:02d}"), _Steps(), []
    for switch in range(switches + 1):
        ranks, workers = way
        broken.words = (f"data.workers={workers}",)
        group = bench.start(zygote, broken, ranks)
        stop = chance.choice((signal.SIGTERM, signal.SIGKILL)) if switch < switches else 0
        if stop:
            wait_for("step", group, broken, chance)
        code = _end(stop, group)
        told.append(f"{ranks} ranks, {workers} workers, {f'signal {stop:d}' if stop else 'to the end'}")
        if code not in (0, 143, -signal.SIGKILL) or (not stop and code):
            report.fail("schedules", f"{'; '.join(told)}: ended with {code}: {tail(group.said())}", group.log)
        steps.add(broken.folder, ranks)
        way = chance.choice([other for other in ways if other != way])
    read = order_of(steps, bench.images)
    order = tuple(mine or key for mine, key in zip(read, wanted, strict=False))
    if order != wanted or len(read) != len(wanted):
        report.fail("schedules", f"{'; '.join(told)}: other keys, or in another order", broken.place)
    return order


def _end(stop: int, group: Trial) -> int | None:
    """Stops a run by a signal (0: lets it end); the exit code."""
    if stop == signal.SIGKILL:
        return group.kill()
    if stop and group.poll() is None:
        os.kill(group.pid, stop)
    code = group.wait(GRACE if stop else PATIENCE)
    group.kill()
    return code


class _Steps:
    """What each step of the diffusion stage read, collected attempt by attempt."""

    def __init__(self) -> None:
        self._read: dict[Path, int] = {}
        #: Images before the step -> the keys of each rank, None where a killed rank left no line.
        self.keys: dict[int, list[list[str] | None]] = {}

    def add(self, run: Path, ranks: int) -> "_Steps":
        """Takes in what the ranks of an attempt have added to their traces."""
        rows: dict[int, list[list[str] | None]] = {}
        for rank in range(ranks):
            path = run / "diffusion" / f"trace-{rank}.jsonl"
            data = path.read_bytes() if path.exists() else b""
            for line in data[self._read.get(path, 0) :].splitlines():
                row = json.loads(line)
                rows.setdefault(row["images"], [None] * ranks)[rank] = row["keys"]
            self._read[path] = len(data)
        if rows:
            first = min(rows)
            self.keys = {images: keys for images, keys in self.keys.items() if images < first} | rows
        return self


def order_of(steps: _Steps, images_of_run: int) -> Order:
    """All keys in the order of the global batches; "" for one that a killed rank did not write down."""
    order: list[str] = []
    for images in range(0, images_of_run, BATCH):
        parts = steps.keys.get(images, [])
        for part in parts:
            order += part if part is not None else [""] * (BATCH // len(parts))
    return tuple(order)
