"""The algebra of schedules and parameterizations: round trips, ends, and refusals."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.denoiser import Denoiser
from models.diffusion.draws import Draws, Purpose
from models.diffusion.grids import uniform_grid
from models.diffusion.objective import Objective
from models.diffusion.parameterizations import EDM, Clean, Flow, Noise, Parameterization, Velocity
from models.diffusion.samplers import multistep
from models.diffusion.schedules import (
    Coefficients,
    CosineSchedule,
    EDMSchedule,
    FlowSchedule,
    LinearSchedule,
    Schedule,
    expand,
)
from models.diffusion.times import (
    LogitNormalTimes,
    LogNormalSigmaTimes,
    ModeTimes,
    TimeDistribution,
    UniformLogSNRTimes,
    UniformTimes,
)
from models.diffusion.weightings import (
    EDMWeighting,
    MinSNRWeighting,
    SigmoidWeighting,
    UnitWeighting,
    Weighting,
)

SCHEDULES = [
    FlowSchedule(), FlowSchedule(shift=3.0), CosineSchedule(), EDMSchedule(),
    LinearSchedule(), LinearSchedule(1e-4, 0.02, scaled=False), LinearSchedule(zero_terminal=True),
]  # fmt: skip
PARAMETERIZATIONS = [Noise(), Clean(), Velocity(), Flow(), EDM(0.7)]
TIMES = torch.linspace(0.02, 0.98, 25)


WEIGHTINGS: list[Weighting] = [UnitWeighting(), MinSNRWeighting(), EDMWeighting(), SigmoidWeighting()]
TIME_DISTRIBUTIONS: list[TimeDistribution] = [
    UniformTimes(), LogitNormalTimes(), ModeTimes(), LogNormalSigmaTimes(), UniformLogSNRTimes(),
]  # fmt: skip


def name(value: object) -> str:
    end = "-zero" if isinstance(value, LinearSchedule) and value.zero_terminal else ""
    return type(value).__name__ + end


def valid(parameterization: Parameterization, schedule: Schedule) -> bool:
    """EDM's coefficients assume alpha = 1; every other pair is invertible inside (0, 1)."""
    return not (isinstance(parameterization, EDM) and not isinstance(schedule, EDMSchedule))


def allowed(parameterization: Parameterization, schedule: Schedule) -> bool:
    """Whether the pair can be trained and sampled, from t = 1 on."""
    return valid(parameterization, schedule) and not (
        isinstance(parameterization, Noise) and schedule.reaches_pure_noise
    )


PAIRS = [(s, p) for s in SCHEDULES for p in PARAMETERIZATIONS]
ALLOWED = [(s, p) for s, p in PAIRS if allowed(p, s)]
TOLD = Conditioning(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1))


