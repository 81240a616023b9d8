"""SIGKILL at random moments, again and again, until the run is finished; then every bit is compared.

A run is killed as a whole at four kinds of moments: while it starts, in its steps, inside the writer of a
checkpoint, and after its last step. Runs of another kind lose only a loader worker, or only one of two ranks:
their process has to end by itself with exit code 5 and name what it lost.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.faults.jobs import Jobs, Report
from scripts.faults.runs import BATCH, PATIENCE, Bench, Broken, tail
from scripts.faults.zygote import PROJECT, Trial, Zygote, children_of

ENVIRONMENT = 5
#: Kills of one run before it is let through to its end.
KILLS_A_RUN = 14
#: Seconds in which a process that lost a worker or a rank has to end.
GRACE = 40.0
MOMENTS = ("start", "step", "step", "writer", "end")
#: Share of them that has to fall into the writer of a checkpoint.
IN_WRITER = 0.3


@dataclass
class Outcome:
    """What happened to one run: kills by kind of moment, and what was found wrong."""

    kills: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    wrong_exit: int = 0
    left_behind: int = 0


def run_kills(jobs: Jobs, bench: Bench, bench_of_two: Bench, report: Report, kills: int) -> dict[str, Any]:
    """Figures of `kills` kills: how many, of what, and how many were of runs that came out identical.

    Args:
        jobs: that run them.
        bench: of runs of one process.
        bench_of_two: of runs of two ranks.
        report: told of failures.
        kills: how many, of all kinds together.
    """
    began = time.monotonic()
    workers, ranks, commands, of_two = max(1, kills // 10), max(1, kills // 20), kills // 50, kills // 20
    tasks: list[Callable[[Zygote], Outcome]] = [
        functools.partial(_worker_run, bench, report, workers),
        functools.partial(_rank_run, bench_of_two, report, ranks),
    ]
    if of_two:
        tasks.append(functools.partial(_killed_run, bench_of_two, report, 0, of_two))
    if commands:
        tasks.append(functools.partial(_command_run, bench, report, commands))
    left = max(1, kills - workers - ranks - of_two - commands)
    runs = -(-left // KILLS_A_RUN)
    for number in range(runs):
        share = left * (number + 1) // runs - left * number // runs
        tasks.append(functools.partial(_killed_run, bench, report, number, share))
    outcomes = jobs.run(tasks)
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total += outcome.kills
    seconds = time.monotonic() - began
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    return {
        "kills": total.total(),
        "identical": sum(outcome.kills.total() for outcome in outcomes if not outcome.faults),
        "lost": _sum_of(faults, "samples lost"), "duplicated": _sum_of(faults, "read twice"),
        "kills_in_writer": total["writer"], "kills_of_worker": total["worker"],
        "kills_of_rank": total["rank"], "kills_by_moment": dict(sorted(total.items())),
        "kill_seconds": round(seconds / max(1, total.total()), 2),
        "wrong_exit_after_kill": sum(outcome.wrong_exit for outcome in outcomes),
        "left_behind": sum(outcome.left_behind for outcome in outcomes),
    }  # fmt: skip


def _killed_run(bench: Bench, report: Report, number: int, kills: int, zygote: Zygote) -> Outcome:
    """Runs that are killed as a whole, `kills` times in all; each is let through once it had its share.

    A run that ends before its moment comes is followed by a fresh one. Every fourth begins with nothing.
    """
    chance, outcome, again = report.random("kills", bench.ranks, number), Outcome(), 0
    while outcome.kills.total() < kills or not again:
        name = f"killed-{number:02d}-{again}"
        broken = bench.place(name, with_autoencoder=(number + again) % 4 != 3)
        again += 1
        while True:
            trial = bench.start(zygote, broken)
            moment = _next_moment(outcome.kills, chance) if outcome.kills.total() < kills else ""
            killed = _kill_at(moment, trial, broken, chance)
            if not killed:
                break
            outcome.kills[killed] += 1
            _check(bench, broken, outcome, report, finished=False)
        code = trial.wait(PATIENCE)
        trial.kill()
        if code != 0:
            outcome.wrong_exit += 1
            _blame(report, outcome, f"resumed, it ended with {code}: {tail(trial.said())}", trial.log)
        _check(bench, broken, outcome, report, finished=code == 0)
    return outcome


def _rank_run(bench: Bench, report: Report, kills: int, zygote: Zygote) -> Outcome:
    """A run of two ranks of which one is killed, `kills` times; the other must end with 5 and say so."""
    chance, outcome = report.random("ranks"), Outcome()
    broken = bench.place("ranks")
    while outcome.kills["rank"] < kills:
        trial = bench.start(zygote, broken)
        wait_for("step", trial, broken, chance)
        ranks = trial.ranks()
        if trial.poll() is not None or len(ranks) < bench.ranks:
            break
        victim = chance.choice(ranks)
        os.kill(victim, signal.SIGKILL)
        outcome.kills["rank"] += 1
        code = trial.wait(GRACE)
        trial.kill()
        if code != ENVIRONMENT or f"process {victim}" not in trial.said():
            outcome.wrong_exit += 1
            said = tail(trial.said())
            report.fail("kills", f"rank {victim} was killed, the run ended with {code}: {said}", trial.log)
        _check(bench, broken, outcome, report, finished=False)
    _finish(bench, report, broken, outcome, zygote)
    return outcome


def _next_moment(done: Counter[str], chance: random.Random) -> str:
    """The next kind of moment; in the writer where too few were there so far."""
    if done["writer"] < IN_WRITER * done.total():
        return "writer"
    return chance.choice(MOMENTS)


def _check(bench: Bench, broken: Broken, outcome: Outcome, report: Report, finished: bool) -> None:
    """Compares a run with the uninterrupted one, as far as it has come."""
    for fault in bench.faults(broken, finished):
        _blame(report, outcome, fault, broken.place)
    if finished:  # also after a kill in the last save: the start that found it done swept
        outcome.left_behind += len(_staging(broken.checkpoints(), removed=True))


def _blame(report: Report, outcome: Outcome, fault: str, place: Path) -> None:
    """Adds a fault to an outcome and reports it, once."""
    if fault not in outcome.faults:
        outcome.faults.append(fault)
        report.fail("kills", fault, place)


def _kill_at(moment: str, trial: Trial, broken: Broken, chance: random.Random) -> str:
    """Kills the run at a random moment of a kind; the kind it turned out to be, "" where it ended before."""
    if not moment:
        return ""
    if moment == "writer":
        return _kill_in_writer(trial, broken, chance)
    wait_for(moment, trial, broken, chance)
    if trial.poll() is not None:
        return ""
    return moment if trial.kill() == -signal.SIGKILL else ""


def wait_for(moment: str, trial: Trial, broken: Broken, chance: random.Random) -> None:
    """Waits for a random moment of a kind, or until the run has ended."""
    if moment == "start":
        time.sleep(chance.uniform(0, 2.5))
    elif moment == "step":
        wanted = _lines_of(broken) + chance.randrange(1, broken.images // BATCH // 3 + 1)
        _until(trial, lambda: _lines_of(broken) >= wanted)
        time.sleep(chance.uniform(0, 0.05))
    elif moment == "end":
        _until(trial, lambda: _last_images(broken) >= broken.images)
        time.sleep(chance.uniform(0, 1.0))
    elif moment == "writer":
        skip, seen = chance.randrange(3), set[str]()
        _until(trial, lambda: len(_add(seen, _staging(broken.checkpoints()))) > skip)
    elif moment == "lock":
        _until(trial, lambda: _locked_by(trial, broken))
        time.sleep(chance.uniform(0, 1.5))


def _locked_by(trial: Trial, broken: Broken) -> bool:
    """Whether a run's lock names the processes of this attempt."""
    try:
        pids = json.loads((broken.folder / "lock.json").read_text())["pids"]
    except (OSError, ValueError, KeyError):
        return False
    return trial.pid in pids or set(pids) == set(trial.ranks())


