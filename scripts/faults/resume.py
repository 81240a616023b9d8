"""How long it takes to go on in the middle of a hundred million samples.

The dataset is real but for its size: a few distinct shards of a thousand small pictures, hard-linked under a
hundred thousand names, with the catalogue that indexing would write. The keys of the links are the same, so
the catalogue is written as if they had been compared. A first opening counts the split and keeps the counts
in the cache, as the beginning of a run does; then fresh processes open the dataset at a late position.
"""

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from scripts.faults.jobs import Jobs, Report
from scripts.faults.runs import write_data
from scripts.faults.zygote import PROJECT, Zygote

SHARD_SAMPLES = 1_000
DISTINCT = 4
BATCH = 64
#: Where the run goes on, as a share of the samples.
LATE = 0.77
#: Fresh processes, of which the fastest counts, and in a short torture.
TIMES, FEW_TIMES = 3, 1
PATIENCE = 300.0
#: Links that a file may have on common file systems, well below the least of them.
MOST_LINKS = 30_000


def run_resume(jobs: Jobs, report: Report, samples: int) -> dict[str, Any]:
    """Figures of a resume among `samples` samples: seconds with and without imports, and peak memory."""
    return jobs.run([functools.partial(_resume, report, samples)])[0]


def _resume(report: Report, samples: int, zygote: Zygote) -> dict[str, Any]:
    """The figures, measured in one job."""
    folder = report.out / "resume"
    shards = max(DISTINCT, samples // SHARD_SAMPLES)
    began = time.monotonic()
    write_dataset(folder / "shards", shards)
    made = time.monotonic() - began
    first = _forked(folder, zygote)
    start = int(LATE * shards * SHARD_SAMPLES) // BATCH * BATCH
    late = [_fresh(folder, start) for _ in range(FEW_TIMES if report.short else TIMES)]
    shutil.rmtree(folder)
    best = min(late, key=lambda figures: figures["seconds"])
    return {
        "resume_samples": shards * SHARD_SAMPLES, "resume_seconds": round(best["seconds"], 2),
        "resume_process_seconds": round(best["process_seconds"], 2),
        "resume_peak_mib": round(best["peak_mib"]), "resume_imports_mib": round(best["imports_mib"]),
        "first_open_seconds": round(first["seconds"], 2), "resume_made_seconds": round(made, 1),
    }  # fmt: skip


def write_dataset(folder: Path, shards: int) -> None:
    """Writes a folder of `shards` shards that are links to a few, with their indexes and a catalogue."""
    from data.catalogue import Catalogue, write_catalogue
    from data.shard_index import read_index

    distinct = max(DISTINCT, -(-shards // MOST_LINKS))
    real = write_data(folder.with_name("real"), SHARD_SAMPLES * distinct, distinct, side=16)
    folder.mkdir(parents=True)
    read = [read_index(str(real / f"{k:05d}.tar")) for k in range(distinct)]
    indexes, stamps = [], []
    for number in range(shards):
        source, name = real / f"{number % distinct:05d}.tar", folder / f"{number:06d}.tar"
        os.link(source, name)
        os.link(source.with_name(source.name + ".idx"), name.with_name(name.name + ".idx"))
        index = read[number % distinct]
        header = replace(index.header, shard=str(name), index=name.with_name(name.name + ".idx"))
        indexes.append(replace(index, header=header))
        stamps.append(index.header.index.stat().st_mtime_ns)
    write_catalogue(replace(Catalogue.of(indexes, folder, stamps), unique_keys=True))


def _forked(folder: Path, zygote: Zygote) -> dict[str, float]:
    """Figures of a first opening, in a forked process, whose imports and memory are not its own."""
    log = folder / "first.log"
    trial = zygote.start("resume", [str(folder), "0"], folder, log)
    if (code := trial.wait(PATIENCE)) != 0:
        trial.kill()
        raise RuntimeError(f"the first opening ended with {code}: {trial.said()[-600:]}")
    return dict(json.loads(trial.said().splitlines()[-1]))


def _fresh(folder: Path, start: int) -> dict[str, float]:
    """Figures of a fresh process that opens the dataset and makes the batch after `start` samples."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "scripts.faults.resume", str(folder), str(start)],
        cwd=PROJECT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"resuming at {start} ended with {done.returncode}: {done.stderr[-600:]}")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_seconds": time.monotonic() - began}


def measure(words: Sequence[str]) -> dict[str, float]:
    """Seconds from opening the dataset in `words[0]` to the batch after `words[1]` samples, and peaks."""
    import torch

    from data.datamodule import DataModule, ShardData

    imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    folder, start = Path(words[0]), int(words[1])
    options: dict[str, Any] = {"shards": str(folder / "shards"), "resolution": 16, "workers": 0}
    if "cache" in {field.name for field in fields(ShardData)}:
        options["cache"] = str(folder / "cache")
    began = time.perf_counter()
    train, val = ShardData(**options).open(seed=0)
    data = DataModule(train, val, lambda texts: torch.zeros(len(texts), 4, dtype=torch.int64), BATCH, 0)
    loader = data.train_loader(start, start + 10 * BATCH)
    batch = next(iter(loader))
    seconds = time.perf_counter() - began
    if batch.indices.tolist() != list(range(start, start + BATCH)):
        raise RuntimeError(f"the batch after {start} samples holds others: {batch.indices.tolist()[:4]}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": seconds, "peak_mib": peak, "imports_mib": imports}


def tell_measured(words: Sequence[str]) -> None:
    """Prints what `measure` returns as JSON."""
    print(json.dumps(measure(words)), flush=True)


if __name__ == "__main__":
    tell_measured(sys.argv[1:])
