"""Samplers against closed forms: measured order of convergence, distribution, and guidance as a sum."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser
from models.diffusion.guidance import Branch, classifier_free, guide
from models.diffusion.parameterizations import Flow, Velocity
from models.diffusion.samplers import Sampler, euler, log_snr_grid, multistep, step, uniform_grid
from models.diffusion.schedules import CosineSchedule, EDMSchedule, FlowSchedule, Schedule, expand

SCHEDULES = [FlowSchedule(), CosineSchedule(), EDMSchedule()]
MEAN, STD = 0.6, 0.5


class GaussianData:
    """The exact denoiser where clean data is normal with mean MEAN and deviation STD."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c.double(), x_t) for c in self.schedule(t))
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return MEAN + gain * (x_t - alpha * MEAN)

    def exact(self, x: Tensor, start: float) -> Tensor:
        """Where the probability-flow ODE takes `x` at `start`: the same quantile of the data."""
        alpha, sigma = (c.double() for c in self.schedule(torch.tensor([start])))
        return MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()


def measured_order(sampler: Sampler, schedule: Schedule, grid: Callable[[Schedule, int], Tensor]) -> float:
    """Slope of log error against log steps, started at t = 1 where alpha may be 0."""
    data = GaussianData(schedule)
    x = torch.tensor([-1.5, -0.4, 0.9, 2.0], dtype=torch.float64)[:, None] * schedule(torch.ones(1)).sigma
    steps = (40, 80, 160)
    errors = [
        (sampler(data, schedule, x, grid(schedule, n), None) - data.exact(x, 1.0)).abs().max().item()
        for n in steps
    ]
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    ("sampler", "order", "tolerance"), [(euler, 1.0, 0.2), (multistep, 2.0, 0.3)], ids=["euler", "multistep"]
)
def test_measured_order(sampler: Sampler, order: float, tolerance: float, schedule: Schedule) -> None:
    # The tails of the grid grow with the steps, as the order is a statement about ever finer grids.
    def grid(schedule: Schedule, n: int) -> Tensor:
        reach = 14.0
        return log_snr_grid(schedule, n, max(-reach, schedule.log_snr(torch.ones(1)).item()), reach)

    assert measured_order(sampler, schedule, grid) == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
def test_multistep_keeps_its_order_on_a_uniform_grid(schedule: Schedule) -> None:
    assert measured_order(multistep, schedule, uniform_grid) == pytest.approx(2.0, abs=0.3)


def test_the_order_test_notices_a_planted_fault() -> None:
    def careless(denoise, schedule, x, times, callback):  # type: ignore[no-untyped-def]
        """Extrapolates by half a step whatever the step sizes are, as if the grid were uniform."""
        alphas, sigmas = schedule(times)
        before = None
        for i in range(len(times) - 1):
            x0 = denoise(x, times[i].expand(len(x)))
            used = x0 if before is None else 1.5 * x0 - 0.5 * before
            x = step(x, used, type(schedule(times))(alphas[i], sigmas[i]), schedule(times[i + 1]))
            before = x0
        return x

    assert measured_order(careless, CosineSchedule(), uniform_grid) < 1.7


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("grid", [uniform_grid, log_snr_grid])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_grids_fall_from_1_to_0(
    schedule: Schedule, grid: Callable[[Schedule, int], Tensor], num_steps: int
) -> None:
    times = grid(schedule, num_steps)
    assert times.shape == (num_steps + 1,)
    assert times[0] == 1
    assert times[-1] == 0
    assert (times.diff() < 0).all()


def test_one_step_is_the_euler_step_of_rectified_flow() -> None:
    schedule = FlowSchedule()
    x, x0 = torch.tensor([[0.3]]), torch.tensor([[1.1]])
    now, then = schedule(torch.tensor(0.8)), schedule(torch.tensor(0.5))
    velocity = (x - x0) / now.sigma
    torch.testing.assert_close(step(x, x0, now, then), x + (0.5 - 0.8) * velocity)


@pytest.mark.parametrize("sampler", [euler, multistep])
def test_samples_have_the_distribution_of_a_two_point_mixture(sampler: Sampler, rng: torch.Generator) -> None:
    """Data is -1 (30 %) or +1 (70 %) with deviation 0.1; the exact denoiser is a softmax of two Gaussians."""
    schedule, spread = FlowSchedule(), 0.1
    centres, shares = torch.tensor([-1.0, 1.0]), torch.tensor([0.3, 0.7])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (expand(c, x_t) for c in schedule(t))
        variance = alpha**2 * spread**2 + sigma**2
        weight = (shares.log() - (x_t - alpha * centres) ** 2 / (2 * variance)).softmax(-1)
        each = centres + alpha * spread**2 / variance * (x_t - alpha * centres)
        return (weight * each).sum(-1, keepdim=True)

    x = sampler(denoise, schedule, torch.randn(20_000, 1, generator=rng), uniform_grid(schedule, 60), None)
    assert (x > 0).float().mean().item() == pytest.approx(0.7, abs=0.015)
    assert x[x > 0].mean().item() == pytest.approx(1.0, abs=0.01)
    assert x[x > 0].std().item() == pytest.approx(spread, abs=0.02)


def test_callback_sees_every_step() -> None:
    seen: list[int] = []
    schedule = FlowSchedule()
    multistep(
        GaussianData(schedule),
        schedule,
        torch.zeros(2, 1, dtype=torch.float64),
        uniform_grid(schedule, 5),
        lambda i, x, x0: seen.append(i),
    )
    assert seen == [1, 2, 3, 4, 5]


def conditioning(value: float, B: int = 2) -> Conditioning:
    return Conditioning(torch.full((B, 3, 4), value), torch.ones(B, 3, dtype=torch.bool), torch.zeros(B, 4))


class CountingBackbone:
    """Outputs the first number of its conditioning and counts the images it was asked for."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        self.images += len(x)
        return conditioning.tokens[:, 0, 0].reshape(-1, 1, 1, 1).expand_as(x)


@pytest.mark.parametrize(("scale", "branches"), [(0.0, 1), (1.0, 1), (3.5, 2)])
def test_classifier_free_guidance_is_the_weighted_sum(scale: float, branches: int) -> None:
    backbone = CountingBackbone()
    denoiser = Denoiser(backbone, FlowSchedule(), Flow())
    x, t = torch.ones(2, 1, 2, 2), torch.full((2,), 0.5)
    cond, null = conditioning(2.0), conditioning(1.0)
    guided = classifier_free(denoiser, cond, null, scale)(x, t)
    assert backbone.images == branches * 2
    expected = (1 - scale) * denoiser(x, t, null) + scale * denoiser(x, t, cond)
    torch.testing.assert_close(guided, expected)


def test_guidance_weights_must_sum_to_1() -> None:
    denoiser = Denoiser(CountingBackbone(), FlowSchedule(), Velocity())
    with pytest.raises(ValueError, match=r"sum to 1\.5"):
        guide(denoiser, [Branch(0.5, conditioning(0.0)), Branch(1.0, conditioning(1.0))])
