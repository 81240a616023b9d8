"""Bradley-Terry ratings against choix, closed forms and algebra; what votes leave free is said."""

import math

import choix
import numpy as np
import pytest

from evaluation.arena.ratings import MEAN, POINTS, maximise, pair_weights, rate, reachable
from evaluation.arena.votes import wins_of


def counted(wins: list[list[int]]) -> np.ndarray:
    """Counts in which the row's entrant was left and won so often."""
    counts = np.zeros((len(wins), len(wins), 4), np.int64)
    counts[..., 0] = wins
    return counts


def test_two_entrants_by_hand() -> None:
    fit = rate(counted([[0, 30], [10, 0]]))
    gap = 400 * math.log10(3)
    assert fit.ratings == pytest.approx([MEAN + gap / 2, MEAN - gap / 2], abs=1e-9)


def test_ties_and_two_bad_pictures_are_half_a_win() -> None:
    counts = counted([[0, 20], [0, 0]])
    counts[0, 1, 2], counts[1, 0, 3] = 12, 8  # 20 wins, 20 of neither: 30 to 10
    assert rate(counts).ratings == pytest.approx(rate(counted([[0, 30], [10, 0]])).ratings, abs=1e-9)


def test_sides_do_not_matter(draws: np.random.Generator) -> None:
    counts = draws.integers(1, 20, size=(5, 5, 4)) * (1 - np.eye(5, dtype=int))[..., None]
    swapped = np.swapaxes(counts, 0, 1)[..., [1, 0, 2, 3]]
    assert rate(swapped).ratings == pytest.approx(rate(counts).ratings, abs=1e-9)


@pytest.mark.parametrize("scale", [0.3, 2.0])
def test_ratings_are_those_of_choix(scale: float, draws: np.random.Generator) -> None:
    truth = draws.normal(size=12) * scale
    one, other = (pairs := draws.integers(12, size=(4000, 2)))[pairs[:, 0] != pairs[:, 1]].T
    won = draws.random(len(one)) < 1 / (1 + np.exp(truth[other] - truth[one]))
    counts = np.zeros((12, 12, 4), np.int64)
    np.add.at(counts, (one, other, np.where(won, 0, 1)), 1)
    winners, losers = np.where(won, one, other), np.where(won, other, one)
    data = list(zip(winners.tolist(), losers.tolist(), strict=True))
    assert rate(counts).ghost == 0
    for theirs in (
        choix.ilsr_pairwise(12, data, alpha=0, tol=1e-10, max_iter=1000),
        choix.opt_pairwise(12, data, alpha=0, method="BFGS", tol=1e-10),
    ):
        assert rate(counts).ratings == pytest.approx(MEAN + POINTS * (theirs - theirs.mean()), abs=1e-3)


def test_wins_are_what_the_fit_expects(draws: np.random.Generator) -> None:
    """The likelihood's equations: each entrant's expected wins are its wins."""
    counts = draws.integers(0, 9, size=(50, 6, 6, 4)) * (1 - np.eye(6, dtype=int))[..., None]
    fit, wins = rate(counts), wins_of(counts)
    expected = ((wins + np.swapaxes(wins, -1, -2)) * fit.chances).sum(-1)
    assert expected == pytest.approx(wins.sum(-1), rel=1e-9)


def test_a_batch_is_each_of_its_tables(draws: np.random.Generator) -> None:
    counts = draws.binomial(1, 0.15, size=(40, 4, 4, 4)) * (1 - np.eye(4, dtype=int))[..., None]
    together = rate(counts)
    assert 0 < (together.ghost > 0).sum() < 40  # some of these tables are not strongly connected
    for k in range(40):
        assert rate(counts[k]).ratings == pytest.approx(together.ratings[k], abs=1e-6)
        assert np.array_equal(rate(counts[k]).free_above, together.free_above[k])


def test_a_bad_start_ends_at_the_same_place(draws: np.random.Generator) -> None:
    """Full Newton steps from here would diverge."""
    wins = wins_of(draws.integers(1, 9, size=(5, 5, 4)) * (1 - np.eye(5, dtype=int))[..., None])
    far = maximise(wins, np.zeros(()), np.array([40.0, -40, 10, 0, -10]), steps=200)
    near = maximise(wins, np.zeros(()))
    assert far - far.mean() == pytest.approx(near - near.mean(), abs=1e-8)


def test_one_that_won_all_is_free_above_only() -> None:
    fit = rate(counted([[0, 9, 8], [0, 0, 5], [0, 6, 0]]))
    assert fit.ghost == 1
    assert fit.reference.tolist() == [False, True, True]
    assert fit.free_above.tolist() == [True, False, False]
    assert not fit.free_below.any()
    assert fit.ratings[0] > 1200
    assert fit.ratings[1:].mean() == pytest.approx(MEAN)


def test_those_who_never_met_are_free_on_both_sides() -> None:
    fit = rate(counted([[0, 30, 0, 0], [20, 0, 0, 0], [0, 0, 0, 4], [0, 0, 3, 0]]))
    assert fit.reference.tolist() == [True, True, False, False]
    assert fit.free_below.tolist() == fit.free_above.tolist() == [False, False, True, True]


def test_a_chain_without_a_loss_in_return() -> None:
    """A over B over C: A is above the mean for sure, C below it, B anywhere."""
    fit = rate(counted([[0, 5, 0], [0, 0, 5], [0, 0, 0]]))
    assert fit.free_above.tolist() == [True, True, False]
    assert fit.free_below.tolist() == [False, True, True]
    assert fit.ratings[0] > fit.ratings[1] > fit.ratings[2]


def test_without_votes_everything_is_free() -> None:
    fit = rate(np.zeros((3, 3, 4), np.int64))
    assert fit.ratings == pytest.approx(MEAN)
    assert fit.free_below.all()
    assert fit.free_above.all()


def test_reach_is_the_closure_of_wins() -> None:
    chain = np.diag(np.ones(9), 1)  # 0 beat 1 beat 2 ... beat 9
    assert np.array_equal(reachable(chain), np.triu(np.ones((10, 10), bool)))


def test_weights_make_pairs_alike_above_the_floor() -> None:
    counts = counted([[0, 600, 150], [300, 0, 10], [150, 10, 0]])
    weights = pair_weights(counts, 50)
    votes = counts.sum(-1) + counts.sum(-1).T
    total = weights * votes
    assert total[0, 1] == pytest.approx(total[0, 2])
    assert total[1, 2] == pytest.approx(total[0, 1] * 20 / 50)  # 20 votes, less than the floor
    assert total.sum() == pytest.approx(votes.sum())
    assert (pair_weights(counts, None) == 1).all()


def test_reweighting_undoes_which_pairs_were_chosen() -> None:
    """Rock, paper, scissors has no true ratings; the even ones are those of evenly met pairs."""
    counts = counted([[0, 800, 10], [200, 0, 80], [40, 20, 0]])
    plain, even = rate(counts).ratings, rate(counts, 1).ratings
    assert abs(plain - MEAN).max() > 40
    assert even == pytest.approx(MEAN, abs=1e-6)
