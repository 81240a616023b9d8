"""Active pairing: fair where nothing is known, fewer votes where something is, and never blind to a pair."""

from collections.abc import Callable

import numpy as np
import pytest

from evaluation.arena.intervals import covariance
from evaluation.arena.pairing import pair_probabilities
from evaluation.arena.ratings import rate

Simulate = Callable[[np.ndarray, np.ndarray, float], np.ndarray]
ALL = np.ones(4, bool)


def test_without_votes_all_pairs_are_alike() -> None:
    shares = pair_probabilities(np.zeros((4, 4, 4), np.int64), ALL)
    assert shares[np.triu_indices(4, 1)] == pytest.approx(1 / 6)
    assert not np.tril(shares).any()


def test_every_pair_keeps_a_share_and_they_sum_to_one(draws: np.random.Generator) -> None:
    counts = draws.integers(0, 300, size=(20, 4, 4, 4)) * (1 - np.eye(4, dtype=int))[..., None]
    shares = pair_probabilities(counts, ALL, exploration=0.3)
    assert shares.sum((-1, -2)) == pytest.approx(1)
    assert shares[..., *np.triu_indices(4, 1)].min() >= 0.3 / 6 - 1e-12


def test_it_asks_for_the_pair_that_is_not_settled(simulate: Simulate) -> None:
    """0 and 1 are equal, 2 and 3 are far off: votes go to 0 against 1."""
    showings = np.full((4, 4), 60) * (1 - np.eye(4, dtype=int))
    shares = pair_probabilities(simulate(np.array([2.0, 2.1, 0.0, -2.0]), showings, 0.0), ALL)
    assert np.unravel_index(shares.argmax(), shares.shape) == (0, 1)
    assert shares[0, 1] > 0.5


def test_a_newcomer_is_asked_about() -> None:
    counts = np.full((4, 4, 4), 40) * (1 - np.eye(4, dtype=int))[..., None]
    counts[3], counts[:, 3] = 0, 0
    shares = pair_probabilities(counts, ALL)
    assert shares[:, 3].sum() > 0.8


def test_only_those_that_can_be_shown_are() -> None:
    shares = pair_probabilities(np.zeros((3, 3, 4), np.int64), np.array([True, False, True]))
    assert shares[0, 2] == pytest.approx(1.0)
    assert shares.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("allowed", "exploration", "error"),
    [([True, False], 0.2, "a pair needs two"), ([True, True], 0.0, "exploration")],
)
def test_what_cannot_be_chosen_is_refused(allowed: list[bool], exploration: float, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        pair_probabilities(np.zeros((2, 2, 4), np.int64), np.array(allowed), exploration)


def votes_to_separate(
    truth: np.ndarray, active: bool, simulate: Simulate, draws: np.random.Generator
) -> np.ndarray:
    """Votes `[60 runs]` until each entrant's difference to the next has an interval above 0."""
    n, runs, step = len(truth), 60, 50
    counts, needed = np.zeros((runs, n, n, 4), np.int64), np.zeros(runs, np.int64)
    even = np.triu(np.ones((n, n)), 1) / (n * (n - 1) / 2)
    while not needed.all():
        shares = (
            pair_probabilities(counts, np.ones(n, bool)) if active else np.broadcast_to(even, (runs, n, n))
        )
        counts += simulate(truth, draws.multinomial(step, shares.reshape(runs, -1)).reshape(runs, n, n), 0.15)
        fit = rate(counts)
        spread = covariance(fit)
        gap = np.diff(fit.strengths)
        upper, lower = np.arange(1, n), np.arange(n - 1)
        variance = spread[:, upper, upper] + spread[:, lower, lower] - 2 * spread[:, upper, lower]
        apart = (gap > 1.96 * np.sqrt(variance)).all(-1) & (fit.ghost == 0)
        needed = np.where((needed == 0) & apart, counts.sum((1, 2, 3)), needed)
    return needed


@pytest.mark.parametrize("truth", [np.arange(6) * 0.4, np.array([0, 1, 1.3, 2, 2.8, 3, 3.4, 4])])
def test_it_separates_entrants_with_fewer_votes(
    truth: np.ndarray, simulate: Simulate, draws: np.random.Generator
) -> None:
    active = votes_to_separate(truth, True, simulate, draws).mean()
    assert active < 0.65 * votes_to_separate(truth, False, simulate, draws).mean()
