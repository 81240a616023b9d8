"""How many votes hold the first place: the fewest whose loss, or whose reversal, puts another on top.

Two votes of 57,477 did so on a public board, which no interval shows (Huang et al. 2025, arXiv 2508.11847).
Votes of one pair and outcome are alike, so what is searched are cells of the table. They are taken in the
order of their influence on the gap between the first and a rival (Broderick, Giordano & Meager 2020, arXiv
2011.14999) and the ratings are fitted again; the fewest that suffice are found by halving. Then all smaller
choices are tried, where those are few, and the number is marked exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, islice
from math import comb

import numpy as np

from evaluation.arena.ratings import Fit, information, maximise, reachable
from evaluation.arena.votes import wins_of

#: All smaller choices are fitted while choices * n^2 stay below: at most half a second.
WORK = 250_000
PORTION = 2000


@dataclass(frozen=True)
class Overturn:
    """`votes` suffice to put `rival` first; `exact`: no fewer do."""

    votes: int
    rival: str
    exact: bool


@dataclass(frozen=True)
class _Cells:
    """Kinds of votes: index, the `available` votes of each, and what one changes in the wins `[K n n]`."""

    available: np.ndarray
    change: np.ndarray


def fewest_dropped(fit: Fit, entrants: tuple[str, ...]) -> Overturn | None:
    """Returns the fewest votes without which another is first; None where no number is found.

    `fit` is of one table, not of a batch.
    """
    wins, ties = _wins_and_ties(fit)
    one, other = np.nonzero(wins)
    first, second = np.nonzero(np.triu(ties))
    change = np.zeros((len(one) + len(first), *wins.shape))
    change[np.arange(len(one)), one, other] = -1.0
    for a, b in ((first, second), (second, first)):
        change[len(one) + np.arange(len(first)), a, b] = -0.5
    return _overturn(fit, entrants, _Cells(np.r_[wins[one, other], ties[first, second]], change))


def fewest_flipped(fit: Fit, entrants: tuple[str, ...]) -> Overturn | None:
    """Returns the fewest wins that, given to the loser, put another first; None where no number is found."""
    wins, _ = _wins_and_ties(fit)
    one, other = np.nonzero(wins)
    change = np.zeros((len(one), *wins.shape))
    change[np.arange(len(one)), one, other] = -1.0
    change[np.arange(len(one)), other, one] = 1.0
    return _overturn(fit, entrants, _Cells(wins[one, other], change))


def _wins_and_ties(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Decided wins of i over j and ties of the pair (symmetric), int64 `[n n]`."""
    counts = fit.counts
    ties = counts[..., 2:].sum(-1)
    return counts[..., 0] + counts[..., 1].T, ties + ties.T


def _overturn(fit: Fit, entrants: tuple[str, ...], cells: _Cells) -> Overturn | None:
    voted = (fit.counts.sum((1, 2)) + fit.counts.sum((0, 2))) > 0
    if voted.sum() < 2:
        return None
    top = int(np.where(voted, fit.strengths, -np.inf).argmax())
    found = _by_influence(fit, cells, top, np.flatnonzero(voted & (np.arange(len(voted)) != top)))
    if found is None:
        return None
    votes, rival = found
    work = 0
    for size in range(1, votes):
        work += comb(len(cells.available) + size - 1, size) * len(voted) ** 2
        if work > WORK:
            return Overturn(votes, entrants[rival], exact=False)
        smaller = _any_choice(fit, cells, top, voted, size)
        if smaller is not None:
            return Overturn(size, entrants[smaller], exact=True)
    return Overturn(votes, entrants[rival], exact=True)


def _by_influence(fit: Fit, cells: _Cells, top: int, rivals: np.ndarray) -> tuple[int, int] | None:
    """The fewest votes, taken by influence, and for which rival they suffice."""
    pairs = fit.weights * (wins_of(fit.counts) + wins_of(fit.counts).T) * fit.chances * (1.0 - fit.chances)
    toward = np.linalg.inv(information(pairs, fit.strengths, fit.ghost))
    toward = toward[rivals] - toward[top]  # [R n]: what one unit of score adds to the rival's lead
    games = cells.change + np.swapaxes(cells.change, -1, -2)
    score = (fit.weights * (cells.change - games * fit.chances)).sum(-1)  # [K n]
    gain = toward @ score.T  # [R K]
    order = np.argsort(-gain, axis=-1, kind="stable")
    available = np.where(np.take_along_axis(gain, order, -1) > 0, cells.available[order], 0)
    before = np.cumsum(available, -1) - available
    low, high = np.zeros(len(rivals), np.int64), available.sum(-1)
    suffices = _leads(fit, cells, order, np.clip(high[:, None] - before, 0, available), top, rivals)
    if not suffices.any():
        return None
    rivals, order, available, before = (
        rivals[suffices],
        order[suffices],
        available[suffices],
        before[suffices],
    )
    low, high = low[suffices], high[suffices]
    while (high - low > 1).any():
        middle = (low + high) // 2
        enough = _leads(fit, cells, order, np.clip(middle[:, None] - before, 0, available), top, rivals)
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    best = int(high.argmin())
    return int(high[best]), int(rivals[best])


def _leads(
    fit: Fit, cells: _Cells, order: np.ndarray, taken: np.ndarray, top: int, rivals: np.ndarray
) -> np.ndarray:
    """Whether each rival leads when `taken` `[R K]` votes of the cells in its `order` are changed."""
    amounts = np.zeros(taken.shape)
    np.put_along_axis(amounts, order, taken, -1)
    strengths = _refit(fit, np.tensordot(amounts, cells.change, 1))
    return strengths[np.arange(len(rivals)), rivals] > strengths[:, top] + 1e-9


def _any_choice(fit: Fit, cells: _Cells, top: int, voted: np.ndarray, size: int) -> int | None:
    """The new first if some `size` votes change it, or None."""
    for chosen in _portions(combinations_with_replacement(range(len(cells.available)), size)):
        amounts = np.zeros((len(chosen), len(cells.available)))
        np.add.at(amounts, (np.arange(len(chosen))[:, None], chosen), 1.0)
        amounts = amounts[(amounts <= cells.available).all(-1)]
        strengths = np.where(voted, _refit(fit, np.tensordot(amounts, cells.change, 1)), -np.inf)
        lead = strengths.max(-1, initial=-np.inf) - strengths[:, top]
        if len(lead) and lead.max() > 1e-9:
            return int(strengths[lead.argmax()].argmax())
    return None


def _portions(choices: Iterator[tuple[int, ...]]) -> Iterator[np.ndarray]:
    while portion := list(islice(choices, PORTION)):
        yield np.array(portion)


def _refit(fit: Fit, change: np.ndarray) -> np.ndarray:
    """Strengths `[B n]` after `change` `[B n n]` of the wins; pairs keep their weights."""
    wins = wins_of(fit.counts) + change
    ghost = (~reachable(wins).all((-1, -2))).astype(float)
    return maximise(fit.weights * wins, ghost, fit.strengths)
