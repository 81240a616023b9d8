"""Indexes shards and reports what is in them: `python scripts/index.py SHARDS [OUT]`.

SHARDS is a folder of tars (or of train/ and val/), a pattern, or remote: https://host/p/{00000..00009}.tar,
s3://bucket/prefix/. Tars as img2dataset, webdataset and tar itself write them are read. In a folder that can
be written the indexes go beside the shards, else OUT is needed, and is what data.shards names in training:
remote shards then come through a cache. Nothing in the shards is changed. OUT also gets catalogue.idx, which
makes opening fast, duplicates.idx (data.unique=true), report.json and report.html, which says what to do
about each finding. Run again after an interruption or when shards are added: whole indexes are kept.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from shlex import quote
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.catalogue import CATALOGUE, Catalogue, repeated_keys, write_catalogue
from data.duplicates import DUPLICATES, write_duplicates
from data.findings import find_duplicates, survey
from data.index import Index
from data.index_report import FINE, advise, write_report
from data.indexing import Job, Outcome, index_shards
from data.opening import find_shards
from data.remote import list_shards, redact
from data.shard_index import DataError, index_path, is_address

DATA, INTERRUPTED = 3, 130
PAUSE = 5.0  # seconds between two lines of progress
MOST_KEYS = 100  # keys in two shards that are listed


def positive(text: str) -> int:
    """Returns a whole number above 0; raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def bits(text: str) -> int:
    """Returns a number of bits from 0 to 12; raises argparse's error."""
    if not text.isdecimal() or int(text) > 12:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to 12")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="index.py", description=description, epilog=notes)
    add = options.add_argument
    add("shards", help="folder, pattern, tar, or address with braces (https) or prefix (s3)")
    add("out", nargs="?", type=Path, help="folder for what is written; the shards' own if it can be written")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes (%(default)s)")
    add("--perceptual-hash", action="store_true", help="decode every picture once to find near duplicates")
    add("--near", type=bits, default=4, help="bits of 64 that near duplicates differ in (%(default)s)")
    add("--verify", action="store_true", help="compare every byte of shards that have an index, by SHA-256")
    add("--leave-out-damaged", action="store_true", help="write the catalogue without damaged shards")
    add("--cache", type=Path, default=Path("cache"), help="folder remote shards pass through (%(default)s)")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 wrong option, 3 damaged or missing data, 130 interrupted."""
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    options = parser()
    args = options.parse_args(argv)
    if args.out is None:
        folder = Path(args.shards)
        if is_address(args.shards) or (folder.exists() and not folder.is_dir()) or "*" in args.shards:
            options.error("OUT is needed: these shards are in no folder of their own; name a new folder")
        if folder.is_dir() and not os.access(folder, os.W_OK):
            options.error(f"OUT is needed: {folder} cannot be written; name a new folder")
    try:
        return index(args)
    except DataError as error:
        print(error, file=sys.stderr)
        return DATA
    except OSError as error:
        print(f"{error.filename or args.out}: {error.strerror}; check the disk, run again", file=sys.stderr)
        return DATA
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def index(args: argparse.Namespace) -> int:
    """Returns the exit code after indexing every part and writing the report."""
    started = time.monotonic()
    shards, out = args.shards, args.out if args.out is not None else Path(args.shards)
    folder = Path(shards)
    if not is_address(shards) and folder.is_dir() and out.resolve() == folder.resolve():
        out = folder  # however OUT is written, the indexes lie beside the shards
    split = not is_address(shards) and (folder / "train").is_dir() and (folder / "val").is_dir()
    places = (
        [(side, str(folder / side), out / side) for side in ("train", "val")]
        if split
        else [("", shards, out)]
    )
    parts = [_part(args, name, where, into) for name, where, into in places]
    stopped = any(
        (part["damaged"] and not part["left_out"]) or part["repeated_keys"]["count"] for part in parts
    )
    nexts = [] if stopped else [f"python train.py data.shards={quote(str(out))}" + _unique(parts)]
    report = {"shards": redact(shards), "out": str(out), "parts": parts, "next": nexts}
    _, page = write_report(out, report)
    _say(parts, time.monotonic() - started)
    print(f"report: {page}")
    for line in nexts:
        print(f"next: {line}")
    for part in parts:
        for each in part["damaged"]:
            print(each["problem"], file=sys.stderr)
    damaged = sum(len(part["damaged"]) for part in parts)
    if stopped:
        print(f"{damaged} damaged shards; no catalogue written: mend what is listed above", file=sys.stderr)
    return DATA if damaged or stopped else 0


def _unique(parts: Sequence[dict[str, Any]]) -> str:
    return " data.unique=true" if any(p["duplicates"] and p["duplicates"]["extra"] for p in parts) else ""


def _part(args: argparse.Namespace, name: str, shards: str, out: Path) -> dict[str, Any]:
    """Returns the findings about one part of a dataset after indexing it."""
    jobs = _jobs(args, shards, out)
    out.mkdir(parents=True, exist_ok=True)
    (out / DUPLICATES).unlink(missing_ok=True)
    outcomes: list[Outcome] = []
    with _Shown(f"indexing {name or redact(shards)}", len(jobs)) as shown:
        for outcome in index_shards(jobs, args.workers):
            outcomes.append(outcome)
            shown.add(outcome)
    outcomes.sort(key=lambda outcome: outcome.job.number)
    damaged = [
        {"shard": redact(each.job.shard), "problem": each.problem} for each in outcomes if each.index is None
    ]
    indexes = [each.index for each in outcomes if each.index is not None]
    part: dict[str, Any] = {
        "name": name,
        "shards": len(jobs),
        "kept": sum(each.kept for each in outcomes),
        "samples": sum(index.count for index in indexes),
        "bytes": sum(index.size for index in indexes),
        "fingerprint": None,
        "damaged": damaged,
        "left_out": bool(damaged and args.leave_out_damaged and indexes),
        "repeated_keys": {"count": 0, "more": False, "examples": []},
        "duplicates": None,
    }
    if not indexes:
        return part
    stamps = [index.header.index.stat().st_mtime_ns for index in indexes]
    catalogue = Catalogue.of(indexes, out, stamps)
    return _examine(args, part, catalogue, [each.job.shard for each in outcomes if each.index is None])


def _examine(
    args: argparse.Namespace, part: dict[str, Any], catalogue: Catalogue, left_out: list[str]
) -> dict[str, Any]:
    """Returns the findings about what was indexed; writes catalogue and duplicates where nothing stops it."""
    twice = list(islice(repeated_keys(catalogue, {}), MOST_KEYS + 1))
    examples = [[key, redact(shard), redact(other)] for key, shard, other in twice[:12]]
    part["repeated_keys"] = {
        "count": min(len(twice), MOST_KEYS), "more": len(twice) > MOST_KEYS, "examples": examples
    }  # fmt: skip
    part |= survey(catalogue)
    found = find_duplicates(catalogue, args.near if args.perceptual_hash else None)
    part["duplicates"] = found.findings
    part["fingerprint"] = fingerprint = Index(catalogue).fingerprint()
    if twice or (part["damaged"] and not part["left_out"]):
        (catalogue.folder / CATALOGUE).unlink(missing_ok=True)
        return part
    named = tuple(left_out if catalogue.outside() else [Path(shard).name for shard in left_out])
    write_catalogue(replace(catalogue, unique_keys=True, left_out=named))
    write_duplicates(catalogue.folder, fingerprint, found.shards, found.rows, len(catalogue))
    return part


def _jobs(args: argparse.Namespace, shards: str, out: Path) -> list[Job]:
    names = list_shards(shards) if is_address(shards) else [str(path) for path in find_shards(shards)]
    beside = out == Path(shards)
    return [
        Job(
            number=number,
            shard=shard if is_address(shard) or beside else str(Path(shard).absolute()),
            index=index_path(shard) if beside else out / f"{number:05d}-{shard.rpartition('/')[2]}.idx",
            spool=args.cache / "indexing",
            hashed=args.perceptual_hash,
            verify=args.verify,
        )
        for number, shard in enumerate(names)
    ]


def _say(parts: Sequence[dict[str, Any]], seconds: float) -> None:
    for part in parts:
        title = f"{part['name']}: " if part["name"] else ""
        kept = f", {part['kept']:,} kept from before" if part["kept"] else ""
        print(f"{title}{part['samples']:,} images in {part['shards']:,} shards{kept}, {seconds:.1f} s")
        for advice in advise(part):
            if advice.weight != FINE:
                print(f"- {advice.weight}: {advice.finding} {advice.remedy}")


class _Shown:
    """Shows how far the shards have come: a bar on a terminal, else a line now and then."""

    def __init__(self, title: str, shards: int) -> None:
        self.title, self.shards, self.done, self.images = title, shards, 0, 0
        self.began = self.said = time.monotonic()
        console = Console(soft_wrap=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("shards  {task.fields[rate]}"), TimeRemainingColumn(), console=console,
            disable=not console.is_terminal,
        )  # fmt: skip
        self.quiet = console.is_terminal
        self.task = self.bar.add_task(title, total=shards, rate="")

    def __enter__(self) -> "_Shown":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def add(self, outcome: Outcome) -> None:
        """Counts one more shard."""
        self.done += 1
        self.images += outcome.index.count if outcome.index is not None else 0
        now = time.monotonic()
        rate = f"{self.images / max(now - self.began, 1e-9):,.0f} images/s"
        self.bar.update(self.task, completed=self.done, rate=rate)
        if not self.quiet and (now - self.said >= PAUSE or self.done == self.shards):
            self.said = now
            print(f"{self.title}: {self.done:,}/{self.shards:,} shards  {rate}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
