"""The algebra of schedules and parameterizations: round trips, ends, and refusals."""

import math

import pytest
import torch

from models.diffusion.objective import (
    LogitNormalTimes,
    MinSNRWeighting,
    Objective,
    UniformTimes,
    UnitWeighting,
)
from models.diffusion.parameterizations import EDM, Clean, Flow, Noise, Parameterization, Velocity
from models.diffusion.schedules import Coefficients, CosineSchedule, EDMSchedule, FlowSchedule, Schedule

SCHEDULES = [FlowSchedule(), FlowSchedule(shift=3.0), CosineSchedule(), EDMSchedule()]
PARAMETERIZATIONS = [Noise(), Clean(), Velocity(), Flow(), EDM(0.7)]
TIMES = torch.linspace(0.02, 0.98, 25)


def valid(parameterization: Parameterization, schedule: Schedule) -> bool:
    """EDM's coefficients assume alpha = 1; every other pair is invertible inside (0, 1)."""
    return not (isinstance(parameterization, EDM) and schedule.reaches_pure_noise)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda p: type(p).__name__)
def test_clean_inverts_the_target(
    schedule: Schedule, parameterization: Parameterization, rng: torch.Generator
) -> None:
    if not valid(parameterization, schedule):
        pytest.skip("refused at construction")
    at = Coefficients(*(c.double() for c in schedule(TIMES)))
    x0, eps = torch.randn(2, len(TIMES), 6, generator=rng, dtype=torch.float64)
    a, b = parameterization.target(at)
    x_t = at.alpha[:, None] * x0 + at.sigma[:, None] * eps
    output = a[:, None] * x0 + b[:, None] * eps
    # Each inversion loses at most the ratio of the coefficients involved; 1e-9 is far above float64 noise.
    torch.testing.assert_close(parameterization.clean(x_t, output, at), x0, rtol=0, atol=1e-9)


def test_edm_target_is_the_papers_preconditioning() -> None:
    sigma = torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64)
    at, sd = Coefficients(torch.ones_like(sigma), sigma), 0.7
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    a, b = EDM(sd).target(at)
    torch.testing.assert_close(a, (1 - c_skip) / c_out)
    torch.testing.assert_close(b, -c_skip * sigma / c_out)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_is_clean_at_0_and_noisiest_at_1(schedule: Schedule) -> None:
    alpha, sigma = schedule(torch.tensor([0.0, 0.3, 0.7, 1.0]))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha[-1] == 0) == schedule.reaches_pure_noise
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() <= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_time_at_inverts_log_snr(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(TIMES)), TIMES, rtol=1e-4, atol=1e-5)


def test_shift_moves_log_snr_by_a_constant() -> None:
    moved = FlowSchedule(3.0).log_snr(TIMES) - FlowSchedule().log_snr(TIMES)
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * math.log(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("schedule", [FlowSchedule(), CosineSchedule()], ids=["flow", "cosine"])
@pytest.mark.parametrize("parameterization", [Noise(), EDM()], ids=["eps", "edm"])
def test_pairs_without_an_inverse_are_refused(schedule: Schedule, parameterization: Parameterization) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Objective(schedule, parameterization, UnitWeighting(), UniformTimes())


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=lambda p: type(p).__name__)
def test_min_snr_weighs_the_error_of_x0(parameterization: Parameterization, rng: torch.Generator) -> None:
    """A known error of the output must cost min(snr, gamma) times the error of x0 it causes."""
    schedule = EDMSchedule() if isinstance(parameterization, EDM) else CosineSchedule()
    at = Coefficients(*(c.double() for c in schedule(TIMES)))
    target = parameterization.target(at)
    output = torch.randn(len(TIMES), 1, generator=rng, dtype=torch.float64)
    zero = torch.zeros_like(output)
    error_x0 = (parameterization.clean(zero, output, at) - parameterization.clean(zero, zero, at)).squeeze()
    snr = (at.alpha / at.sigma) ** 2
    expected = snr.clamp(max=5) * error_x0**2
    torch.testing.assert_close(MinSNRWeighting(5.0)(at, target) * output.squeeze() ** 2, expected)


def test_logit_normal_times_have_the_asked_median_and_width() -> None:
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logits = torch.logit(LogitNormalTimes(mean=-0.4, std=1.3)(uniform).double())
    assert logits.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.3, abs=1e-3)


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlowSchedule(shift=0.0),
        lambda: FlowSchedule(shift=math.nan),
        lambda: EDMSchedule(sigma_max=-1.0),
        lambda: LogitNormalTimes(std=0.0),
        lambda: MinSNRWeighting(gamma=0.0),
        lambda: EDM(sigma_data=0.0),
    ],
)
def test_numbers_out_of_range_are_refused(build: object) -> None:
    with pytest.raises(ValueError, match="but"):
        build()  # type: ignore[operator]
