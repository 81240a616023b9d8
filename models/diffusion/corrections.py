"""Corrections of guidance: what is done to the weighted sum of branches so that a large scale does less harm.

A correction sees the branches' outputs and their sum so far, and returns a better one; those asked for are
applied one after another. All of them act on `x0_hat`, where the papers' formulas for noise or velocity are
rewritten. Measures are taken of each picture alone, one after another, so that none depends on the batch
around it.

A correction is a value without state. What one remembers from step to step lives in the function that `start`
returns, and so begins anew with every batch of pictures.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.schedules import Coefficients, expand


class Outputs(NamedTuple):
    """What guidance has at a step: `x_t`, `t` `[B]`, its coefficients, each branch's `x0_hat` and weight.

    The last branch is the reference, which the others only push away from: the conditional one.
    """

    x_t: Tensor
    t: Tensor
    at: Coefficients
    branches: list[Tensor]
    weights: list[float]

    @property
    def reference(self) -> Tensor:
        """`x0_hat` of the last branch, `[B C h w]`."""
        return self.branches[-1]

    @property
    def still(self) -> Tensor:
        """The `x0_hat` with which a flow would stand still, `x_t / (alpha + sigma)`, `[B C h w]`."""
        return self.x_t / expand(self.at.alpha + self.at.sigma, self.x_t)


#: `(outputs, sum so far) -> better sum`, both `x0_hat` `[B C h w]`.
Correct = Callable[[Outputs, Tensor], Tensor]


class Correction(ABC):
    """Interface: one correction of the weighted sum."""

    @abstractmethod
    def start(self) -> Correct:
        """The function for the steps of one batch of pictures."""


class OptimalScale(Correction):
    """CFG-Zero*: each other branch's velocity scaled so that it best explains the reference's.

    Fan et al. 2025 (arXiv 2503.18886): `s = <v_ref, v_k> / |v_k|^2`, with the velocities of the
    straight path also on other schedules.
    """

    def start(self) -> Correct:
        return self._correct

    def _correct(self, outputs: Outputs, total: Tensor) -> Tensor:
        reference = outputs.still - outputs.reference
        for weight, x0 in zip(outputs.weights[:-1], outputs.branches[:-1], strict=True):
            velocity = outputs.still - x0
            power = _inner(velocity, velocity)
            scale = torch.where(power > 0, _inner(reference, velocity) / power.clamp(min=1e-30), 1.0)
            total = total - weight * expand(scale - 1, velocity) * velocity
        return total


class Projection(Correction):
    """APG: the push away from the reference, smoothed over steps, bounded, less of what oversaturates.

    Sadat et al. 2024 (arXiv 2410.02416). The push is the total less the reference, in units of
    the weights: `cond - uncond` for classifier-free guidance.

    Args:
        parallel: `eta`, factor on the push's part along the reference, from 0 to 1; 1 keeps it, as CFG does.
        momentum: `beta`, share of the pushes before, between -1 and 1; the paper's is about -0.5, 0 is none.
        norm_limit: `r`, largest length of the push, positive; None is no limit. The paper's are 2.5 to 15.
    """

    def __init__(
        self, parallel: float = 0.0, momentum: float = -0.5, norm_limit: float | None = None
    ) -> None:
        if not 0 <= parallel <= 1:
            raise ValueError(f"parallel is {parallel}, but must be from 0 (APG) to 1 (all of it, as CFG)")
        if not -1 < momentum < 1:
            raise ValueError(f"momentum is {momentum}, but must be between -1 and 1, such as -0.5; 0 is none")
        if norm_limit is not None and not norm_limit > 0:
            raise ValueError(
                f"norm_limit is {norm_limit}, but must be positive, such as 10, or null for none"
            )
        self.parallel = parallel
        self.momentum = momentum
        self.norm_limit = norm_limit

    def start(self) -> Correct:
        before: Tensor | None = None

        def correct(outputs: Outputs, total: Tensor) -> Tensor:
            nonlocal before
            unit = math.fsum(abs(weight) for weight in outputs.weights[:-1])
            push = (total - outputs.reference) / unit
            if self.momentum != 0:
                push = push if before is None else push + self.momentum * before
                before = push
            return outputs.reference + unit * self._bounded(push, outputs.reference)

        return correct

    def _bounded(self, push: Tensor, reference: Tensor) -> Tensor:
        if self.norm_limit is not None:
            length = _inner(push, push).sqrt().clamp(min=1e-30)
            push = expand((self.norm_limit / length).clamp(max=1), push) * push
        share = _inner(push, reference) / _inner(reference, reference).clamp(min=1e-30)
        return push - (1 - self.parallel) * expand(share, push) * reference


class Rescale(Correction):
    """The sum with its deviation pulled to the reference's (Lin et al. 2023, arXiv 2305.08891, section 3.4).

    Taken of `x0_hat`, where overexposure is seen.

    Args:
        share: `phi`, from 0 (nothing) to 1 (the reference's deviation); the paper's is 0.7.
    """

    def __init__(self, share: float = 0.7) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share}, but must be from 0 (no rescaling) to 1; 0.7 is a good start")
        self.share = share

    def start(self) -> Correct:
        return self._correct

    def _correct(self, outputs: Outputs, total: Tensor) -> Tensor:
        ratio = _deviation(outputs.reference) / _deviation(total).clamp(min=1e-30)
        return expand(self.share * ratio + (1 - self.share), total) * total


class Threshold(Correction):
    """Dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487), for latents of deviation 1.

    Where 0.5 % of a picture's values are larger than the limit, all larger ones are clipped to that quantile
    and the picture is scaled so that it meets the limit.

    Args:
        limit: in deviations of the latents, positive; 3 or 4 for a Gaussian-like autoencoder.
    """

    def __init__(self, limit: float = 4.0) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ValueError(f"limit is {limit}, but must be positive, such as 4 deviations of the latents")
        self.limit = limit

    def start(self) -> Correct:
        return self._correct

    def _correct(self, outputs: Outputs, total: Tensor) -> Tensor:
        largest = torch.stack([torch.quantile(image.abs().flatten(), _QUANTILE) for image in total])
        bound = expand(largest.clamp(min=self.limit), total)
        return total.clamp(-bound, bound) * (self.limit / bound)


class ZeroInit(Correction):
    """CFG-Zero*'s other half: the flow stands still in the first steps (Fan et al. 2025).

    Args:
        share: of the walk from `t = 1`, above 0 and below 1; the paper's is 0.04. Any share covers the step
            from `t = 1` itself.
    """

    def __init__(self, share: float = 0.04) -> None:
        if not 0 < share < 1:
            raise ValueError(f"share is {share}, but must be above 0 and below 1, such as 0.04")
        self.share = share

    def start(self) -> Correct:
        return self._correct

    def _correct(self, outputs: Outputs, total: Tensor) -> Tensor:
        return torch.where(expand(outputs.t > 1 - self.share, total), outputs.still, total)


#: The share of a picture's values that dynamic thresholding leaves as they are.
_QUANTILE = 0.995


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each picture with its other, `[B]`; picture by picture, see above."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)])


def _deviation(x: Tensor) -> Tensor:
    return torch.stack([image.std() for image in x])
