"""Packs a folder of pictures with captions into shards: `python scripts/make_shards.py PICTURES OUT`.

Captions come from metadata.jsonl (or .csv, .tsv, .parquet; also captions.*) or from NAME.txt beside NAME.jpg.
Image bytes are stored as they are unless --resize; every picture is decoded once, and one that training could
not read is left out and listed in OUT/skipped.jsonl. Also left out, and listed: rows with `dup_of` set (see
--keep-duplicates) and pictures without a caption (see --keep-uncaptioned). A split column, or folders train/
and val/, give OUT/train and OUT/val. The bytes of a shard depend on its pictures and the options alone, not
on --workers. Run again after an interruption: whole shards of the same pictures and options are kept.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.captions import Columns, Picture, Skipped, find_table, read_pictures
from data.index import DataError
from data.packing import Done, Encoding, Ledger, ShardPlan, build_shard, make_plan
from data.shard_index import write_atomic

USAGE, DATA, INTERRUPTED = 2, 3, 130
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_bytes(text: str) -> int:
    """Returns a number of bytes from text such as 300MB, 2G or 4096; raises argparse's error."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 300MB")
    return int(float(match[1]) * UNITS[match[2]])


def positive(text: str) -> int:
    """Returns a whole number above 0; raises argparse's error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Returns the command's options."""
    description, _, notes = (__doc__ or "").partition("\n\n")
    options = argparse.ArgumentParser(prog="make_shards.py", description=description, epilog=notes)
    add = options.add_argument
    add("source", type=Path, help="folder of pictures (jpg, jpeg, png, webp)")
    add("out", type=Path, help="folder the shards are written to")
    add("--captions", type=Path, help="table of captions: .jsonl, .csv, .tsv or .parquet")
    add("--image-column", default=Columns.image, help="column with the pictures' paths (%(default)s)")
    add("--caption-column", default=Columns.caption, help="column with the captions (%(default)s)")
    add("--split-column", default=Columns.split, help="column with train, val or test (%(default)s)")
    add("--shard-size", type=positive, default=1000, help="pictures in a shard, at most (%(default)s)")
    add("--max-bytes", type=parse_bytes, default="300MB", help="bytes of pictures in a shard (%(default)s)")
    add(
        "--resize", type=positive, help="shrink pictures to this short side, in pixels, and encode them again"
    )
    add("--quality", type=positive, default=95, help="JPEG quality with --resize, 1 to 100 (%(default)s)")
    add("--workers", type=positive, default=os.cpu_count() or 1, help="processes (%(default)s)")
    add("--keep-duplicates", action="store_true", help="also pack rows whose dup_of is set")
    add("--keep-uncaptioned", action="store_true", help="also pack pictures without a caption")
    return options


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 wrong option, 3 data that cannot be packed, 130 interrupted."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    options = parser()
    args = options.parse_args(argv)
    if args.quality > 100:
        options.error("argument --quality: it goes from 1 to 100")
    if args.source.resolve() == args.out.resolve():
        options.error(f"OUT is the source folder {args.source}; name another one")
    try:
        pack(args)
    except DataError as error:
        print(error, file=sys.stderr)
        return DATA
    except OSError as error:
        print(
            f"{error.filename or args.out}: {error.strerror}; check the disk and run again", file=sys.stderr
        )
        return DATA
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


def pack(args: argparse.Namespace) -> None:
    """Writes the shards, OUT/plan.json and OUT/skipped.jsonl, and says what to type next."""
    started = time.monotonic()
    pictures, skipped = _pictures(args)
    encoding = Encoding(args.resize, args.quality)
    plans = make_plan(pictures, encoding, args.shard_size, args.max_bytes)
    for folder in {(args.out / plan.name).parent for plan in plans}:
        folder.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(args.out)
    todo = ledger.prepare(plans)
    with _reporter(sum(len(plan.pictures) for plan in todo), len(todo)) as report:
        run(args.out, todo, encoding, args.workers, ledger, report)
    finished = [ledger.done[plan.name] for plan in plans]
    skipped = skipped + [skip for done in finished for skip in done.skipped]
    lines = "".join(json.dumps(asdict(skip), ensure_ascii=False) + "\n" for skip in skipped)
    write_atomic(args.out / "skipped.jsonl", lines.encode("utf-8", "replace"))
    _summary(args.out, plans, ledger, skipped, len(plans) - len(todo), time.monotonic() - started)


