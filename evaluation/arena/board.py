"""The leaderboard: everything that is said of the entrants of an arena, computed from its votes.

A pure function of the votes, the entrants and a seed. `Board.to_dict` has JSON values alone: what is free or
unknown is None. What each number means and whose it is: docs/arena-statistics.md.
Use: `leaderboard(votes, entrants).to_dict()`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.arena.diagnostics import (
    Cycles,
    GoodnessOfFit,
    Influence,
    PositionBias,
    cycles,
    goodness_of_fit,
    influences,
    planning_half_width,
    position_bias,
    votes_to_separate,
)
from evaluation.arena.flips import Overturn, fewest_dropped, fewest_flipped
from evaluation.arena.intervals import (
    Jackknife,
    bounds,
    covariance,
    percentiles,
    ranks,
    resampled_voters,
    resampled_votes,
    vote_freedom,
    without_each_voter,
)
from evaluation.arena.ratings import Fit, rate
from evaluation.arena.votes import OUTCOMES, Outcome, Vote, VoteTable, wins_of

#: An entrant with fewer votes is marked preliminary: its interval is about 68 points to either side.
PRELIMINARY = 100
#: With fewer voters what differs between them cannot be told, and all votes are taken as independent.
FEWEST_VOTERS = 10
REPLICATES = 1000
#: So many voters are listed by influence.
LISTED = 10


@dataclass(frozen=True)
class Interval:
    """Rating points, 95 %; None where the votes leave that side free."""

    low: float | None
    high: float | None


@dataclass(frozen=True)
class Tally:
    """What the votes of one entrant said; ties and two bad pictures count half in the rating."""

    votes: int
    wins: int
    losses: int
    ties: int
    both_bad: int


@dataclass(frozen=True)
class Row:
    """One entrant. `rank` is the best that the intervals leave open, `worst_rank` the worst.

    `rating` is None without votes. `interval` is the sandwich's, `bootstrap` None where it was not made.
    `separable` is False where wins and losses do not bound the rating on both sides; `preliminary` where
    there are too few votes.
    """

    entrant: str
    rating: float | None
    interval: Interval
    bootstrap: Interval | None
    rank: int
    worst_rank: int
    tally: Tally
    preliminary: bool
    separable: bool


@dataclass(frozen=True)
class Matrix:
    """Of each two `entrants`, best first: wins of row over column, ties half; votes; votes still needed.

    `needed` is how many further votes of the pair would separate the two, None where no number would.
    """

    entrants: tuple[str, ...]
    wins: tuple[tuple[float, ...], ...]
    votes: tuple[tuple[int, ...], ...]
    needed: tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True)
class Robustness:
    """What it takes to put another first: votes lost, votes reversed, or a voter who leaves.

    `voters_who_decide` is how many voters could do it alone; `influences` are the greatest of all.
    """

    dropped: Overturn | None
    flipped: Overturn | None
    voters_who_decide: int
    influences: tuple[Influence, ...]


@dataclass(frozen=True)
class Diagnostics:
    """What a reader can hold against the board.

    `design_effect` is the variance of ratings with voters as the independent units, over that with votes as
    such: above 1, voters have tastes of their own (None for fewer than `FEWEST_VOTERS`). `both_bad` is the
    share of the votes that liked neither picture, `known_propensities` of those whose pair's probability was
    recorded, and `least_propensity` the smallest such.
    """

    position: PositionBias
    goodness_of_fit: GoodnessOfFit
    cycles: Cycles
    robustness: Robustness
    design_effect: float | None
    both_bad: float | None
    known_propensities: float | None
    least_propensity: float | None


@dataclass(frozen=True)
class Category:
    """The board of the votes on one category of prompts; intervals by sandwich only."""

    votes: int
    voters: int
    by_voter: bool
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Board:
    """A leaderboard; `rows` by rating, best first, entrants without votes last.

    `by_voter`: intervals take voters, not votes, as independent. `planning` is the half width in rating
    points that as many votes of one even pair give.
    """

    votes: int
    voters: int
    by_voter: bool
    rows: tuple[Row, ...]
    matrix: Matrix
    categories: Mapping[str, Category]
    diagnostics: Diagnostics
    planning: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; neither NaN nor infinity."""
        return asdict(self)


