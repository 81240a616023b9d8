"""Intervals by hand, against each other, and above all: how often they cover the truth."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from evaluation.arena.intervals import (
    bounds,
    covariance,
    model_covariance,
    percentiles,
    ranks,
    resampled_voters,
    resampled_votes,
    vote_freedom,
    without_each_voter,
)
from evaluation.arena.pairing import pair_probabilities
from evaluation.arena.ratings import MEAN, POINTS, Fit, centred, maximise, rate
from evaluation.arena.votes import VoteTable, wins_of

Simulate = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
Evenly = Callable[[int, int, int], np.ndarray]
TRUTH = np.array([-0.9, -0.3, 0.0, 0.4, 0.8])
SIMULATIONS = 500


def coverage(truth: np.ndarray, ends: tuple[np.ndarray, np.ndarray]) -> float:
    """The share of intervals `[simulations n]` that hold the true rating."""
    ratings = MEAN + POINTS * (truth - truth.mean())
    return float(((ends[0] <= ratings) & (ratings <= ends[1])).mean())


def sandwich(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    return bounds(fit, covariance(fit), vote_freedom(fit))


def two(wins: int, losses: int, ties: int) -> Fit:
    counts = np.zeros((2, 2, 4), np.int64)
    counts[0, 1] = wins, losses, ties, 0
    return rate(counts)


def test_the_width_of_an_even_pair_by_hand() -> None:
    """Half the difference's 681 / sqrt(votes), the rating being half the difference."""
    low, high = sandwich(two(5000, 5000, 0))
    assert (high - low) / 2 == pytest.approx(681 / math.sqrt(10000) / 2, rel=2e-3)


def test_two_entrants_by_hand() -> None:
    """The variance of a log odds: 1/(n p q), and with ties that of the mean score over (p q)^2."""
    fit = two(6000, 2000, 2000)
    p = 0.7
    assert 4 * model_covariance(fit)[0, 0] == pytest.approx(1 / (10000 * p * (1 - p)), rel=1e-6)
    score = (0.6 * (1 - p) ** 2 + 0.2 * p**2 + 0.2 * (0.5 - p) ** 2) / 10000
    assert 4 * covariance(fit)[0, 0] == pytest.approx(score / (p * (1 - p)) ** 2, rel=1e-3)


def test_one_tie_does_not_make_certain() -> None:
    low, high = sandwich(two(0, 0, 1))
    assert (high - low).min() > 500


@pytest.mark.parametrize(
    ("votes", "ties"),
    [
        (120, 0.3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [(120, 0.0), (400, 0.0), (400, 0.3)]),
    ],
)
def test_both_intervals_cover_the_truth(
    votes: int, ties: float, simulate: Simulate, spread_evenly: Evenly, draws: np.random.Generator
) -> None:
    fit = rate(simulate(TRUTH, spread_evenly(SIMULATIONS, len(TRUTH), votes), ties))
    assert 0.93 <= coverage(TRUTH, sandwich(fit)) <= 0.97
    assert 0.93 <= coverage(TRUTH, percentiles(fit, resampled_votes(fit, 200, draws))) <= 0.97


@pytest.mark.slow
def test_both_cover_where_pairs_met_unequally_and_are_reweighted(
    simulate: Simulate, draws: np.random.Generator
) -> None:
    shares = np.exp(draws.normal(size=(5, 5))) * (1 - np.eye(5))
    showings = draws.multinomial(500, (shares / shares.sum()).ravel(), size=SIMULATIONS).reshape(-1, 5, 5)
    for floor in (None, 20):
        fit = rate(simulate(TRUTH, showings, 0.2), floor)
        assert 0.93 <= coverage(TRUTH, sandwich(fit)) <= 0.97
        assert 0.93 <= coverage(TRUTH, percentiles(fit, resampled_votes(fit, 200, draws))) <= 0.97


def test_both_cover_under_active_pairing(simulate: Simulate, draws: np.random.Generator) -> None:
    """Pairs chosen by what earlier votes said: 40 rounds of 10 votes."""
    counts = np.zeros((SIMULATIONS, 5, 5, 4), np.int64)
    for _ in range(40):
        shares = pair_probabilities(counts, np.ones(5, bool)).reshape(SIMULATIONS, -1)
        showings = draws.multinomial(10, shares).reshape(SIMULATIONS, 5, 5)
        counts += simulate(TRUTH, showings, 0.2)
    fit = rate(counts)
    met = counts.sum((0, 3)) + counts.sum((0, 3)).T + np.eye(5) * 1e9
    assert met.max(where=met < 1e9, initial=0) > 3 * met.min()  # unequal indeed
    assert 0.93 <= coverage(TRUTH, sandwich(fit)) <= 0.97
    assert 0.93 <= coverage(TRUTH, percentiles(fit, resampled_votes(fit, 200, draws))) <= 0.97


