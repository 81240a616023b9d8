"""Parameterizations: what the backbone's output means, as two coefficients.

The backbone learns `F = a * x0 + b * eps`; a parameterization is the pair `(a, b)` as a function of `(alpha,
sigma)`. One formula (`clean`) inverts them all, so nothing else in the project asks which one is in use.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.schedules import Coefficients, Schedule, expand


class Target(NamedTuple):
    """The two coefficients of `F = a * x0 + b * eps`, each float32 `[B]`."""

    a: Tensor
    b: Tensor


class Parameterization(ABC):
    """Interface: `(alpha, sigma) -> (a, b)`, and how the backbone's two inputs are scaled."""

    @abstractmethod
    def target(self, at: Coefficients) -> Target:
        """Coefficients of the backbone's target."""

    def c_in(self, at: Coefficients) -> Tensor:
        """Factor `[B]` on `x_t` before the backbone sees it."""
        return torch.ones_like(at.sigma)

    def c_noise(self, timestep: Tensor, at: Coefficients) -> Tensor:
        """What the backbone's time embedding sees, `[B]`: the schedule's `timestep`, about 0 to 1000."""
        return timestep

    def check(self, schedule: Schedule) -> None:
        """Raises ValueError where this parameterization cannot be inverted on `schedule`."""
        return

    def clean(self, x_t: Tensor, output: Tensor, at: Coefficients) -> Tensor:
        """`x0` from `x_t` and the output, both `[B ...]`: `(b x_t - sigma F) / (alpha b - sigma a)`."""
        a, b = self.target(at)
        scale = at.alpha * b - at.sigma * a
        return expand(b / scale, x_t) * x_t - expand(at.sigma / scale, x_t) * output


class Noise(Parameterization):
    """`F = eps` (Ho et al. 2020, arXiv 2006.11239)."""

    def target(self, at: Coefficients) -> Target:
        return Target(torch.zeros_like(at.alpha), torch.ones_like(at.alpha))

    def check(self, schedule: Schedule) -> None:
        if schedule.reaches_pure_noise:
            raise ValueError(
                f"parameterization 'eps' cannot be used with {type(schedule).__name__}: at t = 1 its alpha "
                "is 0 and the noise says nothing about the image; use parameterization=v or flow, or "
                "schedule=edm or linear"
            )


class Clean(Parameterization):
    """`F = x0`."""

    def target(self, at: Coefficients) -> Target:
        return Target(torch.ones_like(at.alpha), torch.zeros_like(at.alpha))


class Velocity(Parameterization):
    """`F = alpha * eps - sigma * x0` (Salimans and Ho 2022, arXiv 2202.00512)."""

    def target(self, at: Coefficients) -> Target:
        return Target(-at.sigma, at.alpha)


class Flow(Parameterization):
    """`F = eps - x0`, the velocity of the straight path (Lipman et al. 2022, arXiv 2210.02747)."""

    def target(self, at: Coefficients) -> Target:
        return Target(-torch.ones_like(at.alpha), torch.ones_like(at.alpha))


class EDM(Parameterization):
    """The preconditioned target of Karras et al. 2022 (arXiv 2206.00364, table 1); needs `alpha = 1`.

    `a = (1 - c_skip) / c_out` and `b = -c_skip * sigma / c_out`, simplified so that nothing is 0/0 at
    `sigma = 0`.

    Args:
        sigma_data: standard deviation of the latents; 1 where they are normalised.
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        if not sigma_data > 0:
            raise ValueError(f"sigma_data is {sigma_data}, but must be positive")
        self.sigma_data = sigma_data

    def _norm(self, sigma: Tensor) -> Tensor:
        return (sigma**2 + self.sigma_data**2).sqrt()

    def target(self, at: Coefficients) -> Target:
        norm = self._norm(at.sigma)
        return Target(at.sigma / (self.sigma_data * norm), -self.sigma_data / norm)

    def c_in(self, at: Coefficients) -> Tensor:
        return 1 / self._norm(at.sigma)

    def c_noise(self, timestep: Tensor, at: Coefficients) -> Tensor:
        # ln(sigma)/4 in the paper; times 1000 because the time embedding is Stable Diffusion's.
        return 250 * at.sigma.clamp(min=1e-4).log()

    def check(self, schedule: Schedule) -> None:
        if float(schedule(torch.ones(1)).alpha) != 1:
            raise ValueError(
                f"parameterization 'edm' needs alpha = 1, which {type(schedule).__name__} does not have; "
                "use schedule=edm"
            )