@pytest.mark.parametrize(
    ("schedule", "parameterization"), [(s, p) for s, p in PAIRS if valid(p, s)], ids=name
)
def test_clean_inverts_the_target(
    schedule: Schedule, parameterization: Parameterization, rng: torch.Generator
) -> None:
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


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_time_is_clean_at_0_and_noisiest_at_1(schedule: Schedule) -> None:
    alpha, sigma = schedule(torch.tensor([0.0, 0.3, 0.7, 1.0]))
    assert alpha[0] == 1
    assert sigma[0] == 0
    assert (alpha[-1] == 0) == schedule.reaches_pure_noise
    assert (sigma.diff() > 0).all()
    assert (alpha.diff() <= 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
def test_time_at_inverts_log_snr(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.time_at(schedule.log_snr(TIMES)), TIMES, rtol=1e-4, atol=1e-5)


def test_shift_moves_log_snr_by_a_constant() -> None:
    moved = FlowSchedule(3.0).log_snr(TIMES) - FlowSchedule().log_snr(TIMES)
    torch.testing.assert_close(moved, torch.full_like(moved, -2 * math.log(3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("schedule", "parameterization"), PAIRS, ids=name)
def test_every_pair_samples_alike_or_is_refused(
    schedule: Schedule, parameterization: Parameterization, gaussian: Any, rng: torch.Generator
) -> None:
    """The exact denoiser, told through what the backbone would output, from t = 1 with alpha 0 to t = 0."""
    exact = gaussian(schedule)
    if not allowed(parameterization, schedule):
        with pytest.raises(ValueError, match="alpha"):
            Denoiser(lambda x, c_noise, conditioning: x, schedule, parameterization)
        with pytest.raises(ValueError, match=r"use .*schedule=edm"):
            Objective(schedule, parameterization, UnitWeighting(), UniformTimes())
        return
    now: list[Tensor] = []

    def backbone(x_in: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        at = schedule(now[-1])
        x_t = x_in / expand(parameterization.c_in(at), x_in)
        x0 = exact(x_t, now[-1])
        alpha, sigma, a, b = (expand(c.double(), x_in) for c in (*at, *parameterization.target(at)))
        return a * x0 + b * (x_t - alpha * x0) / sigma

    denoiser = Denoiser(backbone, schedule, parameterization)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        now.append(t)
        return denoiser(x_t, t, TOLD)

    x = torch.randn(4, 3, generator=rng) * schedule(torch.ones(1)).sigma
    times = uniform_grid(schedule, 12)
    ours = multistep(denoise, schedule, x, times, lambda number: x, None)
    wanted = multistep(exact, schedule, x, times, lambda number: x, None).float()
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("times", TIME_DISTRIBUTIONS, ids=name)
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=name)
@pytest.mark.parametrize(("schedule", "parameterization"), ALLOWED, ids=name)
def test_every_allowed_combination_trains(
    schedule: Schedule, parameterization: Parameterization, weighting: Weighting, times: TimeDistribution
) -> None:
    """Finite losses and gradients, and nothing to learn for a backbone that knows the answer."""
    objective = Objective(schedule, parameterization, weighting, times)
    draws = Draws(0, torch.arange(64))
    x0 = draws.normal(Purpose.POSTERIOR, (2, 2, 2))
    gain = torch.ones(1, requires_grad=True)
    losses = objective(
        lambda x, c_noise, told: gain * x + 1e-3 * c_noise[:, None, None, None], x0, TOLD, draws
    )
    assert losses.shape == (64,)
    assert torch.isfinite(losses).all()
    assert (losses > 0).float().mean() > 0.8
    losses.mean().backward()
    assert torch.isfinite(gain.grad).all()
    eps = draws.normal(Purpose.NOISE, x0.shape[1:])
    t = times(draws.spread(Purpose.TIME), schedule)
    target = parameterization.target(schedule(t))
    answer = expand(target.a, x0) * x0 + expand(target.b, x0) * eps
    assert (objective.loss(lambda x, c_noise, told: answer, x0, TOLD, t, eps) == 0).all()


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=name)
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


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=name)
def test_edm_and_sigmoid_weigh_what_their_papers_weigh(
    parameterization: Parameterization, rng: torch.Generator
) -> None:
    schedule = EDMSchedule() if isinstance(parameterization, EDM) else CosineSchedule()
    at = Coefficients(*(c.double() for c in schedule(TIMES)))
    target = parameterization.target(at)
    output = torch.randn(len(TIMES), 1, generator=rng, dtype=torch.float64)
    zero = torch.zeros_like(output)
    error_x0 = (parameterization.clean(zero, output, at) - parameterization.clean(zero, zero, at)).squeeze()
    s, sd = at.sigma / at.alpha, 0.7
    edm = (s**2 + sd**2) / (s * sd) ** 2 * error_x0**2
    torch.testing.assert_close(EDMWeighting(sd)(at, target) * output.squeeze() ** 2, edm)
    error_eps = error_x0 / s
    sigmoid = torch.sigmoid(1.5 - 2 * torch.log(1 / s)) * error_eps**2
    torch.testing.assert_close(SigmoidWeighting(1.5)(at, target) * output.squeeze() ** 2, sigmoid)


def test_edm_weighting_is_1_for_edms_own_target() -> None:
    schedule = EDMSchedule()
    at = schedule(TIMES)
    weight = EDMWeighting(0.7)(at, EDM(0.7).target(at))
    torch.testing.assert_close(weight, torch.ones_like(weight))


UNIFORM = (torch.arange(100_000) + 0.5) / 100_000


@pytest.mark.parametrize("schedule", SCHEDULES, ids=name)
@pytest.mark.parametrize("times", TIME_DISTRIBUTIONS, ids=name)
def test_times_rise_with_the_uniform_number_within_0_and_1(
    times: TimeDistribution, schedule: Schedule
) -> None:
    t = times(UNIFORM, schedule)
    assert ((t > 0) & (t <= 1)).all()
    assert (t.diff() >= -1e-6).all()


def test_logit_normal_times_have_the_asked_median_and_width() -> None:
    logits = torch.logit(LogitNormalTimes(mean=-0.4, std=1.3)(UNIFORM, FlowSchedule()).double())
    assert logits.mean().item() == pytest.approx(-0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(1.3, abs=1e-3)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_mode_times_are_the_papers(scale: float) -> None:
    u = 1 - UNIFORM.double()
    wanted = 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(ModeTimes(scale)(UNIFORM, FlowSchedule()).double(), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [FlowSchedule(3.0), CosineSchedule(), EDMSchedule()], ids=name)
def test_log_normal_sigma_is_normal_in_the_log_of_the_noise_level(schedule: Schedule) -> None:
    level = -schedule.log_snr(LogNormalSigmaTimes(-0.8, 1.1)(UNIFORM, schedule)).double() / 2
    assert level.mean().item() == pytest.approx(-0.8, abs=2e-3)
    assert level.std().item() == pytest.approx(1.1, abs=2e-3)


def test_uniform_log_snr_stays_on_the_schedule() -> None:
    for schedule, lowest in ((CosineSchedule(), -6.0), (EDMSchedule(sigma_max=10.0), -2 * math.log(10))):
        found = schedule.log_snr(UniformLogSNRTimes(-6.0, 8.0)(UNIFORM, schedule)).double().sort().values
        wanted = torch.linspace(lowest, 8.0, len(UNIFORM), dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-2)


def test_the_linear_schedule_is_smooth_between_its_timesteps() -> None:
    """Also below the first and above the last but one, where the log-SNR goes to infinity."""
    t = torch.linspace(0, 1, 20_001)
    for schedule in (LinearSchedule(), LinearSchedule(zero_terminal=True)):
        alpha, sigma = schedule(t)
        assert (alpha.diff() <= 0).all()
        assert (sigma[1:].diff() >= 0).all()
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))
        level = schedule.log_snr(t[10:-10]).diff()
        assert (level < 0).all()
        assert (level / level.roll(1))[1:].max() < 2.5


