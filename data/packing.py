"""Packs pictures into shards: a plan that fixes every shard's content, and a ledger for taking up a run.

The bytes of a shard depend on its pictures and the encoding alone, so shards can be made in any order by any
number of processes. Each picture is decoded once; one that training could not read is left out. The ledger,
OUT/plan.json, ties each finished shard to a digest of what it was made from: whole shards of the same
pictures and options are kept, all others are made again. `scripts/make_shards.py` is the command.
"""

import hashlib
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from data.captions import Picture, Skipped
from data.catalogue import CATALOGUE
from data.index import DataError, current_index, index_path, read_index
from data.shard_index import write_atomic
from data.transforms import BadSample, Decoder, decode_caption
from data.writer import write_shard

PLAN_VERSION = 1
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@dataclass(frozen=True)
class Encoding:
    """How pictures are stored: as they are, or with a short side of at most `resize` pixels."""

    resize: int | None = None
    quality: int = 95


@dataclass(frozen=True)
class ShardPlan:
    """One shard to write: its path below OUT, its pictures, and a hash of all its bytes depend on."""

    name: str
    pictures: tuple[Picture, ...]
    digest: str


@dataclass(frozen=True)
class Done:
    """What came of one planned shard: samples written, maybe 0, its SHA-256, pictures left out."""

    digest: str
    count: int
    sha256: str
    skipped: list[Skipped] = field(default_factory=list)


def make_plan(
    pictures: list[Picture], encoding: Encoding, shard_size: int, max_bytes: int
) -> list[ShardPlan]:
    """Returns the shards to write: pictures in order, at most `shard_size` and about `max_bytes` in each."""
    splits = {picture.split or "train" for picture in pictures}
    groups: dict[str, list[list[Picture]]] = {}
    held: dict[str, int] = {}
    for picture in pictures:
        # With one side only there is nothing to keep apart: it goes into OUT itself, but a test set never.
        apart = {"train", "val"} <= splits or picture.split == "test"
        folder = f"{picture.split or 'train'}/" if apart else ""
        shards, size = groups.setdefault(folder, [[]]), picture.path.stat().st_size
        if shards[-1] and (len(shards[-1]) >= shard_size or held[folder] + size > max_bytes):
            shards.append([])
        if not shards[-1]:
            held[folder] = 0
        shards[-1].append(picture)
        held[folder] += size
    return [
        ShardPlan(f"{folder}{number:05d}.tar", tuple(shard), _digest(shard, encoding))
        for folder, shards in sorted(groups.items())
        for number, shard in enumerate(shards)
    ]


