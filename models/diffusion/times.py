"""Training times: how often each noise level is trained, as distributions of `t`.

A distribution maps evenly spread uniform numbers to times by its quantile function, so that a batch covers it
evenly. Those that are about noise levels rather than `t` ask the schedule where the levels are.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.diffusion.schedules import Schedule

#: Times stay above 0, where nothing is left to learn and some weights are 0/0.
_SMALLEST = 2**-24


class TimeDistribution(ABC):
    """Interface: uniform numbers to training times on a schedule."""

    @abstractmethod
    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        """`t` `[B]` in (0, 1]: the distribution's quantile at `uniform` `[B]` in (0, 1)."""


class UniformTimes(TimeDistribution):
    """`t` uniform in (0, 1)."""

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        return uniform


class LogitNormalTimes(TimeDistribution):
    """`t` whose logit is normal (Esser et al. 2024, arXiv 2403.03206, section 3.1).

    Args:
        mean: of the logit; above 0 favours noise.
        std: of the logit, positive.
    """

    def __init__(self, mean: float = 0.0, std: float = 1.0) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean must be finite and std positive, but they are {mean} and {std}")
        self.mean = mean
        self.std = std

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))


class ModeTimes(TimeDistribution):
    """`t` with more weight in the middle and some at the ends (Esser et al. 2024, 2403.03206, eq. 20).

    `t = 1 - u - s (cos^2(pi u / 2) - 1 + u)` for uniform `u`.

    Args:
        scale: `s`; 0 is uniform, above 0 favours the middle, below 0 the ends. From -1 to 2 / (pi - 2) =
            1.75, where `t` still falls with `u`.
    """

    def __init__(self, scale: float = 1.29) -> None:
        if not -1 <= scale <= 2 / (math.pi - 2):
            raise ValueError(
                f"scale is {scale}, but must be from -1 to 2 / (pi - 2) = 1.7519: beyond that times run "
                f"backwards"
            )
        self.scale = scale

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        # With 1 - u for u, so that t rises; sin^2 is their cos^2 then.
        t = uniform - self.scale * (torch.sin(math.pi / 2 * uniform) ** 2 - uniform)
        return t.clamp(_SMALLEST, 1)


class LogNormalSigmaTimes(TimeDistribution):
    """`t` whose `ln(sigma/alpha)` is normal (Karras et al. 2022, arXiv 2206.00364, table 1).

    Levels beyond the schedule's own at `t = 1` are trained at `t = 1`.

    Args:
        mean: `P_mean`, of `ln(sigma/alpha)`.
        std: `P_std`, positive.
    """

    def __init__(self, mean: float = -1.2, std: float = 1.2) -> None:
        if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
            raise ValueError(f"mean must be finite and std positive, but they are {mean} and {std}")
        self.mean = mean
        self.std = std

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        log_sigma = self.mean + self.std * torch.special.ndtri(uniform)
        return schedule.time_at(-2 * log_sigma).clamp(_SMALLEST, 1)


class UniformLogSNRTimes(TimeDistribution):
    """`t` whose log-SNR is uniform: what `SigmoidWeighting` is to be combined with for its paper's loss.

    Args:
        lowest: log-SNR of the noisiest time; times are at most 1.
        highest: log-SNR of the cleanest time, above `lowest`.
    """

    def __init__(self, lowest: float = -10.0, highest: float = 10.0) -> None:
        if not (math.isfinite(lowest) and math.isfinite(highest) and lowest < highest):
            raise ValueError(
                f"lowest {lowest} and highest {highest} must be finite and rise, such as -10 and 10"
            )
        self.lowest = lowest
        self.highest = highest

    def __call__(self, uniform: Tensor, schedule: Schedule) -> Tensor:
        lowest = max(self.lowest, float(schedule.log_snr(torch.ones(1))))
        return schedule.time_at(self.highest - (self.highest - lowest) * uniform).clamp(_SMALLEST, 1)
