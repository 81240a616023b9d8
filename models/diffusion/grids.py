"""Grids: the times that a sampler visits, `(schedule, num_steps) -> times [N+1]` falling from 1 to 0.

Every grid begins at exactly 1 and ends at exactly 0, whatever its spacing in between, and computes in float64
so that no two of its times coincide. A grid's parameters with a default are its configuration.
"""

import math

import torch
from torch import Tensor

from models.diffusion.schedules import Schedule


def uniform_grid(schedule: Schedule, num_steps: int) -> Tensor:
    """Times `[N+1]` uniform in `t`; on the linear schedule diffusers' "trailing" spacing."""
    return torch.linspace(1, 0, num_steps + 1)


def log_snr_grid(schedule: Schedule, num_steps: int, lowest: float = -9.0, highest: float = 9.0) -> Tensor:
    """Times `[N+1]` uniform in log-SNR between `lowest` and `highest`, whose ends are moved to 1 and 0.

    Args:
        schedule: whose log-SNR.
        num_steps: N.
        lowest: log-SNR at the start; the schedule's own at `t = 1` where that is higher.
        highest: log-SNR at the end, above `lowest`.

    Raises:
        ValueError: `highest` is not above `lowest`.
    """
    if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
        raise ValueError(f"lowest {lowest} and highest {highest} must be finite and rise, such as -9 and 9")
    lowest = max(lowest, float(schedule.log_snr(torch.ones(1))))
    inner = schedule.time_at(torch.linspace(lowest, highest, num_steps + 1)[1:-1])
    return _closed(inner, f"a log_snr grid from {lowest:g} to {highest:g}")


def karras_grid(
    schedule: Schedule,
    num_steps: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Times `[N+1]` at the noise levels of Karras et al. 2022 (arXiv 2206.00364, eq. 5), then 0.

    `sigma**(1/rho)` falls evenly over N times, where `sigma` is `sigma/alpha` on other schedules than EDM's.

    Args:
        schedule: whose noise levels.
        num_steps: N.
        sigma_min: the last noise level before 0; positive.
        sigma_max: the first one, moved to `t = 1`; the schedule's own at `t = 1` where that is lower.
        rho: 1 is uniform; larger crowds towards little noise. Positive.

    Raises:
        ValueError: a number out of range.
    """
    if not (0 < sigma_min < sigma_max < math.inf and 0 < rho < math.inf):
        raise ValueError(
            f"sigma_min {sigma_min}, sigma_max {sigma_max}, rho {rho}: all must be positive and sigma_min "
            "below sigma_max; the paper's are 0.002, 80 and 7"
        )
    sigma_max = min(sigma_max, math.exp(-float(schedule.log_snr(torch.ones(1))) / 2))
    roots = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps, dtype=torch.float64)
    inner = schedule.time_at(-2 * rho * roots[1:].log())
    return _closed(inner, f"a karras grid from {sigma_max:g} to {sigma_min:g}")


def sgm_uniform_grid(schedule: Schedule, num_steps: int, last: float = 0.001) -> Tensor:
    """Times `[N+1]`: the first N of N+1 times uniform in `t` from 1 to `last`, then 0.

    What ComfyUI and k-diffusion's users call "sgm_uniform", after Stability's generative-models: `last` is
    the smallest training time, which is left out, so that the final step is a whole one as in `uniform_grid`.

    Args:
        schedule: any.
        num_steps: N.
        last: the time left out, in (0, 1).

    Raises:
        ValueError: `last` is outside (0, 1).
    """
    if not 0 < last < 1:
        raise ValueError(
            f"last is {last}, but must be above 0 and below 1; 0.001 is the first of 1,000 timesteps"
        )
    return _closed(torch.linspace(1, last, num_steps + 1)[1:-1], "an sgm_uniform grid")


def warped_grid(schedule: Schedule, num_steps: int, a: float = 1.0, b: float = 1.4) -> Tensor:
    """Times `[N+1]`: `1 - (1 - x^a)^b` for `x` falling evenly from 1 to 0; the defaults suit few steps.

    The distribution function of Kumaraswamy 1980 (doi.org/10.1016/0022-1694(80)90036-0), a two-parameter
    family for schedules optimised as in Sabour et al. 2024 (arXiv 2404.14507). The defaults were fitted on
    rendered landscapes, with UniPC and 4 to 8 steps of flow; see docs/experiments.md.

    Args:
        schedule: any.
        num_steps: N.
        a: above 1 crowds towards clean data; positive.
        b: above 1 crowds towards noise; positive. With `a` = `b` = 1 the grid is uniform.

    Raises:
        ValueError: `a` or `b` is not positive, or so extreme that two times coincide.
    """
    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"a and b are {a} and {b}, but must be positive; 1 and 1 are the uniform grid")
    x = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)[1:-1]
    return _closed(-torch.expm1(b * torch.log1p(-(x**a))), f"a warped grid with a={a:g} and b={b:g}")


def _closed(inner: Tensor, what: str) -> Tensor:
    """`inner` between 1 and 0, float32.

    Raises:
        ValueError: it does not fall strictly.
    """
    times = torch.cat((torch.ones(1), inner.float(), torch.zeros(1)))
    if not bool((times.diff() < 0).all()):
        raise ValueError(
            f"{what} puts two of its {len(inner) + 1} steps on the same time of this schedule; use fewer "
            "steps or a milder spacing"
        )
    return times
