"""The objective: schedule, parameterization, weighting and the training distribution of `t`, as one loss.

Returns a loss per sample, so that whoever calls it decides how to average. All of it runs in float32; only
the backbone may run under autocast.
"""

from typing import Protocol

from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.draws import Draws, Purpose
from models.diffusion.parameterizations import Parameterization
from models.diffusion.schedules import Schedule, expand
from models.diffusion.times import TimeDistribution
from models.diffusion.weightings import Weighting


class Backbone(Protocol):
    """The network `F(x, c_noise, conditioning)`: `[B C h w], [B], Conditioning -> [B C h w]`."""

    def __call__(self, x: Tensor, c_noise: Tensor, conditioning: Conditioning) -> Tensor: ...


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
        t = self.times(draws.spread(Purpose.TIME), self.schedule)
        return self.loss(backbone, x0, conditioning, t, draws.normal(Purpose.NOISE, x0.shape[1:]))

    def loss(
        self, backbone: Backbone, x0: Tensor, conditioning: Conditioning, t: Tensor, eps: Tensor
    ) -> Tensor:
        """As calling the objective, at given times `t` `[B]` and noise `eps` `[B C h w]`: for validation."""
        at = self.schedule(t)
        target = self.parameterization.target(at)
        x_t = expand(at.alpha, x0) * x0 + expand(at.sigma, x0) * eps
        x_in = expand(self.parameterization.c_in(at), x0) * x_t
        c_noise = self.parameterization.c_noise(self.schedule.timestep(t), at)
        output = backbone(x_in, c_noise, conditioning).float()
        error = output - (expand(target.a, x0) * x0 + expand(target.b, x0) * eps)
        return self.weighting(at, target) * error.square().flatten(1).mean(1)
