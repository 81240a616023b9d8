"""Samplers against the schedulers of diffusers, driven through their public interface on an exact denoiser.

Both walk the same times and get the same new noise, and end at the same picture to 1e-4.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from models.diffusion.grids import karras_grid, uniform_grid
from models.diffusion.samplers import Sampler, ancestral, euler
from models.diffusion.schedules import EDMSchedule, FlowSchedule, LinearSchedule, Schedule, expand
from models.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, heun, unipc

#: Theirs turns tensors into numpy arrays in a way numpy has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
Exact = Callable[[Schedule], Any]
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SHAPE = (3, 2, 4, 4)
SEED = 5


def noises() -> Callable[[int], Tensor]:
    """New noise as a scheduler draws it from its generator: each number in its turn."""
    generator = torch.Generator().manual_seed(SEED)
    drawn: list[Tensor] = []

    def noise(number: int) -> Tensor:
        while len(drawn) <= number:
            drawn.append(torch.randn(SHAPE, generator=generator))
        return drawn[number]

    return noise


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    assert torch.isfinite(ours).all()
    return (ours.double() - theirs.double()).abs().max().item()


def drive(scheduler: Any, model: Callable[[Tensor, Tensor], Tensor], x: Tensor, **options: Any) -> Tensor:
    """A scheduler's loop as its pipelines write it."""
    for timestep in scheduler.timesteps:
        output = model(scheduler.scale_model_input(x, timestep), timestep)
        x = scheduler.step(output, timestep, x, **options).prev_sample
    return x


#: Scheduler, our sampler, whether theirs walks `x / alpha`, whether it draws new noise.
CASES: dict[str, tuple[Callable[[], Any], Sampler, bool, bool]] = {
    "ddim": (
        lambda: DDIMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
        euler, False, False,
    ),
    "ddpm": (
        lambda: DDPMScheduler(**BETAS, clip_sample=False, timestep_spacing="trailing"),
        ancestral, False, True,
    ),
    "euler": (lambda: EulerDiscreteScheduler(**BETAS, timestep_spacing="trailing"), euler, True, False),
    "euler_ancestral": (
        lambda: EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing"), ancestral, True, True,
    ),
    "dpmpp_2m": (
        lambda: DPMSolverMultistepScheduler(**BETAS, timestep_spacing="trailing"), dpmpp_2m, False, False,
    ),
    "dpmpp_2m_sde": (
        lambda: DPMSolverMultistepScheduler(
            **BETAS, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++"
        ),
        dpmpp_2m_sde, False, True,
    ),
    "unipc": (
        lambda: UniPCMultistepScheduler(**BETAS, timestep_spacing="trailing", final_sigmas_type="zero"),
        unipc, False, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_steps", [5, 20])
@pytest.mark.parametrize("name", CASES)
def test_stable_diffusion_schedulers(
    name: str, num_steps: int, gaussian: Exact, rng: torch.Generator
) -> None:
    make, sampler, scaled, stochastic = CASES[name]
    schedule = LinearSchedule()
    denoise = gaussian(schedule)
    scheduler = make()
    scheduler.set_timesteps(num_steps)
    times = torch.cat((schedule.discrete_time(scheduler.timesteps), torch.zeros(1)))

    def predict_eps(x: Tensor, timestep: Tensor) -> Tensor:
        t = schedule.discrete_time(timestep).expand(len(x))
        assert schedule.timestep(t)[0] == timestep
        alpha, sigma = (expand(c, x) for c in schedule(t))
        return ((x - alpha * denoise(x, t)) / sigma).float()

    x = torch.randn(SHAPE, generator=rng)
    start = x / schedule(times[:1]).alpha if scaled else x
    options = {"generator": torch.Generator().manual_seed(SEED)} if stochastic else {}
    theirs = drive(scheduler, predict_eps, start, **options)
    assert largest_difference(sampler(denoise, schedule, x, times, noises(), None), theirs) < 1e-4


@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize(
    ("kind", "sampler"), [(DPMSolverMultistepScheduler, dpmpp_2m), (UniPCMultistepScheduler, unipc)]
)
def test_the_order_of_the_last_step(
    kind: Any, sampler: Any, lower: bool, gaussian: Exact, rng: torch.Generator
) -> None:
    """A walk that ends at their `sigma_min`, where a last step of second order is finite in the log-SNR."""
    schedule = LinearSchedule()
    denoise = gaussian(schedule)
    scheduler = kind(
        **BETAS, timestep_spacing="trailing", final_sigmas_type="sigma_min", lower_order_final=lower
    )
    scheduler.set_timesteps(10)
    times = schedule.discrete_time(torch.cat((scheduler.timesteps, torch.zeros(1, dtype=torch.long))))

    def predict_eps(x: Tensor, timestep: Tensor) -> Tensor:
        t = schedule.discrete_time(timestep).expand(len(x))
        alpha, sigma = (expand(c, x) for c in schedule(t))
        return ((x - alpha * denoise(x, t)) / sigma).float()

    x = torch.randn(SHAPE, generator=rng)
    ours = sampler(denoise, schedule, x, times, noises(), None, lower_order_final=lower)
    other = sampler(denoise, schedule, x, times, noises(), None, lower_order_final=not lower)
    theirs = drive(scheduler, predict_eps, x)
    assert largest_difference(ours, theirs) < 1e-4
    assert largest_difference(other, theirs) > 1e-3


def test_heun_is_edm_heun(gaussian: Exact, rng: torch.Generator) -> None:
    scheduler = HeunDiscreteScheduler(**BETAS, timestep_spacing="trailing", use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    levels = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1:-1:2])).double()
    schedule = EDMSchedule(sigma_max=float(levels[0]))
    denoise = gaussian(schedule)
    times = torch.cat((schedule.time_at(-2 * levels.log()), torch.zeros(1)))

    def predict_eps(x: Tensor, timestep: Tensor) -> Tensor:
        sigma = scheduler.sigmas[scheduler.step_index or 0]
        x = x * (sigma**2 + 1).sqrt()
        t = schedule.time_at(-2 * sigma.log()).expand(len(x))
        return ((x - denoise(x, t)) / sigma).float()

    x = torch.randn(SHAPE, generator=rng) * levels[0].float()
    theirs = drive(scheduler, predict_eps, x)
    assert largest_difference(heun(denoise, schedule, x, times, noises(), None), theirs) < 1e-4


