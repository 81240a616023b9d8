"""Evaluations of a run's checkpoints beside its training: one process at a time, behind all other work.

Each is `scripts/evaluate.py` with a checkpoint, so that the memory of training is untouched. It ends with the
run, and none of its failures is one of the run. Used by `models.stages.evaluating`; needs no lightning.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from models.stages.beside import Beside


@dataclass(frozen=True)
class EvaluationOptions:
    """Which checkpoints are evaluated while the diffusion stage trains, and how much of them.

    The first checkpoint at or past each multiple of `every_images` images is; 0 evaluates none. One picture
    is made of each of `pictures` held-out captions, and `seeds` of each of `prompts`. `nice` is how far the
    process stands behind others, 0 to 19, `threads` what it may use, `device` where it samples: on a "cuda"
    that training uses it takes some of its memory.

    Raises:
        ValueError: a number out of range, or an unknown device.
    """

    every_images: int = 0
    pictures: int = 256
    prompts: int = 8
    seeds: int = 8
    nice: int = 10
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        limits = {
            "every_images": (0, math.inf), "pictures": (8, 1_000_000), "prompts": (0, 100_000),
            "seeds": (4, 10_000), "nice": (0, 19), "threads": (1, 1_024),
        }  # fmt: skip
        for name, (least, most) in limits.items():
            value = vars(self)[name]
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}, but must be from {least} to {most:,}")
        if self.device not in ("cpu", "cuda", "auto"):
            raise ValueError(f"device is '{self.device}', but must be cpu, cuda or auto")


@dataclass(frozen=True)
class Evaluated:
    """What came of one evaluation: finite figures by name and alarms, or why there are none.

    `images` are those that its checkpoint had seen.
    """

    images: int
    figures: dict[str, float]
    alarms: tuple[str, ...]
    failure: str = ""


class Evaluations:
    """Starts evaluations and hears how they ended; a context manager that stops the one that runs.

    Args:
        command: that evaluates, without its options.
        folder: of the evaluations.
        options: what and how much.
    """

    def __init__(self, command: Sequence[str], folder: Path, options: EvaluationOptions) -> None:
        self.command = list(command)
        self.folder = folder
        self.options = options
        self._process: Beside | None = None
        self._images = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether one was started whose end was not yet heard of."""
        return self._process is not None

    def done(self) -> list[Evaluated]:
        """What earlier evaluations of this run left, fewest images first."""
        found = [each for path in self.folder.glob("*/card.json") if (each := _read(path)) is not None]
        return sorted(found, key=lambda each: each.images)

    def start(self, checkpoint: Path, images: int) -> Evaluated | None:
        """Starts the evaluation of a checkpoint; a failure where that cannot be."""
        options, out = self.options, self.folder / f"{images:012d}"
        words = {
            "checkpoint": checkpoint, "out": out, "pictures": options.pictures, "nice": options.nice,
            "variety.prompts": options.prompts, "variety.seeds": options.seeds, "device": options.device,
            "overwrite": "true",
        }  # fmt: skip
        command = [*self.command, *(f"{key}={value}" for key, value in words.items())]
        self._images = images
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._process = Beside(command, self._log(), options.threads)
        except OSError as error:
            return Evaluated(images, {}, (), f"it could not be started: {error}")
        return None

    def poll(self) -> Evaluated | None:
        """What came of the one that was started, once; None while it runs, and where there is none."""
        if self._process is None or (code := self._process.code) is None:
            return None
        self._process = None
        card = _read(self.folder / f"{self._images:012d}" / "card.json") if code == 0 else None
        return card or Evaluated(self._images, {}, (), f"it ended with {code}: {self._last_line()}")

    def stop(self) -> None:
        """Stops the one that runs; its pictures stay, for the next time."""
        if self._process is not None:
            self._process.stop()
        self._process = None

    def _log(self) -> Path:
        return self.folder / f"{self._images:012d}.log"

    def _last_line(self) -> str:
        try:
            lines = self._log().read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            return f"no log ({error.strerror})"
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")[:300]


def evaluations_of(run: Path, script: Path, options: EvaluationOptions) -> Evaluations | None:
    """The evaluations of the run in folder `run` by the `script`; None where `options` want none."""
    if not options.every_images:
        return None
    return Evaluations([sys.executable, str(script)], run / "evaluation" / "training", options)


def _read(path: Path) -> Evaluated | None:
    """What the card at `path` says; None where there is none that can be read."""
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        figures = {str(name): float(value) for name, value in card["metrics"].items() if value is not None}
        return Evaluated(int(path.parent.name), figures, tuple(map(str, card["alarms"])))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