def test_stable_diffusion_is_told_its_timesteps() -> None:
    schedule = LinearSchedule()
    t = torch.tensor([0.0005, 0.001, 0.123, 0.5, 1.0])
    seen: list[Tensor] = []

    def backbone(x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor:
        seen.append(c_noise)
        return x

    Denoiser(backbone, schedule, Noise())(torch.zeros(5, 1), t, TOLD)
    Objective(schedule, Noise(), UnitWeighting(), UniformTimes()).loss(
        backbone, torch.zeros(5, 1), TOLD, t, torch.zeros(5, 1)
    )
    for c_noise in seen:
        assert c_noise.tolist() == [0.0, 0.0, 122.0, 499.0, 999.0]
    assert FlowSchedule().timestep(torch.tensor([1.0])).item() == 1000


@pytest.mark.parametrize(
    "build",
    [
        lambda: FlowSchedule(shift=0.0),
        lambda: FlowSchedule(shift=math.nan),
        lambda: EDMSchedule(sigma_max=-1.0),
        lambda: LogitNormalTimes(std=0.0),
        lambda: MinSNRWeighting(gamma=0.0),
        lambda: EDM(sigma_data=0.0),
        lambda: LinearSchedule(beta_start=0.0),
        lambda: LinearSchedule(beta_start=0.02, beta_end=0.01),
        lambda: EDMWeighting(sigma_data=-1.0),
        lambda: SigmoidWeighting(bias=math.inf),
        lambda: ModeTimes(scale=1.8),
        lambda: LogNormalSigmaTimes(std=0.0),
    ],
)
def test_numbers_out_of_range_are_refused(build: object) -> None:
    with pytest.raises(ValueError, match="but"):
        build()  # type: ignore[operator]
