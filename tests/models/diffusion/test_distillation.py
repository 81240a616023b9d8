"""Distillation: what a perfect student loses, where its steps begin, and which grids let both meet."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser
from models.diffusion.distillation import Distillation, Lesson
from models.diffusion.grids import karras_grid, uniform_grid, warped_grid
from models.diffusion.guidance import Guidance
from models.diffusion.objective import Objective
from models.diffusion.parameterizations import EDM, Clean, Flow, Parameterization, Velocity
from models.diffusion.samplers import euler
from models.diffusion.schedules import CosineSchedule, EDMSchedule, FlowSchedule, Schedule, expand
from models.diffusion.times import UniformTimes
from models.diffusion.weightings import UnitWeighting

SHAPE = (3, 2, 4, 4)
PAIRS: list[tuple[Schedule, Parameterization]] = [
    (FlowSchedule(), Flow()), (FlowSchedule(shift=3.0), Velocity()), (CosineSchedule(), Clean()),
    (EDMSchedule(sigma_max=20.0), EDM()),
]  # fmt: skip


def conditioning(value: float, B: int = 3) -> Conditioning:
    return Conditioning(torch.full((B, 3, 4), value), torch.ones(B, 3, dtype=torch.bool), torch.zeros(B, 4))


COND, NULL = conditioning(2.0), conditioning(1.0, 1)


class Backbone:
    """Outputs something unlike for each conditioning and time, and keeps what it was called with."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        self.seen.append(x)
        told = conditioning.tokens[:, 0, 0].reshape(-1, 1, 1, 1)
        return 0.3 * torch.sin(told * x + 0.3 * told) + 0.1 * told


def lesson(
    schedule: Schedule, parameterization: Parameterization, n: int = 1, steps: int = 2, scale: float = 1.0
) -> Lesson:
    objective = Objective(schedule, parameterization, UnitWeighting(), UniformTimes())
    segments = Distillation(n).segments(uniform_grid, objective, steps)
    return Lesson(objective, segments, Guidance(), scale)


@pytest.fixture
def noise(rng: torch.Generator) -> Tensor:
    return torch.randn(SHAPE, generator=rng)


@pytest.mark.parametrize(("schedule", "parameterization"), PAIRS)
def test_a_teacher_of_as_many_steps_teaches_nothing_new(
    schedule: Schedule, parameterization: Parameterization, noise: Tensor
) -> None:
    each, backbone = lesson(schedule, parameterization), Backbone()
    losses, _ = each(backbone, each.teacher(backbone, COND, NULL), COND, noise)
    assert losses.shape == (3,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, torch.zeros(3), rtol=0, atol=1e-9)
    finer = lesson(schedule, parameterization, n=4)
    assert (finer(backbone, finer.teacher(backbone, COND, NULL), COND, noise)[0] > 1e-7).all()


@pytest.mark.parametrize(("schedule", "parameterization"), PAIRS)
def test_guidance_is_built_in(schedule: Schedule, parameterization: Parameterization, noise: Tensor) -> None:
    """The output is linear in x0, so a student that outputs the guided sum loses nothing, and no other."""
    each, backbone = lesson(schedule, parameterization, scale=3.0), Backbone()

    def guided(x: Tensor, c_noise: Tensor, told: Conditioning) -> Tensor:
        null = NULL.expand(len(x))
        return 3.0 * backbone(x, c_noise, told) - 2.0 * backbone(x, c_noise, null)

    losses, _ = each(guided, each.teacher(backbone, COND, NULL), COND, noise)
    torch.testing.assert_close(losses, torch.zeros(3), rtol=0, atol=1e-8)
    assert (each(backbone, each.teacher(backbone, COND, NULL), COND, noise)[0] > 1e-4).all()


