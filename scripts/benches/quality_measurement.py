"""A measurement of `bench.py quality` in a folder: sweeps, target, horizons; nothing there is made twice."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data.shard_index import write_atomic
from evaluation.report import find_judge, judge_folder
from scripts.benches.quality_arms import RECIPE, RECIPE_LR, Arm, finished_autoencoder
from scripts.benches.quality_exam import PROMPTS, TUNING, Exam, Score, real_features
from scripts.benches.quality_train import ClockKind, Point, Probe, Trained, Training, probe, train

#: Factors on each arm's learning rate, and guidance scales, that the sweep tries; the first scale is that of
#: the rates' training.
RATES = (1.0, 0.5, 2.0)
SCALES = (3.0, 2.0, 4.5)
#: Adherences so near to each other are alike, and distance decides.
ALIKE = 0.01
#: The budget of a training in the sweep, and our horizons, as shares of the recipe's budget.
SWEEP_SHARE = 1 / 4
HORIZONS = (1 / 48, 1 / 32, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)
SWEEP_SEED = 1_000


@dataclass(frozen=True)
class Settings:
    """What a measurement is made with; see `quality`."""

    minutes: float
    points: int
    pictures: int
    steps: int
    clock: ClockKind
    threads: int
    demo: str
    shards: str


@dataclass(frozen=True)
class Choice:
    """What an arm's sweep chose: factor on the learning rate, guidance scale, and all that was tried."""

    rate: float
    scale: float
    tried: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Tried:
    """A training of a seed up to one of its points, and whether it is at the target there.

    `horizon` is the share of the recipe's budget that the training was made for, `scale` that of guidance.
    """

    arm: str
    seed: int
    horizon: float
    point: Point
    score: Score
    scale: float
    reached: bool

    def document(self) -> dict[str, Any]:
        """All of it, as JSON."""
        told = {
            "arm": self.arm,
            "seed": self.seed,
            "horizon": round(self.horizon, 5),
            "scale": self.scale,
            "reached": self.reached,
        }
        return {**told, **asdict(self.point), **self.score.document()}


