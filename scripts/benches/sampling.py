"""How fast pictures come, and whether they are as good, next to the usual 50 steps of DDIM with guidance.

Three arms make pictures of the same prompts from the same checkpoint and take turns: ours, as the checkpoint
is sampled by default; the usual one, Euler with 50 uniform steps and both branches of guidance in each; and
ours again, for the A/A ratio. With a student, a checkpoint that was distilled from the other, ours are its
pictures. Told as well are how long one picture takes alone, and how long a fresh process of `sample.py` takes
until its first picture is there. Afterwards both make pictures of several seeds, which are judged: do they
show what the prompt says, and how far are their features from those of held-out pictures. The spread of the
usual one's distance from seed to seed says what difference means nothing. Checkpoints of landscapes only: the
judge knows nothing else.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.landscapes import caption, draw_scene, factors, render
from data.progress import Progress
from data.rendered import VAL_SEED
from evaluation.adherence import AdherenceJudge, class_ids, score
from evaluation.metrics import frechet_distance
from evaluation.report import find_judge, judge_folder
from models.diffusion.grids import uniform_grid
from models.diffusion.guidance import Guidance
from models.diffusion.samplers import euler
from models.loading import load_pipeline
from models.pipeline import Pipeline
from models.sampling import Job, Sampling
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import (
    RESAMPLES,
    Arm,
    Ratio,
    check_rounds,
    cpu,
    cpu_ms,
    interleave,
    machine,
    rate,
    ratio,
    wall,
)

WANTED = {"speedup": 5.0}
#: Of a student, with at most 3 points of adherence less.
WANTED_OF_A_STUDENT = {"speedup": 15.0}
ERRORS = {"speedup": "aa"}
USUAL_STEPS = 50
TRIED = 128
#: Pictures that are made alone.
ALONE = 5
PROJECT = Path(__file__).resolve().parents[2]


def sampling(
    checkpoint: Path = Path("runs/landscapes"),
    student: Path | None = None,
    images: int = 16,
    rounds: int = 12,
    pictures: int = 512,
    seeds: int = 5,
    batch: int = 16,
    steps: int = 0,
    scale: float = 0.0,
    usual_scale: float = 0.0,
    starts: int = 3,
) -> Findings:
    """Returns how fast pictures are made, and how good they are, next to 50 steps of DDIM with guidance.

    Args:
        checkpoint: a run's folder or an exported file, of landscapes.
        student: another one, distilled from it, whose pictures are ours; none is the checkpoint itself.
        images: pictures a round.
        rounds: of each arm, an even number.
        pictures: that are judged, of each seed.
        seeds: that pictures are made of.
        batch: pictures made at once.
        steps: of ours; 0 is as the checkpoint is sampled.
        scale: of our guidance; 0 is as the checkpoint is sampled.
        usual_scale: of the usual one's guidance; 0 is the best one of 2, 3 and 4, tried on some pictures.
        starts: fresh processes that are timed until their first picture; 0 times none.
    """
    check_rounds(rounds)
    if min(images, pictures - 1, seeds, batch) < 1 or starts < 0:
        raise ValueError("images, seeds and batch must be at least 1, pictures at least 2, starts at least 0")
    teacher, _, sha256 = load_pipeline(checkpoint, torch.device("cpu"))
    source = checkpoint if student is None else student
    ours, _, ours_sha256 = load_pipeline(source, torch.device("cpu"))
    assert ours.defaults is not None
    mine = replace(
        ours.defaults,
        num_steps=steps or ours.defaults.num_steps,
        guidance_scale=scale or ours.defaults.guidance_scale,
    )
    test = Test(find_judge(judge_folder(checkpoint)), pictures, batch, teacher.resolution)
    scales = [usual_scale] if usual_scale else [2.0, 3.0, 4.0]
    tried = {each: test(teacher, usual(each, -1), TRIED) for each in scales} if len(scales) > 1 else {}
    best = max(scales, key=lambda each: tried[each].shares["all"] if tried else 0.0)

    def arm(name: str, pipeline: Pipeline, how: Sampling) -> Arm:
        def run() -> int:
            jobs = [Job(prompt, k) for k, prompt in enumerate(test.prompts[:images])]
            return len(pipeline.generate(jobs, how, batch_size=batch))

        return Arm(name, run)

    arms = [arm("ours", ours, mine), arm("usual", teacher, usual(best, 0)), arm("ours again", ours, mine)]
    with Progress("timing", len(arms) * (rounds + 1) * images) as progress:
        laps = interleave(arms, rounds, advance=progress.advance)
    judged = {
        "ours": [test(ours, replace(mine, seed=seed)) for seed in range(seeds)],
        "usual": [test(teacher, usual(best, seed)) for seed in range(seeds)],
    }
    return _findings(laps, judged, test, {
        "images": images, "rounds": rounds, "pictures": pictures, "seeds": seeds, "batch": batch,
        "num_steps": mine.num_steps, "guidance_scale": mine.guidance_scale,
        "parts": ours.described, "usual_steps": USUAL_STEPS, "usual_scale": best,
        "usual_scales": {str(each): round(100 * found.shares["all"], 2) for each, found in tried.items()},
        "one_picture_ms": {"ours": _one_ms(ours, mine), "usual": _one_ms(teacher, usual(best, 0))},
        "cold_start": cold_start(source, starts) if starts else None,
        "checkpoint_sha256": sha256,
        "student_sha256": None if student is None else ours_sha256, **machine(),
    }, WANTED if student is None else WANTED_OF_A_STUDENT)  # fmt: skip


def _one_ms(pipeline: Pipeline, how: Sampling) -> dict[str, float]:
    """Milliseconds that one picture takes alone, by the wall and of processor; medians of some."""
    laps = []
    for k in range(1 + ALONE):
        began, spent = time.perf_counter(), time.process_time()
        pipeline.generate([Job("a clear dawn over the sea", k)], how)
        laps.append((time.perf_counter() - began, time.process_time() - spent))
    walls, cpus = zip(*laps[1:], strict=True)
    return {
        "wall": round(1000 * statistics.median(walls), 1),
        "cpu": round(1000 * statistics.median(cpus), 1),
    }


def cold_start(checkpoint: Path, starts: int) -> dict[str, float]:
    """Seconds from the command `sample.py` to its first picture: the shortest of some starts, of each clock.

    Raises:
        RuntimeError: the command ended in error.
    """
    laps = []
    for _ in range(starts):
        with tempfile.TemporaryDirectory() as place:
            words = [f"checkpoint={checkpoint.absolute()}", "prompt=a clear dawn over the sea"]
            command = [sys.executable, "sample.py", *words, "num_images=1", f"output={place}/made"]
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
            wall_s, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"sample.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        laps.append((wall_s, cpu_s))
    walls, cpus = zip(*laps, strict=True)
    return {"wall_s": round(min(walls), 2), "cpu_s": round(min(cpus), 2)}


def usual(guidance_scale: float, seed: int) -> Sampling:
    """DDIM with eta 0 and 50 uniform steps, the prompt and the empty one in each."""
    return Sampling(guidance_scale, USUAL_STEPS, euler, uniform_grid, seed, Guidance())


@dataclass(frozen=True)
class Judged:
    """Shares in [0, 1] right by factor and in all, whether each picture is, bool `[N]`, and `distance`."""

    shares: dict[str, float]
    right: Tensor
    distance: float


class Test:
    """Judges pictures of fixed held-out prompts."""

    __test__ = False  # for pytest

    def __init__(self, judge: AdherenceJudge, pictures: int, batch: int, resolution: int) -> None:
        self.judge = judge
        self.batch = batch
        scenes = [draw_scene(VAL_SEED, k) for k in range(pictures)]
        self.prompts = [caption(scene) for scene in scenes]
        self.factors = [factors(scene) for scene in scenes]
        # Other held-out scenes, through the autoencoder no more than life: what pictures should be like.
        others = [render(draw_scene(VAL_SEED + 1, k), resolution) for k in range(2 * pictures)]
        self.real = self._features(torch.from_numpy(np.stack(others)).permute(0, 3, 1, 2))
        self.floor = frechet_distance(self.real[:pictures], self.real[pictures:])

    def __call__(self, pipeline: Pipeline, how: Sampling, most: int | None = None) -> Judged:
        """The scores of pictures that `pipeline` makes in this way, of the first `most` prompts."""
        jobs = [Job(prompt, k) for k, prompt in enumerate(self.prompts[:most])]
        with Progress("pictures to judge", len(jobs)) as progress:
            made = pipeline.generate(jobs, how, batch_size=self.batch, progress=progress.update)
        images, wanted = made.float() / 127.5 - 1, self.factors[:most]
        shares, predicted = score(self.judge, images, wanted), self.judge.predict(images)
        right = torch.stack(list(predicted.values()), 1) == class_ids(wanted)
        distance = frechet_distance(self._features(made), self.real[: len(jobs)])
        return Judged(shares, right.all(1), distance)

    def _features(self, pixels: Tensor) -> Tensor:
        return self.judge.embed(pixels.float() / 127.5 - 1)


def _rounded(found: Judged) -> dict[str, float]:
    return {key: round(value, 4) for key, value in (found.shares | {"distance": found.distance}).items()}


def gap_interval(usual: Sequence[Tensor], ours: Sequence[Tensor]) -> tuple[float, float]:
    """Interval of 95 % of how many points less adherence ours has, by resampling the prompts of both alike.

    Args:
        usual: whether each picture is right, bool `[N]` of the same N prompts, a seed each.
        ours: the same.
    """
    mine, theirs = (torch.stack(list(each)).double().mean(0).numpy() for each in (ours, usual))
    gaps = 100 * (theirs - mine)
    draws = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(1), (0.025, 0.975))
    return float(low), float(high)


def _findings(
    laps: Any,
    judged: dict[str, list[Judged]],
    test: Test,
    told: dict[str, Any],
    wanted: dict[str, float],
) -> Findings:
    adherence = {
        name: statistics.fmean(each.shares["all"] for each in found) for name, found in judged.items()
    }
    distances = {name: [each.distance for each in found] for name, found in judged.items()}
    distance = {name: statistics.fmean(values) for name, values in distances.items()}
    spread = {name: max(values) - min(values) for name, values in distances.items()}
    interval = gap_interval(*([each.right for each in judged[name]] for name in ("usual", "ours")))

    pairs = {"speedup": ("ours", "usual"), "aa": ("ours again", "ours")}
    ratios: dict[str, Ratio] = {}
    by_cpu: dict[str, float | None] = {}
    for name, (over, under) in pairs.items():
        found = ratio(laps[over], laps[under], wall)
        assert found is not None
        ratios[name] = found
        processor = ratio(laps[over], laps[under], cpu)
        by_cpu[name] = None if processor is None else round(processor.value, 4)
    figures = {
        "adherence_gap": round(100 * (adherence["usual"] - adherence["ours"]), 3),
        "adherence_gap_interval": [round(end, 3) for end in interval],
        "adherence": {name: round(100 * value, 2) for name, value in adherence.items()},
        "distance": {name: round(value, 3) for name, value in distance.items()},
        "distance_spread": {name: round(value, 3) for name, value in spread.items()},
        "distance_floor": round(test.floor, 3),
        "by_seed": {name: [_rounded(found) for found in each] for name, each in judged.items()},
        "images_per_second": {name: round(rate(each), 3) for name, each in laps.items()},
        "cpu_ratios": by_cpu,
        **told,
    }  # fmt: skip
    rows: list[Sequence[str]] = [("", "images/s", "CPU ms/image", "adherence %", "distance", "its spread")]
    for name, each in laps.items():
        known = name in judged
        rows.append(
            (
                name,
                cell(rate(each), ".2f"),
                cell(cpu_ms(each), ".1f"),
                cell(100 * adherence[name], ".2f") if known else "",
                cell(distance[name], ".2f") if known else "",
                cell(spread[name], ".2f") if known else "",
            )
        )
    rows.append(("held-out pictures", "", "", "", cell(test.floor, ".2f"), ""))
    gap = f"adherence {figures['adherence_gap']:.2f} points less [{interval[0]:.2f} {interval[1]:.2f}]"
    alone = ", ".join(f"{name} {each['wall']:,.0f} ms" for name, each in told["one_picture_ms"].items())
    notes = [gap, f"one picture alone: {alone}"]
    if told["cold_start"] is not None:
        start = told["cold_start"]
        notes.append(
            f"cold start to the first picture: {start['wall_s']:.1f} s ({start['cpu_s']:.1f} s of CPU)"
        )
    return Findings("sampling", figures, rows, ratios, wanted, ERRORS, notes=notes)
