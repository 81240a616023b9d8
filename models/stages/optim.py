"""Optimizers and the learning rate, both counted in images.

The learning rate is a pure function of the images seen, so a resumed run needs no scheduler state.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import nn


class OptimizerSettings(ABC):
    """Interface: settings that can make an optimizer for a network's parameters."""

    lr: float
    #: Whether it can step on parts of weights that are spread over ranks.
    takes_parts = True

    @abstractmethod
    def build(self, network: nn.Module, native: bool = False) -> torch.optim.Optimizer:
        """The optimizer of what `network` trains; every group's `lr` is the peak learning rate.

        With `native` it may compute by the machine's own kernels, which all ranks then have.
        """


class AdamW(OptimizerSettings):
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) in one fused kernel.

    Args:
        lr: peak learning rate.
        beta1: decay of the mean gradient a step.
        beta2: decay of the mean squared gradient a step.
        weight_decay: a step, times the learning rate; on matrices and kernels only, not on biases and norms.
        eps: added to the root of the mean squared gradient.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        if not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr is {lr}, but must be a positive number")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"beta1 and beta2 must lie in [0, 1), but are {beta1} and {beta2}")
        if not (math.isfinite(weight_decay) and weight_decay >= 0 and eps > 0):
            raise ValueError(f"weight_decay is {weight_decay} and eps {eps}, but neither may be negative")
        self.lr = lr
        self.beta1 = beta1
        self.beta2 = beta2
        self.weight_decay = weight_decay
        self.eps = eps

    def build(self, network: nn.Module, native: bool = False) -> torch.optim.Optimizer:
        return self.of(network.parameters())

    def of(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of those `parameters` that are trained."""
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=True)


def learning_rate_factor(
    images_seen: int, horizon_images: int, warmup_images: int, cooldown_fraction: float
) -> float:
    """The factor in [0, 1] on the peak learning rate.

    Rises linearly over `warmup_images`, stays at 1, and falls to 0 as half a cosine over the last
    `cooldown_fraction` of the horizon.
    """
    warmup = min(1.0, (images_seen + 1) / (warmup_images + 1))
    cooldown_images = cooldown_fraction * horizon_images
    left = horizon_images - images_seen
    if left >= cooldown_images:
        return warmup
    return warmup * 0.5 * (1 - math.cos(math.pi * max(left, 0) / cooldown_images))