class Measurement:
    """A measurement in a folder.

    Args:
        folder: what is found is kept there.
        settings: it is made with.

    Raises:
        ValueError: the folder holds a measurement with other settings.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        # Trainings are processes of another working folder.
        self.folder, self.settings = folder.absolute(), settings
        folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps({**asdict(settings), "recipe_lr": RECIPE_LR}, indent=1) + "\n"
        kept = folder / "settings.json"
        if kept.exists() and kept.read_text() != told:
            raise ValueError(
                f"{folder} holds a measurement with other settings (settings.json); use those again to go "
                "on, or give another --folder"
            )
        write_atomic(kept, told.encode())

    @cached_property
    def exams(self) -> dict[int, Exam]:
        """The exam on the tuning prompts, and that on the reported ones, by the seeds of their scenes."""
        settings = self.settings
        judge = find_judge(judge_folder(Path(settings.demo)))
        _, demo = finished_autoencoder(Path(settings.demo))
        real = real_features(judge, 2 * settings.pictures, int(demo["resolution"]))
        counts = {TUNING: max(2, settings.pictures // 2), PROMPTS: settings.pictures}
        return {seed: Exam(judge, seed, count, real, settings.steps) for seed, count in counts.items()}

    def probed(self, arm: Arm) -> Probe:
        """How `arm` computes here, and how fast."""
        return probe(self._training(arm, 1.0, 0, 1.0, 0, {}), self.folder / arm.name / "probe.json")

    def trained(self, arm: Arm, rate: float, seed: int, share: float) -> Trained:
        """A training of `arm` for `share` of the budget, made now unless it was."""
        # A schedule that is made for its horizon is at nothing before its end.
        found, points = self.probed(arm), 1 if arm.by_images else self.settings.points
        seconds = 60 * self.settings.minutes * share
        images = 0
        if arm.by_images:  # as many as the seconds are expected to hold
            steps = max(points, round((seconds - found.start) / found.step))
            seconds, images = 0.0, found.batch * steps
        training = self._training(arm, rate, seed, seconds, images, found.compute, points)
        name = f"rate-{rate:g}-seed-{seed}-share-{share:.4f}"
        return train(training, self.folder / arm.name / name)

    def _training(
        self,
        arm: Arm,
        rate: float,
        seed: int,
        seconds: float,
        images: int,
        compute: dict[str, Any],
        points: int = 1,
    ) -> Training:
        settings = self.settings
        return Training(
            arm.name, str(Path(settings.demo).absolute()), str(Path(settings.shards).absolute()), rate, seed,
            seconds, images, points, settings.clock, settings.threads, compute,
        )  # fmt: skip

    def score(self, trained: Trained, point: int, scale: float, scenes: int) -> Score:
        """The score of a training at a point (-1 is its end), examined now unless it was."""
        model = trained.folder / trained.points[point].file
        kept = model.with_name(f"{model.stem}-scenes-{scenes}-scale-{scale:g}.json")
        if not kept.exists():
            found = self.exams[scenes](model, scale)
            write_atomic(kept, (json.dumps(found.document()) + "\n").encode())
        return Score(**json.loads(kept.read_text()))

    def choice(self, arm: Arm, share: float = SWEEP_SHARE) -> Choice:
        """The learning rate and the guidance scale of `arm`, both chosen on prompts of their own.

        The rate is that of the best short training. The scale is chosen at the end of that one too; with a
        `share` of 1 it is at the end of the first seed's training for the whole budget.
        """
        swept = {rate: self.trained(arm, rate, SWEEP_SEED, SWEEP_SHARE) for rate in RATES}
        rates = {rate: self.score(trained, -1, SCALES[0], TUNING) for rate, trained in swept.items()}
        best = best_of(rates)
        tuned = swept[best] if share == SWEEP_SHARE else self.trained(arm, best, 0, share)
        scales = {scale: self.score(tuned, -1, scale, TUNING) for scale in SCALES}
        scale = best_of(scales)
        told = {f"rate x{each:g}": found.document() for each, found in rates.items()}
        told |= {f"scale {each:g}": found.document() for each, found in scales.items()}
        return Choice(best, scale, told)

    def target(self, chosen: Choice, seeds: Sequence[int]) -> Score:
        """The median over seeds of what the recipe reaches at its end, of either figure on its own."""
        trained = [self.trained(RECIPE, chosen.rate, k, 1.0) for k in seeds]
        found = [self.score(each, -1, chosen.scale, PROMPTS) for each in trained]
        return Score(
            statistics.median(each.adherence for each in found),
            statistics.median(each.distance for each in found),
        )

    def ended(self, arm: Arm, chosen: Choice, seed: int, horizon: float, target: Score) -> Tried:
        """A training of `arm` for the share `horizon` of the budget, examined at its end."""
        trained = self.trained(arm, chosen.rate, seed, horizon)
        scale = self.nearest(trained, target)
        score = self.score(trained, -1, scale, PROMPTS)
        return Tried(arm.name, seed, horizon, trained.points[-1], score, scale, score.reaches(target))

    def nearest(self, trained: Trained, target: Score) -> float:
        """The guidance scale that brings a training nearest to the target at its end, on the tuning prompts.

        More guidance buys adherence with distance, the more so the better the text is heard: no one scale
        serves a target of both for every horizon.
        """
        return min(SCALES, key=lambda scale: self.score(trained, -1, scale, TUNING).shortfall(target))

    def held(self, arm: Arm, chosen: Choice, seed: int, target: Score) -> Tried:
        """The point from which on a training for the whole budget stays at the target.

        Looked for from its end, so that a training that ends short of the target is examined once.
        """
        trained = self.trained(arm, chosen.rate, seed, 1.0)
        last = len(trained.points) - 1
        score, scale = self.score(trained, last, chosen.scale, PROMPTS), chosen.scale
        found = Tried(arm.name, seed, 1.0, trained.points[last], score, scale, False)
        for number in range(last, -1, -1):
            score = self.score(trained, number, scale, PROMPTS)
            if not score.reaches(target):
                break
            found = Tried(arm.name, seed, 1.0, trained.points[number], score, scale, True)
        return found

    def horizon(self, arm: Arm, chosen: Choice, target: Score) -> float:
        """The shortest horizon at which the seed of the sweep reaches the target; the longest if none does.

        Looked for from the sweep's own horizon, downwards as long as it is reached, else upwards.
        """
        start = HORIZONS.index(SWEEP_SHARE)

        def reached(place: int) -> bool:
            return self.ended(arm, chosen, SWEEP_SEED, HORIZONS[place], target).reached

        if reached(start):
            while start > 0 and reached(start - 1):
                start -= 1
            return HORIZONS[start]
        while start < len(HORIZONS) - 1 and not reached(start + 1):
            start += 1
        return HORIZONS[min(start + 1, len(HORIZONS) - 1)]

    def climb(self, arm: Arm, chosen: Choice, seed: int, horizon: float, target: Score) -> list[Tried]:
        """Trainings of `seed`, from `horizon` to longer ones, up to the first that reaches the target."""
        tried = []
        for share in HORIZONS[HORIZONS.index(horizon) :]:
            tried.append(self.ended(arm, chosen, seed, share, target))
            if tried[-1].reached:
                break
        return tried


def best_of(scores: Mapping[float, Score]) -> float:
    """The key of the nearest distance among the adherences that are like the best.

    Guidance buys the last hundredths of adherence with a distance that then is no target at all.
    """
    least = max(score.adherence for score in scores.values()) - ALIKE
    alike = {key: score.distance for key, score in scores.items() if score.adherence >= least}
    return min(alike, key=lambda key: alike[key])
