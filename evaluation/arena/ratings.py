"""Ratings of entrants from the votes between them: the Bradley-Terry model by maximum likelihood.

P(i is preferred to j) = sigmoid(s_i - s_j), s the strengths in natural units (Zermelo 1929; Bradley & Terry
1952), and a rating is 1000 + 400 log10(e) s: 400 points are odds of ten to one. A tie is half a win for each,
also a tie of two bad pictures: both say that neither was better, and the board reports the bad ones apart.

The likelihood has one finite maximum exactly when the graph "i won against j" is strongly connected (Ford
1957). Where it is not (an entrant that won or lost every vote, or never met the others) each entrant also
ties once with a ghost of strength 0, so that all have a number. It is no more than that on the side which the
votes leave free: `Fit.free_below` and `free_above` name those, and their intervals are unbounded there.

All functions take leading batch dimensions `..`, so that a thousand resampled tables are fitted at once.
Use: `fit = rate(table.counts()); fit.ratings` is float64 `[n]`.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from evaluation.arena.votes import wins_of

MEAN = 1000.0
#: Rating points of one natural unit: 400 / ln 10 = 173.7.
POINTS = 400.0 / math.log(10.0)


@dataclass(frozen=True)
class Fit:
    """Strengths that explain votes, and what their uncertainty is computed from.

    `counts` int64 `[.. n n 4]`; `weights` float64 `[.. n n]`, of one vote of a pair; `strengths` float64
    `[.. n]`, of which only differences mean anything; `ghost` float64 `[..]`, the weight of everybody's tie
    with the ghost: 0 where the votes alone have a maximum, else 1; `reference` bool `[.. n]`, the entrants
    whose mean is 1000; `free_below`, `free_above` bool `[.. n]`: no chain of wins holds this entrant up from
    below, or none holds it down, as seen from the reference.
    """

    counts: np.ndarray
    weights: np.ndarray
    strengths: np.ndarray
    ghost: np.ndarray
    reference: np.ndarray
    free_below: np.ndarray
    free_above: np.ndarray
    floor: int | None

    @property
    def ratings(self) -> np.ndarray:
        """Rating points `[.. n]`; those of the reference have mean 1000."""
        return MEAN + POINTS * centred(self.strengths, self.reference)

    @property
    def chances(self) -> np.ndarray:
        """P(i is preferred to j) `[.. n n]`."""
        return chances_of(self.strengths)


def chances_of(strengths: np.ndarray) -> np.ndarray:
    """Returns P(i is preferred to j) `[.. n n]` for strengths `[.. n]`."""
    return expit(strengths[..., :, None] - strengths[..., None, :])


def rate(counts: np.ndarray, floor: int | None = None, start: np.ndarray | None = None) -> Fit:
    """Returns the fit to `counts` int64 `[.. n n 4]`, as `VoteTable.counts` gives them.

    `floor` weighs votes by `pair_weights`; None: each vote counts the same. `start` are strengths near the
    answer, which save steps.
    """
    weights, wins = pair_weights(counts, floor), wins_of(counts)
    voted = (wins + np.swapaxes(wins, -1, -2)).any(-1)
    reach = reachable(wins)
    ghost = (~reach.all((-1, -2))).astype(float)
    reference = reference_of(reach, wins)
    free_below = ~(reach | ~reference[..., None, :]).all(-1) | ~voted
    free_above = ~(reach | ~reference[..., :, None]).all(-2) | ~voted
    strengths = maximise(weights * wins, ghost, start)
    return Fit(counts, weights, strengths, ghost, reference, free_below, free_above, floor)


def pair_weights(counts: np.ndarray, floor: int | None) -> np.ndarray:
    """Returns the weight of one vote of each pair, float64 `[.. n n]`, of mean 1 over the votes.

    It is 1 / max(votes of the pair, `floor`): pairs that met at least `floor` times count alike, however
    often each was chosen (the reweighting of the public arenas, whose floor is 50): inverse propensity
    weighting by the share of the votes that each pair really had.
    """
    votes = counts.sum(-1)
    games = (votes + np.swapaxes(votes, -1, -2)).astype(float)
    if floor is None:
        return np.ones_like(games)
    raw = 1.0 / np.maximum(games, max(floor, 1))
    total = (raw * games).sum((-1, -2), keepdims=True)
    return raw * np.divide(
        games.sum((-1, -2), keepdims=True), total, out=np.ones_like(total), where=total > 0
    )


def maximise(
    wins: np.ndarray, ghost: np.ndarray, start: np.ndarray | None = None, steps: int = 60
) -> np.ndarray:
    """Returns the strengths `[.. n]` of greatest likelihood for weighted `wins` `[.. n n]`.

    Newton's method on the concave log-likelihood. A step d is shortened by ln(1+r)/r, r the largest change it
    would make to a difference of strengths: that ascends without a line search, since along d the curvature
    grows at most as e^(r t) (generalised self-concordance: Bach 2010, arXiv 0909.3271; Sun & Tran-Dinh 2019,
    arXiv 1703.04599). Ends when no strength moves by 1e-11, or after `steps`.
    """
    won = wins.sum(-1)
    games = wins + np.swapaxes(wins, -1, -2)
    strengths = np.zeros(won.shape) if start is None else np.broadcast_to(start, won.shape).copy()
    for _ in range(steps):
        chances = chances_of(strengths)
        gradient = won - (games * chances).sum(-1) + ghost[..., None] * (0.5 - expit(strengths))
        curvature = information(games * chances * (1.0 - chances), strengths, ghost)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        reach = np.maximum(step.max(-1), 0.0) - np.minimum(step.min(-1), 0.0)
        strengths += (
            step * np.divide(np.log1p(reach), reach, out=np.ones_like(reach), where=reach > 0)[..., None]
        )
        if not reach.size or reach.max() < 1e-11:
            break
    return strengths


def information(pairs: np.ndarray, strengths: np.ndarray, ghost: np.ndarray) -> np.ndarray:
    """Returns the curvature of the log-likelihood, `[.. n n]` and invertible.

    `pairs` are w p (1-p) summed over the votes of each pair, symmetric `[.. n n]`. The likelihood does not
    know the mean of the strengths: without a ghost that direction is held by a curvature of its own, which
    moves nothing (the gradient has no part in it), and entrants without votes by a tiny one.
    """
    n = strengths.shape[-1]
    size = np.maximum(pairs.sum((-1, -2)), 1.0)[..., None, None] / n
    tie = expit(strengths) * expit(-strengths) * ghost[..., None] + 1e-12 * size[..., 0]
    return laplacian(pairs) + np.eye(n) * tie[..., None] + np.where(ghost[..., None, None] > 0, 0.0, size / n)


def laplacian(pairs: np.ndarray) -> np.ndarray:
    """Returns the sum over pairs of `pairs` x x^T, x = e_i - e_j; `pairs` is symmetric `[.. n n]`."""
    return pairs.sum(-1)[..., None] * np.eye(pairs.shape[-1]) - pairs


def reachable(wins: np.ndarray) -> np.ndarray:
    """Returns whether a chain of wins leads from i to j, bool `[.. n n]`; each reaches itself."""
    n = wins.shape[-1]
    reach = ((wins > 0) | np.eye(n, dtype=bool)).astype(np.float32)
    for _ in range(max(n - 1, 1).bit_length()):
        if reach.all():
            break
        reach = np.minimum(reach @ reach, 1.0)
    return reach > 0


def reference_of(reach: np.ndarray, wins: np.ndarray) -> np.ndarray:
    """Returns the entrants that others are compared with, bool `[.. n]`.

    They are the strongly connected ones with the most votes, the first such of several; where no two are
    strongly connected all that have votes, and everybody where nobody has.
    """
    mutual = reach & np.swapaxes(reach, -1, -2)
    votes = (wins + np.swapaxes(wins, -1, -2)).sum(-1)
    heaviest = ((mutual * votes[..., None, :]).sum(-1) * (mutual.sum(-1) > 1)).argmax(-1)
    main = np.take_along_axis(mutual, heaviest[..., None, None], -2)[..., 0, :]
    voted = np.where((votes > 0).any(-1, keepdims=True), votes > 0, True)
    return np.where(main.sum(-1, keepdims=True) > 1, main, voted)


def centred(strengths: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Returns `strengths` `[.. n]` less their mean over `reference` bool `[.. n]`."""
    return strengths - ((strengths * reference).sum(-1) / reference.sum(-1))[..., None]
