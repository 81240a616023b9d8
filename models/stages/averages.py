"""Averages of the weights: how far each moves in a step, and one of any width made after the training.

The power-function average (Karras et al. 2024, arXiv:2312.02696, section 3.1) weighs the weights of training
position tau by tau**gamma: its width is a share `sigma_rel` of the training so far, whatever its length. Of
snapshots of two such averages, others are made afterwards: the combination of the snapshots' profiles that is
nearest to the profile that is wanted (appendix C.3). Positions are images seen.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: The halflife never exceeds this share of the images seen, so that the random first weights fade early.
_RAMP = 0.1
#: Width of the uniform average, gamma = 0; wider ones would weigh the first weights most.
WIDEST = 12**-0.5


class Averaging(ABC):
    """Interface: which averages of the weights are kept, and how."""

    #: Of the power-function averages, one each; empty where the average is none.
    sigma_rel: tuple[float, ...] = ()
    #: Images between two snapshots of them; 0 for none.
    snapshot_every_images = 0

    @abstractmethod
    def towards(self, images_seen: int, batch_size: int, halflife_images: int) -> list[float]:
        """How far in [0, 1] each average moves to the new weights, in the step that led to `images_seen`."""


class HalflifeAverage(Averaging):
    """One exponential average, of the halflife that the plan gives."""

    def towards(self, images_seen: int, batch_size: int, halflife_images: int) -> list[float]:
        halflife = max(min(halflife_images, _RAMP * images_seen), 1e-8)
        return [1 - 0.5 ** (batch_size / halflife)]


class PowerFunctionAverage(Averaging):
    """Power-function averages, in place of the halflife's; the first makes pictures and is exported.

    Args:
        sigma_rel: widths, as shares of the training so far, in (0, 0.288].
        snapshot_every_images: they are kept in the run's `averages` so often and at the end; 0 is never.
        half: whether snapshots are of 16 bits instead of 32.
    """

    def __init__(
        self,
        sigma_rel: tuple[float, ...] = (0.05, 0.10),
        snapshot_every_images: int = 4_000,
        half: bool = True,
    ) -> None:
        if not sigma_rel or len(set(sigma_rel)) < len(sigma_rel):
            raise ValueError(
                f"sigma_rel is {list(sigma_rel)}, but must be one width or several different ones"
            )
        if snapshot_every_images < 0:
            raise ValueError(f"snapshot_every_images is {snapshot_every_images}, but must be 0 or more")
        self.sigma_rel = tuple(sigma_rel)
        self.gammas = [gamma_of(each) for each in sigma_rel]
        self.snapshot_every_images = snapshot_every_images
        self.half = half

    def towards(self, images_seen: int, batch_size: int, halflife_images: int) -> list[float]:
        kept = max(1 - batch_size / images_seen, 0.0)  # eq. 3, with t in images
        return [1 - kept ** (gamma + 1) for gamma in self.gammas]


@dataclass(frozen=True)
class Profile:
    """How much the weights of each position count in a power-function average: tau**gamma up to `images`."""

    images: float
    gamma: float

    def product(self, other: "Profile") -> float:
        """The integral of both profiles' product; each alone integrates to 1."""
        first, last = (self, other) if self.images <= other.images else (other, self)
        g, h = first.gamma, last.gamma
        return (g + 1) * (h + 1) / (g + h + 1) * (first.images / last.images) ** h / last.images


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the average of width `sigma_rel` (eq. 4, solved).

    Raises:
        ValueError: a width that no such average has.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}, but must lie in (0, {WIDEST:.3f}]")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combination(snapshots: Sequence[Profile], wanted: Profile) -> list[float]:
    """Factors of the snapshots, with sum 1, whose combined profile is nearest to the one that is wanted."""
    # Positions as shares of the wanted one, so that the numbers are near 1 for any length of training.
    scaled = [Profile(each.images / wanted.images, each.gamma) for each in snapshots]
    aim = Profile(1.0, wanted.gamma)
    count = len(scaled)
    system, right = np.zeros((count + 1, count + 1)), np.ones(count + 1)
    system[:count, :count] = [[one.product(other) for other in scaled] for one in scaled]
    system[count, :count] = system[:count, count] = 1  # the factors' sum, by a multiplier
    right[:count] = [one.product(aim) for one in scaled]
    factors, *_ = np.linalg.lstsq(system, right, rcond=1e-13)
    return [float(factor) for factor in factors[:count]]
