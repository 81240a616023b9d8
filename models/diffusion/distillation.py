"""Distillation: a student takes in one step what its teacher takes in several, along the student's own path.

The student walks from noise to data in N steps, exactly as it will when it makes pictures. From where it
stands, the teacher goes the length of each step in several guided ones, and the student is drawn to where
that ends. It is progressive distillation (Salimans and Ho 2022, arXiv 2202.00512) in one go to the last
number of steps, and its starting points are the student's own, so that it learns to mend what its earlier
steps did ("backward distillation", Kohler et al. 2024, arXiv 2405.05224). The teacher is guided and the
student is not told by how much: guidance is built in, at one pass a step instead of two (Meng et al. 2022,
arXiv 2210.03142). Needs captions only, no pictures.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser
from models.diffusion.guidance import Branch, Denoise, Guidance
from models.diffusion.objective import Backbone, Objective
from models.diffusion.samplers import Grid, points, same_time, step
from models.diffusion.solvers import unipc


class Distillation:
    """How a student is taught.

    Args:
        teacher_steps: of the teacher for each one of the student, at least 1; with UniPC.
        guidance_scale: that is built into the student, up to 1,000; null is the teacher's own.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(self, teacher_steps: int = 3, guidance_scale: float | None = None) -> None:
        if not 1 <= teacher_steps <= 1_000:
            raise ValueError(f"teacher_steps is {teacher_steps}, but must be from 1 to 1,000, such as 3")
        if guidance_scale is not None and not abs(guidance_scale) <= 1_000:
            raise ValueError(f"guidance_scale is {guidance_scale}, but must be a number up to 1,000")
        self.teacher_steps = teacher_steps
        self.guidance_scale = guidance_scale

    def segments(self, grid: Grid, objective: Objective, num_steps: int) -> tuple[Tensor, ...]:
        """The teacher's times `[teacher_steps + 1]` within each of the student's `num_steps` steps.

        Raises:
            ValueError: `grid` with more steps visits other times than with `num_steps`.
        """
        n = self.teacher_steps
        fine, coarse = (grid(objective.schedule, count) for count in (num_steps * n, num_steps))
        if not torch.allclose(fine[::n], coarse, rtol=0, atol=1e-5):
            raise ValueError(
                f"the times of the grid's {num_steps} steps are not among those of its {num_steps * n}, so "
                "that teacher and student would not meet; use grid=uniform or grid=warped"
            )
        # The ends are the student's to the bit: those are the times that it is called at.
        return tuple(
            torch.cat([coarse[k : k + 1], fine[k * n + 1 : k * n + n], coarse[k + 1 : k + 2]])
            for k in range(num_steps)
        )


@dataclass(frozen=True)
class Lesson:
    """What is to be learnt.

    Args:
        objective: whose schedule and parameterization teacher and student share.
        segments: the teacher's times within each step of the student.
        guidance: of the teacher, with its refinements.
        guidance_scale: of the teacher.
    """

    objective: Objective
    segments: tuple[Tensor, ...]
    guidance: Guidance
    guidance_scale: float

    @property
    def times(self) -> Tensor:
        """The student's times `[N+1]`."""
        return torch.cat([*(times[:1] for times in self.segments), self.segments[-1][-1:]])

    def teacher(self, backbone: Backbone, conditioning: Conditioning, null: Conditioning) -> Denoise:
        """The guided teacher of one batch; `null` is the conditioning of the empty caption, B = 1."""
        w = self.guidance_scale
        everywhere = null.expand(conditioning.batch_size)
        denoiser = Denoiser(backbone, self.objective.schedule, self.objective.parameterization)
        return self.guidance.combine(denoiser, [Branch(1 - w, everywhere), Branch(w, conditioning)])

    def __call__(
        self, student: Backbone, teacher: Denoise, conditioning: Conditioning, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of each sample, float32 `[B]`, and the clean latents the teacher ended at `[B C h w]`.

        A step from `x_t` with denoised `D` ends at `x_s`, which is linear in `D`: the target of the student
        is the `D` whose one step ends where the teacher's several do. The error is that of the backbone's
        output, the mean over latents and steps.

        Args:
            student: its backbone; gradients go through each step alone.
            teacher: of this batch, as `teacher` gives it.
            conditioning: what the student is told.
            noise: standard normal `[B C h w]`.
        """
        schedule, parameterization = self.objective.schedule, self.objective.parameterization
        denoiser = Denoiser(student, schedule, parameterization)
        x = points(schedule, self.segments[0][:1])[0].sigma * noise
        losses, ahead = [], x
        for times in self.segments:
            now, then = points(schedule, times[[0, -1]])
            with torch.no_grad():
                ahead = unipc(teacher, schedule, x, times, _refuse, None)
            ratio = then.sigma / now.sigma
            wanted = (ahead - ratio * x) / (then.alpha - now.alpha * ratio)
            x0 = denoiser(x, same_time(times[0], x), conditioning)
            target = parameterization.target(now)
            # An error of x0 is so many times as large in the output F = a x0 + b eps.
            gain = (now.alpha * target.b - now.sigma * target.a) / now.sigma
            losses.append(gain.square() * (x0 - wanted).square().flatten(1).mean(1))
            x = step(x, x0.detach(), now, then)
        return torch.stack(losses).mean(0), ahead


def _refuse(number: int) -> Tensor:
    raise AssertionError("UniPC draws no noise")
