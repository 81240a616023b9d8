"""Which two entrants are shown next: the pair whose vote is expected to tell most, and sometimes any pair.

A vote between a and b adds information w = p (1-p) along x = e_a - e_b, and lowers the variance of every
difference z of strengths by w (z' C x)^2 / (1 + w x' C x), C the covariance of the strengths (Sherman &
Morrison 1950). Those reductions are summed over all differences, each weighted by how much its variance
matters: a pair whose order is settled matters little, one that could be either way much. Pairs are drawn in
proportion to a power of the sum. Which power: to separate 6 to 20 simulated entrants took 0.44 to 0.63 of the
votes that even pairing takes with the first, 0.27 to 0.51 with the fourth.
Use: `pair_probabilities(table.counts(), allowed)`; `evaluation.arena.matches` draws from them.
"""

import numpy as np
from scipy.special import ndtr

from evaluation.arena.intervals import model_covariance
from evaluation.arena.ratings import rate

#: The share of showings that are spread evenly over all pairs: each keeps a chance, whatever the votes say.
EXPLORATION = 0.2
SHARPNESS = 4


def pair_probabilities(
    counts: np.ndarray, allowed: np.ndarray, exploration: float = EXPLORATION
) -> np.ndarray:
    """Returns the probability of each pair to be shown next, float64 `[.. n n]`, above the diagonal.

    `counts` int64 `[.. n n 4]`; `allowed` bool `[n]`: the entrants that can be shown. They sum to 1, and no
    allowed pair has less than `exploration` / pairs.

    Raises:
        ValueError: fewer than two entrants are allowed, or `exploration` is not in (0, 1].
    """
    if allowed.sum() < 2:
        raise ValueError(f"{allowed.sum()} entrants can be shown; a pair needs two")
    if not 0.0 < exploration <= 1.0:
        raise ValueError(
            f"exploration is {exploration}; it must lie in (0, 1], or a pair could never be shown"
        )
    one, other = np.triu_indices(len(allowed), 1)
    shown = allowed[one] & allowed[other]
    one, other = one[shown], other[shown]
    gains = _gains(counts, one, other)
    sharp = (gains / np.maximum(gains.max(-1, keepdims=True), 1e-300)) ** SHARPNESS
    total = sharp.sum(-1, keepdims=True)
    share = np.divide(sharp, total, out=np.full_like(sharp, 1.0 / len(one)), where=total > 0)
    probabilities = np.zeros(counts.shape[:-1])
    probabilities[..., one, other] = (1.0 - exploration) * share + exploration / len(one)
    return probabilities


def _gains(counts: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How much one vote on each of P pairs is expected to settle, `[.. P]`."""
    fit = rate(counts)
    between = model_covariance(fit)
    rows = between[..., one, :] - between[..., other, :]
    together = rows[..., one] - rows[..., other]  # covariance of the differences, [.. P P]
    variance = np.diagonal(together, axis1=-2, axis2=-1)
    apart = np.abs(fit.strengths[..., one] - fit.strengths[..., other])
    unsettled = ndtr(-apart / np.sqrt(variance))  # the chance that the pair's order is wrong
    chance = fit.chances[..., one, other]
    weight = chance * (1.0 - chance)
    return weight / (1.0 + weight * variance) * (unsettled[..., None, :] * together**2).sum(-1)
