"""The embedded default data as a data set: landscapes rendered into shards on first use.

shards = RenderedLandscapes(images=16_384).write(resolution=64, workers=2)
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.landscapes import write_landscapes

#: Seeds of the renderer; the judge's own begin far above.
TRAIN_SEED, VAL_SEED = 1, 2


@dataclass(frozen=True)
class RenderedLandscapes:
    """How many landscapes to render, and where: `<folder>/landscapes-<resolution>-<images>`.

    `images` are trained on and `held_out` kept apart, by seeds of their own.
    """

    images: int = 16_384
    held_out: int = 1_024
    folder: str = "shards"

    def __post_init__(self) -> None:
        if self.images < 1 or self.held_out < 1:
            raise ValueError(f"images {self.images} and held_out {self.held_out} must be at least 1")

    def write(self, resolution: int, workers: int, progress: Callable[[int], None] | None = None) -> Path:
        """Returns the folder of the shards; what is there already is kept.

        Raises DataError where the folder holds something else, OSError where it cannot be written.
        """
        folder = Path(self.folder) / f"landscapes-{resolution}-{self.images}"
        for name, count, seed in (
            ("train", self.images, TRAIN_SEED),
            ("val", self.held_out, VAL_SEED),
        ):
            write_landscapes(
                folder / name, count, resolution, seed, shard_size=2_048, workers=workers, progress=progress
            )
        return folder
