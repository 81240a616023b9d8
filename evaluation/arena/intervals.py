"""How far ratings can be trusted: sandwich, jackknife over voters, bootstrap, and the ranks they leave open.

Covariances are of centred strengths in natural units, `[.. n n]`; multiply by `POINTS` squared for ratings.
Use: `low, high = bounds(fit, covariance(fit)); ranks(low, high)`.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from evaluation.arena.ratings import MEAN, POINTS, Fit, centred, information, laplacian, maximise, rate
from evaluation.arena.votes import CREDIT, VoteTable, wins_of

LEVEL = 0.95
#: Voters left out, or resampled tables fitted, in one call: bounds the memory.
PORTION = 500


def covariance(fit: Fit) -> np.ndarray:
    """Returns the sandwich estimate, votes being independent (White 1982; Huber 1967).

    Bread is the inverse of the likelihood's curvature, meat the sum of squared scores, so that ties, which
    vary less than wins, and a model that is not quite true are allowed for. Two corrections for few votes:
    a residual is divided by 1 - its leverage (HC3: MacKinnon & White 1985; Davidson & MacKinnon 1993), and
    each pair carries one vote of the model's own variance, or a pair that tied once would have none.
    """
    bread = _bread(fit)
    games = _games(fit)
    spread = np.diagonal(bread, axis1=-2, axis2=-1)
    leverage = (
        _variance_of_pair(fit) * fit.weights * (spread[..., :, None] + spread[..., None, :] - 2 * bread)
    )
    residual = CREDIT - fit.chances[..., None]
    squares = (fit.counts * residual**2).sum(-1)
    squares = squares + np.swapaxes(squares, -1, -2)
    squares = squares / (1.0 - np.clip(leverage, 0.0, 0.5)) ** 2
    smooth = (squares + _variance_of_pair(fit)) * games / (games + 1.0)
    meat = laplacian(fit.weights**2 * smooth)
    return _centred(bread @ meat @ bread, fit.reference)


def model_covariance(fit: Fit) -> np.ndarray:
    """Returns the inverse of the curvature: the covariance if the model is true and nobody ties."""
    return _centred(_bread(fit), fit.reference)


def bounds(
    fit: Fit, of_strengths: np.ndarray, freedom: np.ndarray | float, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends `[.. n]` of the ratings' intervals, infinite where the votes leave them free.

    `of_strengths` is a covariance `[.. n n]`; `freedom` the degrees of freedom of Student's t. With
    a ghost the width is at least the model's own, since the residuals of one that always won are nearly 0.
    """
    variance = np.diagonal(of_strengths, axis1=-2, axis2=-1)
    if fit.ghost.any():
        own = np.diagonal(model_covariance(fit), axis1=-2, axis2=-1)
        variance = np.where(fit.ghost[..., None] > 0, np.maximum(variance, own), variance)
    half = POINTS * np.sqrt(variance) * np.asarray(student.ppf(0.5 + level / 2, freedom))[..., None]
    low = np.where(fit.free_below, -np.inf, fit.ratings - half)
    return low, np.where(fit.free_above, np.inf, fit.ratings + half)


def vote_freedom(fit: Fit) -> np.ndarray:
    """Returns the degrees of freedom `[..]` that independent votes leave: votes less fitted strengths."""
    votes = fit.counts.sum((-1, -2, -3))
    return np.maximum(votes - fit.reference.sum(-1) + 1, 1)


@dataclass(frozen=True)
class Jackknife:
    """Strengths float64 `[voters n]` as fitted without the votes of each voter, centred as the fit's own."""

    strengths: np.ndarray

    def covariance(self) -> np.ndarray:
        """Returns the covariance for votes that are independent between voters only.

        The jackknife over voters is the sandwich whose meat is summed by voter, corrected for few of them
        (CV3: Bell & McCaffrey 2002; MacKinnon, Nielsen & Webb 2023). Its t has voters - 1 degrees of freedom.

        Raises:
            ValueError: fewer than two voters.
        """
        voters = len(self.strengths)
        if voters < 2:
            raise ValueError(f"{voters} voters; what differs between voters needs at least 2 of them")
        apart = self.strengths - self.strengths.mean(0)
        return (voters - 1) / voters * apart.T @ apart


