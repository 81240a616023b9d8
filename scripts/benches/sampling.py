"""How fast pictures come, and whether they are as good, next to the usual 50 steps of DDIM with guidance.

Three arms make pictures of the same prompts from the same checkpoint and take turns: ours, as the checkpoint
is sampled by default; the usual one, Euler with 50 uniform steps and both branches of guidance in each; and
ours again, for the A/A ratio. Afterwards both make pictures of several seeds, which are judged: do they show
what the prompt says, and how far are their features from those of held-out pictures. The spread of the usual
one's distance from seed to seed says what difference means nothing. Checkpoints of landscapes only: the judge
knows nothing else.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.landscapes import caption, draw_scene, factors, render
from data.progress import Progress
from data.rendered import VAL_SEED
from evaluation.adherence import AdherenceJudge, score
from evaluation.metrics import frechet_distance
from evaluation.report import find_judge
from models.diffusion.grids import uniform_grid
from models.diffusion.guidance import Guidance
from models.diffusion.samplers import euler
from models.loading import load_pipeline
from models.pipeline import Pipeline
from models.sampling import Job, Sampling
from scripts.benches.findings import Findings, cell
from scripts.benches.measuring import (
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
ERRORS = {"speedup": "aa"}
USUAL_STEPS = 50
TRIED = 128


def sampling(
    checkpoint: Path = Path("runs/landscapes"),
    images: int = 16,
    rounds: int = 12,
    pictures: int = 512,
    seeds: int = 5,
    batch: int = 16,
    steps: int = 0,
    scale: float = 0.0,
    usual_scale: float = 0.0,
) -> Findings:
    """Returns how fast pictures are made, and how good they are, next to 50 steps of DDIM with guidance.

    Args:
        checkpoint: a run's folder or an exported file, of landscapes.
        images: pictures a round.
        rounds: of each arm, an even number.
        pictures: that are judged, of each seed.
        seeds: that pictures are made of.
        batch: pictures made at once.
        steps: of ours; 0 is as the checkpoint is sampled.
        scale: of our guidance; 0 is as the checkpoint is sampled.
        usual_scale: of the usual one's guidance; 0 is the best one of 2, 3 and 4, tried on some pictures.
    """
    check_rounds(rounds)
    if min(images, pictures - 1, seeds, batch) < 1:
        raise ValueError("images, seeds and batch must be at least 1, and pictures at least 2")
    pipeline, _, sha256 = load_pipeline(checkpoint, torch.device("cpu"))
    assert pipeline.defaults is not None
    mine = replace(
        pipeline.defaults,
        num_steps=steps or pipeline.defaults.num_steps,
        guidance_scale=scale or pipeline.defaults.guidance_scale,
    )
    test = Test(pipeline, find_judge(checkpoint.parent / "judge"), pictures, batch)
    scales = [usual_scale] if usual_scale else [2.0, 3.0, 4.0]
    tried = {each: test(usual(each, -1), TRIED) for each in scales} if len(scales) > 1 else {}
    best = max(scales, key=lambda each: tried[each]["all"] if tried else 0.0)

    def arm(name: str, how: Sampling) -> Arm:
        def run() -> int:
            jobs = [Job(prompt, k) for k, prompt in enumerate(test.prompts[:images])]
            return len(pipeline.generate(jobs, how, batch_size=batch))

        return Arm(name, run)

    arms = [arm("ours", mine), arm("usual", usual(best, 0)), arm("ours again", mine)]
    with Progress("timing", len(arms) * (rounds + 1) * images) as progress:
        laps = interleave(arms, rounds, advance=progress.advance)
    judged = {
        name: [test(make(seed)) for seed in range(seeds)]
        for name, make in {
            "ours": lambda seed: replace(mine, seed=seed),
            "usual": lambda seed: usual(best, seed),
        }.items()
    }
    return _findings(laps, judged, test, {
        "images": images, "rounds": rounds, "pictures": pictures, "seeds": seeds, "batch": batch,
        "num_steps": mine.num_steps, "guidance_scale": mine.guidance_scale,
        "parts": pipeline.described, "usual_steps": USUAL_STEPS, "usual_scale": best,
        "usual_scales": {str(each): round(100 * found["all"], 2) for each, found in tried.items()},
        "checkpoint_sha256": sha256, **machine(),
    })  # fmt: skip


def usual(guidance_scale: float, seed: int) -> Sampling:
    """DDIM with eta 0 and 50 uniform steps, the prompt and the empty one in each."""
    return Sampling(guidance_scale, USUAL_STEPS, euler, uniform_grid, seed, Guidance())


class Test:
    """Judges pictures of fixed held-out prompts: adherence in [0, 1] by factor and in all, and `distance`."""

    __test__ = False  # for pytest

    def __init__(self, pipeline: Pipeline, judge: AdherenceJudge, pictures: int, batch: int) -> None:
        self.pipeline = pipeline
        self.judge = judge
        self.batch = batch
        scenes = [draw_scene(VAL_SEED, k) for k in range(pictures)]
        self.prompts = [caption(scene) for scene in scenes]
        self.factors = [factors(scene) for scene in scenes]
        # Other held-out scenes, through the autoencoder no more than life: what pictures should be like.
        others = [render(draw_scene(VAL_SEED + 1, k), pipeline.resolution) for k in range(2 * pictures)]
        self.real = self._features(torch.from_numpy(np.stack(others)).permute(0, 3, 1, 2))
        self.floor = frechet_distance(self.real[:pictures], self.real[pictures:])

    def __call__(self, how: Sampling, most: int | None = None) -> dict[str, float]:
        """The scores of pictures made in this way, of the first `most` prompts."""
        jobs = [Job(prompt, k) for k, prompt in enumerate(self.prompts[:most])]
        with Progress("pictures to judge", len(jobs)) as progress:
            made = self.pipeline.generate(jobs, how, batch_size=self.batch, progress=progress.update)
        shares = score(self.judge, made.float() / 127.5 - 1, self.factors[:most])
        return {**shares, "distance": frechet_distance(self._features(made), self.real[: len(jobs)])}

    def _features(self, pixels: Tensor) -> Tensor:
        return self.judge.embed(pixels.float() / 127.5 - 1)


def _rounded(found: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in found.items()}


def _findings(
    laps: Any, judged: dict[str, list[dict[str, float]]], test: Test, told: dict[str, Any]
) -> Findings:
    def mean(name: str, key: str) -> float:
        return statistics.fmean(found[key] for found in judged[name])

    def spread(name: str, key: str) -> float:
        values = [found[key] for found in judged[name]]
        return max(values) - min(values)

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
        "adherence_gap": round(100 * (mean("usual", "all") - mean("ours", "all")), 3),
        "adherence": {name: round(100 * mean(name, "all"), 2) for name in judged},
        "distance": {name: round(mean(name, "distance"), 3) for name in judged},
        "distance_spread": {name: round(spread(name, "distance"), 3) for name in judged},
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
                cell(100 * mean(name, "all"), ".2f") if known else "",
                cell(mean(name, "distance"), ".2f") if known else "",
                cell(spread(name, "distance"), ".2f") if known else "",
            )
        )
    rows.append(("held-out pictures", "", "", "", cell(test.floor, ".2f"), ""))
    return Findings("sampling", figures, rows, ratios, WANTED, ERRORS)
