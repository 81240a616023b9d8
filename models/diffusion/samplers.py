"""Samplers: plain functions that integrate noise to data. Here the one step and the simplest walks over it.

Along the probability-flow ODE, `d(x/sigma) = D d(alpha/sigma)` with `D` the denoised latents, so one step is
exact where `D` is constant:

    x_s = (sigma_s/sigma_t) x_t + (alpha_s - alpha_t sigma_s/sigma_t) D

A sampler chooses only `D`. Nothing divides by `alpha_t`, which is 0 at `t = 1` for flow and cosine schedules.
A stochastic sampler takes the same step to less noise than `sigma_s` and adds the rest anew. Solvers that
look further than one call are in `solvers.py`, the times they walk in `grids.py`.

Coefficients are float64 numbers on the CPU, so that nothing in a step depends on the batch or the device; the
latents keep their own dtype. A function's parameters with a default are its configuration.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion.guidance import Denoise
from models.diffusion.schedules import Coefficients, Schedule

#: Told after every step: `(step number from 1, x [B C h w], x0_hat [B C h w])`.
Callback = Callable[[int, Tensor, Tensor], None]
#: Number of a draw, from 0 -> its standard normal numbers, like `x`; deterministic samplers never ask.
StepNoise = Callable[[int], Tensor]
#: What every sampler is.
Sampler = Callable[[Denoise, Schedule, Tensor, Tensor, StepNoise, Callback | None], Tensor]
#: What every grid is: `(schedule, num_steps) -> times [N+1]`, falling from 1 to 0.
Grid = Callable[[Schedule, int], Tensor]


def step(x_t: Tensor, x0: Tensor, now: Coefficients, then: Coefficients) -> Tensor:
    """`x` at the next time, for `x_t` and denoised `x0` `[B C h w]`; coefficients are scalars.

    Equals a DDIM step with eta 0 (Song et al. 2020, arXiv 2010.02502, eq. 12), and the Euler step of
    rectified flow and of EDM.
    """
    ratio = then.sigma / now.sigma
    return ratio * x_t + (then.alpha - now.alpha * ratio) * x0


def noisy_step(
    x_t: Tensor, x0: Tensor, now: Coefficients, then: Coefficients, eta: float, draw: Callable[[], Tensor]
) -> Tensor:
    """As `step`, with the share `eta` of the DDPM posterior's deviation drawn anew.

    Song et al. 2020 (arXiv 2010.02502, eq. 16), written for any schedule: with `q = (alpha_t sigma_s) /
    (alpha_s sigma_t)`, the new noise has variance `eta^2 sigma_s^2 (1 - q^2)` and what is kept has the rest
    of `sigma_s^2`. `eta` 0 is `step` to the bit; 1 is the exact posterior where `x0` is certain.
    """
    q = float(now.alpha * then.sigma / (then.alpha * now.sigma))
    fresh = eta**2 * (1 - q**2)
    x = step(x_t, x0, now, Coefficients(then.alpha, then.sigma * math.sqrt(1 - fresh)))
    if fresh == 0 or then.sigma == 0:
        return x
    return x + then.sigma * math.sqrt(fresh) * draw()


def euler(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
) -> Tensor:
    """Clean latents `[B C h w]` from noise `x`; first order, one denoiser call a step.

    Args:
        denoise: `(x_t, t) -> x0_hat`.
        schedule: of the denoiser.
        x: latents at `times[0]`, `[B C h w]`.
        times: falling grid `[N+1]`, on the CPU.
        step_noise: new noise by number.
        callback: told after every step.
    """
    return integrate(denoise, schedule, x, times, step_noise, callback, lambda i, x0, before: x0, 0.0)


def ancestral(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    eta: float = 1.0,
) -> Tensor:
    """As `euler`, with new noise in every step: DDPM's ancestral sampler (Ho et al. 2020, arXiv 2006.11239).

    On the EDM schedule it is the "Euler ancestral" of k-diffusion. Needs more steps than `euler`, and
    forgives errors of earlier steps.

    Args:
        denoise: as for `euler`, like all others.
        schedule: of the denoiser.
        x: latents at `times[0]`.
        times: falling grid.
        step_noise: new noise by number.
        callback: told after every step.
        eta: 1 = DDPM, 0 = `euler`, in between as DDIM's.

    Raises:
        ValueError: `eta` is outside [0, 1].
    """
    check_eta(eta)
    return integrate(denoise, schedule, x, times, step_noise, callback, lambda i, x0, before: x0, eta)


def multistep(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
) -> Tensor:
    """As `euler`, second order at the same cost: `D` is extrapolated from the last two denoiser calls.

    A two-step Adams-Bashforth in the integral above, in the family of DPM-Solver++(2M) (Lu et al. 2022,
    arXiv 2211.01095). `D` is taken as linear in `u = sigma/(alpha + sigma)` instead of in the log-SNR: `u`
    is finite at both ends, so the first and the last step need no special case. With `y = alpha/sigma`, the
    mean of `u = 1/(1+y)` over a step is `log((1+y_s)/(1+y_t))/(y_s-y_t)`, and 0 for the step to `sigma = 0`.
    """
    alpha, sigma = (c.double() for c in schedule(times))
    u = sigma / (alpha + sigma)
    y = alpha[:-1] / sigma[:-1]
    mean = torch.zeros_like(y)
    gap = y[1:] - y[:-1]
    mean[:-1] = torch.log1p(gap / (1 + y[:-1])) / gap
    if sigma[-1] > 0:
        last = alpha[-1] / sigma[-1] - y[-1]
        mean[-1] = torch.log1p(last / (1 + y[-1])) / last
    ahead = ((mean[1:] - u[1:-1]) / (u[1:-1] - u[:-2])).tolist()

    def extrapolate(i: int, x0: Tensor, before: Tensor | None) -> Tensor:
        return x0 if before is None else x0 + ahead[i - 1] * (x0 - before)

    return integrate(denoise, schedule, x, times, step_noise, callback, extrapolate, 0.0)


def integrate(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    choose: Callable[[int, Tensor, Tensor | None], Tensor],
    eta: float,
) -> Tensor:
    """Walks the grid with `noisy_step`; `choose(i, x0, x0 of the step before)` is the `D` of step i."""
    at = points(schedule, times)
    before = None
    for i in range(len(times) - 1):
        x0 = denoise(x, same_time(times[i], x))
        draw = _like(x, step_noise, i)
        x = noisy_step(x, choose(i, x0, before), at[i], at[i + 1], eta, draw)
        before = x0
        if callback is not None:
            callback(i + 1, x, x0)
    return x


def points(schedule: Schedule, times: Tensor) -> list[Coefficients]:
    """The coefficients at each of `times` `[N+1]`, as float64 scalars on the CPU."""
    alphas, sigmas = (c.double() for c in schedule(times.cpu()))
    return [Coefficients(alpha, sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)]


def same_time(time: Tensor, x: Tensor) -> Tensor:
    """The scalar `time` for every sample of `x`, `[B]` on its device."""
    return time.to(x.device).expand(len(x))


def check_eta(eta: float) -> None:
    """Raises ValueError where `eta` is no share of new noise."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be from 0 (no new noise) to 1 (as much as DDPM)")


def _like(x: Tensor, step_noise: StepNoise, number: int) -> Callable[[], Tensor]:
    return lambda: step_noise(number).to(x)
