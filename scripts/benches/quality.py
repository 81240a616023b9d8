"""How much sooner our training makes pictures of a fixed quality than diffusers' recipe does.

Both arms learn on the latents of one finished autoencoder, from the same shards, with as many parameters
(`quality_arms.py`), a process each. First both get the same sweep of three learning rates, a short training
each, of which the best is taken: by adherence, and among those within a point of the best by distance. Then
the recipe is trained for the whole budget, with several seeds, and sampled with the best of three guidance
scales by the same order: the median of what it reaches at its end is the target, fixed before ours is
measured. Ours is trained for shorter and shorter horizons with the seed of the sweep, until it misses the
target; the shortest that reached it is that of the reported seeds. A seed that misses it is trained anew for
the next longer one, and both trainings count. The target is reached where adherence and distance are both as
good at the end of a training, with the one of the same scales that is nearest to it. Rates and scales are
chosen on prompts of their own.

An arm's spread over seeds is the error: `aa` is by how much the recipe's own seeds differ in the time to the
target. Everything lies in a folder: a measurement that was stopped goes on with the same command, and its
parts can be made apart (`--part recipe`, then `--part ours`).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student

from data.progress import Progress
from data.rendered import RenderedLandscapes
from data.shard_index import DataError
from evaluation.adherence import RESOLUTION
from models.registry import ConfigError
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import Ratio, machine
from scripts.benches.quality_arms import OURS, PATCHED, RECIPE, UNPATCHED, finished_autoencoder
from scripts.benches.quality_measurement import Measurement, Settings, Tried
from scripts.benches.quality_train import ClockKind

WANTED = {"time": 4.0, "images": 2.0}
ERRORS = {"time": "aa", "images": "aa"}
HEADINGS = (
    "", "seed", "budget %", "images", "CPU s", "wall s", "loss", "scale", "adherence %", "distance", "target",
)  # fmt: skip


class Part(StrEnum):
    """What of the measurement is to be made; what lies there already is not made again."""

    all = "all"
    recipe = "recipe"
    ours = "ours"
    extra = "extra"


def quality(
    minutes: float = 30.0,
    seeds: int = 3,
    points: int = 12,
    pictures: int = 256,
    clock: ClockKind = ClockKind.wall,
    threads: int = 1,
    part: Part = Part.all,
    demo: Path = Path("runs/landscapes"),
    shards: Path | None = None,
    folder: Path = Path("runs/bench-quality"),
) -> Findings:
    """Returns how much sooner training reaches the quality that diffusers' recipe reaches in its budget.

    Args:
        minutes: the recipe's budget.
        seeds: trainings of each arm.
        points: of each of the recipe's trainings at which pictures are judged, evenly to its end.
        pictures: that are judged.
        clock: wall, or cpu where other work shares the machine.
        threads: of torch.
        part: all, recipe (sweep and target), ours, or extra (also one seed of each with patches exchanged).
        demo: run with the autoencoder that both arms learn on; the judge lies in judge beside it.
        shards: of landscapes, with pictures and captions; without, 16,384 of 64 pixels are rendered first.
        folder: where trainings and scores are kept; the same command goes on there.
    """
    if not minutes > 0 or min(seeds, points, threads) < 1 or pictures < 4:
        raise ValueError("minutes must be above 0, seeds, points and threads at least 1, pictures at least 4")
    if find_spec("diffusers") is None:
        raise ConfigError("diffusers is what ours is compared with; install the extra `dev`")
    finished_autoencoder(demo)  # refused now rather than by a process that trains
    if shards is None:
        rendered = RenderedLandscapes()
        with Progress("rendering landscapes", rendered.images + rendered.held_out) as progress:
            shards = rendered.write(RESOLUTION, threads, progress.advance)
    if not shards.exists():
        raise DataError(f"{shards}: there is no such folder of shards; without --shards they are rendered")
    torch.set_num_threads(threads)
    settings = Settings(minutes, points, pictures, steps=10, clock=clock, threads=threads,
                        demo=str(demo), shards=str(shards))  # fmt: skip
    measurement = Measurement(folder, settings)
    report = Report(measurement, seeds)
    if part is not Part.recipe:
        report.add_ours()
    if part is Part.extra:
        report.add_extra()
    return report.findings()


class Report:
    """The table and the ratios: the recipe's trainings and the target at first, to which more is added.

    Args:
        measurement: that trains and examines.
        seeds: of each arm.
    """

    def __init__(self, measurement: Measurement, seeds: int) -> None:
        self.measurement, self.seeds = measurement, range(seeds)
        chosen = measurement.choice(RECIPE, 1.0)
        self.chosen = {RECIPE.name: chosen}
        self.target = measurement.target(chosen, self.seeds)
        self.ends = [measurement.trained(RECIPE, chosen.rate, k, 1.0) for k in self.seeds]
        self.held = [measurement.held(RECIPE, chosen, seed, self.target) for seed in self.seeds]
        self.tried = list(self.held)
        self.parameters = {RECIPE.name: self.ends[0].parameters}
        self.ratios: dict[str, Ratio] = {}
        self.figures: dict[str, Any] = {}
        self.notes: list[str] = []

    def add_ours(self) -> None:
        """Adds our trainings, and the ratios."""
        measurement, clock = self.measurement, self.measurement.settings.clock
        chosen = self.chosen[OURS.name] = measurement.choice(OURS)
        horizon = measurement.horizon(OURS, chosen, self.target)
        climbs = [measurement.climb(OURS, chosen, seed, horizon, self.target) for seed in self.seeds]
        self.tried += [tried for climb in climbs for tried in climb]
        trained = measurement.trained(OURS, chosen.rate, 0, horizon)
        self.parameters[OURS.name] = trained.parameters
        ends = [each.points[-1] for each in self.ends]
        by_clock = {
            kind: spread([
                statistics.fmean(end.spent.on(kind) for end in ends)
                / sum(tried.point.spent.on(kind) for tried in climb)
                for climb in climbs
            ])
            for kind in ClockKind
        }  # fmt: skip
        self.ratios["time"] = by_clock[clock]
        images = statistics.fmean(end.images for end in ends)
        self.ratios["images"] = spread(
            [images / sum(each.point.images for each in climb) for climb in climbs]
        )
        without = [
            statistics.fmean(end.spent.on(clock) - end.start for end in ends)
            / sum(tried.point.spent.on(clock) - tried.point.start for tried in climb)
            for climb in climbs
        ]
        times = [each.point.spent.on(clock) for each in self.held]
        self.ratios["aa"] = Ratio(max(times) / min(times), None)
        self.figures |= {
            "by_clock": {kind.value: round(found.value, 4) for kind, found in by_clock.items()},
            "without_start": round(spread(without).value, 4),
            "horizon": horizon,
        }
        self.notes.append("aa: the longest time to the target over the shortest, of the recipe's own seeds")
        if short := sum(not climb[-1].reached for climb in climbs):
            self.notes.append(f"{short} of ours never reached the target: their ratios are bounds from above")

    def add_extra(self) -> None:
        """Adds one seed of each arm with the other's patches: how much of the gain they are."""
        measurement = self.measurement
        chosen, ours = self.chosen[RECIPE.name], self.chosen[OURS.name]
        self.tried.append(measurement.ended(PATCHED, chosen, 0, 1.0, self.target))
        self.tried += measurement.climb(UNPATCHED, ours, 0, self.figures["horizon"], self.target)

    def findings(self) -> Findings:
        """All of it."""
        target, settings = self.target, self.measurement.settings
        rows = [HEADINGS, *map(_row, self.tried)]
        counts = ", ".join(f"{name} {count:,}" for name, count in self.parameters.items())
        notes = [
            f"target: adherence {100 * target.adherence:.1f} %, distance {target.distance:.2f}: the median "
            f"of {len(self.seeds)} seeds of the recipe after {settings.minutes:g} min by {settings.clock}",
            *(
                f"{name}: rate x{each.rate:g}, guidance scale {each.scale:g}"
                for name, each in self.chosen.items()
            ),
            f"parameters: {counts}",
            *self.notes,
        ]
        figures = {
            "target": target.document(),
            "trainings": [each.document() for each in self.tried],
            "chosen": {name: asdict(each) for name, each in self.chosen.items()},
            "computes": {
                arm.name: self.measurement.probed(arm).described
                for arm in (RECIPE, OURS)
                if arm.name in self.chosen
            },
            "parameters": self.parameters,
            **self.figures,
            **asdict(settings),
            **machine(),
        }
        known = bool(self.ratios)
        return Findings(
            "quality",
            figures,
            rows,
            self.ratios,
            WANTED if known else {},
            ERRORS if known else {},
            notes=notes,
        )


def spread(ratios: Sequence[float]) -> Ratio:
    """The geometric mean and its interval of 95 % (Student's t on the logarithms); none of a single one."""
    logs = [math.log(each) for each in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(mean), None)
    half = float(student.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)))


def _row(tried: Tried) -> Sequence[str]:
    point, score = tried.point, tried.score
    return (
        tried.arm, str(tried.seed), f"{100 * tried.horizon:.1f}", cell(point.images), cell(point.cpu),
        cell(point.wall), cell(point.loss, ".4f"), f"{tried.scale:g}", cell(100 * score.adherence, ".1f"),
        cell(score.distance, ".2f"), "reached" if tried.reached else "short",
    )  # fmt: skip
