"""Schedules: position `t` in [0, 1] to the two numbers every formula here is written with.

A noisy latent is `x_t = alpha * x0 + sigma * eps`. `t = 0` is clean data and `t = 1` is the most noise, for
every schedule. Coefficients are float32 whatever the backbone runs in.
"""

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

#: Timesteps of the discrete models that `LinearSchedule` makes continuous.
_TIMESTEPS = 1000


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

    def timestep(self, t: Tensor) -> Tensor:
        """What a backbone's time embedding is told, `[B]`, 0 to about 1000 as in Stable Diffusion."""
        return 1000 * t

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


class LinearSchedule(Schedule):
    """The variance-preserving schedule of Stable Diffusion and DDPM: 1,000 betas on a line, made continuous.

    Ho et al. 2020 (arXiv 2006.11239); `scaled` puts the square roots of the betas on the line, as Stable
    Diffusion does (Rombach et al. 2022, arXiv 2112.10752). Timestep k = 0..999 of such a model is `t = (k +
    1) / 1000` (`discrete_time`), and its time embedding is told exactly k there (`timestep`). Between
    timesteps the log-SNR is linear in `t`; below the first one `(sigma/alpha)**2` is, down to exactly clean
    data at `t = 0`; above the last but one of a zero-terminal schedule `alpha/sigma` is, down to 0.

    Args:
        beta_start: first beta, above 0.
        beta_end: last beta, from `beta_start` to below 1.
        scaled: the betas' square roots are evenly spaced; else the betas.
        zero_terminal: shift and stretch `alpha` so that it is 0 at `t = 1` (Lin et al. 2023, arXiv
            2305.08891, algorithm 1); needs a parameterization other than eps.
    """

    def __init__(
        self,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        scaled: bool = True,
        zero_terminal: bool = False,
    ) -> None:
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"beta_start and beta_end are {beta_start} and {beta_end}, but must rise within (0, 1); "
                "Stable Diffusion's are 0.00085 and 0.012"
            )
        power = 2.0 if scaled else 1.0
        ends = (beta_start ** (1 / power), beta_end ** (1 / power))
        betas = torch.linspace(*ends, _TIMESTEPS, dtype=torch.float64, device="cpu") ** power
        alpha = (1 - betas).cumprod(0).sqrt()
        if zero_terminal:
            alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
        self.zero_terminal = zero_terminal
        #: log-SNR at the timesteps, float32 [1000]; the last is -inf on a zero-terminal schedule.
        self.table = (alpha**2 / (1 - alpha**2)).log().float()

    @property
    def reaches_pure_noise(self) -> bool:
        return self.zero_terminal

    @staticmethod
    def discrete_time(timestep: Tensor) -> Tensor:
        """The `t` of discrete timesteps 0..999 (any shape), float32."""
        return ((timestep.double() + 1) / _TIMESTEPS).float()

    def timestep(self, t: Tensor) -> Tensor:
        """`1000 t - 1`, at least 0: exactly k at `discrete_time(k)`."""
        # Rounded to 2**-10, far below what an embedding can tell, as 1000 * float32(0.123) is not 123.
        return ((_TIMESTEPS * t.float() - 1) * 1024).round().clamp(min=0) / 1024

    def __call__(self, t: Tensor) -> Coefficients:
        t = t.float()
        table = self.table.to(t.device)
        place = _TIMESTEPS * t - 1
        below = place.floor().clamp(0, _TIMESTEPS - 2).long()
        share = place - below
        low, high = table[below], table[below + 1]
        ending = low + 2 * torch.log1p(-share.clamp(max=1))
        log_snr = torch.where(high == -math.inf, ending, low + share * (high - low))
        log_snr = torch.where(place < 0, table[0] - torch.log(_TIMESTEPS * t), log_snr)
        return Coefficients(torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt())

    def time_at(self, log_snr: Tensor) -> Tensor:
        log_snr = log_snr.float()
        table = self.table.to(log_snr.device)
        below = torch.searchsorted(-table, -log_snr, right=True).sub(1).clamp(0, _TIMESTEPS - 2)
        low, high = table[below], table[below + 1]
        share = torch.where(
            high == -math.inf, -torch.expm1((log_snr - low) / 2), (log_snr - low) / (high - low)
        )
        t = (below + 1 + share.clamp(0, 1)) / _TIMESTEPS
        return torch.where(log_snr > table[0], torch.exp(table[0] - log_snr) / _TIMESTEPS, t)


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """`coefficient` `[B]` with trailing axes of size 1, so that it multiplies `like` `[B ...]`."""
    return coefficient.reshape(-1, *([1] * (like.ndim - 1)))
