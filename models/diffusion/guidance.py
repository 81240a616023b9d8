"""Guidance: a weighted sum of denoiser branches whose weights sum to 1, and corrections of it.

All branches of a denoiser go through it in one batched call; a branch of weight 0 is never computed. The last
branch is the reference: what is left alone outside the interval, and what corrections measure against.

    CFG              (1 - s, s)                      null or negative prompt, prompt
    autoguidance     (1 - s, s)                      weaker denoiser, denoiser; both with the prompt
    editing          (1 - s_I, s_I - s_T, s_T)       null, picture, picture and prompt
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models.conditioning import Conditioning
from models.diffusion.corrections import (
    Correct,
    Correction,
    OptimalScale,
    Outputs,
    Projection,
    Rescale,
    Threshold,
    ZeroInit,
)
from models.diffusion.schedules import Schedule, expand

#: What a sampler calls: `(x_t [B C h w], t [B]) -> x0_hat [B C h w]`.
Denoise = Callable[[Tensor, Tensor], Tensor]


class ConditionalDenoiser(Protocol):
    """What guidance calls: a `Denoiser` or a wrapper of one."""

    @property
    def schedule(self) -> Schedule:
        """The schedule it was trained with."""

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """`x0_hat` `[B C h w]`."""


@dataclass(frozen=True)
class Branch:
    """One denoiser call.

    Args:
        weight: in the sum.
        conditioning: what this branch is told, batch B.
        denoiser: another one than guidance's own, on the same schedule and latents, such as a weaker
        checkpoint.
    """

    weight: float
    conditioning: Conditioning
    denoiser: ConditionalDenoiser | None = None


@dataclass(frozen=True)
class Interval:
    """The times `low < t <= high` at which there is guidance; elsewhere only the last branch is computed.

    Kynkäänniemi et al. 2024 (arXiv 2404.07724), whose noise levels are `t = schedule.time_at(-2 log(sigma))`.

    Raises:
        ValueError: the two do not rise within [0, 1].
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(
                f"the guidance interval is {self.low} to {self.high}, but must rise within [0, 1] in t, "
                "where 1 is pure noise; 0 to 1 is everywhere"
            )

    def contains(self, t: Tensor) -> Tensor:
        """Whether there is guidance at each of `t` `[B]`."""
        return (t > self.low) & (t <= self.high)


def guide(
    denoiser: ConditionalDenoiser,
    branches: Sequence[Branch],
    corrections: Sequence[Correction] = (),
    interval: Interval = Interval(),
) -> Denoise:
    """A `(x_t, t) -> x0_hat` that sums the branches and corrects the sum, for one batch of pictures.

    Build a new one for every batch: corrections may remember the steps before.

    Args:
        denoiser: of the branches that name none.
        branches: at least one; the last is the reference.
        corrections: applied in order, where more than one branch has a weight.
        interval: where in `t` all this happens.

    Raises:
        ValueError: the weights do not sum to 1 (the sum would no longer be an image).
    """
    total = math.fsum(branch.weight for branch in branches)
    if not abs(total - 1) < 1e-6:
        raise ValueError(f"guidance weights sum to {total}, but must sum to 1")
    used = [branch for branch in branches if branch.weight != 0]
    inside = _sum(denoiser, used, [c.start() for c in corrections] if len(used) > 1 else [])
    if interval == Interval() or (len(used) == 1 and used[0] is branches[-1]):
        return inside
    last = branches[-1]
    outside = _sum(denoiser, [Branch(1.0, last.conditioning, last.denoiser)], [])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        guided = interval.contains(t)
        if bool(guided.all()):
            return inside(x_t, t)
        if not bool(guided.any()):
            return outside(x_t, t)
        return torch.where(expand(guided, x_t), inside(x_t, t), outside(x_t, t))

    return denoise


