"""Diagnostics on boards whose faults are planted."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluation.arena.diagnostics import (
    cycles,
    goodness_of_fit,
    influences,
    planning_half_width,
    position_bias,
    votes_to_separate,
)
from evaluation.arena.intervals import covariance, without_each_voter
from evaluation.arena.ratings import POINTS, rate
from evaluation.arena.votes import Outcome, Vote, VoteTable

Simulate = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
Evenly = Callable[[int, int, int], np.ndarray]


def counted(wins: list[list[int]]) -> np.ndarray:
    counts = np.zeros((len(wins), len(wins), 4), np.int64)
    counts[..., 0] = wins
    return counts


def votes_of(voter: str, left: str, right: str, times: int) -> list[Vote]:
    return [Vote(left, right, Outcome.LEFT, "p", "", voter, k, 0.0) for k in range(times)]


def test_a_lean_to_the_left_is_seen() -> None:
    counts = np.zeros((2, 2, 4), np.int64)
    counts[0, 1], counts[1, 0] = (60, 40, 30, 5), (58, 42, 9, 2)
    bias = position_bias(counts)
    assert (bias.left, bias.right, bias.share) == (118, 82, 0.59)
    assert bias.p_value is not None
    assert bias.p_value < 0.02
    assert bias.low is not None
    assert bias.low > 0.5
    even = position_bias(counts[..., [0, 0, 2, 3]])
    assert (even.share, even.p_value) == (0.5, 1.0)
    assert position_bias(np.zeros((2, 2, 4), np.int64)).share is None


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_the_test_of_fit_is_calibrated(ties: float, simulate: Simulate, spread_evenly: Evenly) -> None:
    """On boards that do have one scale its p-values are even, a twentieth of them below 0.05."""
    tables = simulate(np.linspace(-1, 1, 7), spread_evenly(400, 7, 2000), ties)
    p_values = np.array([goodness_of_fit(rate(counts)).p_value for counts in tables], float)
    assert p_values.mean() == pytest.approx(0.5, abs=0.05)
    assert (p_values < 0.05).mean() == pytest.approx(0.05, abs=0.03)


def test_rock_paper_scissors_fit_no_scale(draws: np.random.Generator) -> None:
    fit = rate(counted([[0, 60, 20], [20, 0, 60], [60, 20, 0]]))
    test = goodness_of_fit(fit)
    assert test.freedom == 1
    assert test.p_value is not None
    assert test.p_value < 1e-6
    found = cycles(fit, draws)
    assert (found.triads, found.cyclic) == (1, 1)
    assert found.expected == pytest.approx(0.25, abs=0.12)  # three even pairs: a quarter of all outcomes


def test_entrants_that_nobody_voted_on_and_groups_apart_take_no_freedom() -> None:
    circle = np.array([[0, 60, 20], [20, 0, 60], [60, 20, 0]])
    alone = goodness_of_fit(rate(counted(circle.tolist())))
    among, apart = np.zeros((5, 5), int), np.kron(np.eye(2, dtype=int), circle)
    among[:3, :3] = circle
    test = goodness_of_fit(rate(counted(among.tolist())))
    assert (test.freedom, alone.freedom) == (1, 1)
    assert test.p_value == pytest.approx(alone.p_value, rel=0.5)
    assert goodness_of_fit(rate(counted(apart.tolist()))).freedom == 2


def test_a_clear_order_has_no_cycles(draws: np.random.Generator) -> None:
    found = cycles(rate(counted([[0, 90, 95], [10, 0, 90], [5, 10, 0]])), draws)
    assert (found.triads, found.cyclic, found.p_value) == (1, 0, 1.0)
    assert found.expected < 0.05


def test_cycles_of_four_by_hand(draws: np.random.Generator) -> None:
    """0 > 1 > 2 > 0 is one; 3 loses to all; and a pair without a majority closes no triad."""
    wins = [[0, 3, 1, 3], [1, 0, 3, 3], [3, 1, 0, 2], [1, 1, 2, 0]]
    found = cycles(rate(counted(wins)), draws)
    assert (found.triads, found.cyclic) == (2, 1)


def test_a_voter_with_weight_is_named() -> None:
    crowd = [
        vote for k in range(20) for vote in votes_of(f"v{k}", "a", "b", 2) + votes_of(f"v{k}", "b", "a", 2)
    ]
    table = VoteTable.of([*crowd, *votes_of("one", "a", "b", 20)], ["a", "b"])
    fit = rate(table.counts())
    first, *others = influences(fit, table, without_each_voter(fit, table))
    assert (first.voter, first.votes) == ("one", 20)
    gap = 400 * np.log10(60 / 40) / 2  # without them both are at 1000
    assert abs(first.change) == pytest.approx(gap, rel=1e-2)
    assert not any(each.changes_top for each in others)
    assert len(others) == 20


def test_a_voter_who_decides_the_top_is_marked() -> None:
    votes = [*votes_of("v", "b", "a", 12), *votes_of("w", "a", "b", 10), *votes_of("x", "a", "b", 5)]
    table = VoteTable.of(votes, ["a", "b"])
    fit = rate(table.counts())
    marked = {
        each.voter for each in influences(fit, table, without_each_voter(fit, table)) if each.changes_top
    }
    assert marked == {"w", "x"}


def test_the_votes_wanted_do_separate() -> None:
    counts = counted([[0, 30, 40], [26, 0, 38], [20, 22, 0]])
    fit = rate(counts)
    wanted = votes_to_separate(fit, covariance(fit))
    assert (wanted == wanted.T).all()
    assert (wanted[0, 2], wanted[0, 0]) == (0, 0)
    more = int(wanted[0, 1])
    assert more > 100
    for votes, separated in ((more * 1.05, True), (more * 0.95, False)):
        later = counts.astype(float)
        later[0, 1, 0] += votes * fit.chances[0, 1]  # the difference stays what it was
        later[1, 0, 0] += votes * fit.chances[1, 0]
        refit = rate(later)
        spread = covariance(refit)
        variance = spread[0, 0] + spread[1, 1] - 2 * spread[0, 1]
        assert (abs(refit.strengths[0] - refit.strengths[1]) > 1.96 * np.sqrt(variance)) == separated


def test_equals_and_strangers_are_never_separated() -> None:
    fit = rate(counted([[0, 10, 0], [10, 0, 0], [0, 0, 0]]))
    wanted = votes_to_separate(fit, covariance(fit))
    assert np.isinf(wanted[0, 1])
    assert np.isinf(wanted[0, 2])


def test_the_planning_number() -> None:
    assert planning_half_width(100) == pytest.approx(68.1, abs=0.05)
    assert planning_half_width(1) == pytest.approx(1.96 * 2 * POINTS, rel=1e-4)