def _add(seen: set[str], names: list[str]) -> set[str]:
    seen.update(names)
    return seen


def _kill_in_writer(trial: Trial, broken: Broken, chance: random.Random) -> str:
    """Kills while a checkpoint is being written; it counts only if its staging folder is left."""
    skip, delay, seen = chance.randrange(3), chance.uniform(0, 0.06), set[str]()
    parent = broken.checkpoints()
    while trial.poll() is None:
        seen |= set(_staging(parent))
        if len(seen) > skip:
            time.sleep(delay)
            if trial.kill() != -signal.SIGKILL:
                return ""
            return "writer" if _staging(parent) else "step"
        time.sleep(0.002)
    return ""


def _worker_run(bench: Bench, report: Report, kills: int, zygote: Zygote) -> Outcome:
    """A run whose loader workers are killed, `kills` of them; each time it must end with 5 and name it."""
    chance = report.random("workers")
    broken = bench.place("workers", words=("data.workers=1",))
    outcome = Outcome()
    while outcome.kills["worker"] < kills:
        trial = bench.start(zygote, broken)
        wanted = _last_images(broken) // BATCH + chance.randrange(1, 4)
        _until(trial, lambda wanted=wanted: _last_images(broken) >= wanted * BATCH)  # type: ignore[misc]
        workers = loader_workers(trial.pid)
        if trial.poll() is not None or not workers:
            break
        victim = chance.choice(workers)
        os.kill(victim, signal.SIGKILL)
        code = trial.wait(GRACE)
        trial.kill()
        if code == 0:
            break  # everything had been loaded
        outcome.kills["worker"] += 1
        last = tail(trial.said(), 1)
        if code != ENVIRONMENT or str(victim) not in last:
            outcome.wrong_exit += 1
            report.fail("kills", f"worker {victim} was killed, the run ended with {code}: {last}", trial.log)
        _check(bench, broken, outcome, report, finished=False)
    broken.words = ()  # it goes on without a worker, which must change nothing
    _finish(bench, report, broken, outcome, zygote)
    return outcome


