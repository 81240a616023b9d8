"""Signals to ranks: SIGTERM to every subset of them at random moments, and the other signals a run obeys.

Whatever the moment, all ranks have to end within `GRACE` seconds with 143, and what was trained by then has
to be in a verified checkpoint that equals the uninterrupted run's at that step. The run then goes on, to be
stopped again; at its end every bit is compared.
"""

import contextlib
import functools
import itertools
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scripts.faults.jobs import Jobs, Report
from scripts.faults.kills import MOMENTS, wait_for
from scripts.faults.runs import BATCH, PATIENCE, Bench, Broken, tail
from scripts.faults.zygote import Trial, Zygote

#: Seconds in which every rank has to end after the signal.
GRACE = 30.0
#: Signals a run gets before it is let through to its end.
SIGNALS_A_RUN = 8
EXIT = {signal.SIGTERM: 143, signal.SIGINT: 130}


def run_sigterms(jobs: Jobs, bench: Bench, report: Report, trials: int) -> dict[str, Any]:
    """Figures of `trials` SIGTERMs, and of a few other signals besides.

    Args:
        jobs: that run them.
        bench: of runs of as many ranks as are wanted.
        report: told of failures.
        trials: how many.
    """
    ranks = range(bench.ranks)
    subsets = [s for n in range(1, bench.ranks + 1) for s in itertools.combinations(ranks, n)]
    plans: list[tuple[str, tuple[int, ...]]] = [
        ("SIGTERM", subsets[number % len(subsets)]) for number in range(trials)
    ]
    for number in range(trials // 10):
        subset = subsets[number % len(subsets)]
        plans += [("SIGINT", subset), ("SIGUSR1", subset), ("twice", subset)]
    report.random("signals").shuffle(plans)
    runs = -(-len(plans) // SIGNALS_A_RUN)
    tasks: list[Callable[[Zygote], Counter[str]]] = [
        functools.partial(_signalled_run, bench, report, number, plans[number::runs])
        for number in range(runs)
    ]
    total: Counter[str] = Counter()
    for result in jobs.run(tasks):
        total += result
    names = ("sigterms", "hangs", "saved", "wrong_exit", "sigints", "sigusr1s", "twice", "wrong_after_signal")
    return {name: total[name] for name in names}


def _signalled_run(
    bench: Bench, report: Report, number: int, plans: Sequence[tuple[str, tuple[int, ...]]], zygote: Zygote
) -> Counter[str]:
    """Runs that are stopped by the signals of `plans`, one after another, each then let through."""
    chance, counted, again, waiting = report.random("sigterms", number), Counter[str](), 0, list(plans)
    while waiting or not again:
        broken = bench.place(f"signalled-{number:02d}-{again}")
        again += 1
        finished = False
        while waiting:
            before = _trace(broken).stat().st_size if _trace(broken).exists() else 0
            group = bench.start(zygote, broken)
            moment = chance.choice((*MOMENTS, "lock"))
            wait_for(moment, group, broken, chance)
            if group.poll() is not None:
                finished = True
                break
            what, subset = waiting.pop(0)
            label = f"{what} to {subset} at {moment}"
            _signal(what, subset, group, broken, before, report, counted, chance, label)
            for fault in bench.faults(broken, finished=False):
                counted["wrong_after_signal"] += 1
                report.fail("sigterms", f"after {what} to {subset} at {moment}: {fault}", broken.place)
        if not finished:
            group = bench.start(zygote, broken)
        code = group.wait(PATIENCE)
        group.kill()
        if code != 0:
            counted["wrong_exit"] += 1
            report.fail("sigterms", f"resumed, it ended with {code}: {tail(group.said())}", group.log)
        for fault in bench.faults(broken, finished=code == 0):
            counted["wrong_after_signal"] += 1
            report.fail("sigterms", fault, broken.place)
    return counted


def _signal(
    what: str, subset: Sequence[int], group: Trial, broken: Broken, before: int, report: Report,
    counted: Counter[str], chance: random.Random, label: str,
) -> None:  # fmt: skip
    """Sends one signal to some ranks, and looks at what follows."""
    number = {"SIGINT": signal.SIGINT, "SIGUSR1": signal.SIGUSR1}.get(what, signal.SIGTERM)
    pids = _pids(broken, group)
    if len(pids) < len(subset) or max(subset) >= len(pids):  # it is still starting: the launcher gets it
        pids = [group.pid] * (max(subset) + 1)
    seen, saved = images_seen(broken, before), saved_images(broken)
    for rank in subset:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[rank], number)
    if number == signal.SIGUSR1:
        counted["sigusr1s"] += 1
        _goes_on(group, broken, report, counted, saved, label)
        group.kill()
        return
    if what == "twice":
        time.sleep(chance.uniform(0.6, 1.5))
        for rank in subset:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pids[rank], number)
    counted[{"SIGINT": "sigints", "twice": "twice"}.get(what, "sigterms")] += 1
    code = group.wait(GRACE)
    group.kill()
    if code is None:
        counted["hangs"] += 1
        report.fail("sigterms", f"{label}: it still runs after {GRACE:.0f} s", group.log)
        return
    # A run that was at its very end may end as if nothing had happened; one that had not begun just dies.
    allowed = (
        {EXIT[number]} | ({0} if seen >= broken.images else set()) | (set() if group.said() else {-number})
    )
    if code not in allowed:
        counted["wrong_exit"] += 1
        report.fail("sigterms", f"{label}: it ended with {code}: {tail(group.said())}", group.log)
    if what == "SIGTERM":
        now = saved_images(broken)
        if now >= seen:
            counted["saved"] += 1
        else:
            report.fail("sigterms", f"{label}: {now} images were saved of {seen} seen", group.log)


def _goes_on(
    group: Trial, broken: Broken, report: Report, counted: Counter[str], saved: int, label: str
) -> None:
    """Waits until a run that was asked to save has saved and trains on, or has ended well."""
    end = time.monotonic() + GRACE
    while group.poll() is None and time.monotonic() < end:
        if saved_images(broken) > saved:
            return
        time.sleep(0.01)
    if group.poll() == 0:
        return
    code = group.poll()
    counted["hangs" if code is None else "wrong_exit"] += 1
    report.fail("sigterms", f"{label}: it did not go on, but ended with {code}", group.log)


def _pids(broken: Broken, group: Trial) -> list[int]:
    """The ranks' processes as the run's lock names them; those that were forked before there is a lock."""
    mine = group.ranks()
    try:
        pids = json.loads((broken.folder / "lock.json").read_text())["pids"]
    except (OSError, ValueError, KeyError):
        return mine
    return [int(pid) for pid in pids] if sorted(pids) == sorted(mine) else mine


def images_seen(broken: Broken, before: int) -> int:
    """Images that an attempt has trained the diffusion stage on, 0 before its first step.

    Args:
        broken: the run.
        before: bytes of the first rank's trace when the attempt began.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = _trace(broken).read_bytes()[before:].splitlines()
        return int(json.loads(lines[-1])["images"]) + BATCH
    return 0


def _trace(broken: Broken) -> Path:
    return broken.folder / "diffusion" / "trace-0.jsonl"


def saved_images(broken: Broken) -> int:
    """Images seen at the newest checkpoint of the diffusion stage that verifies; 0 where there is none."""
    from models.checkpoint import newest

    parent: Path = broken.checkpoints()
    checkpoint = newest(parent) if parent.is_dir() else None
    return checkpoint.images if checkpoint is not None else 0
