"""Cards side by side: each figure with its interval, and how far the others are from the first card's.

Only like is compared: `evaluation.card.NEEDS` says what must be the same, and `refuse_unlike` names what is
not. Intervals come from the features and scores beside the cards: distances from halves of the pictures,
averages from pictures or prompts drawn again. Two cards were asked the same prompts, so that a difference is
taken prompt by prompt. The same cards give the same text.

    rows = compare([read(path) for path in paths], ["distance", "adherence"])
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.index import DataError
from evaluation.card import NEEDS, SETTINGS, Card, kind_of, read_card, read_features, unlike
from evaluation.metrics import (
    Interval,
    bootstrap,
    density_coverage,
    frechet_distance,
    half_samples,
    mmd,
    polynomial_mmd,
    precision_recall,
)
from models.registry import ConfigError

#: Distance -> its formula, (made, real) -> number.
DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "fd": frechet_distance,
    "kid": polynomial_mmd,
    "mmd": mmd,
    "precision": lambda made, real: precision_recall(made, real)[0],
    "recall": lambda made, real: precision_recall(made, real)[1],
    "density": lambda made, real: density_coverage(made, real)[0],
    "coverage": lambda made, real: density_coverage(made, real)[1],
}
#: Figures that stand beside others and are not compared themselves.
_BESIDE = ("_floor", "_se", "_real")
#: How far a figure may be from what the features give on another machine, as a share.
_SAME = 1e-6


@dataclass(frozen=True)
class Opened:
    """A card that was read and checked, with what it was computed from."""

    path: Path
    card: Card
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class Row:
    """One figure: of each card, with its interval where there is one, and less the first card's."""

    metric: str
    values: tuple[float, ...]
    intervals: tuple[Interval | None, ...]
    differences: tuple[Interval | None, ...]


def read(path: Path) -> Opened:
    """The card at `path` with its features.

    Raises:
        DataError: one of both is missing or was changed, or the card's distance is not that of its features.
    """
    card = read_card(path)
    features = read_features(path, card)
    if "fd" in card.metrics:
        computed = frechet_distance(features["made"], features["reference"])
        if not math.isclose(computed, card.metrics["fd"], rel_tol=_SAME, abs_tol=_SAME):
            raise DataError(f"{path}: says fd {card.metrics['fd']}, but its features give {computed}")
    return Opened(path, card, features)


def refuse_unlike(cards: Sequence[Opened], kinds: Sequence[str], strict: bool = False) -> None:
    """Raises ConfigError, naming the difference, where figures of `kinds` must not be compared."""
    for kind in kinds:
        reason = unlike([each.card for each in cards], kind, strict)
        if reason is not None:
            raise ConfigError(f"these cards are unlike, and their {kind} is not compared: {reason}")


def kinds_of(cards: Sequence[Opened]) -> list[str]:
    """The kinds of figures that all the cards have."""
    return [k for k in NEEDS if all(any(kind_of(m) == k for m in each.card.metrics) for each in cards)]


def compare(cards: Sequence[Opened], kinds: Sequence[str], resamples: int = 100) -> list[Row]:
    """A row for each figure of `kinds` that all cards have; raises ConfigError for unlike cards."""
    refuse_unlike(cards, kinds)
    names = [
        name
        for name in cards[0].card.metrics
        if kind_of(name) in kinds and not name.endswith(_BESIDE)
        if all(name in each.card.metrics for each in cards)
    ]
    return [_row(name, cards, resamples) for name in names]


def _row(name: str, cards: Sequence[Opened], resamples: int) -> Row:
    values = tuple(each.card.metrics[name] for each in cards)
    if name in DISTANCES:
        intervals, differences = _of_distances(DISTANCES[name], cards, resamples)
    else:
        intervals, differences = _of_averages(name, cards, resamples)
    return Row(name, values, tuple(intervals), tuple(differences))


def _of_distances(
    distance: Callable[[Tensor, Tensor], float], cards: Sequence[Opened], resamples: int
) -> tuple[list[Interval | None], list[Interval | None]]:
    """Intervals from halves of the prompts: what they made in each card, and the real pictures of these."""
    real, width = cards[0].features["reference"], cards[0].features["reference"].shape[1]

    def interval(*made: Tensor) -> Interval:
        def statistic(rows: Tensor) -> float:
            first, *others, reference = rows.split(width, 1)
            value = distance(first, reference)
            return distance(others[0], reference) - value if others else value

        return half_samples(statistic, torch.cat([*made, real], 1), resamples=resamples)

    rows = [each.features["made"] for each in cards]
    return [interval(each) for each in rows], [None, *(interval(rows[0], each) for each in rows[1:])]


def _of_averages(
    name: str, cards: Sequence[Opened], resamples: int
) -> tuple[list[Interval | None], list[Interval | None]]:
    """Bootstrap intervals of a mean over pictures or prompts; none for figures of another form."""
    rows = [scores_of(name, each.features) for each in cards]
    if any(each is None for each in rows):
        return [None] * len(cards), [None] * len(cards)
    table = torch.stack([each.double() for each in rows if each is not None], 1)
    table = table[table.isfinite().all(1)]
    if not len(table):
        return [None] * len(cards), [None] * len(cards)
    often = 10 * resamples
    intervals = [bootstrap(_mean, column, resamples=often) for column in table.unbind(1)]
    moved = [
        bootstrap(_mean, column - table[:, 0], resamples=often) for column in table[:, 1:].unbind(1)
    ]  # fmt: skip
    return [*intervals], [None, *moved]


def scores_of(name: str, features: Mapping[str, Tensor]) -> Tensor | None:
    """The scores `[N]` whose mean is figure `name`; None where it is no mean."""
    kind, _, rest = name.partition("_")
    return features.get(f"score_{rest}") if kind == "adherence" else features.get(f"{kind}_{rest}")


def _mean(rows: Tensor) -> float:
    return float(rows.mean())


def as_text(cards: Sequence[Opened], rows: Sequence[Row]) -> str:
    """The comparison as a table of plain text, with the settings in which the cards differ above it."""
    lines = [f"card {k}: {each.path}" for k, each in enumerate(cards, 1)]
    for key in ("checkpoint_sha256", "images_seen", *SETTINGS, "code", "torch", "device"):
        given = [each.card.made.get(key) for each in cards]
        if any(each != given[0] for each in given):
            lines.append(f"  {key}: {' | '.join(str(each)[:48] for each in given)}")
    table = [["", *(f"card {k}" for k in range(1, len(cards) + 1)), *_headings(len(cards))]]
    for row in rows:
        shown = [_shown(value, interval) for value, interval in zip(row.values, row.intervals, strict=True)]
        moved = [
            _shown(value - row.values[0], interval) + _mark(interval)
            for value, interval in zip(row.values[1:], row.differences[1:], strict=True)
        ]
        table.append([row.metric, *shown, *moved])
    widths = [max(len(line[k]) for line in table) for k in range(len(table[0]))]
    lines += [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    return "\n".join([*lines, "[95 % intervals]; * the interval of the difference does not hold 0"])


def _headings(count: int) -> list[str]:
    return [f"card {k} - card 1" for k in range(2, count + 1)]


def _shown(value: float, interval: Interval | None) -> str:
    return f"{value:.4g}" + ("" if interval is None else f" [{interval.low:.4g}, {interval.high:.4g}]")


def _mark(interval: Interval | None) -> str:
    return " *" if interval is not None and not interval.low <= 0 <= interval.high else ""
