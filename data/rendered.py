"""The embedded default data as a data set: landscapes, or edits of them, rendered into shards on first use.

shards = RenderedLandscapes(images=16_384).write(resolution=64, workers=2)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from data.landscape_edits import write_landscape_edits
from data.landscapes import write_landscapes

#: Seeds of the renderer; the judge's own begin far above.
TRAIN_SEED, VAL_SEED = 1, 2
#: So that a few cores share the default number of images out evenly, and those that are held out as well.
SHARD_SIZE = 512


class Rendered(Protocol):
    """A data set that is rendered: so many samples to train on, and so many held out."""

    @property
    def images(self) -> int:
        """Returns how many samples are trained on."""

    @property
    def held_out(self) -> int:
        """Returns how many are kept apart."""

    def write(self, resolution: int, workers: int, progress: Callable[[int], None] | None = None) -> Path:
        """Returns the folder of the shards; what is there already is kept.

        Raises DataError where the folder holds something else, OSError where it cannot be written.
        """


@dataclass(frozen=True)
class RenderedLandscapes:
    """How many landscapes to render, and where: `<folder>/landscapes-<resolution>-<images>`.

    `images` are trained on and `held_out` kept apart, by seeds of their own.
    """

    images: int = 16_384
    held_out: int = 1_024
    folder: str = "shards"

    def __post_init__(self) -> None:
        _check(self.images, self.held_out)

    def write(self, resolution: int, workers: int, progress: Callable[[int], None] | None = None) -> Path:
        """Returns the folder of the shards, as `Rendered.write`."""
        folder = Path(self.folder) / f"landscapes-{resolution}-{self.images}"
        for name, count, seed in _parts(self.images, self.held_out):
            write_landscapes(folder / name, count, resolution, seed, SHARD_SIZE, workers, progress)
        return folder


@dataclass(frozen=True)
class RenderedEdits:
    """How many pairs of landscapes to render, and where: `<folder>/landscape-edits-<resolution>-<images>`.

    Each is a landscape before and after one of its factors is changed, and the instruction that says so;
    `images` pairs are trained on and `held_out` kept apart, by seeds of their own.
    """

    images: int = 16_384
    held_out: int = 1_024
    folder: str = "shards"

    def __post_init__(self) -> None:
        _check(self.images, self.held_out)

    def write(self, resolution: int, workers: int, progress: Callable[[int], None] | None = None) -> Path:
        """Returns the folder of the shards, as `Rendered.write`."""
        folder = Path(self.folder) / f"landscape-edits-{resolution}-{self.images}"
        for name, count, seed in _parts(self.images, self.held_out):
            write_landscape_edits(folder / name, count, resolution, seed, SHARD_SIZE, workers, progress)
        return folder


def _parts(images: int, held_out: int) -> tuple[tuple[str, int, int], ...]:
    return ("train", images, TRAIN_SEED), ("val", held_out, VAL_SEED)


def _check(images: int, held_out: int) -> None:
    if images < 1 or held_out < 1:
        raise ValueError(f"images {images} and held_out {held_out} must be at least 1")
