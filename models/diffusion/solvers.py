"""Samplers that evaluate or remember more: Heun, EDM's stochastic sampler, DPM-Solver++ and UniPC.

All take the one step of `samplers.py` and choose only `D`, also where the papers write something else:

- Heun on `dx/dsigma` (EDM) or on the velocity (flow) is `D = D_1 + sigma_t / (2 sigma_s) (D_2 - D_1)`;
- DPM-Solver++ 2M is `D = D_1 + h / (2 h_before) (D_1 - D_before)` with `h` the steps in half the log-SNR;
- its stochastic form has the same `D`, in an ancestral step;
- UniPC's predictor is DPM-Solver++ 2M, and its corrector repeats the step with `D` interpolated.

A step to or from an infinite log-SNR (`alpha = 0`, `sigma = 0`) uses the limit of these formulas, so all of
them start at `t = 1` and end at `t = 0` on every schedule.
"""

import math

import torch
from torch import Tensor

from models.diffusion.guidance import Denoise
from models.diffusion.samplers import (
    Callback,
    StepNoise,
    check_eta,
    integrate,
    points,
    same_time,
    step,
)
from models.diffusion.schedules import Coefficients, Schedule

#: Largest factor by which churn raises the noise (Karras et al. 2022, algorithm 2).
_MOST_CHURN = math.sqrt(2) - 1


def heun(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
) -> Tensor:
    """Clean latents from noise `x`; second order, two denoiser calls a step and one in the last.

    Karras et al. 2022 (arXiv 2206.00364, algorithm 1) on the EDM schedule, Heun's method on the velocity on
    the flow schedule.
    """
    return edm_stochastic(denoise, schedule, x, times, step_noise, callback, churn=0.0)


def edm_stochastic(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    churn: float = 40.0,
    lowest: float = 0.05,
    highest: float = 50.0,
    inflation: float = 1.003,
) -> Tensor:
    """As `heun`, after raising the noise level a little before each step (Karras et al. 2022, algorithm 2).

    The paper's sampler on the EDM schedule. On others the noise level is `sigma/alpha`, and it is never
    raised beyond the one at `t = 1`. Defaults are the paper's for ImageNet at 64 pixels.

    Args:
        denoise: as for `euler`, like all others.
        schedule: of the denoiser.
        x: latents at `times[0]`.
        times: falling grid.
        step_noise: new noise by number.
        callback: told after every step.
        churn: `S_churn`, new noise over the whole walk; at least 0, and 0 is `heun`.
        lowest: `S_tmin`, noise level below which nothing is added.
        highest: `S_tmax`, noise level above which nothing is added.
        inflation: `S_noise`, factor on the new noise; positive.

    Raises:
        ValueError: a number out of range.
    """
    if not (churn >= 0 and inflation > 0 and 0 <= lowest < highest):
        raise ValueError(
            f"churn {churn}, lowest {lowest}, highest {highest}, inflation {inflation}: churn must be at "
            "least 0, inflation positive, lowest at least 0 and below highest; the paper's are 40, 0.05, 50, "
            "1.003"
        )
    at = points(schedule, times)
    gamma = min(churn / max(len(times) - 1, 1), _MOST_CHURN)
    for i in range(len(times) - 1):
        time, now, then = times[i], at[i], at[i + 1]
        if gamma > 0 and lowest * now.alpha <= now.sigma <= highest * now.alpha:
            time, raised = _raised(schedule, now, gamma)
            ratio = raised.alpha / now.alpha
            added = (raised.sigma**2 - (ratio * now.sigma) ** 2).clamp(min=0).sqrt()
            x, now = ratio * x + added * inflation * step_noise(i).to(x), raised
        x0 = denoise(x, same_time(time, x))
        chosen = x0
        if then.sigma > 0:
            ahead = denoise(step(x, x0, now, then), same_time(times[i + 1], x))
            chosen = x0 + now.sigma / (2 * then.sigma) * (ahead - x0)
        x = step(x, chosen, now, then)
        if callback is not None:
            callback(i + 1, x, x0)
    return x


def _raised(schedule: Schedule, now: Coefficients, gamma: float) -> tuple[Tensor, Coefficients]:
    """The time and the coefficients where `sigma/alpha` is `1 + gamma` times as large, at most those at 1."""
    level = now.sigma / now.alpha * (1 + gamma)
    time = schedule.time_at(-2 * level.log()).clamp(max=1)
    return time, points(schedule, time[None])[0]


