"""Weightings: what an error at each noise level costs, a factor per sample on the backbone's squared error.

Papers state weights on the error of `x0` or of `eps`, each for its own parameterization. With `F = a x0 + b
eps` and `gain = alpha b - sigma a`, an error of the output is `gain / sigma` times that of `x0` and `gain /
alpha` times that of `eps`, so each weighting here costs the same whatever the backbone predicts. The formulas
are simplified so that nothing is 0/0 where `alpha` or `sigma` is 0.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from models.diffusion.parameterizations import Target
from models.diffusion.schedules import Coefficients


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


class EDMWeighting(Weighting):
    """`(s^2 + sigma_data^2) / (s sigma_data)^2` on the error of `x0`, with `s = sigma/alpha`.

    Karras et al. 2022 (arXiv 2206.00364, table 1). With parameterization edm it is 1, with v on a
    variance-preserving schedule and `sigma_data` 1 too.

    Args:
        sigma_data: standard deviation of the latents, positive; 1 where they are normalised.
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        if not (math.isfinite(sigma_data) and sigma_data > 0):
            raise ValueError(f"sigma_data is {sigma_data}, but must be positive; normalised latents have 1")
        self.sigma_data = sigma_data

    def __call__(self, at: Coefficients, target: Target) -> Tensor:
        gain = at.alpha * target.b - at.sigma * target.a
        return ((at.sigma / self.sigma_data) ** 2 + at.alpha**2) / gain**2


class SigmoidWeighting(Weighting):
    """`sigmoid(bias - log_snr)` on the error of `eps` (Kingma and Gao 2023, arXiv 2303.00848).

    As in Hoogeboom et al. 2024 (arXiv 2410.19324). Their loss is an integral over the log-SNR: with `times`
    of uniform log-SNR it is this exactly, with others the weight is multiplied by their density of log-SNR.

    Args:
        bias: the log-SNR above which errors cost less and less; larger latents want a lower one.
    """

    def __init__(self, bias: float = 2.0) -> None:
        if not math.isfinite(bias):
            raise ValueError(f"bias is {bias}, but must be a finite log-SNR, such as 2")
        self.bias = bias

    def __call__(self, at: Coefficients, target: Target) -> Tensor:
        gain = at.alpha * target.b - at.sigma * target.a
        share = at.sigma**2 / (at.sigma**2 + at.alpha**2 * math.exp(-self.bias))
        return share * (at.alpha / gain) ** 2
