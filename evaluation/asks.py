"""What a checkpoint is asked to paint when it is evaluated, and the real pictures that answer the same.

The prompts are the captions of held-out samples, whose pictures the made ones are compared with, or a suite
of prompts of one's own, which has none. Which samples these are does not depend on the run: two runs on the
same data are asked the same.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.datamodule import ShardData
from data.index import DataError
from data.landscapes import FACTORS
from data.progress import Progress
from data.shards import Sample, ShardDataset
from evaluation.prompts import read_prompts
from evaluation.request import clean

#: Training pictures that tell how varied real pictures of a class are, at most.
TRAIN_PICTURES = 4_096
#: The order of the training samples does not depend on the run's seed.
_SEED = 0
#: Held-out pictures that a detector of copies is calibrated on, at least where there are so many.
KNOWN_NEW = 256
#: Fewer pictures than this have no neighbours to speak of.
FEWEST = 8
#: Samples read at a time.
_CHUNK = 128


@dataclass(frozen=True)
class Ask:
    """One prompt.

    Args:
        text: of the prompt.
        of_class: what real pictures it is compared with in variety; prompts of a suite are grouped by it.
        record: what is known of it, such as the factors of a landscape.
        before: the picture to be edited, uint8 `[3 H W]`, for a checkpoint that edits.
    """

    text: str
    of_class: str = ""
    record: Mapping[str, Any] = field(default_factory=dict)
    before: Tensor | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Real:
    """Real pictures uint8 `[N 3 H W]` with their captions, classes and keys, and the hash of all of it."""

    pictures: Tensor
    asks: tuple[Ask, ...]
    keys: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of the pixels and captions, in hexadecimal."""
        digest = hashlib.sha256(repr(tuple(self.pictures.shape)).encode())
        digest.update(self.pictures.numpy().tobytes())
        digest.update(prompts_sha256(self.asks).encode())
        return digest.hexdigest()

    def first(self, count: int) -> "Real":
        """The first `count` of them."""
        return Real(self.pictures[:count], self.asks[:count], self.keys[:count])

    @property
    def is_landscapes(self) -> bool:
        """Whether all tell what the judge of landscapes reads."""
        return all(is_landscape(ask.record) for ask in self.asks)


@dataclass(frozen=True)
class RealData:
    """The data of a run, read without augmentation: held-out pictures, and both data sets.

    `held_out` are those that are compared; `known_new` are more where these are few: pictures of which a copy
    detector knows that nobody copied them.
    """

    held_out: Real
    known_new: Real
    train_set: ShardDataset
    val_set: ShardDataset
    class_field: str | None

    def train(self) -> Real:
        """4,096 training pictures, or as many as are held out where those are more; all of a small set."""
        count = min(max(TRAIN_PICTURES, len(self.held_out.pictures)), len(self.train_set))
        with Progress("reading training pictures", count) as progress:
            return _read(self.train_set, count, self.class_field, progress)


def open_real(options: ShardData, divisor: int, pictures: int, class_field: str | None) -> RealData:
    """The first `pictures` held-out samples of a run's data.

    Args:
        options: of the run's data.
        divisor: what its networks halve pictures by.
        pictures: wanted; fewer where fewer are held out.
        class_field: of the samples' JSON, which names the class; None is the four factors of landscapes
            where a sample has them, else one class for all.

    Raises:
        DataError: shards are missing or damaged, or too few samples are held out.
    """
    plain = replace(options, random_crop=False, flip=False, buckets=1, precomputed=None)
    try:
        train_set, val_set = plain.open(_SEED, divisor=divisor, records=True)
    except ValueError as error:
        raise DataError(f"data: {error}") from None
    if len(val_set) < FEWEST:
        raise DataError(
            f"{options.shards}: {len(val_set)} samples are held out, but {FEWEST} is the least to compare "
            "with; hold out more with data.val_fraction when you train"
        )
    count = min(max(pictures, KNOWN_NEW), len(val_set))
    with Progress("reading held-out pictures", count) as progress:
        known_new = _read(val_set, count, class_field, progress)
    return RealData(known_new.first(pictures), known_new, train_set, val_set, class_field)


def read_suite(path: Path, count: int) -> tuple[list[Ask], str]:
    """`count` prompts of a suite, evenly over its categories, and its file's format; raises DataError."""
    suite = read_prompts(path)
    asks = [Ask(clean(p.text, f"prompt {p.id}"), p.category, p.record) for p in suite.sampled(count)]
    return asks, suite.format


def _read(dataset: ShardDataset, count: int, class_field: str | None, progress: Progress) -> Real:
    samples: list[Sample] = []
    for first in range(0, count, _CHUNK):
        some = range(first, min(first + _CHUNK, count))
        samples += dataset.__getitems__(some)
        progress.advance(len(some))
    asks = tuple(
        Ask(sample.caption, class_of(sample.record, class_field), sample.record, sample.before)
        for sample in samples
    )
    return Real(torch.stack([s.pixels for s in samples]), asks, tuple(s.key for s in samples))


def is_landscape(record: Mapping[str, Any]) -> bool:
    """Whether a sample's JSON tells the four factors of a landscape."""
    return all(record.get(name) in {member.value for member in members} for name, members in FACTORS.items())


def class_of(record: Mapping[str, Any], class_field: str | None) -> str:
    """The class of a sample: `class_field` of its JSON, else a landscape's four factors, else none."""
    if class_field is not None:
        return str(record.get(class_field, ""))
    return "/".join(str(record[name]) for name in FACTORS) if is_landscape(record) else ""


def varied(asks: Sequence[Ask], count: int) -> list[Ask]:
    """`count` of the asks with different texts, one of each class in turn, in their order."""
    classes: dict[str, dict[str, Ask]] = {}
    for ask in asks:
        classes.setdefault(ask.of_class, {}).setdefault(ask.text, ask)
    queues = [list(each.values()) for each in classes.values()]
    longest = max(map(len, queues), default=0)
    in_turn = [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]
    return in_turn[:count]


def prompts_sha256(asks: Sequence[Ask]) -> str:
    """The SHA-256 of the prompts with what is known of each, in hexadecimal."""
    told = [[ask.text, ask.of_class, dict(ask.record)] for ask in asks]
    return hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
