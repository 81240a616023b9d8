"""One training of `bench.py quality`, in a process and on a clock of its own.

`python -m scripts.benches.quality_train '{"folder": ...}'` trains what the document describes and leaves in
that folder the averaged weights at evenly spaced points, as exported models, and `training.json` with images
and seconds of each. The clock starts with the process, so that imports and data count; what is not on it is
the writing of weights, and the probe of how to compute, which is made once for each arm (`Probe`).
"""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from conf.schema import make
from data.batch import Batch
from data.datamodule import DataModule, ShardData
from data.progress import Progress
from data.shard_index import write_atomic
from models.checkpoint import save_single_file
from models.loading import EXPORT_FORMAT, MODEL_KEYS
from models.registry import build
from models.stages.compute import Compute, choose, seconds_a_call
from scripts.benches.measuring import eager_ways
from scripts.benches.quality_arms import ARMS, Arm, Setting, finished_autoencoder

PROJECT = Path(__file__).resolve().parents[2]
RESULT = "training.json"
#: Images of a step by which ways to compute are compared: a way that has no hardware can take minutes.
PROBE_IMAGES = 8
#: A way of which one step takes so many times the fastest is not timed again.
HOPELESS = 4.0
#: Steps that are timed, after as many that are not, to tell a horizon in images from one in seconds.
TIMED_STEPS = 4
ENDLESS = 2**40


class TrainingError(RuntimeError):
    """The process that trains ended with an error."""


class ClockKind(StrEnum):
    """What is counted: wall seconds, or processor seconds where the machine is shared."""

    wall = "wall"
    cpu = "cpu"


@dataclass(frozen=True)
class Spent:
    """Seconds since the process began, by the wall and of its processor time."""

    wall: float
    cpu: float

    def on(self, clock: ClockKind) -> float:
        """Those that `clock` counts."""
        return self.wall if clock is ClockKind.wall else self.cpu


class Stopwatch:
    """Tells what was spent since the process began at `began` (`time.time()`), pauses left out."""

    def __init__(self, began: float) -> None:
        self.began = began
        self._paused = Spent(0.0, 0.0)

    def read(self) -> Spent:
        """What was spent until now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall, cpu = time.time() - self.began, time.process_time()
        return Spent(wall - self._paused.wall, cpu - self._paused.cpu)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves out what happens inside."""
        before = self.read()
        yield
        after, was = self.read(), self._paused
        self._paused = Spent(was.wall + after.wall - before.wall, was.cpu + after.cpu - before.cpu)


@dataclass(frozen=True)
class Training:
    """What is to be trained, as plain values.

    Args:
        arm: its name.
        demo: folder of the run whose autoencoder it is.
        shards: what is learnt.
        lr: factor on the arm's learning rate.
        seed: of all that is drawn.
        seconds: it ends when so many are spent; 0 is never.
        images: it ends when so many are seen, and schedules have this horizon; 0 is never.
        points: how many times weights are kept, evenly over the budget, the last at its end.
        clock: that counts the seconds.
        threads: of torch.
        compute: the way to compute, as the probe found.
    """

    arm: str
    demo: str
    shards: str
    lr: float
    seed: int
    seconds: float
    images: int
    points: int
    clock: ClockKind
    threads: int
    compute: dict[str, Any]

    def done(self, spent: Spent, images: int) -> float:
        """The share of the budget that is used up; 1 and more is all."""
        return max(
            spent.on(self.clock) / self.seconds if self.seconds else 0.0,
            images / self.images if self.images else 0.0,
        )


@dataclass(frozen=True)
class Point:
    """A point of a training at which its averaged weights were kept in `file`.

    `loss` is the mean since the point before, `start` the seconds on its clock before the first step.
    """

    file: str
    images: int
    wall: float
    cpu: float
    loss: float
    start: float

    @property
    def spent(self) -> Spent:
        """What was spent until there."""
        return Spent(self.wall, self.cpu)


