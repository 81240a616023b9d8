"""Votes: one blind choice between two pictures, and many of them as columns of numbers.

`Vote` is what the store keeps and never changes. `VoteTable` is what the statistics read: integers, since
nearly all of them need only how often each outcome happened between each two entrants (`counts`), and a few
also who voted. An entrant that nobody voted on yet belongs into the table: give all entrants by name.
Use: `table = VoteTable.of(votes, entrants)`; `table.counts()` is int64 `[n n 4]`, left, right, outcome.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

import numpy as np
from scipy.sparse import coo_array, csr_array


class Outcome(StrEnum):
    """What a voter said of two pictures. The order is that of the last axis of `VoteTable.counts`."""

    LEFT = "left"
    RIGHT = "right"
    TIE = "tie"
    BOTH_BAD = "both_bad"


OUTCOMES = tuple(Outcome)
#: The left entrant's wins, by outcome: a tie, also of two bad pictures, is half a win for each.
CREDIT = np.array([1.0, 0.0, 0.5, 0.5])


@dataclass(frozen=True)
class Vote:
    """One answer to "which picture is better?", given while both were anonymous.

    `left` and `right` are the ids of the entrants as they were shown; `prompt` is the prompt's id; `category`
    may be empty; `voter` is an opaque id; `showing` counts the pairs that this voter was shown, from 0;
    `time` is in seconds since 1970, UTC; `propensity` is the probability with which this pair was chosen
    among all pairs (`matches.Match`), NaN where it is unknown.

    Raises:
        ValueError: an entrant against itself, or a propensity outside (0, 1].
    """

    left: str
    right: str
    outcome: Outcome
    prompt: str
    category: str
    voter: str
    showing: int
    time: float
    propensity: float = math.nan

    def __post_init__(self) -> None:
        if self.left == self.right:
            raise ValueError(f"a vote between {self.left!r} and itself; left and right must differ")
        if not (math.isnan(self.propensity) or 0.0 < self.propensity <= 1.0):
            raise ValueError(f"propensity is {self.propensity}; it must lie in (0, 1]")

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values; an unknown propensity is None."""
        propensity = None if math.isnan(self.propensity) else self.propensity
        return {**asdict(self), "outcome": self.outcome.value, "propensity": propensity}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the vote that `to_dict` gave; raises KeyError, TypeError, ValueError for others."""
        propensity = values.get("propensity")
        texts = {name: str(values[name]) for name in ("left", "right", "prompt", "category", "voter")}
        return cls(
            **texts,
            outcome=Outcome(values["outcome"]),
            showing=int(values["showing"]),
            time=float(values["time"]),
            propensity=math.nan if propensity is None else float(propensity),
        )


@dataclass(frozen=True)
class VoteTable:
    """Votes as columns int64 `[V]` of indices into `entrants`, `OUTCOMES`, `voters` and `categories`."""

    entrants: tuple[str, ...]
    voters: tuple[str, ...]
    categories: tuple[str, ...]
    left: np.ndarray
    right: np.ndarray
    outcome: np.ndarray
    voter: np.ndarray
    category: np.ndarray

    @classmethod
    def of(cls, votes: Iterable[Vote], entrants: Sequence[str] = ()) -> Self:
        """Returns the table of `votes`; `entrants` come first and in their order, others as they are met."""
        names = {name: k for k, name in enumerate(entrants)}
        voters: dict[str, int] = {}
        categories: dict[str, int] = {}
        kinds = {outcome: k for k, outcome in enumerate(OUTCOMES)}
        rows = [
            (
                names.setdefault(vote.left, len(names)),
                names.setdefault(vote.right, len(names)),
                kinds[vote.outcome],
                voters.setdefault(vote.voter, len(voters)),
                categories.setdefault(vote.category, len(categories)),
            )
            for vote in votes
        ]
        columns = np.array(rows, np.int64).reshape(-1, 5).T.copy()
        return cls(tuple(names), tuple(voters), tuple(categories), *columns)

    def __len__(self) -> int:
        return len(self.left)

    def where(self, chosen: np.ndarray) -> "VoteTable":
        """Returns the votes that a mask bool `[V]` or indices int64 choose, and the voters who cast them.

        Entrants and categories stay as they are.
        """
        present, voter = np.unique(self.voter[chosen], return_inverse=True)
        voters = tuple(self.voters[k] for k in present)
        left, right, outcome = self.left[chosen], self.right[chosen], self.outcome[chosen]
        category = self.category[chosen]
        return VoteTable(self.entrants, voters, self.categories, left, right, outcome, voter, category)

    def counts(self) -> np.ndarray:
        """Returns how often each outcome happened: int64 `[n n 4]` by left, right and `Outcome`."""
        n = len(self.entrants)
        return np.bincount(self._cells(), minlength=n * n * len(OUTCOMES)).reshape(n, n, len(OUTCOMES))

    def counts_by_voter(self) -> csr_array:
        """Returns the same for each voter, sparse int64 `[voters n*n*4]`: most met few pairs."""
        shape = (len(self.voters), len(self.entrants) ** 2 * len(OUTCOMES))
        return coo_array((np.ones(len(self), np.int64), (self.voter, self._cells())), shape).tocsr()

    def _cells(self) -> np.ndarray:
        return (self.left * len(self.entrants) + self.right) * len(OUTCOMES) + self.outcome


def wins_of(counts: np.ndarray) -> np.ndarray:
    """Returns the wins of each over each, ties as half: float64 `[.. n n]` from counts `[.. n n 4]`."""
    return counts @ CREDIT + np.swapaxes(counts @ (1.0 - CREDIT), -1, -2)
