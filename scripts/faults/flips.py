"""Damage on disk: single bits flipped and files cut at every 512 bytes, read by what training reads with.

Each kind of file is a `Target`: a folder that is whole, and a way to read all of it. A flip or a cut is
detected where reading ends in an error of ours, leaves a line in the list of bad samples, or falls back to a
checkpoint that verifies; harmless where everything read is the same as before; and silent otherwise, which
must never be. What is read around the damage has to be right in either case.
"""

import functools
import hashlib
import json
import os
import random
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from scripts.faults.jobs import Jobs, Report
from scripts.faults.runs import write_data
from scripts.faults.saves import content
from scripts.faults.zygote import Zygote

BLOCK = 512
SAMPLES = 24
PATIENCE = 1800.0
#: Everything that was read, by name, and whether something was noticed on the way.
Observation = tuple[dict[str, str], bool]


class Target(ABC):
    """Interface: files of one kind, and what reads them.

    Args:
        folder: for the whole files and for a copy of them that is damaged.
    """

    #: Share of the flips.
    share: float

    def __init__(self, folder: Path) -> None:
        self.whole = folder / "whole"
        self.work = folder / "work"
        self.cache = folder / "cache"

    @abstractmethod
    def make(self) -> None:
        """Writes the whole files into `self.whole`."""

    @abstractmethod
    def read(self) -> Observation:
        """Reads everything in `self.work`; raises one of our errors where damage is noticed."""

    def files(self) -> list[str]:
        """The files that are damaged, by their paths below the folder."""
        paths = (p for p in sorted(self.whole.rglob("*")) if p.is_file() and not p.is_symlink())
        return [path.relative_to(self.whole).as_posix() for path in paths if path.stat().st_size]

    def renew(self) -> None:
        """Makes the copy whole again, with the times of change of the whole files."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(self.cache, ignore_errors=True)
        shutil.copytree(self.whole, self.work, symlinks=True)


class Shards(Target):
    """Shards with their indexes and catalogue, read as training reads them; one kind of file is damaged.

    Args:
        folder: as for every target.
        suffixes: the endings of the files that are damaged.
        share: of the flips.
        indexed: whether the shards still have their indexes, which know their checksums.
    """

    def __init__(self, folder: Path, suffixes: tuple[str, ...], share: float, indexed: bool = True) -> None:
        super().__init__(folder)
        self.suffixes = suffixes
        self.share = share
        self.indexed = indexed

    def make(self) -> None:
        write_data(self.whole, SAMPLES, 3)
        if self.indexed:
            self.open(self.whole)  # leaves the catalogue
        else:
            for index in self.whole.glob("*.idx"):
                index.unlink()

    def files(self) -> list[str]:
        return [name for name in super().files() if name.endswith(self.suffixes)]

    def open(self, folder: Path) -> Any:
        """The training set of the shards in `folder`."""
        from data.datamodule import ShardData

        options: dict[str, Any] = {
            "shards": str(folder), "resolution": 16, "val_fraction": 0.0, "max_bad_fraction": 1.0,
            "workers": 0,
        }  # fmt: skip
        if "cache" in {field.name for field in fields(ShardData)}:
            options["cache"] = str(self.cache)
        return ShardData(**options).open(seed=0, bad_samples=self.work.parent / "bad.jsonl")[0]

    def read(self) -> Observation:
        bad = self.work.parent / "bad.jsonl"
        bad.unlink(missing_ok=True)
        dataset = self.open(self.work)
        seen = {}
        for index in range(SAMPLES):
            sample = dataset[index]
            if not sample.substituted:
                pixels = hashlib.sha256(sample.pixels.numpy().tobytes()).hexdigest()
                seen[str(index)] = f"{sample.key} {sample.caption} {pixels}"
        return seen, bad.exists()


class Moments(Target):
    """Precomputed shards with moments and text embeddings, and all notes beside them."""

    share = 0.15
    _TEXT: ClassVar = {
        "weights": "w" * 64, "tokenizer": "t" * 64, "context_length": 6, "dim": 3, "mask_padding": True,
    }  # fmt: skip
    _OPTIONS: ClassVar = {"random_crop": False, "flip": False, "background": (255, 255, 255)}

    def make(self) -> None:
        from data.index import Index
        from data.npy import encode_npy
        from data.precompute import Output, source_shards
        from data.provenance import Preprocessing, Provenance
        from data.writer import write_shard

        made = Provenance("a" * 64, {"name": "kl"}, Preprocessing(16), "float32", (4, 2, 2), dict(self._TEXT))
        sources, dataset = source_shards(str(write_data(self.whole.with_name("pictures"), SAMPLES, 3)))
        output = Output(self.whole, made)
        output.prepare(sources, dataset, "unknown")
        random = np.random.default_rng(0)
        for source in sources:
            index, samples = source.load(), []
            for row in range(index.count):
                fields = {
                    "moments.npy": encode_npy(random.normal(size=(1, 4, 2, 2)).astype("f4")),
                    "text.npy": encode_npy(random.normal(size=(1 + row % 4, 3)).astype("f4")),
                    "pooled.npy": encode_npy(random.normal(size=3).astype("f4")),
                    "txt": f"caption {row}".encode(),
                }
                samples.append((index.key(row), fields))
            output.finish(source, write_shard(self.whole / source.name, samples), [])
        Index.open(str(self.whole))  # leaves the catalogue

    def read(self) -> Observation:
        from data.moments import open_moments
        from data.provenance import check_provenance

        bad = self.work.parent / "bad.jsonl"
        bad.unlink(missing_ok=True)
        check_provenance(self.work, "a" * 64, 16, self._TEXT, self._OPTIONS)
        dataset, _ = open_moments(
            str(self.work), 0, 0.0, with_text=True, max_bad_fraction=1.0, bad_samples=bad
        )
        seen = {}
        for index in range(SAMPLES):
            rows = dataset[index]
            if not rows.substituted:
                digest = hashlib.sha256(rows.moments.numpy().tobytes())
                assert rows.text is not None
                for array in rows.text[0]:
                    digest.update(array.tobytes())
                seen[str(index)] = f"{rows.keys} {digest.hexdigest()}"
        return seen, bad.exists()


class Checkpoints(Target):
    """A stage's checkpoints, of which the newest is damaged."""

    share = 0.2

    def make(self) -> None:
        from models.checkpoint import save_checkpoint

        for images in (1, 2):
            tensors, documents = content(images)
            small = {file: {k: t[:200].clone() for k, t in named.items()} for file, named in tensors.items()}
            save_checkpoint(self.whole, images, small, documents)

    def files(self) -> list[str]:
        return [name for name in super().files() if not name.startswith("images-000000000001/")]

    def read(self) -> Observation:
        from models.checkpoint import fingerprint, newest

        checkpoint = newest(self.work)
        if checkpoint is None:
            return {"images": "none"}, False
        seen = {file: fingerprint(checkpoint.tensors(file)) for file in ("weights", "ema", "optimizer")}
        seen |= {name: json.dumps(checkpoint.document(name), sort_keys=True) for name in ("config", "state")}
        if checkpoint.images == 1:
            return {f"before {name}": value for name, value in seen.items()}, True
        return seen, False