@pytest.mark.parametrize(
    ("kind", "sampler"), [(EDMEulerScheduler, euler), (EDMDPMSolverMultistepScheduler, dpmpp_2m)]
)
def test_edm_schedulers(kind: Any, sampler: Sampler, gaussian: Exact, rng: torch.Generator) -> None:
    """Theirs on their own sigmas, ours on `karras_grid`."""
    schedule, sigma_data = EDMSchedule(sigma_max=80.0), 0.5
    denoise = gaussian(schedule)
    scheduler = kind(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data)
    scheduler.set_timesteps(12)

    def predict(x_in: Tensor, timestep: Tensor) -> Tensor:
        sigma = torch.exp(4 * timestep)
        norm = (sigma**2 + sigma_data**2).sqrt()
        x = x_in * norm
        x0 = denoise(x, schedule.time_at(-2 * sigma.log()).expand(len(x)))
        return ((x0 - sigma_data**2 / norm**2 * x) * norm / (sigma * sigma_data)).float()

    x = torch.randn(SHAPE, generator=rng) * 80
    theirs = drive(scheduler, predict, x)
    ours = sampler(denoise, schedule, x, karras_grid(schedule, 12), noises(), None)
    assert largest_difference(ours, theirs) < 1e-4


@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_flow_match_schedulers(kind: Any, gaussian: Exact, rng: torch.Generator) -> None:
    scheduler = kind(shift=1.0 if kind is FlowMatchHeunDiscreteScheduler else 3.0)
    schedule = FlowSchedule(scheduler.config.shift)
    denoise = gaussian(schedule)
    if kind is FlowMatchEulerDiscreteScheduler:
        scheduler.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
        times, sampler = uniform_grid(schedule, 10), euler
    else:
        scheduler.set_timesteps(10)
        times = torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], torch.zeros(1)))
        sampler = heun

    def velocity(x: Tensor) -> Tensor:
        sigma = scheduler.sigmas[scheduler.step_index or 0]
        t = schedule.time_at(2 * torch.logit(1 - sigma.double())).expand(len(x))
        return ((x - denoise(x, t)) / sigma).float()

    x = start = torch.randn(SHAPE, generator=rng)
    for timestep in scheduler.timesteps:
        x = scheduler.step(velocity(x), timestep, x).prev_sample
    assert largest_difference(sampler(denoise, schedule, start, times, noises(), None), x) < 1e-4


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_the_linear_schedule_is_theirs_at_every_timestep(scaled: bool, zero_terminal: bool) -> None:
    kind = "scaled_linear" if scaled else "linear"
    theirs = DDIMScheduler(**BETAS | {"beta_schedule": kind}, rescale_betas_zero_snr=zero_terminal)
    schedule = LinearSchedule(scaled=scaled, zero_terminal=zero_terminal)
    k = torch.arange(1000)
    alpha, sigma = schedule(schedule.discrete_time(k))
    torch.testing.assert_close(alpha, theirs.alphas_cumprod.sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sigma, (1 - theirs.alphas_cumprod).sqrt(), rtol=1e-4, atol=1e-5)
    assert torch.equal(schedule.timestep(schedule.discrete_time(k)), k.float())
