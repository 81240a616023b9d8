"""Votes as records and as counts."""

import json
import math
from typing import Any

import numpy as np
import pytest

from evaluation.arena.votes import Outcome, Vote, VoteTable, wins_of


def vote(left: str, right: str, outcome: Outcome, voter: str = "v", category: str = "") -> Vote:
    return Vote(left, right, outcome, "prompt", category, voter, 0, 12.5)


VOTES = [
    vote("a", "b", Outcome.LEFT, "v", "cats"),
    vote("b", "a", Outcome.LEFT, "w", "cats"),
    vote("b", "a", Outcome.RIGHT, "v", "dogs"),
    vote("a", "c", Outcome.TIE, "w"),
    vote("c", "a", Outcome.BOTH_BAD, "w"),
]


@pytest.mark.parametrize("propensity", [0.25, math.nan])
def test_a_vote_survives_json(propensity: float) -> None:
    one = Vote("a", "b", Outcome.BOTH_BAD, "p", "c", "v", 3, 1.5, propensity)
    text = json.dumps(one.to_dict(), allow_nan=False)
    again = Vote.from_dict(json.loads(text))
    assert again.to_dict() == one.to_dict()
    assert again.outcome is Outcome.BOTH_BAD


@pytest.mark.parametrize(
    ("change", "error"),
    [({"right": "a"}, "itself"), ({"propensity": 0.0}, "propensity"), ({"propensity": 1.5}, "propensity")],
)
def test_a_vote_that_cannot_be_is_refused(change: dict[str, Any], error: str) -> None:
    good = Vote("a", "b", Outcome.LEFT, "p", "", "v", 0, 0.0).to_dict()
    with pytest.raises(ValueError, match=error):
        Vote.from_dict({**good, **change})


def test_an_unknown_outcome_is_refused() -> None:
    good = VOTES[0].to_dict()
    with pytest.raises(ValueError, match="neither"):
        Vote.from_dict({**good, "outcome": "neither"})


def test_counts_and_wins() -> None:
    table = VoteTable.of(VOTES, ["c", "a", "z"])
    assert table.entrants == ("c", "a", "z", "b")
    counts = table.counts()
    a, b, c = (table.entrants.index(name) for name in "abc")
    assert counts[a, b].tolist() == [1, 0, 0, 0]
    assert counts[b, a].tolist() == [1, 1, 0, 0]
    assert counts.sum() == 5
    wins = wins_of(counts)
    assert (wins[a, b], wins[b, a], wins[a, c], wins[c, a]) == (2.0, 1.0, 1.0, 1.0)
    assert not wins[2].any()  # "z" has no votes and a row all the same


def test_counts_of_each_voter_sum_to_those_of_all() -> None:
    table = VoteTable.of(VOTES)
    counts = table.counts_by_voter().toarray().reshape(2, 3, 3, 4)
    assert np.array_equal(counts.sum(0), table.counts())
    assert counts[table.voters.index("v")].sum() == 2


def test_a_part_keeps_entrants_and_drops_voters_without_votes() -> None:
    table = VoteTable.of(VOTES)
    dogs = table.where(table.category == table.categories.index("dogs"))
    assert (len(dogs), dogs.voters, dogs.entrants) == (1, ("v",), table.entrants)
    assert dogs.counts_by_voter().shape[0] == 1


def test_no_votes_at_all() -> None:
    assert VoteTable.of([], ["a", "b"]).counts().shape == (2, 2, 4)
    assert VoteTable.of([], []).counts().shape == (0, 0, 4)
