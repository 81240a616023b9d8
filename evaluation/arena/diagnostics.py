"""Whether a board can be believed: sides, transitivity, single voters, and how many votes are still wanted.

None of these changes a rating; each is a number that a reader can hold against one. Votes are counts int64
`[n n 4]`, as `VoteTable.counts` gives them.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.stats import binomtest, chi2, norm

from evaluation.arena.intervals import Jackknife
from evaluation.arena.ratings import POINTS, Fit, centred
from evaluation.arena.votes import CREDIT, OUTCOMES, Outcome, VoteTable, wins_of

LEFT, RIGHT, TIE, BAD = (OUTCOMES.index(outcome) for outcome in Outcome)
#: Boards drawn from the fitted model, to which the cycles of a real one are compared.
DRAWN = 200


@dataclass(frozen=True)
class PositionBias:
    """The share of left wins among the decided votes: 0.5 if sides are drawn by lot and voters see no side.

    `low`, `high`: Wilson's 95 % interval (1927); `p_value`: the exact two-sided binomial test.
    """

    left: int
    right: int
    share: float | None
    low: float | None
    high: float | None
    p_value: float | None


def position_bias(counts: np.ndarray) -> PositionBias:
    """Returns how often the left picture won; None where no vote was decided."""
    left, right = int(counts[..., LEFT].sum()), int(counts[..., RIGHT].sum())
    if left + right == 0:
        return PositionBias(left, right, None, None, None, None)
    test = binomtest(left, left + right)
    interval = test.proportion_ci(0.95, method="wilson")
    share, p_value = left / (left + right), float(test.pvalue)
    return PositionBias(left, right, share, float(interval.low), float(interval.high), p_value)


@dataclass(frozen=True)
class GoodnessOfFit:
    """How far each pair's own share of wins is from the model's; a small `p_value`: no one scale fits.

    `statistic` is chi-squared with `freedom` degrees of freedom if one scale does.
    """

    statistic: float
    freedom: int
    p_value: float | None


def goodness_of_fit(fit: Fit) -> GoodnessOfFit:
    """Returns Pearson's test of the Bradley-Terry model, one term for each pair that met at least twice.

    Ties make a vote vary less than p (1-p); the ratio is estimated within pairs and divided out, as in
    quasi-likelihood (McCullagh & Nelder 1989, section 4.5). `p_value` is None without freedom.
    """
    one, other = np.triu_indices(len(fit.strengths), 1)
    votes, wins, squares = (matrix[one, other] for matrix in _pairs(fit.counts))
    met = votes >= 2
    votes, wins, squares, chance = votes[met], wins[met], squares[met], fit.chances[one, other][met]
    model = chance * (1.0 - chance)
    within = (squares - wins**2 / votes) * votes / (votes - 1)
    ratio = within.sum() / max((votes * model).sum(), 1e-300)
    # Of each group of entrants that the pairs join, all strengths but one follow from the votes.
    joined = coo_array((np.ones(met.sum()), (one[met], other[met])), (len(fit.strengths),) * 2)
    groups = connected_components(joined, directed=False, return_labels=False)
    freedom = int(met.sum()) - (len(fit.strengths) - int(groups))
    if freedom < 1 or ratio <= 0:
        return GoodnessOfFit(0.0, max(freedom, 0), None)
    statistic = float((votes * (wins / votes - chance) ** 2 / (ratio * model)).sum())
    return GoodnessOfFit(statistic, freedom, float(chi2.sf(statistic, freedom)))


@dataclass(frozen=True)
class Cycles:
    """Three entrants of which each beats the next by majority (Kendall & Babington Smith 1940).

    `triads` could be cyclic, all three pairs being decided; `cyclic` are; `expected` are on boards of as many
    votes drawn from the fitted model, where only chance makes cycles, and `p_value` is how often those have
    at least as many.
    """

    triads: int
    cyclic: int
    expected: float
    p_value: float


def cycles(fit: Fit, rng: np.random.Generator) -> Cycles:
    """Returns the cyclic triads among the majorities, and those that chance would make."""
    votes, wins, _ = _pairs(fit.counts)
    beats = wins > wins.T
    triads, cyclic = _cyclic(beats | beats.T)[1], _cyclic(beats)[0]
    ties = fit.counts[..., [TIE, BAD]].sum(-1)
    ties = ties + ties.T
    decided = votes - ties
    # The model's chance is of wins and half the ties; the ties are as many as they were.
    chance = np.divide(
        votes * fit.chances - ties / 2, decided, out=np.full(votes.shape, 0.5), where=decided > 0
    )
    upper = np.triu(np.ones(votes.shape, bool), 1)
    drawn = rng.binomial(decided * upper, np.clip(chance, 0.0, 1.0), size=(DRAWN, *votes.shape))
    margin = np.where(upper, 2 * drawn - decided, 0)
    chance_cycles = _cyclic(margin - np.swapaxes(margin, -1, -2) > 0)[0]
    p_value = (1 + (chance_cycles >= cyclic).sum()) / (1 + DRAWN)
    return Cycles(int(triads), int(cyclic), float(chance_cycles.mean()), float(p_value))


@dataclass(frozen=True)
class Influence:
    """What leaving out one voter does: the rating it moves farthest, and whether another is first then."""

    voter: str
    votes: int
    entrant: str
    change: float
    changes_top: bool


def influences(fit: Fit, table: VoteTable, without: Jackknife) -> tuple[Influence, ...]:
    """Returns the influence of every voter, the largest change of a rating first."""
    if not len(table):
        return ()
    change = POINTS * (without.strengths - centred(fit.strengths, fit.reference))
    voted = (fit.counts.sum((1, 2)) + fit.counts.sum((0, 2))) > 0
    top = np.where(voted, fit.strengths, -np.inf).argmax()
    tops = np.where(voted, without.strengths, -np.inf).argmax(-1)
    votes = np.bincount(table.voter, minlength=len(table.voters))
    farthest = np.abs(change).argmax(-1)
    order = np.argsort(-np.abs(change).max(-1), kind="stable")
    return tuple(
        Influence(
            table.voters[k],
            int(votes[k]),
            table.entrants[farthest[k]],
            float(change[k, farthest[k]]),
            bool(tops[k] != top),
        )
        for k in order
    )


def votes_to_separate(fit: Fit, of_strengths: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Returns how many further votes between i and j would separate them, float64 `[n n]`, 0 where they are.

    Separate: the interval of the difference of their ratings excludes 0, the difference staying what it is.
    A vote on the pair adds its information to that of the difference exactly (Sherman & Morrison 1950), so
    with difference d, variance v and information w of a vote the number is (z^2 / d^2 - 1 / v) / w. Infinite
    where d is 0 or the votes leave i or j free.
    """
    spread = np.diagonal(of_strengths)
    variance = spread[:, None] + spread[None, :] - 2 * of_strengths
    apart = np.abs(fit.strengths[:, None] - fit.strengths[None, :])
    model = fit.chances * (1.0 - fit.chances)
    votes, _, _ = _pairs(fit.counts)
    residual = (fit.counts * (CREDIT - fit.chances[..., None]) ** 2).sum()
    ratio = residual / max((np.triu(votes, 1) * model).sum(), 1e-300)  # ties: less than p (1-p) a vote
    z = norm.ppf(0.5 + level / 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.maximum(z**2 / apart**2 - 1.0 / variance, 0.0) * ratio / model
    free = fit.free_below | fit.free_above
    wanted = np.where(free[:, None] | free[None, :] | (apart == 0), np.inf, np.ceil(wanted))
    np.fill_diagonal(wanted, 0.0)
    return wanted


def planning_half_width(votes: float, level: float = 0.95) -> float:
    """Returns the half width, in rating points, that `votes` of one even pair give: 681 / sqrt(votes)."""
    return float(norm.ppf(0.5 + level / 2)) * POINTS * 2.0 / math.sqrt(votes)


def _pairs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Votes of each pair (symmetric), wins of i over j, and the sum of the squares of i's scores, `[n n]`."""
    squares = counts @ CREDIT**2 + (counts @ (1.0 - CREDIT) ** 2).T
    votes = counts.sum(-1)
    return votes + votes.T, wins_of(counts), squares


def _cyclic(beats: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The closed walks of length three, by 3 (cycles of a tournament) and by 6 (triangles of a graph)."""
    walks = np.trace((floats := beats.astype(float)) @ floats @ floats, axis1=-2, axis2=-1)
    return np.rint(walks / 3), np.rint(walks / 6)