def dpmpp_2m(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    lower_order_final: bool = True,
) -> Tensor:
    """Clean latents from noise `x`: DPM-Solver++(2M); second order, one denoiser call a step.

    Lu et al. 2022 (arXiv 2211.01095, algorithm 2). `D` is extrapolated linearly in the log-SNR.

    Args:
        denoise: as for `euler`, like all others.
        schedule: of the denoiser.
        x: latents at `times[0]`.
        times: falling grid.
        step_noise: never asked.
        callback: told after every step.
        lower_order_final: the last step is of first order. Else of second, and where it ends at `sigma = 0`,
            so that the log-SNR is infinite, `D` is extrapolated linearly in `sigma/(alpha + sigma)`.
    """
    return dpmpp_2m_sde(denoise, schedule, x, times, step_noise, callback, 0.0, lower_order_final)


def dpmpp_2m_sde(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    eta: float = 1.0,
    lower_order_final: bool = True,
) -> Tensor:
    """As `dpmpp_2m`, with new noise in every step: the solver of the diffusion SDE (Lu et al. 2022).

    Args:
        denoise: as for `euler`, like all others.
        schedule: of the denoiser.
        x: latents at `times[0]`.
        times: falling grid.
        step_noise: new noise by number.
        callback: told after every step.
        eta: 1 = the SDE, 0 = `dpmpp_2m`, in between as DDIM's.
        lower_order_final: as for `dpmpp_2m`.

    Raises:
        ValueError: `eta` is outside [0, 1].
    """
    check_eta(eta)
    ahead = _extrapolation(points(schedule, times), lower_order_final)

    def extrapolate(i: int, x0: Tensor, before: Tensor | None) -> Tensor:
        return x0 if before is None else x0 + ahead[i] * (x0 - before)

    return integrate(denoise, schedule, x, times, step_noise, callback, extrapolate, eta)


def unipc(
    denoise: Denoise,
    schedule: Schedule,
    x: Tensor,
    times: Tensor,
    step_noise: StepNoise,
    callback: Callback | None,
    lower_order_final: bool = True,
) -> Tensor:
    """Clean latents from noise `x`: UniPC-2 with `B(h) = e^h - 1`; one denoiser call a step.

    Zhao et al. 2023 (arXiv 2302.04867, data prediction, "bh2"). The call at the end of a
    step also corrects that step, which costs nothing more.

    Args:
        denoise: as for `euler`, like all others.
        schedule: of the denoiser.
        x: latents at `times[0]`.
        times: falling grid.
        step_noise: never asked.
        callback: told after every step, before its correction.
        lower_order_final: as for `dpmpp_2m`.
    """
    at = points(schedule, times)
    ahead = _extrapolation(at, lower_order_final)
    half = _half_log_snr(at)
    start, before, older = x, x, x  # of the step to be corrected; none before the first
    for i in range(len(times) - 1):
        x0 = denoise(x, same_time(times[i], x))
        if i == 1:
            x = step(start, before + 0.5 * (x0 - before), at[0], at[1])
        elif i > 1:
            back, forth = _correction(half[i - 2 : i + 1])
            x = step(start, before + back * (older - before) + forth * (x0 - before), at[i - 1], at[i])
        start = x
        x = step(x, x0 if i == 0 else x0 + ahead[i] * (x0 - before), at[i], at[i + 1])
        before, older = x0, before
        if callback is not None:
            callback(i + 1, x, x0)
    return x


def _half_log_snr(at: list[Coefficients]) -> list[float]:
    return [float(torch.log(point.alpha) - torch.log(point.sigma)) for point in at]


def _extrapolation(at: list[Coefficients], lower_order_final: bool) -> list[float]:
    """`h / (2 h_before)` of each step, in half the log-SNR; its limit where one of them is infinite."""
    half = _half_log_snr(at)
    factors = [0.0]
    for older, now, then in zip(half, half[1:], half[2:], strict=False):
        factors.append((then - now) / (2 * (now - older)) if math.isfinite(then - now) else 0.0)
    if lower_order_final:
        factors[-1] = 0.0
    elif len(at) > 2 and at[-1].sigma == 0:
        u = [float(point.sigma / (point.alpha + point.sigma)) for point in at[-3:-1]]
        factors[-1] = u[1] / (u[0] - u[1])
    return factors


def _correction(half: list[float]) -> tuple[float, float]:
    """Weights of the older and of the newer `D`, less the one between, that correct a step of order 2.

    `half` is half the log-SNR before the step before, before the step, and after it; the first may be `-inf`.
    With `h` the step, these solve the paper's order conditions for `r = -h_before / h` and 1.
    """
    h = half[2] - half[1]
    inverse = -h / (half[1] - half[0])  # 1 / r
    phi_1 = math.expm1(-h)
    phi_2 = -phi_1 / h - 1
    phi_3 = -phi_2 / h - 0.5
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    share = (b_1 - b_2) * inverse / (inverse - 1)
    return share * inverse, b_1 - share
