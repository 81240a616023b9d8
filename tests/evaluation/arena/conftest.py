"""Simulated voters, whose true strengths are known."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import expit

Simulate = Callable[[np.ndarray, np.ndarray, float], np.ndarray]


@pytest.fixture
def draws() -> np.random.Generator:
    """A fresh generator with a fixed seed."""
    return np.random.default_rng(7)


@pytest.fixture
def simulate(draws: np.random.Generator) -> Simulate:
    """Counts `[.. n n 4]` for strengths `[n]`, showings `[.. n n]` and a share of ties in even pairs.

    A tie takes as much from either side, so that wins and half the ties are the model's chance exactly.
    """

    def counts(truth: np.ndarray, showings: np.ndarray, ties: float) -> np.ndarray:
        chance = expit(truth[:, None] - truth[None, :])
        tie = ties * 2 * np.minimum(chance, 1 - chance)
        shares = np.stack([chance - tie / 2, 1 - chance - tie / 2, tie * 0.7, tie * 0.3], -1)
        return draws.multinomial(showings, shares)

    return counts


@pytest.fixture
def spread_evenly(draws: np.random.Generator) -> Callable[[int, int, int], np.ndarray]:
    """Showings `[tables n n]` of so many votes each, every ordered pair being equally likely."""

    def showings(tables: int, n: int, votes: int) -> np.ndarray:
        shares = (1 - np.eye(n)).ravel() / (n * (n - 1))
        return draws.multinomial(votes, shares, size=tables).reshape(tables, n, n)

    return showings
