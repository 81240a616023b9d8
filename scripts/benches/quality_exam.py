"""How good the pictures of a model are, the same exam for every arm of `bench.py quality`.

Pictures of fixed held-out prompts from fixed noise, by UniPC on uniform times with guidance in all steps.
Judged are adherence (all four factors right, in [0, 1]) and the Frechet distance in the judge's features to
other held-out renders.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.landscapes import caption, draw_scene, factors, render
from data.progress import Progress
from data.rendered import VAL_SEED
from evaluation.adherence import AdherenceJudge, score
from evaluation.metrics import frechet_distance
from models.diffusion.grids import uniform_grid
from models.diffusion.guidance import Guidance
from models.diffusion.samplers import Sampler
from models.loading import load_pipeline
from models.registry import build
from models.sampling import Job, Sampling

#: Seeds of the scenes: of the prompts that are reported, of the pictures that they are held against, and of
#: the prompts that rates and guidance scales are chosen on.
PROMPTS, REAL, TUNING = VAL_SEED, VAL_SEED + 1, VAL_SEED + 2
BATCH = 32


@dataclass(frozen=True)
class Score:
    """Adherence in [0, 1], and Frechet distance."""

    adherence: float
    distance: float

    def reaches(self, target: "Score") -> bool:
        """Whether both are as good as the target's."""
        return self.adherence >= target.adherence and self.distance <= target.distance

    def shortfall(self, target: "Score") -> float:
        """The factor by which the worse of both figures falls short of the target; up to 1 it is reached."""
        wanting = target.adherence / self.adherence if self.adherence else math.inf
        return max(wanting if target.adherence else 0.0, self.distance / target.distance)

    def document(self) -> dict[str, float]:
        """Both, as JSON."""
        return {name: round(value, 5) for name, value in asdict(self).items()}


class Exam:
    """Examines exported models.

    Args:
        judge: of landscapes.
        scenes: the seed of the prompts' scenes.
        pictures: how many are made.
        real: features of held-out renders `[M D]`, as `real_features` makes them.
        steps: of the sampler.
    """

    def __init__(self, judge: AdherenceJudge, scenes: int, pictures: int, real: Tensor, steps: int) -> None:
        drawn = [draw_scene(scenes, k) for k in range(pictures)]
        self.judge, self.real, self.steps = judge, real, steps
        self.prompts = [caption(scene) for scene in drawn]
        self.factors = [factors(scene) for scene in drawn]
        self.sampler: Sampler = build("sampler", {"name": "unipc"})

    def __call__(self, model: Path, scale: float) -> Score:
        """The score of the exported `model`, sampled with the guidance scale `scale`."""
        pipeline, _, _ = load_pipeline(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        how = Sampling(scale, self.steps, self.sampler, uniform_grid, 0, Guidance())
        jobs = [Job(prompt, k) for k, prompt in enumerate(self.prompts)]
        with Progress(
            f"pictures of {model.parent.name}/{model.stem}, scale {scale:g}", len(jobs)
        ) as progress:
            made = pipeline.generate(jobs, how, batch_size=BATCH, progress=progress.update)
        pixels = made.float() / 127.5 - 1
        right = score(self.judge, pixels, self.factors)["all"]
        return Score(right, frechet_distance(self.judge.embed(pixels), self.real))


def real_features(judge: AdherenceJudge, pictures: int, resolution: int) -> Tensor:
    """The judge's features `[N D]` of held-out renders."""
    renders = [render(draw_scene(REAL, k), resolution) for k in range(pictures)]
    return judge.embed(torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2).float() / 127.5 - 1)