def leaderboard(
    votes: Iterable[Vote],
    entrants: Sequence[str],
    floor: int | None = None,
    by_voter: bool = True,
    preliminary: int = PRELIMINARY,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Board:
    """Returns the board of `votes`; `entrants` may lack votes.

    Votes of one voter are correlated, so by default voters are the independent units of both intervals, once
    there are `FEWEST_VOTERS`; `by_voter=False` takes votes as independent, as the public arenas do. `floor`:
    see `ratings.pair_weights`. `seed` draws the bootstrap's tables and the cycles of chance.

    Raises:
        ValueError: no entrant at all.
    """
    votes = list(votes)
    table = VoteTable.of(votes, entrants)
    if not table.entrants:
        raise ValueError("no entrants and no votes; a board needs at least one entrant")
    rng = np.random.default_rng(seed)
    fit = rate(table.counts(), floor)
    without = without_each_voter(fit, table)
    clustered = by_voter and len(table.voters) >= FEWEST_VOTERS
    drawn = None
    if clustered:
        drawn = percentiles(fit, resampled_voters(fit, table, replicates, rng))
    elif votes:
        drawn = percentiles(fit, resampled_votes(fit, replicates, rng))
    spread, freedom = _uncertainty(fit, without, clustered)
    rows = _rows(table, fit, bounds(fit, spread, freedom), drawn, preliminary)
    return Board(
        len(table),
        len(table.voters),
        clustered,
        rows,
        _matrix(table, fit, spread, [row.entrant for row in rows]),
        _categories(table, floor, by_voter, preliminary),
        _diagnostics(votes, table, fit, without, rng),
        {str(count): planning_half_width(count) for count in (100, 400, 1600, 6400)},
    )


def tally(counts: np.ndarray, k: int) -> Tally:
    """Returns what `counts` int64 `[n n 4]` say of entrant `k`."""
    left, right = counts[k].sum(0), counts[:, k].sum(0)
    wins_left, wins_right, tie, bad = (OUTCOMES.index(outcome) for outcome in Outcome)
    both = left + right
    wins, losses = left[wins_left] + right[wins_right], left[wins_right] + right[wins_left]
    return Tally(int(both.sum()), int(wins), int(losses), int(both[tie]), int(both[bad]))


def _uncertainty(fit: Fit, without: Jackknife, clustered: bool) -> tuple[np.ndarray, np.ndarray]:
    """The covariance of the strengths and its degrees of freedom."""
    if clustered:
        return without.covariance(), np.array(len(without.strengths) - 1)
    return covariance(fit), vote_freedom(fit)


def _rows(
    table: VoteTable,
    fit: Fit,
    ends: tuple[np.ndarray, np.ndarray],
    drawn: tuple[np.ndarray, np.ndarray] | None,
    preliminary: int,
) -> tuple[Row, ...]:
    """The rows, best first; `ends` and `drawn` are those of the sandwich's and the bootstrap's intervals."""
    best, worst = ranks(*ends)
    ratings = fit.ratings
    tallies = [tally(fit.counts, k) for k in range(len(table.entrants))]
    rows = [
        Row(
            name,
            float(ratings[k]) if tallies[k].votes else None,
            _interval(ends, k),
            None if drawn is None else _interval(drawn, k),
            int(best[k]),
            int(worst[k]),
            tallies[k],
            tallies[k].votes < preliminary,
            not (fit.free_below[k] or fit.free_above[k]),
        )
        for k, name in enumerate(table.entrants)
    ]
    return tuple(sorted(rows, key=lambda row: -np.inf if row.rating is None else row.rating, reverse=True))


def _interval(ends: tuple[np.ndarray, np.ndarray], k: int) -> Interval:
    low, high = (float(end[k]) if np.isfinite(end[k]) else None for end in ends)
    return Interval(low, high)


def _matrix(table: VoteTable, fit: Fit, spread: np.ndarray, order: Sequence[str]) -> Matrix:
    chosen = [table.entrants.index(name) for name in order]
    block = np.ix_(chosen, chosen)
    votes = fit.counts.sum(-1)
    needed = votes_to_separate(fit, spread)[block].tolist()
    return Matrix(
        tuple(order),
        _tuples(wins_of(fit.counts)[block].tolist()),
        _tuples((votes + votes.T)[block].tolist()),
        _tuples([[int(value) if np.isfinite(value) else None for value in row] for row in needed]),
    )


def _tuples(rows: Sequence[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in rows)


def _categories(
    table: VoteTable, floor: int | None, by_voter: bool, preliminary: int
) -> Mapping[str, Category]:
    """The boards of the categories by name; votes without a category are in none."""
    boards = {}
    for k, name in sorted(enumerate(table.categories), key=lambda item: item[1]):
        if not name:
            continue
        part = table.where(table.category == k)
        fit = rate(part.counts(), floor)
        clustered = by_voter and len(part.voters) >= FEWEST_VOTERS
        if clustered:
            spread, freedom = _uncertainty(fit, without_each_voter(fit, part), clustered)
        else:
            spread, freedom = covariance(fit), vote_freedom(fit)
        rows = _rows(part, fit, bounds(fit, spread, freedom), None, preliminary)
        boards[name] = Category(len(part), len(part.voters), clustered, rows)
    return boards


def _diagnostics(
    votes: Sequence[Vote], table: VoteTable, fit: Fit, without: Jackknife, rng: np.random.Generator
) -> Diagnostics:
    effect = None
    if len(table.voters) >= FEWEST_VOTERS:
        inside = fit.reference
        effect = float((np.diag(without.covariance()) / np.diag(covariance(fit)))[inside].mean())
    everyone = influences(fit, table, without)
    known = [vote.propensity for vote in votes if vote.propensity == vote.propensity]
    bad = sum(vote.outcome is Outcome.BOTH_BAD for vote in votes)
    return Diagnostics(
        position_bias(fit.counts),
        goodness_of_fit(fit),
        cycles(fit, rng),
        Robustness(
            fewest_dropped(fit, table.entrants),
            fewest_flipped(fit, table.entrants),
            sum(each.changes_top for each in everyone),
            everyone[:LISTED],
        ),
        effect,
        bad / len(votes) if votes else None,
        len(known) / len(votes) if votes else None,
        min(known, default=None),
    )
