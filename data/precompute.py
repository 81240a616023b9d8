"""The side of precomputing that is about data: which shards, who makes which, pictures decoded, notes kept.

OUT gets a shard for each of the source, of the same name and keys, so that split and order stay what they
are. Any number of processes share the work: each takes a shard by locking `NAME.lock`, which the system frees
when a process ends however it ends, and a finished shard has its note `NAME.done.json`, with the digests of
what it was made by and from. There is no file that two processes write at once. `scripts/precompute.py` is
the command.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from data.cache import ShardCache
from data.catalogue import CATALOGUE
from data.fields import BadSample, decode_caption
from data.index import Index
from data.order import Purpose, mix, uniform
from data.provenance import AGAIN, DONE, FILE, Preprocessing, Provenance, read_document, short
from data.shard_index import DataError, ShardHeader, ShardIndex, index_path, key_hash, write_atomic
from data.transforms import Decoder, ResizeCrop

LOCK = ".lock"
AHEAD = 2  # batches that each process may have decoded before they are wanted
#: Fields that are copied as they are.
COPIED = ("json", "txt")


@dataclass(frozen=True)
class SourceShard:
    """A shard to precompute: its `name` below OUT, its header, and its place in the index it belongs to."""

    name: str
    header: ShardHeader
    index: Index
    number: int

    def load(self) -> ShardIndex:
        """Returns the shard's index; raises DataError."""
        return self.index.shard(self.number)


def source_shards(shards: str, cache: ShardCache | None = None) -> tuple[list[SourceShard], str]:
    """Returns the shards of a dataset, those of train/ and val/ where it is split so, and its fingerprint.

    `cache` keeps remote ones. Raises DataError where it cannot be opened, or two shards have the same name.
    """
    folder = Path(shards)
    split = (folder / "train").is_dir() and (folder / "val").is_dir()
    sides = ["train/", "val/"] if split else [""]
    found: dict[str, SourceShard] = {}
    fingerprints = []
    for side in sides:
        index = Index.open(str(folder / side) if side else shards, cache)
        fingerprints.append(index.fingerprint())
        for number, header in enumerate(index.headers):
            name = side + header.shard.rpartition("/")[2]
            if name in found:
                raise DataError(
                    f"{header.shard}: another shard has its name, {found[name].header.shard}; "
                    "precompute their folders one by one"
                )
            found[name] = SourceShard(name, header, index, number)
    return list(found.values()), " ".join(fingerprints)


@dataclass(frozen=True)
class Picture:
    """One sample of a shard, decoded: `pixels` uint8 [V 3 H W], its clean `caption`, what is copied."""

    key: str
    pixels: np.ndarray
    caption: str
    copied: dict[str, bytes]


@dataclass(frozen=True)
class LeftOut:
    """A sample that cannot be used, and why."""

    shard: str
    key: str
    field: str
    reason: str


class PictureReader:
    """Reads and decodes the samples of shards; picklable, for processes that do nothing else.

    `cache` keeps remote shards; without one only local ones are read.
    """

    def __init__(self, preprocessing: Preprocessing, cache: ShardCache | None = None) -> None:
        self.cache = cache
        options = preprocessing
        self.preprocessing = options
        self.decoder = Decoder(background=options.background)
        moved = options.variants > 1
        self.crop = ResizeCrop(options.resolution, options.random_crop and moved, options.flip and moved)

    def __call__(self, index: ShardIndex, rows: Sequence[int]) -> list[Picture | LeftOut]:
        """Returns what is at `rows` of a shard; raises DataError where it cannot be read."""
        found: list[Picture | LeftOut] = []
        header, path = index.header, Path(index.shard)
        try:
            if self.cache is not None:
                path = self.cache.path(header.shard, header.size, header.sha256)
            with path.open("rb") as stream:
                for row in rows:
                    try:
                        found.append(self._picture(stream.fileno(), index, row))
                    except BadSample as error:
                        found.append(LeftOut(str(index.shard), index.key(row), error.field, error.reason))
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the disk") from error
        return found

    def _picture(self, handle: int, index: ShardIndex, row: int) -> Picture:
        field = index.image_field(row)
        if field is None:
            raise BadSample("jpg", "no image field (jpg, jpeg, png or webp)")
        key = index.key(row)
        image = self.decoder(_read(handle, index, row, field), field, side=self.crop.resolution)
        draws = variant_draws(self.preprocessing, key)
        pixels = np.stack([self.crop(image, *each).numpy() for each in draws])
        copied = {name: _read(handle, index, row, name) for name in COPIED if index.extent(row, name)}
        return Picture(key, pixels, decode_caption(copied["txt"]) if "txt" in copied else "", copied)


def variant_draws(preprocessing: Preprocessing, key: str) -> Iterator[tuple[float, float, float]]:
    """Yields the draws (crop x, crop y, mirror) of each variant of the picture of a key.

    Crops are independent; the mirror draws are spread evenly, so that half of the variants are mirrored (the
    first ones) and choosing among them evenly is the distribution that training from pictures draws from.
    """
    for variant in range(preprocessing.variants):
        place = mix(key_hash(key), variant)
        x, y = (uniform(preprocessing.seed, place, axis) for axis in (Purpose.CROP_X, Purpose.CROP_Y))
        yield x, y, (variant + 0.5) / preprocessing.variants


def _read(handle: int, index: ShardIndex, row: int, field: str) -> bytes:
    extent = index.extent(row, field)
    assert extent is not None
    data = os.pread(handle, extent.size, extent.offset)
    if google_crc32c.value(data) != extent.crc32c:
        raise BadSample(field, f"its crc32c is not {extent.crc32c:08x}, as the index says")
    return data