def test_a_perfect_student_ends_where_the_flow_does(noise: Tensor, gaussian: Any) -> None:
    """Data is Gaussian, so where the ODE leads is known: who goes there in one step loses least."""
    schedule, steps = FlowSchedule(), 2
    data = gaussian(schedule)
    each = lesson(schedule, Clean(), n=32, steps=steps)
    ends = dict(zip(each.times[:-1].tolist(), each.times[1:].tolist(), strict=True))

    def exact(x: Tensor, start: float, end: float) -> Tensor:
        x0 = data.exact(x.double(), start)
        alpha, sigma = (c.double() for c in schedule(torch.tensor([end])))
        spread = (alpha**2 * 0.5**2 + sigma**2).sqrt()
        return alpha * 0.6 + spread * (x0 - 0.6) / 0.5

    def student(x: Tensor, c_noise: Tensor, told: Conditioning) -> Tensor:
        now = float(c_noise[0] / 1000)
        then = next(end for start, end in ends.items() if abs(start - now) < 1e-6)
        ratio = then / now
        return ((exact(x, now, then) - ratio * x) / ((1 - then) - (1 - now) * ratio)).float()

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return data(x.double(), t).float()

    losses, ahead = each(student, teacher, COND, noise)
    assert losses.max() < 1e-5
    torch.testing.assert_close(ahead.double(), data.exact(noise.double(), 1.0), rtol=0, atol=5e-3)
    worse = each(lambda x, c, told: student(x, c, told) + 0.1, teacher, COND, noise)[0]
    assert worse.min() > 0.009  # an error of 0.1 in x0 at each step, at least

    denoiser = Denoiser(student, schedule, Clean())
    made = euler(lambda x, t: denoiser(x, t, COND), schedule, noise, each.times, lambda number: noise, None)
    torch.testing.assert_close(made.double(), data.exact(noise.double(), 1.0), rtol=0, atol=1e-4)


def test_later_steps_begin_where_the_student_is(noise: Tensor) -> None:
    each, teacher = lesson(FlowSchedule(), Flow(), n=3), Backbone()

    def student(x: Tensor, c_noise: Tensor, told: Conditioning) -> Tensor:
        return torch.full_like(x, 0.7)

    each(student, each.teacher(teacher, COND, NULL), COND, noise)
    assert len(teacher.seen) == 6
    torch.testing.assert_close(teacher.seen[0], noise)
    torch.testing.assert_close(teacher.seen[3], noise - 0.5 * 0.7)  # half the way along its own velocity


def test_each_step_has_its_own_gradient(noise: Tensor) -> None:
    """What the second step makes of the first is no part of the first one's gradient."""
    each = lesson(FlowSchedule(), Flow(), n=2)
    first, second = (torch.tensor(value, requires_grad=True) for value in (0.5, 0.2))

    def student(x: Tensor, c_noise: Tensor, told: Conditioning) -> Tensor:
        return x * expand(torch.where(c_noise > 600, first, second), x)

    each(student, each.teacher(Backbone(), COND, NULL), COND, noise)[0].mean().backward()
    alone = lesson(FlowSchedule(), Flow(), n=2)
    whole = first.grad
    only = torch.tensor(0.5, requires_grad=True)
    one = Lesson(alone.objective, alone.segments[:1], Guidance(), 1.0)
    one(lambda x, c, told: x * only, one.teacher(Backbone(), COND, NULL), COND, noise)[0].mean().backward()
    assert whole is not None
    assert only.grad is not None
    assert second.grad is not None
    torch.testing.assert_close(whole, only.grad / 2)


@pytest.mark.parametrize("grid", [uniform_grid, warped_grid])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_teacher_visits_the_students_times(grid: Callable[..., Tensor], steps: int) -> None:
    objective = lesson(FlowSchedule(), Flow()).objective
    segments = Distillation(teacher_steps=3).segments(grid, objective, steps)
    whole = torch.cat([segments[0][:1], *(times[1:] for times in segments)])
    torch.testing.assert_close(whole, grid(FlowSchedule(), 3 * steps))
    assert torch.equal(Lesson(objective, segments, Guidance(), 1.0).times, grid(FlowSchedule(), steps))


def test_what_cannot_be_is_refused() -> None:
    objective = lesson(FlowSchedule(), Flow()).objective
    with pytest.raises(ValueError, match="use grid=uniform or grid=warped"):
        Distillation(3).segments(karras_grid, objective, 2)
    with pytest.raises(ValueError, match="teacher_steps is 0"):
        Distillation(0)
    with pytest.raises(ValueError, match="guidance_scale is nan"):
        Distillation(3, float("nan"))
