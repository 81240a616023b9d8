"""Schedules: position `t` in [0, 1] to the two numbers every formula here is written with.

A noisy latent is `x_t = alpha * x0 + sigma * eps`. `t = 0` is clean data and `t = 1` is the most noise, for
every schedule. Coefficients are float32 whatever the backbone runs in.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor


class Coefficients(NamedTuple):
    """Signal and noise coefficient, each float32 `[B]`."""

    alpha: Tensor
    sigma: Tensor


class Schedule(ABC):
    """Interface: `t -> (alpha, sigma)`, and back from a log-SNR to `t` for grids."""

    @property
    @abstractmethod
    def reaches_pure_noise(self) -> bool:
        """True where `alpha` is 0 at `t = 1`, so that nothing may divide by it."""

    @abstractmethod
    def __call__(self, t: Tensor) -> Coefficients:
        """Coefficients at `t` (float32 `[B]`, in [0, 1])."""

    @abstractmethod
    def time_at(self, log_snr: Tensor) -> Tensor:
        """The `t` whose `2 * log(alpha / sigma)` is `log_snr` (any shape)."""

    def log_snr(self, t: Tensor) -> Tensor:
        """`2 * log(alpha / sigma)` at `t`; infinite at the ends where a coefficient is 0."""
        alpha, sigma = self(t)
        return 2 * (alpha.log() - sigma.log())


class FlowSchedule(Schedule):
    """The straight line `alpha = 1 - s, sigma = s` of flow matching (Lipman et al. 2022, arXiv 2210.02747).

    `s = shift * t / (1 + (shift - 1) * t)` moves the whole schedule towards noise for larger images (Esser et
    al. 2024, arXiv 2403.03206, eq. 23).

    Args:
        shift: 1 leaves `t` as it is; above 1 spends more of [0, 1] in noise. Must be positive.
    """

    def __init__(self, shift: float = 1.0) -> None:
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift is {shift}, but must be a positive number")
        self.shift = shift

    @property
    def reaches_pure_noise(self) -> bool:
        return True

    def __call__(self, t: Tensor) -> Coefficients:
        t = t.float()
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        alpha = (1 - t) / (1 + (self.shift - 1) * t)
        return Coefficients(alpha, sigma)

    def time_at(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-log_snr.float() / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)


class CosineSchedule(Schedule):
    """The variance-preserving cosine `alpha = cos(pi t / 2), sigma = sin(pi t / 2)`.

    Nichol and Dhariwal 2021 (arXiv 2102.09672) without their offset, as in Salimans and Ho 2022 (arXiv
    2202.00512).
    """

    @property
    def reaches_pure_noise(self) -> bool:
        return True

    def __call__(self, t: Tensor) -> Coefficients:
        t = t.float()
        # sin(pi/2 (1-t)) instead of cos(pi/2 t): exactly 0 at t = 1, where float32 cos gives -4e-8.
        return Coefficients(torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t))

    def time_at(self, log_snr: Tensor) -> Tensor:
        return torch.atan(torch.exp(-log_snr.float() / 2)) * (2 / math.pi)


class EDMSchedule(Schedule):
    """The variance-exploding `alpha = 1, sigma = sigma_max * t**rho` (Karras et al. 2022, arXiv 2206.00364).

    Their eq. 5 with `sigma_min = 0`, so that `t = 0` is exactly clean data.

    Args:
        sigma_max: noise at `t = 1`, in units of the latents' standard deviation.
        rho: how strongly the steps crowd towards little noise.
    """

    def __init__(self, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not (sigma_max > 0 and rho > 0):
            raise ValueError(f"sigma_max and rho must be positive, but are {sigma_max} and {rho}")
        self.sigma_max = sigma_max
        self.rho = rho

    @property
    def reaches_pure_noise(self) -> bool:
        return False

    def __call__(self, t: Tensor) -> Coefficients:
        t = t.float()
        return Coefficients(torch.ones_like(t), self.sigma_max * t**self.rho)

    def time_at(self, log_snr: Tensor) -> Tensor:
        return (torch.exp(-log_snr.float() / 2) / self.sigma_max) ** (1 / self.rho)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """`coefficient` `[B]` with trailing axes of size 1, so that it multiplies `like` `[B ...]`."""
    return coefficient.reshape(-1, *([1] * (like.ndim - 1)))