def _sum(denoiser: ConditionalDenoiser, branches: list[Branch], corrections: list[Correct]) -> Denoise:
    evaluate = _evaluation(denoiser, branches)
    weights = [branch.weight for branch in branches]

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        x0s = evaluate(x_t, t)
        total = torch.stack([w * x0 for w, x0 in zip(weights, x0s, strict=True)]).sum(0)
        if corrections:
            outputs = Outputs(x_t, t, denoiser.schedule(t), x0s, weights)
            for correct in corrections:
                total = correct(outputs, total)
        return total

    return denoise


def _evaluation(
    denoiser: ConditionalDenoiser, branches: list[Branch]
) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """`(x_t, t) -> x0_hat of each branch`, with one call of each denoiser."""
    owners = [branch.denoiser or denoiser for branch in branches]
    calls = []
    for owner in {id(owner): owner for owner in owners}.values():
        places = [k for k, mine in enumerate(owners) if mine is owner]
        calls.append((owner, places, Conditioning.cat([branches[k].conditioning for k in places])))

    def evaluate(x_t: Tensor, t: Tensor) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        for owner, places, conditioning in calls:
            K = len(places)
            outputs = owner(torch.cat([x_t] * K), t.repeat(K), conditioning).chunk(K)
            found.update(zip(places, outputs, strict=True))
        return [found[k] for k in range(len(branches))]

    return evaluate


class Guidance:
    """Guidance with its refinements, which are all off by default and combine freely.

    They apply in the order of the arguments, and only inside the interval and where more than one branch has
    a weight (`guidance_scale` 1 has one).

    Args:
        interval_low: guidance only where `t` is above it, from 0; see `Interval`.
        interval_high: guidance only where `t` is at most this, up to 1.
        optimal_scale: CFG-Zero*'s scale of the other branches; see `OptimalScale`.
        parallel: APG's factor on the push along the reference, 0 to 1, where 1 keeps it; see `Projection`.
        momentum: APG's share of the pushes before, between -1 and 1; 0 is none.
        norm_limit: APG's largest length of the push, positive; null is no limit.
        rescale: share of the reference's deviation that is restored, 0 to 1; see `Rescale`.
        threshold: dynamic thresholding's limit in deviations of the latents, positive; null is none.
        zero_init: share of the walk from `t = 1` in which nothing moves, at least 0 and below 1; see
        `ZeroInit`.

    Raises:
        ValueError: a number out of range, or without effect because the interval ends before.
    """

    def __init__(
        self,
        interval_low: float = 0.0,
        interval_high: float = 1.0,
        optimal_scale: bool = False,
        parallel: float = 1.0,
        momentum: float = 0.0,
        norm_limit: float | None = None,
        rescale: float = 0.0,
        threshold: float | None = None,
        zero_init: float = 0.0,
    ) -> None:
        self.interval = Interval(interval_low, interval_high)
        if zero_init != 0 and interval_high <= 1 - zero_init:
            raise ValueError(
                f"zero_init is {zero_init}, but there is no guidance above interval_high={interval_high}, "
                "so it has no effect; raise interval_high to 1 or leave zero_init at 0"
            )
        projection = Projection(parallel, momentum, norm_limit)
        plain = (parallel, momentum, norm_limit) == (1, 0, None)
        self.corrections: tuple[Correction, ...] = (
            *([OptimalScale()] if optimal_scale else []),
            *([] if plain else [projection]),
            *([Rescale(rescale)] if rescale != 0 else []),
            *([Threshold(threshold)] if threshold is not None else []),
            *([ZeroInit(zero_init)] if zero_init != 0 else []),
        )

    def combine(self, denoiser: ConditionalDenoiser, branches: Sequence[Branch]) -> Denoise:
        """A `(x_t, t) -> x0_hat` for one batch of pictures: the refined sum of the branches; see `guide`.

        Their weights sum to 1 and the last is the reference. `(1 - s, null)` and `(s, cond)` are
        classifier-free guidance, `null + s (cond - null)` (Ho and Salimans 2022, arXiv 2207.12598), of which
        `s` 1 costs one branch; with a weaker denoiser and the prompts' own conditioning in the first they are
        autoguidance (Karras et al. 2024, arXiv 2406.02507).
        """
        return guide(denoiser, branches, self.corrections, self.interval)
