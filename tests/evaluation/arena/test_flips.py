"""The fewest votes that change the first place, against trying everything."""

from itertools import product

import numpy as np
import pytest

from evaluation.arena.flips import fewest_dropped, fewest_flipped
from evaluation.arena.ratings import rate

NAMES = ("a", "b", "c")


def counted(wins: list[list[int]]) -> np.ndarray:
    counts = np.zeros((len(wins), len(wins), 4), np.int64)
    counts[..., 0] = wins
    return counts


def test_two_entrants_by_hand() -> None:
    fit = rate(counted([[0, 12], [7, 0]]))
    dropped, flipped = fewest_dropped(fit, ("a", "b")), fewest_flipped(fit, ("a", "b"))
    assert dropped is not None
    assert flipped is not None
    assert (dropped.votes, dropped.rival, dropped.exact) == (6, "b", True)  # 6 to 7
    assert (flipped.votes, flipped.rival, flipped.exact) == (3, "b", True)  # 9 to 10


#: Boards on which votes taken by influence are one more than needed; trying all choices finds the fewest.
HARD = [[[0, 3, 0], [1, 0, 4], [4, 5, 0]], [[0, 1, 3], [5, 0, 2], [1, 2, 0]]]
EASY = [
    [[0, 4, 3], [3, 0, 2], [1, 3, 0]],
    [[0, 2, 4], [4, 0, 2], [2, 3, 0]],
    [[0, 1, 1], [4, 0, 3], [2, 4, 0]],
]


@pytest.mark.parametrize("table", [*HARD, *EASY])
def test_it_is_what_trying_everything_finds(table: list[list[int]]) -> None:
    wins = np.array(table)
    fit = rate(counted(table))
    top = fit.strengths.argmax()
    assert np.sort(fit.strengths)[-2] < fit.strengths[top] - 1e-6
    cells = [(i, j) for i in range(3) for j in range(3) if i != j]
    choices = np.array(list(product(*(range(wins[cell] + 1) for cell in cells))))
    for flipping, found in ((False, fewest_dropped(fit, NAMES)), (True, fewest_flipped(fit, NAMES))):
        changed = np.broadcast_to(wins, (len(choices), 3, 3)).copy()
        for k, (i, j) in enumerate(cells):
            changed[:, i, j] -= choices[:, k]
            changed[:, j, i] += choices[:, k] * flipping
        counts = np.zeros((*changed.shape, 4), np.int64)
        counts[..., 0] = changed
        strengths = rate(counts).strengths
        over = strengths.max(-1) > strengths[:, top] + 1e-9
        assert found is not None
        assert found.exact
        assert found.votes == choices.sum(-1)[over].min()


def test_a_tie_can_be_what_holds_the_top() -> None:
    """a is first by a tie against c, whom b beat less often than it tied."""
    counts = counted([[0, 5, 0], [5, 0, 5], [0, 6, 0]])
    counts[0, 2, 2] = 1
    fit = rate(counts)
    found = fewest_dropped(fit, NAMES)
    assert found is not None
    assert found.exact
    assert found.votes == 1


def test_a_large_board_gets_a_number_that_suffices(draws: np.random.Generator) -> None:
    wins = draws.integers(30, 60, size=(10, 10)) * (1 - np.eye(10, dtype=int))
    fit = rate(counted(wins.tolist()))
    names = tuple("abcdefghij")
    found = fewest_flipped(fit, names)
    assert found is not None
    top, rival = fit.strengths.argmax(), names.index(found.rival)
    assert found.votes <= wins[top, rival] + 1
    # Reversing that many of the top's wins over the rival is one way; the search must not need more.
    changed = wins.copy()
    changed[top, rival] -= found.votes
    changed[rival, top] += found.votes
    strengths = rate(counted(changed.tolist())).strengths
    assert strengths[rival] > strengths[top] - 1e-6


def test_nothing_to_overturn() -> None:
    assert fewest_dropped(rate(np.zeros((3, 3, 4), np.int64)), NAMES) is None
    assert fewest_flipped(rate(counted([[0, 0, 0], [0, 0, 0], [0, 0, 0]])), NAMES) is None
