"""The leaderboard: everything that is said of the entrants of an arena, computed from its votes.

A pure function of the votes, the entrants and a seed. `Board.to_dict` has JSON values alone: what is free or
unknown is None. What each number means: docs/arena-statistics.md.
Use: `leaderboard(votes, entrants).to_dict()`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.arena.intervals import bounds, covariance, percentiles, ranks, resampled_votes, vote_freedom
from evaluation.arena.ratings import Fit, rate
from evaluation.arena.votes import OUTCOMES, Outcome, Vote, VoteTable

#: An entrant with fewer votes is marked preliminary: its interval is about 68 points to either side.
PRELIMINARY = 100
REPLICATES = 1000


@dataclass(frozen=True)
class Interval:
    """Rating points; None where the votes leave that side free."""

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
    """One entrant. `rank` is the best that its interval leaves open, `worst_rank` the worst.

    `rating` is None without votes. `separable` is False where wins and losses do not bound the rating on both
    sides; `preliminary` where there are too few votes.
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
class Board:
    """A leaderboard; `rows` by rating, best first; entrants without votes last."""

    votes: int
    voters: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; neither NaN nor infinity."""
        return asdict(self)


def leaderboard(
    votes: Sequence[Vote], entrants: Sequence[str], floor: int | None = None, seed: int = 0
) -> Board:
    """Returns the board of `votes`; `entrants` may lack votes. `floor`: see `ratings.pair_weights`."""
    table = VoteTable.of(votes, entrants)
    fit = rate(table.counts(), floor)
    drawn = resampled_votes(fit, REPLICATES, np.random.default_rng(seed)) if votes else None
    rows = rows_of(table.entrants, fit, None if drawn is None else percentiles(fit, drawn))
    return Board(len(table), len(table.voters), rows)


def rows_of(
    entrants: Sequence[str], fit: Fit, drawn: tuple[np.ndarray, np.ndarray] | None
) -> tuple[Row, ...]:
    """Returns the rows, best first; `drawn` are the ends of the bootstrap's intervals."""
    low, high = bounds(fit, covariance(fit), vote_freedom(fit))
    best, worst = ranks(low, high)
    tallies = [tally(fit.counts, k) for k in range(len(entrants))]
    rows = [
        Row(
            name,
            float(fit.ratings[k]) if tallies[k].votes else None,
            _interval(low[k], high[k]),
            None if drawn is None else _interval(drawn[0][k], drawn[1][k]),
            int(best[k]),
            int(worst[k]),
            tallies[k],
            tallies[k].votes < PRELIMINARY,
            not (fit.free_below[k] or fit.free_above[k]),
        )
        for k, name in enumerate(entrants)
    ]
    return tuple(sorted(rows, key=lambda row: -np.inf if row.rating is None else row.rating, reverse=True))


def tally(counts: np.ndarray, k: int) -> Tally:
    """Returns what `counts` int64 `[n n 4]` say of entrant `k`."""
    left, right = counts[k].sum(0), counts[:, k].sum(0)
    wins_left, wins_right, tie, bad = (OUTCOMES.index(outcome) for outcome in Outcome)
    both = left + right
    wins, losses = left[wins_left] + right[wins_right], left[wins_right] + right[wins_left]
    return Tally(int(both.sum()), int(wins), int(losses), int(both[tie]), int(both[bad]))


def _interval(low: float, high: float) -> Interval:
    return Interval(float(low) if np.isfinite(low) else None, float(high) if np.isfinite(high) else None)