@dataclass(frozen=True)
class Trained:
    """A finished training in `folder`: its points, and the parameters of its text encoder and backbone."""

    folder: Path
    points: list[Point]
    parameters: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What a training left in `folder`."""
        document = json.loads((folder / RESULT).read_text())
        return cls(folder, [Point(**each) for each in document["points"]], document["parameters"])


@dataclass(frozen=True)
class Probe:
    """How an arm computes here, and what start and step take, in seconds on the clock that counts."""

    compute: dict[str, Any]
    described: str
    start: float
    step: float
    batch: int


def train(training: Training, folder: Path) -> Trained:
    """Trains in a fresh process, unless `folder` holds the result already.

    Raises:
        TrainingError: the process ended with an error.
    """
    if not (folder / RESULT).exists():
        _run({"folder": str(folder), "training": asdict(training)}, training.threads)
    return Trained.read(folder)


def probe(training: Training, file: Path) -> Probe:
    """What a fresh process finds of the arm of `training`, unless `file` holds it; errors as `train`."""
    if not file.exists():
        _run({"probe": str(file), "training": asdict(training)}, training.threads)
    return Probe(**json.loads(file.read_text()))


def _run(told: dict[str, Any], threads: int) -> None:
    command = [
        sys.executable,
        "-m",
        "scripts.benches.quality_train",
        json.dumps(told | {"began": time.time()}),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        said = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise TrainingError(
            f"{told['training']['arm']}: {said[-1] if said else f'exit code {done.returncode}'}"
        )


class TrainingProcess:
    """What one training has: data, learner and clock."""

    def __init__(self, training: Training, began: float) -> None:
        self.training, self.watch = training, Stopwatch(began)
        torch.set_num_threads(training.threads)
        self.arm: Arm = ARMS[training.arm]
        self.autoencoder, demo = finished_autoencoder(Path(training.demo))
        self.values = self.arm.values(demo)
        options: ShardData = make("data", {**self.values["data"], "shards": training.shards, "workers": 0})
        train, val = options.open(training.seed)
        tokenizer = build("text_encoder", self.values["text_encoder"]).tokenizer
        batch = make("plan/diffusion", self.values["plan"]["diffusion"]).batch_size
        self.data = DataModule(train, val, tokenizer, batch, 0)
        self.fastest = math.inf

    def setting(self, compute: Compute) -> Setting:
        """What a learner is built of."""
        training = self.training
        return Setting(
            self.values, self.autoencoder, training.lr, training.seed, training.images or ENDLESS, compute
        )

    def train(self, folder: Path) -> None:
        """Trains, and writes everything to `folder`; the result comes last."""
        training, watch = self.training, self.watch
        learner = self.arm.learner(self.setting(Compute.read(training.compute, "as probed")))
        folder.mkdir(parents=True, exist_ok=True)
        start, points = watch.read().on(training.clock), list[Point]()
        losses: list[float] = []
        with Progress(
            f"{training.arm}, rate x{training.lr:g}, seed {training.seed}, % done", 100
        ) as progress:
            for batch in self.data.train_loader(0, training.images or ENDLESS):
                losses.append(learner.step(batch))
                spent = watch.read()
                done = training.done(spent, learner.images_seen)
                with watch.pause():
                    progress.update(min(100, int(100 * done)), losses[-1])
                    if done >= (len(points) + 1) / training.points:
                        file = f"point-{len(points) + 1:02d}.safetensors"
                        self._keep(folder / file, learner.averaged())
                        loss = sum(losses) / len(losses)
                        points.append(Point(file, learner.images_seen, spent.wall, spent.cpu, loss, start))
                        losses.clear()
                if done >= 1:
                    break
        parameters = sum(each.numel() for each in learner.averaged().values())
        document = {
            "training": asdict(training),
            "parameters": parameters,
            "points": [asdict(p) for p in points],
        }
        write_atomic(folder / RESULT, (json.dumps(document, indent=1) + "\n").encode())

    def _keep(self, path: Path, averaged: dict[str, Tensor]) -> None:
        config = {key: self.values[key] for key in MODEL_KEYS if key in self.values}
        config |= {"resolution": self.values["data"]["resolution"], "run": self.values}
        metadata = {"format": EXPORT_FORMAT, "config": json.dumps(config)}
        save_single_file(path, {**self.autoencoder, **averaged}, metadata)

    def probe(self, file: Path) -> None:
        """Finds how the arm computes, times it, and writes both to `file`."""
        options = make("trainer", {**self.values["trainer"], "threads": self.training.threads})
        batch = self.data.probe(self.data.batch_size)
        way = choose(options)
        if self.arm.rival:
            few = self.data.probe(min(PROBE_IMAGES, self.data.batch_size))
            with self.watch.pause():
                # The chosen one first: what is far slower is known by one step then.
                way = min([way, *eager_ways(way.device)], key=lambda each: self._seconds(each, few))
        learner = self.arm.learner(self.setting(way))
        start = self.watch.read()
        for number in range(2 * TIMED_STEPS):
            if number == TIMED_STEPS:
                before = self.watch.read()
            learner.step(batch)
        after, clock = self.watch.read(), self.training.clock
        step = (after.on(clock) - before.on(clock)) / TIMED_STEPS
        found = Probe(way.document(), str(way), start.on(clock), step, len(batch))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, (json.dumps(asdict(found), indent=1) + "\n").encode())

    def _seconds(self, way: Compute, batch: Batch) -> float:
        """Seconds of a step in `way`; of its first alone where that shows it to be none of the fast."""
        learner = self.arm.learner(self.setting(way))

        def step() -> float:
            began = time.perf_counter()
            learner.step(batch)
            return time.perf_counter() - began

        first = step()
        self.fastest = min(self.fastest, first)
        return first if first > HOPELESS * self.fastest else seconds_a_call(step, way.device)


def main(told: str) -> None:
    """Does what `told` describes."""
    document = json.loads(told)
    given = document["training"]
    training = replace(Training(**given), clock=ClockKind(given["clock"]))
    process = TrainingProcess(training, document["began"])
    if "probe" in document:
        process.probe(Path(document["probe"]))
    else:
        process.train(Path(document["folder"]))


if __name__ == "__main__":
    main(sys.argv[1])
