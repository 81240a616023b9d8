"""The board as a whole: JSON, honest about what it does not know, and fast."""

import json
import math
import time

import numpy as np
import pytest

from evaluation.arena.board import leaderboard
from evaluation.arena.votes import Outcome, Vote

KINDS = list(Outcome)


def cast(
    entrants: int, votes: int, voters: int, draws: np.random.Generator, categories: tuple[str, ...] = ("",)
) -> list[Vote]:
    """Votes on entrants "m0" (best) to the worst, 100 points apart."""
    shown = [draws.permutation(entrants)[:2] for _ in range(votes)]
    out = []
    for k, (left, right) in enumerate(shown):
        chance = 1 / (1 + 10 ** ((left - right) / 4))
        kind = draws.choice(4, p=[chance * 0.8, (1 - chance) * 0.8, 0.15, 0.05])
        category, voter = categories[k % len(categories)], f"v{draws.integers(voters)}"
        known = 0.5 if k % 2 else math.nan
        out.append(Vote(f"m{left}", f"m{right}", KINDS[kind], "p", category, voter, k, 0.0, known))
    return out


def test_the_whole_board(draws: np.random.Generator) -> None:
    votes = cast(5, 3000, 40, draws, ("cats", "dogs", ""))
    names = [*(f"m{k}" for k in range(5)), "new"]
    board = leaderboard(votes, names)
    values = json.loads(json.dumps(board.to_dict(), allow_nan=False))
    assert [row["entrant"] for row in values["rows"]] == names
    assert (values["votes"], values["voters"], values["by_voter"]) == (3000, 40, True)
    *rated, new = values["rows"]
    assert (new["rating"], new["interval"], new["separable"]) == (None, {"low": None, "high": None}, False)
    assert new["preliminary"]
    assert sum(row["rating"] for row in rated) / 5 == pytest.approx(1000)
    for row in rated:
        assert row["interval"]["low"] < row["rating"] < row["interval"]["high"]
        assert row["bootstrap"]["low"] < row["rating"] < row["bootstrap"]["high"]
        assert row["rank"] <= row["worst_rank"]
        tally = row["tally"]
        assert tally["wins"] + tally["losses"] + tally["ties"] + tally["both_bad"] == tally["votes"]
    assert sum(row["tally"]["votes"] for row in rated) == 6000
    assert rated[0]["rank"] == 1
    assert rated[4]["rank"] == 5
    matrix = values["matrix"]
    assert matrix["entrants"] == names
    assert matrix["wins"][0][1] + matrix["wins"][1][0] == matrix["votes"][0][1]
    assert matrix["needed"][0][4] == 0
    assert matrix["needed"][0][5] is None
    assert set(values["categories"]) == {"cats", "dogs"}
    assert values["categories"]["cats"]["votes"] == 1000
    checks = values["diagnostics"]
    assert checks["both_bad"] == pytest.approx(0.05, abs=0.02)
    assert (checks["known_propensities"], checks["least_propensity"]) == (0.5, 0.5)
    assert checks["design_effect"] == pytest.approx(1.0, abs=0.5)
    assert checks["robustness"]["flipped"]["votes"] < checks["robustness"]["dropped"]["votes"]
    assert len(checks["robustness"]["influences"]) == 10


def test_a_board_repeats_to_the_last_digit(draws: np.random.Generator) -> None:
    votes = cast(4, 300, 12, draws)
    names = [f"m{k}" for k in range(4)]
    assert leaderboard(votes, names).to_dict() == leaderboard(votes, names).to_dict()
    assert leaderboard(votes, names, seed=1).to_dict() != leaderboard(votes, names).to_dict()


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("names", [["m0", "m1"], ["m0", "m1", "m2"], ["m0"]])
def test_a_young_board_is_json_too(count: int, names: list[str], draws: np.random.Generator) -> None:
    values = leaderboard(cast(2, count, 3, draws), names).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False))["votes"] == count
    assert all(row["preliminary"] for row in values["rows"])


def test_a_board_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one entrant"):
        leaderboard([], [])


def test_one_that_always_won_is_marked_and_has_no_upper_end() -> None:
    votes = [Vote("a", "b", Outcome.LEFT, "p", "", "v", k, 0.0) for k in range(200)]
    first, second = leaderboard(votes, ["b", "a"]).rows
    assert (first.entrant, second.entrant) == ("a", "b")
    assert first.interval.high is None
    assert first.interval.low is not None
    assert first.interval.low > 1000
    assert second.interval.low is None
    assert not first.separable
    assert not first.preliminary
    assert (first.rank, second.rank) == (1, 2)


def test_voters_are_units_only_where_there_are_enough(draws: np.random.Generator) -> None:
    names = ["m0", "m1", "m2"]
    assert not leaderboard(cast(3, 100, 5, draws), names).by_voter
    votes = cast(3, 400, 30, draws)
    assert leaderboard(votes, names).by_voter
    assert not leaderboard(votes, names, by_voter=False).by_voter
    assert (
        leaderboard(votes, names).rows[0].interval
        != leaderboard(votes, names, by_voter=False).rows[0].interval
    )


def test_reweighting_and_the_preliminary_mark_have_effect(draws: np.random.Generator) -> None:
    votes = cast(4, 500, 20, draws)
    votes += [vote for vote in votes if {vote.left, vote.right} == {"m0", "m1"}] * 5
    names = [f"m{k}" for k in range(4)]
    assert leaderboard(votes, names, floor=10).rows[0].rating != leaderboard(votes, names).rows[0].rating
    assert not any(row.preliminary for row in leaderboard(votes, names).rows)
    assert all(row.preliminary for row in leaderboard(votes, names, preliminary=10_000).rows)


def test_ten_thousand_votes_on_twenty_entrants_take_a_second(draws: np.random.Generator) -> None:
    """Budgets are of processor time, so that a busy machine does not fail it."""
    votes = cast(20, 10_000, 300, draws, ("a", "b", "c"))
    names = [f"m{k}" for k in range(20)]
    started = time.process_time()
    leaderboard(votes, names)
    assert time.process_time() - started < 2.0  # measured: 0.2 to 0.4
