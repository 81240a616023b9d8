"""All training pictures as a search sees them: features and a small thumbnail of each, kept on disk.

A portion is a shard: made once, in one pass through the readers of `data/`, and written whole, so that a
killed pass goes on at the shard where it was. A portion says what it was made of (the shard's bytes, the rows
that the run trains on, the network, the size of pictures), and one of anything else is made again. A search
goes from portion to portion, so that memory holds one at a time.

    index = PictureIndex.build([train_view], network, Path("cache/pictures"), resolution=64)
    index.place(4711).key, index.picture(4711)
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.arrays import UNREADABLE, read_arrays, read_meta, write_arrays
from data.cache import ShardCache
from data.index import DataError, IndexView
from data.precompute import LeftOut, PictureReader
from data.progress import Progress
from data.provenance import Preprocessing
from evaluation.features import FeatureNetwork

#: The side of a thumbnail in pixels.
SIDE = 32
KIND, VERSION = "picture index", 1
#: Pictures that are decoded before their features are computed.
_AT_ONCE = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Traits:
    """What N pictures are compared by: `features` float32 `[N D]`, `thumbnails` uint8 `[N 3 32 32]`."""

    features: Tensor
    thumbnails: Tensor

    def __len__(self) -> int:
        return len(self.features)

    def take(self, numbers: Sequence[int] | Tensor) -> "Traits":
        """Those of some pictures."""
        rows = torch.as_tensor(numbers, dtype=torch.int64)
        return Traits(self.features[rows], self.thumbnails[rows])


@dataclass(frozen=True)
class Place:
    """Where a training picture lies: the shard, a path or an address, and its key there."""

    shard: str
    key: str


@dataclass(frozen=True)
class _Part:
    """One portion: where it is kept, the shard `number` of `view`, and what it must have been made of."""

    path: Path
    view: IndexView
    number: int
    made_of: str


class PictureIndex:
    """The pictures of views, numbered through their portions from 0.

    Args:
        parts: of the index, all made.
        reader: of single pictures.
    """

    def __init__(self, parts: Sequence[_Part], reader: PictureReader) -> None:
        self._parts = parts
        self._reader = reader
        rows = [self._read(part, ["rows"])["rows"] for part in parts]
        self._rows = rows
        self._ends = np.cumsum([len(each) for each in rows], dtype=np.int64)

    @classmethod
    def build(
        cls,
        views: Sequence[IndexView],
        network: FeatureNetwork,
        folder: Path,
        resolution: int,
        cache: ShardCache | None = None,
        shown: bool = True,
    ) -> "PictureIndex":
        """The index of the pictures of `views`, after making the portions that are missing in `folder`.

        Pictures are seen as training sees them: the central square, `resolution` pixels wide. Those that
        cannot be decoded are left out, and their number is told.

        Args:
            views: what the run trains on.
            network: computes the features.
            folder: of the portions.
            resolution: of the pictures in pixels.
            cache: keeps remote shards.
            shown: whether progress is shown.

        Raises:
            DataError: a shard cannot be read, or there is no picture.
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        reader = PictureReader(Preprocessing(resolution), cache)
        parts = [
            _Part(
                folder / f"{source:02d}-{number:06d}.idx",
                view,
                number,
                _made_of(view, number, network, resolution),
            )
            for source, view in enumerate(views)
            for number in range(len(view.counts))
        ]
        todo = [part for part in parts if not _is_made(part)]
        total = sum(part.view.counts[part.number] for part in parts)
        done = total - sum(part.view.counts[part.number] for part in todo)
        if todo:
            with Progress("looking at the training pictures", total, done, shown) as progress:
                for part in todo:
                    _make(part, reader, network, progress)
        index = cls(parts, reader)
        if not len(index):
            raise DataError(f"{folder}: none of {total:,} training pictures can be read; check the shards")
        return index

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def fingerprint(self) -> str:
        """What the index was made of, in hex: shards, rows, network, size."""
        return hashlib.sha256(" ".join(part.made_of for part in self._parts).encode()).hexdigest()

    def portions(self) -> Iterator[tuple[int, Traits]]:
        """Yields (the number of its first picture, traits) of each portion; raises DataError."""
        for end, rows, part in zip(self._ends.tolist(), self._rows, self._parts, strict=True):
            arrays = self._read(part, ["features", "thumbnails"])
            yield (
                end - len(rows),
                Traits(*(torch.from_numpy(arrays[n].copy()) for n in ("features", "thumbnails"))),
            )

    def traits(self, numbers: Sequence[int]) -> Traits:
        """The traits of some pictures, in the order asked for; raises DataError."""
        wanted = np.asarray(numbers, np.int64)
        found: list[tuple[np.ndarray, Traits]] = []
        for (start, portion), end in zip(self.portions(), self._ends.tolist(), strict=True):
            inside = np.flatnonzero((wanted >= start) & (wanted < end))
            if len(inside):
                found.append((inside, portion.take(torch.from_numpy(wanted[inside] - start))))
        order = torch.from_numpy(np.argsort(np.concatenate([inside for inside, _ in found])))
        features = torch.cat([traits.features for _, traits in found])[order]
        return Traits(features, torch.cat([traits.thumbnails for _, traits in found])[order])

    def place(self, number: int) -> Place:
        """Where picture `number` lies."""
        part, row = self._locate(number)
        shard = part.view.index.shard(part.number)
        return Place(str(shard.shard), shard.key(row))

    def picture(self, number: int) -> Tensor:
        """Picture `number`, uint8 `[3 H W]`, read from its shard; raises DataError."""
        part, row = self._locate(number)
        (read,) = self._reader(part.view.index.shard(part.number), [row])
        if isinstance(read, LeftOut):
            raise DataError(
                f"{read.shard} key {read.key!r} {read.field}: {read.reason}; copy the shard again"
            )
        return torch.from_numpy(read.pixels[0])

    def _locate(self, number: int) -> tuple[_Part, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        rows = self._rows[place]
        return self._parts[place], int(rows[number - int(self._ends[place]) + len(rows)])

    @staticmethod
    def _read(part: _Part, names: Sequence[str]) -> dict[str, np.ndarray]:
        try:
            return read_arrays(part.path, KIND, names)[1]
        except UNREADABLE as error:
            raise DataError(f"{part.path}: {error}; delete it and it is made again") from error


def thumbnails(pictures: Tensor) -> Tensor:
    """uint8 `[N 3 32 32]` of `pictures` uint8 `[N 3 H W]`: the central square, averaged over areas."""
    height, width = pictures.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = pictures[..., top : top + side, left : left + side].float()
    return F.interpolate(square, (SIDE, SIDE), mode="area").round().to(torch.uint8)


def look(pictures: Tensor, network: FeatureNetwork) -> Traits:
    """The traits of `pictures` uint8 `[N 3 H W]`."""
    return Traits(network.features(pictures), thumbnails(pictures))


def _made_of(view: IndexView, number: int, network: FeatureNetwork, resolution: int) -> str:
    rows = hashlib.sha256(view.rows(number).astype("<i8").tobytes()).hexdigest()
    pictures = [view.index.shard(number).sha256, rows, resolution, SIDE]
    seen_by = [network.name, network.sha256, network.resize]
    return hashlib.sha256(json.dumps([VERSION, *pictures, *seen_by]).encode()).hexdigest()


def _is_made(part: _Part) -> bool:
    try:
        meta = read_meta(part.path)
    except FileNotFoundError:
        return False
    except UNREADABLE as error:
        log.warning("%s: %s; it is made again", part.path, error)
        return False
    return meta.get("kind") == KIND and meta.get("made_of") == part.made_of


def _make(part: _Part, reader: PictureReader, network: FeatureNetwork, progress: Progress) -> None:
    """Writes a portion; `progress` counts its pictures."""
    shard, rows = part.view.index.shard(part.number), part.view.rows(part.number).tolist()
    kept: list[int] = []
    seen: list[Traits] = []
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        read = list(zip(some, reader(shard, some), strict=True))
        good = [(row, each.pixels[0]) for row, each in read if not isinstance(each, LeftOut)]
        if good:
            kept += [row for row, _ in good]
            seen.append(look(torch.from_numpy(np.stack([pixels for _, pixels in good])), network))
        progress.advance(len(some))
    if len(kept) < len(rows):
        log.warning("%s: %d of %d pictures cannot be read", shard.shard, len(rows) - len(kept), len(rows))
    arrays = {
        "rows": np.array(kept, np.int64),
        "features": torch.cat([torch.empty(0, network.dim), *(each.features for each in seen)]).numpy(),
        "thumbnails": torch.cat(
            [torch.empty(0, 3, SIDE, SIDE, dtype=torch.uint8), *(each.thumbnails for each in seen)]
        ).numpy(),
    }
    write_arrays(part.path, {"kind": KIND, "made_of": part.made_of}, arrays)