def _finish(bench: Bench, report: Report, broken: Broken, outcome: Outcome, zygote: Zygote) -> None:
    """Lets a run come to its end, unkilled, and compares."""
    trial = bench.start(zygote, broken)
    if (code := trial.wait(PATIENCE)) != 0:
        trial.kill()
        outcome.wrong_exit += 1
        _blame(report, outcome, f"resumed, it ended with {code}: {tail(trial.said())}", trial.log)
    _check(bench, broken, outcome, report, finished=code == 0)


def _command_run(bench: Bench, report: Report, kills: int, zygote: Zygote) -> Outcome:
    """A run through the real command line, not forked: killed in its steps, then let through."""
    chance = report.random("commands")
    broken = bench.place("commands")
    outcome = Outcome()
    words = [sys.executable, str(PROJECT / "train.py"), *bench.command(broken)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for _ in range(kills):
        log = broken.place / f"command-{outcome.kills.total()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                words, cwd=broken.place, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        wanted = _lines_of(broken) + chance.randrange(3, 15)
        end = time.monotonic() + PATIENCE
        while process.poll() is None and _lines_of(broken) < wanted and time.monotonic() < end:
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            outcome.kills["command"] += 1
        process.wait()
        _check(bench, broken, outcome, report, finished=False)
    _finish(bench, report, broken, outcome, zygote)
    return outcome


def loader_workers(pid: int) -> list[int]:
    """The loader workers of a run: what its fork server has forked."""
    return [worker for server in children_of(pid) for worker in children_of(server)]


def _until(trial: Trial, reached: Callable[[], bool]) -> None:
    """Waits until something is reached or the run has ended."""
    end = time.monotonic() + PATIENCE
    while not reached() and trial.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


def _lines_of(broken: Broken) -> int:
    """Lines in the diffusion stage's metrics, which grow by one a step."""
    try:
        return (broken.folder / "diffusion" / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def _last_images(broken: Broken) -> int:
    """Images seen at the last line of the diffusion stage's metrics."""
    try:
        text = (broken.folder / "diffusion" / "metrics.jsonl").read_text()
    except OSError:
        return 0
    return max((int(part.split(",")[0].rstrip("}")) for part in text.split('"images": ')[1:]), default=0)


def _staging(parent: Path, removed: bool = False) -> list[str]:
    """Names of folders a checkpoint is being written in; with `removed` also of those being removed."""
    try:
        names = os.listdir(parent)
    except OSError:
        return []
    return [
        name
        for name in names
        if name.startswith(".images-") and name.endswith(".part") and (removed or ".old." not in name)
    ]


def _sum_of(faults: list[str], words: str) -> int:
    """The number before `words`, summed over faults."""
    return sum(int(fault.split(f" {words}")[0].split()[-1]) for fault in faults if f" {words}" in fault)