def test_coverage_can_fail(simulate: Simulate, spread_evenly: Evenly) -> None:
    """Half the width covers 67 %, and the model's own width is too wide where voters tie."""
    fit = rate(simulate(TRUTH, spread_evenly(SIMULATIONS, 5, 400), 0.4))
    low, high = sandwich(fit)
    assert coverage(TRUTH, ((3 * low + high) / 4, (low + 3 * high) / 4)) < 0.75
    assert coverage(TRUTH, bounds(fit, model_covariance(fit), vote_freedom(fit))) > 0.97


def by_taste(voters: int, each: int, taste: float, draws: np.random.Generator) -> VoteTable:
    """Votes of voters whose strengths differ from the truth by a taste of their own."""
    n = len(TRUTH)
    own = TRUTH + taste * draws.normal(size=(voters, n))
    voter = np.repeat(np.arange(voters), each)
    left = draws.integers(n, size=len(voter))
    right = (left + draws.integers(1, n, size=len(voter))) % n
    chance = 1 / (1 + np.exp(own[voter, right] - own[voter, left]))
    outcome = np.where(draws.random(len(voter)) < chance, 0, 1)
    names, zeros = tuple(str(k) for k in range(max(n, voters))), np.zeros(len(voter), np.int64)
    return VoteTable(names[:n], names[:voters], ("",), left, right, outcome, voter, zeros)


def test_voters_as_units_cover_where_voters_have_tastes(draws: np.random.Generator) -> None:
    """30 voters of 20 votes with tastes as large as the differences: votes as units cover too little."""
    # What is estimated is what the average voter chooses: the fit to their chances, here from many voters.
    many = rate(by_taste(20_000, 20, 0.8, draws).counts())
    truth = (many.ratings - MEAN) / POINTS
    votes, voters, bootstrap = [], [], []
    for _ in range(SIMULATIONS):
        table = by_taste(30, 20, 0.8, draws)
        fit = rate(table.counts())
        votes.append(coverage(truth, sandwich(fit)))
        jackknife = without_each_voter(fit, table)
        voters.append(coverage(truth, bounds(fit, jackknife.covariance(), 29)))
        bootstrap.append(coverage(truth, percentiles(fit, resampled_voters(fit, table, 100, draws))))
    assert np.mean(votes) < 0.90
    assert 0.93 <= np.mean(voters) <= 0.97
    assert 0.93 <= np.mean(bootstrap) <= 0.97


def test_leaving_a_voter_out_is_fitting_the_others(draws: np.random.Generator) -> None:
    table = by_taste(25, 30, 0.5, draws)
    fit = rate(table.counts())
    without = without_each_voter(fit, table).strengths
    for k in range(25):
        rest = maximise(wins_of(table.where(table.voter != k).counts()), np.zeros(()))
        assert without[k] == pytest.approx(centred(rest, fit.reference), abs=1e-4)


def test_one_voter_has_no_spread(draws: np.random.Generator) -> None:
    table = by_taste(1, 50, 0.0, draws)
    with pytest.raises(ValueError, match="at least 2"):
        without_each_voter(rate(table.counts()), table).covariance()


def test_the_bootstrap_repeats_by_its_seed_and_agrees_with_the_sandwich(draws: np.random.Generator) -> None:
    fit = rate(by_taste(10, 300, 0.0, draws).counts())
    one, again = (resampled_votes(fit, 1000, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(one, again)
    assert one.std(0) == pytest.approx(POINTS * np.sqrt(np.diag(covariance(fit))), rel=0.08)


def test_free_sides_are_unbounded() -> None:
    counts = np.zeros((3, 3, 4), np.int64)
    counts[0, 1, 0], counts[1, 2, 0], counts[2, 1, 0] = 9, 5, 6
    fit = rate(counts)
    low, high = sandwich(fit)
    assert np.isinf(high).tolist() == [True, False, False]
    assert np.isfinite(low).all()
    assert low[0] < fit.ratings[0] - 100
    low, high = percentiles(fit, resampled_votes(fit, 50, np.random.default_rng(0)))
    assert np.isinf(low).tolist() == np.isinf(high).tolist() == [True, False, False]


def test_ranks_by_hand() -> None:
    low, high = np.array([90.0, 70, 60, 10, -np.inf]), np.array([110.0, 95, 80, 20, np.inf])
    best, worst = ranks(low, high)
    assert best.tolist() == [1, 1, 2, 4, 1]
    assert worst.tolist() == [3, 4, 4, 5, 5]