def targets(folder: Path) -> dict[str, Target]:
    """Every kind of file that is damaged, by name."""
    return {
        "shards": Shards(folder / "shards", (".tar",), 0.35),
        "indexes": Shards(folder / "indexes", (".tar.idx",), 0.2),
        "catalogue": Shards(folder / "catalogue", ("catalogue.idx",), 0.1),
        "moments": Moments(folder / "moments"),
        "checkpoints": Checkpoints(folder / "checkpoints"),
        # Without an index nothing knows what a payload should be; but a cut is seen when one is built.
        "shards without index": Shards(folder / "bare", (".tar",), 0.0, indexed=False),
    }


def run_flips(jobs: Jobs, report: Report, flips: int) -> dict[str, Any]:
    """Figures of `flips` flipped bits and of every cut: how many detected, harmless and silent."""
    tasks: list[Callable[[Zygote], Counter[str]]] = []
    parts = 1 if report.short else 2 * jobs.count
    for name, target in targets(report.out).items():
        count = round(flips * target.share)
        for part in range(parts):
            share = count * (part + 1) // parts - count * part // parts
            tasks.append(functools.partial(_part, report, name, part, parts, share))
    total: Counter[str] = Counter()
    for result in jobs.run(tasks):
        total += result
    names = ("flips", "truncations", "detected", "harmless", "silent", "untidy")
    damaged = {name: count for name, count in sorted(total.items()) if name not in names}
    return {**{name: total[name] for name in names}, "damaged": damaged}