def without_each_voter(fit: Fit, table: VoteTable) -> Jackknife:
    """Returns what leaving out each voter makes of `fit`, which is of `table`: two Newton steps from it.

    A voter's share h of a table is small; k steps end at the optimum of the rest but for terms of order
    h^(2^k). Pairs keep their weights.
    """
    n = len(table.entrants)
    by_voter = table.counts_by_voter()
    wins, portions = wins_of(fit.counts), []
    for first in range(0, len(table.voters), PORTION):
        own = by_voter[first : first + PORTION].toarray().reshape(-1, n, n, fit.counts.shape[-1])
        left = fit.weights * (wins - wins_of(own))
        ghost = np.broadcast_to(fit.ghost, left.shape[:1])
        portions.append(maximise(left, ghost, fit.strengths, steps=2))
    moved = np.concatenate(portions) if portions else np.zeros((0, n))
    return Jackknife(centred(moved, fit.reference))


def resampled_votes(fit: Fit, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Returns ratings float64 `[replicates .. n]` of tables with votes drawn from the fit's, with return.

    Votes of one pair and outcome are alike, so a table is one multinomial draw (Efron 1979). It has as many
    votes as the fit has degrees of freedom: with all of them the interval is too narrow (Rao & Wu 1988).
    """
    shape = fit.counts.shape
    flat = fit.counts.reshape(*shape[:-3], -1)
    used = flat.reshape(-1, flat.shape[-1]).any(0)
    votes = flat.sum(-1)
    shares = flat[..., used] / np.maximum(votes, 1)[..., None]
    portions = []
    for size in _portions(replicates):
        drawn = np.zeros((size, *flat.shape), np.int64)
        drawn[..., used] = rng.multinomial(vote_freedom(fit), shares, size=(size, *votes.shape))
        portions.append(_refitted(fit, drawn.reshape(size, *shape)))
    return np.concatenate(portions)


def resampled_voters(fit: Fit, table: VoteTable, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Returns ratings float64 `[replicates n]` of tables of voters drawn with return, with all their votes.

    One voter fewer than there are is drawn, or the interval is too narrow (Rao & Wu 1988).
    """
    voters = len(table.voters)
    by_voter = table.counts_by_voter().T.tocsr()
    portions = []
    for size in _portions(replicates):
        drawn = rng.integers(voters, size=(size, max(voters - 1, 1))) + voters * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * voters).reshape(size, voters)
        portions.append(_refitted(fit, (by_voter @ times.T).T.reshape(size, *fit.counts.shape)))
    return np.concatenate(portions)


def percentiles(fit: Fit, ratings: np.ndarray, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ends `[.. n]` of the percentile intervals of `ratings` `[replicates .. n]`.

    They are infinite on both sides for an entrant that the votes leave free on one: who always won does so in
    every resampled table, and the bootstrap cannot tell how far down it might be.
    """
    # Of B values the k-th is the quantile k / (B+1), so that few replicates do not narrow the interval.
    low, high = np.quantile(ratings, [0.5 - level / 2, 0.5 + level / 2], axis=0, method="weibull")
    free = fit.free_below | fit.free_above
    return np.where(free, -np.inf, low), np.where(free, np.inf, high)


def ranks(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best and the worst rank `[n]` that intervals leave open; the best is the rank shown.

    Best: 1 + how many have a lower end above my upper end (the public arenas' rank; equals share it). Worst:
    how many do not have an upper end below my lower end.
    """
    above = (low[None, :] > high[:, None]).sum(-1)
    below = (high[None, :] < low[:, None]).sum(-1)
    return 1 + above, len(low) - below


def _bread(fit: Fit) -> np.ndarray:
    """The inverse of the likelihood's curvature."""
    pairs = fit.weights * _games(fit) * _variance_of_pair(fit)
    return np.linalg.inv(information(pairs, fit.strengths, fit.ghost))


def _games(fit: Fit) -> np.ndarray:
    votes = fit.counts.sum(-1)
    return votes + np.swapaxes(votes, -1, -2)


def _variance_of_pair(fit: Fit) -> np.ndarray:
    return fit.chances * (1.0 - fit.chances)


def _centred(matrix: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The covariance of strengths less their mean over `reference`."""
    n = reference.shape[-1]
    project = np.eye(n) - (reference / reference.sum(-1, keepdims=True))[..., None, :]
    return project @ matrix @ np.swapaxes(project, -1, -2)


def _portions(replicates: int) -> list[int]:
    return [min(PORTION, replicates - first) for first in range(0, replicates, PORTION)]


def _refitted(fit: Fit, counts: np.ndarray) -> np.ndarray:
    """Ratings of resampled tables `[B .. n n 4]`, centred on the entrants that the fit is centred on."""
    strengths = rate(counts, fit.floor, fit.strengths).strengths
    return MEAN + POINTS * centred(strengths, fit.reference)
