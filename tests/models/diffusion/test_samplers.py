"""Samplers against closed forms: measured order of convergence, distribution, no trace of the batch."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.diffusion.draws import Draws, Purpose
from models.diffusion.grids import karras_grid, log_snr_grid, uniform_grid
from models.diffusion.samplers import Sampler, ancestral, euler, multistep, points, step
from models.diffusion.schedules import CosineSchedule, EDMSchedule, FlowSchedule, LinearSchedule, Schedule
from models.diffusion.solvers import dpmpp_2m, dpmpp_2m_sde, edm_stochastic, heun, unipc

Exact = Callable[[Schedule], Any]
SCHEDULES = [
    FlowSchedule(),
    CosineSchedule(),
    EDMSchedule(),
    LinearSchedule(),
    LinearSchedule(zero_terminal=True),
]
SAMPLERS: dict[str, Sampler] = {
    "euler": euler,
    "multistep": multistep,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "unipc": unipc,
    "ancestral": ancestral,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "edm_stochastic": edm_stochastic,
}
#: The stochastic ones without their noise, and the option's order. UniPC's corrector gains an order.
ORDERS: dict[str, tuple[Sampler, float, float]] = {
    "euler": (euler, 1.0, 0.2),
    "multistep": (multistep, 2.0, 0.3),
    "heun": (heun, 2.0, 0.3),
    "dpmpp_2m": (dpmpp_2m, 2.0, 0.3),
    "dpmpp_2m without a last step of order 1": (
        functools.partial(dpmpp_2m, lower_order_final=False), 2.0, 0.3,
    ),
    "unipc": (unipc, 3.0, 0.3),
    "ancestral": (functools.partial(ancestral, eta=0.0), 1.0, 0.2),
    "dpmpp_2m_sde": (functools.partial(dpmpp_2m_sde, eta=0.0), 2.0, 0.3),
    "edm_stochastic": (functools.partial(edm_stochastic, churn=0.0), 2.0, 0.3),
}  # fmt: skip


def name(value: object) -> str:
    end = "-zero" if isinstance(value, LinearSchedule) and value.zero_terminal else ""
    return type(value).__name__ + end


def never(number: int) -> Tensor:
    raise AssertionError(f"asked for new noise {number}")


def noise_like(x: Tensor, seed: int = 1) -> Callable[[int], Tensor]:
    """New noise of each image by number."""
    return functools.partial(Draws(seed, torch.arange(len(x))).normal, Purpose.STEP_NOISE, x.shape[1:])


def measured_order(
    sampler: Sampler, schedule: Schedule, grid: Callable[[Schedule, int], Tensor], exact: Exact
) -> float:
    """Slope of log error against log steps, started at t = 1 where alpha may be 0."""
    data = exact(schedule)
    x = torch.tensor([-1.5, -0.4, 0.9, 2.0], dtype=torch.float64)[:, None] * schedule(torch.ones(1)).sigma
    steps = (40, 80, 160)
    errors = [
        (sampler(data, schedule, x, grid(schedule, n), never, None) - data.exact(x, 1.0)).abs().max().item()
        for n in steps
    ]
    return math.log(errors[0] / errors[-1]) / math.log(steps[-1] / steps[0])


# The tails of the grid are long, as the order is a statement about ever finer grids.
far_grid = functools.partial(log_snr_grid, lowest=-14.0, highest=14.0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", ORDERS)
def test_measured_order(sampler: str, schedule: Schedule, gaussian: Exact) -> None:
    function, order, tolerance = ORDERS[sampler]
    assert measured_order(function, schedule, far_grid, gaussian) == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
@pytest.mark.parametrize("sampler", [multistep, heun])
def test_order_on_a_uniform_grid(sampler: Sampler, schedule: Schedule, gaussian: Exact) -> None:
    assert measured_order(sampler, schedule, uniform_grid, gaussian) == pytest.approx(2.0, abs=0.3)


def test_the_order_test_notices_a_planted_fault(gaussian: Exact) -> None:
    def careless(denoise, schedule, x, times, step_noise, callback):  # type: ignore[no-untyped-def]
        """Extrapolates by half a step whatever the step sizes are, as if the grid were uniform."""
        at = points(schedule, times)
        before = None
        for i in range(len(times) - 1):
            x0 = denoise(x, times[i].expand(len(x)))
            used = x0 if before is None else 1.5 * x0 - 0.5 * before
            x = step(x, used, at[i], at[i + 1])
            before = x0
        return x

    assert measured_order(careless, CosineSchedule(), uniform_grid, gaussian) < 1.7


def test_one_step_is_the_euler_step_of_rectified_flow() -> None:
    schedule = FlowSchedule()
    x, x0 = torch.tensor([[0.3]]), torch.tensor([[1.1]])
    now, then = schedule(torch.tensor(0.8)), schedule(torch.tensor(0.5))
    velocity = (x - x0) / now.sigma
    torch.testing.assert_close(step(x, x0, now, then), x + (0.5 - 0.8) * velocity)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", [dpmpp_2m, unipc, multistep])
def test_a_last_step_of_second_order_reaches_clean_data(sampler: Any, schedule: Schedule) -> None:
    """Denoised latents that change linearly in `sigma/(alpha + sigma)` are followed down to `sigma = 0`."""

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.double()[:, None] for c in schedule(t))
        return (0.3 + 0.8 * sigma / (alpha + sigma)).expand_as(x_t)

    option = {} if sampler is multistep else {"lower_order_final": False}
    x = torch.ones(2, 3, dtype=torch.float64)
    clean = sampler(denoise, schedule, x, uniform_grid(schedule, 4), never, None, **option)
    torch.testing.assert_close(clean, torch.full_like(x, 0.3), rtol=0, atol=1e-6)


def test_flow_heun_is_heun_on_the_velocity(gaussian: Exact) -> None:
    schedule = FlowSchedule()
    data, times = gaussian(schedule), torch.tensor([1.0, 0.6, 0.25], dtype=torch.float64)
    x = start = torch.tensor([[-1.0], [0.5]], dtype=torch.float64)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return (x - data(x, t.float().expand(2))) / t

    for now, then in itertools.pairwise(times):
        first = velocity(x, now)
        x = x + (then - now) / 2 * (first + velocity(x + (then - now) * first, then))
    ours = heun(data, schedule, start, times.float(), never, None)
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule(), LinearSchedule()], ids=name)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_have_the_distribution_of_a_two_point_mixture(
    sampler: str, schedule: Schedule, mixture: Exact, rng: torch.Generator
) -> None:
    """Weak convergence, for deterministic and stochastic samplers alike."""
    times = karras_grid(schedule, 60, sigma_min=0.01)
    at_1 = schedule(torch.ones(1))
    data = torch.where(torch.rand(8_000, 1, generator=rng) < 0.7, 1.0, -1.0)
    x = at_1.alpha * data + at_1.sigma * torch.randn(8_000, 1, generator=rng)
    x = SAMPLERS[sampler](mixture(schedule), schedule, x, times, noise_like(x), None)
    assert (x > 0).float().mean().item() == pytest.approx(0.7, abs=0.02)
    assert x[x > 0].mean().item() == pytest.approx(1.0, abs=0.01)
    assert x[x < 0].mean().item() == pytest.approx(-1.0, abs=0.01)
    assert x[x > 0].std().item() == pytest.approx(0.1, abs=0.02)


def test_edm_stochastic_is_the_papers_algorithm_2(gaussian: Exact) -> None:
    schedule = EDMSchedule()
    data = gaussian(schedule)
    times = karras_grid(schedule, 8).double()
    start = 80 * torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    noise = noise_like(start)
    sigmas = [80 * float(t) ** 7 for t in times]

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return data(x, torch.full((3,), (sigma / 80) ** (1 / 7)))

    x = start
    for i in range(8):
        gamma = min(2.0 / 8, math.sqrt(2) - 1) if 0.1 <= sigmas[i] <= 30 else 0.0
        raised = sigmas[i] * (1 + gamma)
        x = x + math.sqrt(raised**2 - sigmas[i] ** 2) * 1.01 * noise(i)
        slope = (x - denoise(x, raised)) / raised
        end = x + (sigmas[i + 1] - raised) * slope
        if sigmas[i + 1] > 0:
            other = (end - denoise(end, sigmas[i + 1])) / sigmas[i + 1]
            end = x + (sigmas[i + 1] - raised) * (slope + other) / 2
        x = end
    ours = edm_stochastic(
        data, schedule, start, times.float(), noise, None, churn=2.0, lowest=0.1, highest=30.0, inflation=1.01
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_noise_is_never_raised_beyond_the_schedule(schedule: Schedule, mixture: Exact) -> None:
    seen: list[float] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(t[0].item())
        return mixture(schedule)(x_t, t)

    x = torch.linspace(-2, 2, 9)[:, None] * schedule(torch.ones(1)).sigma
    times = uniform_grid(schedule, 20)
    edm_stochastic(denoise, schedule, x, times, noise_like(x), None, lowest=0.0, highest=1e9)
    assert max(seen) <= 1
    assert len(set(seen) - set(times.tolist())) > 15


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3])
def test_few_steps_from_1_to_0_are_finite(
    sampler: str, schedule: Schedule, num_steps: int, mixture: Exact
) -> None:
    x = torch.linspace(-2, 2, 9)[:, None] * schedule(torch.ones(1)).sigma
    times = uniform_grid(schedule, num_steps)
    x = SAMPLERS[sampler](mixture(schedule), schedule, x, times, noise_like(x), None)
    assert x.dtype == torch.float32
    assert x.abs().max() < 20  # Heun on EDM goes from sigma 80 to 5 to 0.04 here


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_does_not_depend_on_its_batch(sampler: str, mixture: Exact, rng: torch.Generator) -> None:
    schedule = CosineSchedule()
    times = log_snr_grid(schedule, 9)
    whole = torch.randn(5, 3, 7, 1, generator=rng)

    def run(first: int, last: int) -> Tensor:
        draws = Draws(3, torch.arange(first, last))
        noise = functools.partial(draws.normal, Purpose.STEP_NOISE, whole.shape[1:])
        return SAMPLERS[sampler](mixture(schedule), schedule, whole[first:last], times, noise, None)

    together = run(0, 5)
    assert torch.equal(torch.cat((run(0, 1), run(1, 3), run(3, 5))), together)
    assert torch.equal(run(0, 5), together)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_callback_sees_every_step(sampler: str, mixture: Exact) -> None:
    seen: list[int] = []
    schedule = FlowSchedule()
    x = torch.zeros(2, 1)
    SAMPLERS[sampler](
        mixture(schedule), schedule, x, uniform_grid(schedule, 5), noise_like(x),
        lambda i, x, x0: seen.append(i),
    )  # fmt: skip
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("sampler", "option", "said"),
    [
        (ancestral, {"eta": 1.5}, "eta is 1.5"),
        (dpmpp_2m_sde, {"eta": -0.1}, "eta is -0.1"),
        (edm_stochastic, {"churn": -1.0}, "churn -1.0"),
        (edm_stochastic, {"lowest": 2.0, "highest": 1.0}, "lowest at least 0 and below highest"),
        (edm_stochastic, {"inflation": math.nan}, "inflation nan"),
    ],
)
def test_options_out_of_range_are_refused(sampler: Any, option: dict[str, float], said: str) -> None:
    schedule, x = FlowSchedule(), torch.zeros(1, 1)
    with pytest.raises(ValueError, match=said):
        sampler(lambda x, t: x, schedule, x, uniform_grid(schedule, 2), never, None, **option)