def _digest(pictures: list[Picture], encoding: Encoding) -> str:
    digest = hashlib.sha256(json.dumps([PLAN_VERSION, asdict(encoding)]).encode())
    for picture in pictures:
        stat = picture.path.stat()
        parts = [picture.key, picture.name, picture.caption, picture.record, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(parts, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def build_shard(out: Path, plan: ShardPlan, encoding: Encoding) -> Done:
    """Returns what came of one shard after writing it, and its index, unless it has no samples."""
    skipped: list[Skipped] = []
    samples = _samples(plan.pictures, encoding, skipped)
    first = next(samples, None)
    if first is None:
        _remove(out / plan.name)
        return Done(plan.digest, 0, "", skipped)
    index = write_shard(out / plan.name, chain([first], samples))
    return Done(plan.digest, index.count, index.sha256, skipped)


def _samples(
    pictures: tuple[Picture, ...], encoding: Encoding, skipped: list[Skipped]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    decoder = Decoder()
    for picture in pictures:
        try:
            data = picture.path.read_bytes()
            image = decoder(data, picture.path.suffix.removeprefix("."))
            caption = decode_caption(picture.caption.encode("utf-8", "surrogatepass"))
            if picture.caption and not caption:
                raise BadSample("txt", "no caption but control characters")
        except BadSample as error:
            skipped.append(Skipped(picture.name, str(error)))
            continue
        except OSError as error:
            skipped.append(Skipped(picture.name, f"cannot be read: {error.strerror}"))
            continue
        name, data, size = _encode(data, image, encoding)
        record = {**picture.record, "width": size[0], "height": size[1]}
        fields = {name: data, "json": json.dumps(_plain(record), sort_keys=True, ensure_ascii=False).encode()}
        if caption:
            fields["txt"] = caption.encode()
        yield picture.key, fields


def _encode(data: bytes, image: Image.Image, encoding: Encoding) -> tuple[str, bytes, tuple[int, int]]:
    """Returns the field's name, its bytes and the (width, height) of the upright picture they hold."""
    original = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    if encoding.resize is None or min(image.size) <= encoding.resize:
        return EXTENSIONS[str(original.format)], data, image.size
    transparent = original.mode in ("LA", "PA", "RGBA") or "transparency" in original.info
    if transparent:
        image = ImageOps.exif_transpose(original.convert("RGBA"))
    scale = encoding.resize / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    buffer = io.BytesIO()
    if transparent:
        image.save(buffer, "PNG")
        return "png", buffer.getvalue(), size
    image.save(buffer, "JPEG", quality=encoding.quality, subsampling=0)
    return "jpg", buffer.getvalue(), size


def _plain(value: Any) -> Any:
    """Returns a value as strict JSON can hold it: NaN and bytes become null, other types their text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return None if isinstance(value, bytes) else str(value).encode("utf-8", "replace").decode()


def _remove(shard: Path) -> None:
    # The catalogue would go on asking for it.
    (shard.parent / CATALOGUE).unlink(missing_ok=True)
    index_path(shard).unlink(missing_ok=True)
    shard.unlink(missing_ok=True)


class Ledger:
    """OUT/plan.json: which shards are finished and from what they were made."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out / "plan.json"
        self.done: dict[str, Done] = {}
        self.planned: set[str] = set()
        if self.path.is_file():
            try:
                ledger = json.loads(self.path.read_text(encoding="utf-8"))
                self.planned = {str(name) for name in ledger["planned"]}
                for name, entry in ledger["shards"].items():
                    skipped = [Skipped(**skip) for skip in entry["skipped"]]
                    self.done[name] = Done(entry["digest"], entry["count"], entry["sha256"], skipped)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{self.path}: damaged; delete {out} and make the shards again") from error

    def prepare(self, plans: list[ShardPlan]) -> list[ShardPlan]:
        """Returns the shards that are still to be made, after removing what an older plan left.

        Raises DataError where OUT holds shards that no plan of ours names.
        """
        names = {plan.name for plan in plans}
        ours = self.planned | set(self.done)
        for path in sorted(chain(self.out.glob("*.tar"), self.out.glob("*/*.tar"))):
            if path.relative_to(self.out).as_posix() not in ours:
                raise DataError(f"{path}: made by something else; choose another OUT, or empty this one")
        for name in ours - names:
            _remove(self.out / name)
            self.done.pop(name, None)
        self.planned = names
        todo = [plan for plan in plans if not self._is_whole(plan)]
        for plan in todo:
            self.done.pop(plan.name, None)
        self.save()
        return todo

    def _is_whole(self, plan: ShardPlan) -> bool:
        done = self.done.get(plan.name)
        if done is None or done.digest != plan.digest:
            return False
        if done.count == 0:
            return True
        try:
            current_index(self.out / plan.name)
            return read_index(self.out / plan.name, verify=True).sha256 == done.sha256
        except DataError:
            return False

    def save(self) -> None:
        """Writes the ledger, whole or not at all."""
        shards = {name: asdict(self.done[name]) for name in sorted(self.done)}
        ledger = {"plan_version": PLAN_VERSION, "planned": sorted(self.planned), "shards": shards}
        text = json.dumps(ledger, indent=1, ensure_ascii=False)
        write_atomic(self.path, text.encode("utf-8", "replace"))