def _pictures(args: argparse.Namespace) -> tuple[list[Picture], list[Skipped]]:
    source: Path = args.source
    table: Path | None = args.captions
    if table is None:
        table = find_table(source) if source.is_dir() else None
    elif not table.is_file():
        table = source / table
        if not table.is_file():
            raise DataError(f"{args.captions}: no such file, nor in {source}; correct --captions")
    columns = Columns(args.image_column, args.caption_column, args.split_column)
    return read_pictures(source, table, columns, args.keep_duplicates, args.keep_uncaptioned)


def run(
    out: Path,
    todo: list[ShardPlan],
    encoding: Encoding,
    workers: int,
    ledger: Ledger,
    report: Callable[[ShardPlan, Done], None],
) -> None:
    """Makes the shards that are missing and enters each in the ledger when it is whole."""
    if workers == 1 or len(todo) < 2:
        for plan in todo:
            _enter(ledger, plan, build_shard(out, plan, encoding), report)
        return
    # Spawned, as forking a process that holds torch's threads can deadlock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context)
    try:
        futures = {pool.submit(build_shard, out, plan, encoding): plan for plan in todo}
        for future in as_completed(futures):
            _enter(ledger, futures[future], future.result(), report)
    except BrokenProcessPool as error:
        raise DataError(
            f"{out}: a worker died, maybe out of memory; run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _enter(ledger: Ledger, plan: ShardPlan, done: Done, report: Callable[[ShardPlan, Done], None]) -> None:
    ledger.done[plan.name] = done
    ledger.save()
    report(plan, done)


class _Lines:
    """Reports one line per shard, for output that is no terminal."""

    def __init__(self, shards: int) -> None:
        self.shards, self.count, self.started, self.images = shards, 0, time.monotonic(), 0

    def __enter__(self) -> Callable[[ShardPlan, Done], None]:
        return self.report

    def __exit__(self, *_: object) -> None:
        pass

    def report(self, plan: ShardPlan, done: Done) -> None:
        self.count += 1
        self.images += len(plan.pictures)
        rate = self.images / max(1e-9, time.monotonic() - self.started)
        print(
            f"[{self.count}/{self.shards}] {plan.name}: {done.count} images ({rate:.0f} images/s)", flush=True
        )


class _Bar:
    """Reports with a progress bar on a terminal."""

    def __init__(self, images: int) -> None:
        rate = TextColumn("{task.fields[rate]:.0f} images/s")
        self.progress = Progress(
            TextColumn("shards"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn()
        )
        self.task = self.progress.add_task("", total=images, rate=0.0)
        self.images, self.started = 0, time.monotonic()

    def __enter__(self) -> Callable[[ShardPlan, Done], None]:
        self.progress.start()
        return self.report

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def report(self, plan: ShardPlan, done: Done) -> None:
        self.images += len(plan.pictures)
        rate = self.images / max(1e-9, time.monotonic() - self.started)
        self.progress.update(self.task, completed=self.images, rate=rate)


def _reporter(images: int, shards: int) -> AbstractContextManager[Callable[[ShardPlan, Done], None]]:
    return _Bar(images) if sys.stdout.isatty() else _Lines(shards)


def _summary(
    out: Path, plans: list[ShardPlan], ledger: Ledger, skipped: list[Skipped], kept: int, seconds: float
) -> None:
    counts: Counter[str] = Counter()
    for plan in plans:
        counts[plan.name.rpartition("/")[0]] += ledger.done[plan.name].count
    if not counts.total():
        last = skipped[-1]
        raise DataError(
            f"{last.name}: {last.reason}; no picture could be packed, see {out / 'skipped.jsonl'}"
        )
    parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()) if name)
    kept_note = f", {kept} kept from before" if kept else ""
    print(
        f"{counts.total()} images{f' ({parts})' if parts else ''} in {len(plans)} shards{kept_note}, "
        f"{seconds:.1f} s: {out}"
    )
    if skipped:
        reasons = Counter(re.sub(r"^(duplicate of) .*", r"\1 another", skip.reason) for skip in skipped)
        reason, count = reasons.most_common(1)[0]
        print(f"{len(skipped)} left out, {count} of them: {reason} (all in {out / 'skipped.jsonl'})")
    print(f"next: python train.py data.shards={out}")


if __name__ == "__main__":
    sys.exit(main())
