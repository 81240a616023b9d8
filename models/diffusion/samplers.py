"""Samplers: plain functions that integrate noise to data, and the grids of times they walk.

Along the probability-flow ODE, `d(x/sigma) = D d(alpha/sigma)` with `D` the denoised latents, so one step is
exact where `D` is constant:

    x_s = (sigma_s/sigma_t) x_t + (alpha_s - alpha_t sigma_s/sigma_t) D

A sampler chooses only `D`. Nothing divides by `alpha`, which is 0 at `t = 1` for flow and cosine schedules.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion.guidance import Denoise
from models.diffusion.schedules import Coefficients, Schedule

#: Told after every step: `(step number from 1, x [B C h w], x0_hat [B C h w])`.
Callback = Callable[[int, Tensor, Tensor], None]
#: What every sampler is.
Sampler = Callable[[Denoise, Schedule, Tensor, Tensor, Callback | None], Tensor]
#: What every grid is: `(schedule, num_steps) -> times [N+1]`, falling from 1 to 0.
Grid = Callable[[Schedule, int], Tensor]


def step(x_t: Tensor, x0: Tensor, now: Coefficients, then: Coefficients) -> Tensor:
    """`x` at the next time, for `x_t` and denoised `x0` `[B C h w]`; coefficients are scalars.

    Equals a DDIM step with eta 0 (Song et al. 2020, arXiv 2010.02502, eq. 12), and the Euler step of
    rectified flow and of EDM.
    """
    ratio = then.sigma / now.sigma
    return ratio * x_t + (then.alpha - now.alpha * ratio) * x0


def euler(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, callback: Callback | None
) -> Tensor:
    """Clean latents `[B C h w]` from noise `x`; first order, one denoiser call a step.

    Args:
        denoise: `(x_t, t) -> x0_hat`.
        schedule: of the denoiser.
        x: latents at `times[0]`, `[B C h w]`.
        times: falling grid `[N+1]`.
        callback: told after every step.
    """
    return _integrate(denoise, schedule, x, times, callback, lambda i, x0, before: x0)


def multistep(
    denoise: Denoise, schedule: Schedule, x: Tensor, times: Tensor, callback: Callback | None
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

    return _integrate(denoise, schedule, x, times, callback, extrapolate)


def _integrate(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    callback: Callback | None,
    choose: Callable[[int, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Walks the grid; `choose(i, x0, x0 of the step before)` is the `D` of step i."""
    alphas, sigmas = schedule(times)
    before = None
    for i in range(len(times) - 1):
        x0 = denoise(x, times[i].to(x.device).expand(len(x)))
        now, then = Coefficients(alphas[i], sigmas[i]), Coefficients(alphas[i + 1], sigmas[i + 1])
        x = step(x, choose(i, x0, before), now, then)
        before = x0
        if callback is not None:
            callback(i + 1, x, x0)
    return x


def uniform_grid(schedule: Schedule, num_steps: int) -> Tensor:
    """Times `[N+1]` uniform in `t`, from 1 to 0."""
    return torch.linspace(1, 0, num_steps + 1)


def log_snr_grid(schedule: Schedule, num_steps: int, lowest: float = -9.0, highest: float = 9.0) -> Tensor:
    """Times `[N+1]` uniform in log-SNR between `lowest` and `highest`, whose ends are moved to 1 and 0."""
    inner = schedule.time_at(torch.linspace(lowest, highest, num_steps + 1)[1:-1])
    return torch.cat((torch.ones(1), inner.clamp(0, 1), torch.zeros(1)))