def _part(report: Report, name: str, part: int, parts: int, flips: int, zygote: Zygote) -> Counter[str]:
    """One process's share of the damage to one target."""
    folder = report.out / f"flips-{name.replace(' ', '-')}-{part}"
    folder.mkdir(parents=True)
    log, results = folder / "log", folder / "results.jsonl"
    cuts = 16 if report.short else 1
    words = [name, str(folder), str(report.seed), str(part), str(parts), str(flips), str(cuts)]
    trial = zygote.start("damage", words, folder, log)
    code = trial.wait(PATIENCE)
    if code != 0:
        trial.kill()
        report.fail("flips", f"{name}: reading ended with {code}: {trial.said()[-400:]}", folder)
    counted: Counter[str] = Counter()
    for line in results.read_text().splitlines() if results.exists() else []:
        entry = json.loads(line)
        counted += Counter(entry.get("counted", {}))
        if "fault" in entry:
            report.fail("flips", entry["fault"], folder)
    return counted


def damage(words: Sequence[str]) -> None:
    """The trial itself: damages one target again and again, and writes down what reading it gave."""
    name, folder, seed, part, parts, flips, cuts = words[0], Path(words[1]), *(int(w) for w in words[2:])
    target = targets(folder)[name]
    target.make()
    target.renew()
    wanted = target.read()
    target.renew()
    if wanted[1] or target.read() != wanted:
        raise SystemExit(f"{name}: the whole files are not read the same way twice")
    chance = random.Random(f"{seed} {name} {part}")
    counted: Counter[str] = Counter()
    known = _known(target, wanted)
    with (folder / "results.jsonl").open("w", encoding="utf-8") as results:
        for kind, where, harm in _harms(target, chance, part, parts, flips, cuts):
            target.renew()
            harm()
            outcome, why = look(target, wanted, known)
            counted[kind] += 1
            counted[outcome] += 1
            counted[name] += 1
            if outcome in ("silent", "untidy"):
                fault = f"{name}: {where} was {outcome}: {why}"
                results.write(json.dumps({"fault": fault}) + "\n")
        results.write(json.dumps({"counted": counted}) + "\n")


def _known(target: Target, wanted: Observation) -> dict[str, str]:
    """Everything a reader may give although something was noticed: the checkpoint before, if there is one."""
    known = dict(wanted[0])
    if isinstance(target, Checkpoints):
        target.renew()
        shutil.rmtree(target.work / "images-000000000002")
        known |= target.read()[0]
        target.renew()
    return known


def look(target: Target, wanted: Observation, known: dict[str, str]) -> tuple[str, str]:
    """detected, harmless, silent or untidy (an error that is not ours), and why."""
    from data.index import DataError
    from models.checkpoint import CheckpointError

    try:
        seen, noticed = target.read()
    except (DataError, CheckpointError, OSError) as error:
        return ("detected", "") if str(error).strip() else ("untidy", "an error that says nothing")
    except Exception as error:
        return "untidy", f"{type(error).__name__}: {error}"
    if seen == wanted[0] and not noticed:
        return "harmless", ""
    wrong = [name for name, value in seen.items() if known.get(name) != value]
    if wrong or not noticed:
        return "silent", f"{', '.join(wrong[:3]) or 'what is missing'} differs"
    return "detected", ""


def _harms(
    target: Target, chance: random.Random, part: int, parts: int, flips: int, cuts: int
) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """(flips or truncations, where, how to do it) of everything this process does to a target."""
    files = target.files()
    for _ in range(flips if files else 0):
        name = chance.choice(files)
        size = (target.whole / name).stat().st_size
        # Half of them where headers and end marks are, of which a file has few.
        near = chance.choice(("head", "tail", "any", "any"))
        place = {
            "head": chance.randrange(min(size, 2 * BLOCK)),
            "tail": size - 1 - chance.randrange(min(size, 2 * BLOCK)),
            "any": chance.randrange(size),
        }[near]
        bit = chance.randrange(8)
        old = chance.random() < 0.5  # bits that rot leave the time of change as it was
        flip = functools.partial(flip_bit, target.work / name, place, bit, old)
        yield "flips", f"bit {bit} of byte {place} of {name} flipped", flip
    for name in files:
        size = (target.whole / name).stat().st_size
        for number, end in enumerate(range(0, size, BLOCK)):
            if number % parts == part and number // parts % cuts == 0:
                cut = functools.partial(cut_file, target.work / name, end)
                yield "truncations", f"{name} cut at byte {end}", cut


def flip_bit(path: Path, place: int, bit: int, keep_time: bool = False) -> None:
    """Flips one bit of a file in place; with `keep_time` its time of change stays."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_file(path: Path, size: int) -> None:
    """Cuts a file to `size` bytes."""
    os.truncate(path, size)