class Decoding:
    """Decoded batches of a shard, made ahead by other processes; a context manager that ends them."""

    def __init__(self, reader: PictureReader, workers: int, rows: int) -> None:
        self.reader = reader
        self.workers = workers
        self.rows = rows
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Decoding":
        if self.workers:
            # Forking a process that holds torch's threads can deadlock; the server imports everything once.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["__main__", "data.precompute"])
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=follow_parent)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def batches(self, shard: SourceShard) -> Iterator[list[Picture | LeftOut]]:
        """Yields all samples of a shard, in order; raises DataError."""
        index = shard.load()
        starts = range(0, index.count, self.rows)
        parts = [range(start, min(start + self.rows, index.count)) for start in starts]
        if self._pool is None:
            yield from (self.reader(index, part) for part in parts)
            return
        running: deque[Future[list[Picture | LeftOut]]] = deque()
        try:
            for part in parts:
                running.append(self._pool.submit(self.reader, index, part))
                if len(running) > AHEAD * self.workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def follow_parent() -> None:
    """Lets the main process decide about signals, and ends this one when it ends, however it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def flat(document: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested objects as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in document.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found


class Output:
    """The folder OUT: what it was made by, which of its shards are done, and who is at work on which."""

    def __init__(self, folder: Path, provenance: Provenance) -> None:
        self.folder = folder
        self.provenance = provenance
        self.digest = provenance.digest()

    def prepare(self, shards: list[SourceShard], dataset: str, code: str) -> None:
        """Writes OUT/precomputed.json and removes what is no shard of the source any more.

        Raises DataError where OUT was made by something else, or holds shards of another program.
        """
        for parent in {(self.folder / shard.name).parent for shard in shards} | {self.folder}:
            parent.mkdir(parents=True, exist_ok=True)
        with self._alone():
            path = self.folder / FILE
            if path.exists():
                self._compare(path, read_document(path))
            elif strange := next(self.folder.rglob("*.tar"), None):
                raise DataError(f"{strange}: made by something else; choose another OUT, or empty this one")
            about = {"dataset": dataset, "shards": len(shards), "code": code}
            document = {**self.provenance.content(), **about}
            write_atomic(path, (json.dumps(document, indent=2, sort_keys=True) + "\n").encode())
            names = {shard.name for shard in shards}
            for note in self.folder.rglob(f"*{DONE}"):
                name = note.relative_to(self.folder).as_posix().removesuffix(DONE)
                if name not in names:
                    self._remove(name)

    def _compare(self, path: Path, before: dict[str, Any]) -> None:
        then, now = flat(before), flat(self.provenance.content())
        for name in now:
            if then.get(name) != now[name]:
                raise DataError(
                    f"{path}: these shards were made with {name} {short(then.get(name))}, now it is "
                    f"{short(now[name])}; choose another OUT, or delete {self.folder}"
                )

    @contextlib.contextmanager
    def claim(self, shard: SourceShard) -> Iterator[bool]:
        """Whether this process is to make a shard: it is not done, and nobody else is at work on it."""
        if self.is_done(shard):
            yield False
            return
        path = self.folder / f"{shard.name}{LOCK}"
        with path.open("wb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            # Between the first look and the lock another process may have made it, and removed this file.
            if not self.is_done(shard):
                yield True
            else:
                yield False
            if self.is_done(shard):
                path.unlink(missing_ok=True)

    def is_done(self, shard: SourceShard) -> bool:
        """Whether a shard is finished, by this autoencoder and these options, from the bytes it has now."""
        note = self._note(shard.name)
        if note is None or (note.get("provenance"), note.get("source")) != (self.digest, shard.header.sha256):
            return False
        path = self.folder / shard.name
        if not note.get("count"):
            return True
        return path.is_file() and path.stat().st_size == note.get("size")

    def finish(self, shard: SourceShard, made: ShardIndex | None, left_out: list[LeftOut]) -> None:
        """Notes that a shard is finished; `made` is None where it came to no samples."""
        if made is None:
            self._remove(shard.name)
        note = {
            "provenance": self.digest,
            "source": shard.header.sha256,
            "count": made.count if made else 0,
            "size": made.size if made else 0,
            "sha256": made.sha256 if made else "",
            "left_out": [vars(each) for each in left_out],
        }
        text = json.dumps(note, ensure_ascii=False) + "\n"
        write_atomic(self.folder / f"{shard.name}{DONE}", text.encode("utf-8", "replace"))

    def conclude(self, shards: list[SourceShard]) -> tuple[int, int, int]:
        """Returns (shards done, samples in them, samples left out) after writing OUT/skipped.jsonl."""
        with self._alone():
            notes = [self._note(shard.name) for shard in shards if self.is_done(shard)]
            left_out = [each for note in notes if note for each in note["left_out"]]
            lines = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in left_out)
            write_atomic(self.folder / "skipped.jsonl", lines.encode("utf-8", "replace"))
        return len(notes), sum(note["count"] for note in notes if note), len(left_out)

    def _note(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}{DONE}"
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise DataError(f"{path}: damaged; delete it and run again: {AGAIN}") from None
        return note if isinstance(note, dict) else None

    def _remove(self, name: str) -> None:
        # The note goes first: a kill in between leaves a shard that will be made again.
        shard = self.folder / name
        for path in (self.folder / f"{name}{DONE}", shard.parent / CATALOGUE, index_path(shard), shard):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with (self.folder / ".precompute.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
