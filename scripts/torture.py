"""Tries to break everything, and prints figures: `python scripts/torture.py`.

Real processes are killed and signalled at random moments, bits are flipped and files cut, saves crash and
disks are full; afterwards every bit is compared with a run that nothing happened to. A line is printed for
every kind of trial and for every failure; the last line is one JSON object with all figures. The exit code is
0 only if all of them are as wanted. `--short` makes a few trials of each kind, of shorter runs and all kinds
at the same time, in about a minute.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.faults.flips import run_flips
from scripts.faults.jobs import Jobs, Report
from scripts.faults.kills import run_kills
from scripts.faults.resume import run_resume
from scripts.faults.runs import FEW_STEPS, STEPS, Bench
from scripts.faults.saves import run_saves
from scripts.faults.schedules import run_schedules
from scripts.faults.sigterms import run_sigterms

FAILED, INTERRUPTED = 1, 130
#: How many trials of each kind there are, and with --short.
COUNTS = {
    "kills": (100, 5), "schedules": (12, 1), "flips": (2_000, 60), "sigterms": (50, 2), "saves": (200, 15),
    "resume": (100_000_000, 100_000),
}  # fmt: skip
#: Ranks of the runs that a kind breaks.
RANKS = {"kills": (1, 2), "schedules": (1,), "sigterms": (2,)}
#: Seconds from opening a dataset at a late position to the first batch.
MOST_RESUME_SECONDS = 5.0
#: Figures and what they have to be where they were measured.
WANTED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "identical": lambda f: f["identical"] == f["kills"] > 0,
    "lost": lambda f: f["lost"] == 0,
    "duplicated": lambda f: f["duplicated"] == 0,
    "wrong_exit_after_kill": lambda f: f["wrong_exit_after_kill"] == 0,
    "left_behind": lambda f: f["left_behind"] == 0,
    "key_orders": lambda f: f["key_orders"] == 1,
    "silent": lambda f: f["silent"] == 0,
    "untidy": lambda f: f["untidy"] == 0,
    "hangs": lambda f: f["hangs"] == 0,
    "saved": lambda f: f["saved"] == f["sigterms"],
    "wrong_exit": lambda f: f["wrong_exit"] == 0,
    "wrong_after_signal": lambda f: f["wrong_after_signal"] == 0,
    "without_checkpoint": lambda f: f["without_checkpoint"] == 0,
    "saves_left_over": lambda f: f["saves_left_over"] == 0,
    "resume_seconds": lambda f: f["resume_seconds"] <= MOST_RESUME_SECONDS,
}


class Torture:
    """All kinds of trials, and the uninterrupted runs that they share, made at the same time.

    Args:
        report: what all kinds report to.
        jobs: that run the trials.
        kinds: that are wanted.
    """

    def __init__(self, report: Report, jobs: Jobs, kinds: Collection[str]) -> None:
        self.report = report
        self.jobs = jobs
        self._kinds = ThreadPoolExecutor(len(kinds) if report.short else 1)
        self._wholes = ThreadPoolExecutor()
        wanted = {ranks for kind in kinds for ranks in RANKS.get(kind, ())}
        self._benches = {ranks: self._wholes.submit(self._make, ranks) for ranks in sorted(wanted)}

    def __enter__(self) -> "Torture":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._kinds, self._wholes):
            pool.shutdown(wait=False, cancel_futures=True)

    def start(self, kind: str, count: int) -> Future[dict[str, Any]]:
        """The figures of a kind, once it has ended; in a short torture all kinds go on at the same time."""
        return self._kinds.submit(self._run, kind, count)

    def _run(self, kind: str, count: int) -> dict[str, Any]:
        began = time.monotonic()
        found = KINDS[kind](self, count)
        told = ", ".join(f"{name} {value}" for name, value in found.items())
        self.report.say(f"{kind}: {told} ({time.monotonic() - began:.0f} s)")
        return found

    def _make(self, ranks: int) -> Bench:
        steps = FEW_STEPS if self.report.short else STEPS
        bench = Bench(self.report.out / f"ranks-{ranks}", ranks=ranks, steps=steps)
        self.jobs.run([bench.run_whole])
        self.report.say(f"an uninterrupted run of {ranks} took {bench.seconds:.1f} s")
        return bench

    def bench(self, ranks: int) -> Bench:
        """Runs of so many ranks, with the uninterrupted one they are compared with."""
        return self._benches[ranks].result()

    def kills(self, count: int) -> dict[str, Any]:
        """Figures of kills."""
        return run_kills(self.jobs, self.bench(1), self.bench(2), self.report, count)

    def flips(self, count: int) -> dict[str, Any]:
        """Figures of damage on disk."""
        return run_flips(self.jobs, self.report, count)

    def sigterms(self, count: int) -> dict[str, Any]:
        """Figures of signals."""
        return run_sigterms(self.jobs, self.bench(2), self.report, count)

    def schedules(self, count: int) -> dict[str, Any]:
        """Figures of changes of ranks and workers."""
        return run_schedules(self.jobs, self.bench(1), self.report, count)

    def resume(self, count: int) -> dict[str, Any]:
        """Figures of going on in the middle of many samples."""
        return run_resume(self.jobs, self.report, count)

    def saves(self, count: int) -> dict[str, Any]:
        """Figures of saves that were cut short."""
        return run_saves(self.jobs, self.report, count)


KINDS: dict[str, Callable[[Torture, int], dict[str, Any]]] = {
    "kills": Torture.kills, "schedules": Torture.schedules, "sigterms": Torture.sigterms,
    "saves": Torture.saves, "flips": Torture.flips, "resume": Torture.resume,
}  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="torture.py", description=description, epilog=notes)
    add = options.add_argument
    for kind in KINDS:
        name = "--samples" if kind == "resume" else f"--{kind}"
        add(name, dest=kind, type=_count, metavar="N", help=f"how many ({COUNTS[kind][0]:,})")
    add("--only", type=_kinds, default=list(KINDS), metavar="KIND,...", help=f"of {', '.join(KINDS)}")
    add("--short", action="store_true", help="a few trials of each kind")
    add("--out", type=Path, metavar="FOLDER", help="where; kept. Else a new folder, removed if all is well")
    add("--seed", type=int, default=0, help="of the random moments and places (0)")
    add("--jobs", type=_count, default=2, metavar="N", help="trials at a time (2)")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0 if all figures are as wanted, 1 if not, 2 wrong option, 130 interrupted."""
    options = parser()
    args = options.parse_args(argv)
    if args.out is not None and args.out.exists() and any(args.out.iterdir()):
        options.error(f"{args.out} is not empty; give a new folder")
    out = (args.out or Path(tempfile.mkdtemp(prefix="torture-"))).resolve()
    os.environ["OMP_NUM_THREADS"] = "1"
    began, report = time.monotonic(), Report(out, args.seed, args.short)
    counts = {kind: vars(args)[kind] or COUNTS[kind][args.short] for kind in args.only}
    figures: dict[str, Any] = {"seed": args.seed, "only": args.only}
    try:
        with Jobs(out, args.jobs) as jobs, Torture(report, jobs, args.only) as torture:
            for ended in [torture.start(kind, count) for kind, count in counts.items()]:
                figures |= ended.result()
    except KeyboardInterrupt:
        print(f"torture.py: interrupted; its files are in {out}", file=sys.stderr)
        return INTERRUPTED
    figures["seconds"] = round(time.monotonic() - began, 1)
    unwanted = [name for name, wanted in WANTED.items() if name in figures and not wanted(figures)]
    well = not unwanted and not report.failures
    if unwanted:
        report.say(f"not as wanted: {', '.join(unwanted)}")
    if well and args.out is None:
        shutil.rmtree(out, ignore_errors=True)
    elif not well:
        report.say(f"{len(report.failures)} failures; everything is in {out}")
    print(json.dumps(figures), flush=True)
    return 0 if well else FAILED


def _count(text: str) -> int:
    """A number of trials, at least 1; underscores are allowed."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _kinds(text: str) -> list[str]:
    """Names of kinds, separated by commas."""
    unknown = [name for name in text.split(",") if name not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no kind {unknown[0]!r}; there are {', '.join(KINDS)}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
