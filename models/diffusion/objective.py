"""The objective: schedule, parameterization, weighting and the training distribution of `t`, as one loss.

Returns a loss per sample, so that whoever calls it decides how to average. All of it runs in float32; only
the backbone may run under autocast.
"""

import math
from abc import ABC, abstractmethod
from typing import Protocol

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.draws import Draws, Purpose
from models.diffusion.parameterizations import Parameterization, Target
from models.diffusion.schedules import Coefficients, Schedule, expand


class Backbone(Protocol):
    """The network `F(x, c_noise, conditioning)`: `[B C h w], [B], Conditioning -> [B C h w]`."""

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor: ...


class TimeDistribution(ABC):
    """Interface: uniform numbers to training times."""

    @abstractmethod
    def __call__(self, uniform: Tensor) -> Tensor:
        """`t` `[B]` in (0, 1): the distribution's quantile at `uniform` `[B]` in (0, 1)."""


class UniformTimes(TimeDistribution):
    """`t` uniform in (0, 1)."""

    def __call__(self, uniform: Tensor) -> Tensor:
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

    def __call__(self, uniform: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.special.ndtri(uniform))


class Weighting(ABC):
    """Interface: a factor per sample on the squared error of the backbone's output."""

    @abstractmethod
    def __call__(self, at: Coefficients, target: Target) -> Tensor:
        """Factor `[B]`, given the coefficients of `x_t` and of the backbone's target."""


class UnitWeighting(Weighting):
    """1 for every sample."""

    def __call__(self, at: Coefficients, target: Target) -> Tensor:
        return torch.ones_like(at.alpha)


class MinSNRWeighting(Weighting):
    """`min(snr, gamma)` on the error of `x0`, whatever the backbone predicts.

    Hang et al. 2023 (arXiv 2303.09556).

    The error of the output is `(alpha b - sigma a) / sigma` times the error of `x0`.

    Args:
        gamma: the signal-to-noise ratio above which the weight stops growing, positive.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}, but must be positive")
        self.gamma = gamma

    def __call__(self, at: Coefficients, target: Target) -> Tensor:
        # min(snr, gamma) * sigma^2 / (..)^2, with the sigma^2 inside min so that sigma = 0 is no 0/0.
        gain = at.alpha * target.b - at.sigma * target.a
        return torch.minimum(at.alpha**2, self.gamma * at.sigma**2) / gain**2


class Objective:
    """The training loss of a diffusion model.

    Args:
        schedule: `t -> (alpha, sigma)`.
        parameterization: what the backbone predicts.
        weighting: factor per sample.
        times: distribution of the training times.

    Raises:
        ValueError: the parameterization cannot be inverted on the schedule.
    """

    def __init__(
        self,
        schedule: Schedule,
        parameterization: Parameterization,
        weighting: Weighting,
        times: TimeDistribution,
    ) -> None:
        parameterization.check(schedule)
        self.schedule = schedule
        self.parameterization = parameterization
        self.weighting = weighting
        self.times = times

    def __call__(self, backbone: Backbone, x0: Tensor, conditioning: Conditioning, draws: Draws) -> Tensor:
        """The loss of each sample, float32 `[B]`, for clean latents `x0` `[B C h w]`."""
        t = self.times(draws.spread(Purpose.TIME))
        return self.loss(backbone, x0, conditioning, t, draws.normal(Purpose.NOISE, x0.shape[1:]))

    def loss(
        self, backbone: Backbone, x0: Tensor, conditioning: Conditioning, t: Tensor, eps: Tensor
    ) -> Tensor:
        """As calling the objective, at given times `t` `[B]` and noise `eps` `[B C h w]`: for validation."""
        at = self.schedule(t)
        target = self.parameterization.target(at)
        x_t = expand(at.alpha, x0) * x0 + expand(at.sigma, x0) * eps
        x_in = expand(self.parameterization.c_in(at), x0) * x_t
        output = backbone(x_in, self.parameterization.c_noise(t, at), conditioning).float()
        error = output - (expand(target.a, x0) * x0 + expand(target.b, x0) * eps)
        return self.weighting(at, target) * error.square().flatten(1).mean(1)
