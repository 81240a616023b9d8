"""Which two pictures a voter sees next: a pair of entrants, a scene, and sides.

A scene is a prompt and a number for which both entrants have a picture; a voter sees each scene of a pair
once. Entrants are drawn by probabilities that are given (see `evaluation.arena.pairing`), kept to the pairs
of which this voter has not seen all and scaled to sum to 1 again, so the propensity that is stored is the
probability with which this voter was shown this pair. Pictures of a prompt that a voter typed come first.
Use: `matches = Matches(entrants, prompts, pictures)`; `match = matches.choose(voter, rng)`.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.arena.store import PictureRow, PromptRow


@dataclass(frozen=True)
class Match:
    """Two pictures as they are to be shown, and the probability of this pair of entrants."""

    left: PictureRow
    right: PictureRow
    propensity: float


class Matches:
    """What can be shown to whom.

    Args:
        entrants: all names.
        prompts: all of them; those that a voter typed are left out.
        pictures: all of them.
    """

    def __init__(
        self, entrants: Sequence[str], prompts: Iterable[PromptRow], pictures: Iterable[PictureRow]
    ) -> None:
        self.entrants = tuple(entrants)
        self.pairs = list(zip(*np.triu_indices(len(entrants), 1), strict=True))
        self.probabilities = np.full(len(self.pairs), 1.0 / max(len(self.pairs), 1))
        common = {prompt.id for prompt in prompts if not prompt.voter}
        scenes: dict[tuple[str, int], dict[str, PictureRow]] = defaultdict(dict)
        for picture in pictures:
            if picture.prompt in common:
                scenes[picture.prompt, picture.number][picture.entrant] = picture
        self.scenes: list[list[tuple[PictureRow, PictureRow]]] = [
            [
                (scene[self.entrants[a]], scene[self.entrants[b]])
                for scene in scenes.values()
                if self.entrants[a] in scene and self.entrants[b] in scene
            ]
            for a, b in self.pairs
        ]
        self._counts = np.array([len(each) for each in self.scenes], np.int64)
        self._places = {
            frozenset((one.id, other.id)): (k, place)
            for k, each in enumerate(self.scenes)
            for place, (one, other) in enumerate(each)
        }
        self._seen: dict[str, dict[int, set[int]]] = {}
        self._typed: dict[str, deque[Match]] = {}

    @property
    def total(self) -> int:
        """How many votes one voter can give, typed prompts aside."""
        return int(self._counts.sum())

    def set_probabilities(self, probabilities: np.ndarray) -> None:
        """Takes the probability of each pair of entrants, float64 `[n n]`, read above the diagonal."""
        self.probabilities = np.array([probabilities[a, b] for a, b in self.pairs])

    def add_typed(self, voter: str, match: Match) -> None:
        """Lets `voter` see `match` before all others."""
        self._typed.setdefault(voter, deque()).append(match)

    def record(self, voter: str, one: str, other: str) -> None:
        """Notes that a voter has voted on the pictures with these ids."""
        place = self._places.get(frozenset((one, other)))
        if place is not None:
            self._seen.setdefault(voter, {}).setdefault(place[0], set()).add(place[1])

    def seen(self, voter: str) -> int:
        """How many scenes a voter has voted on, typed prompts aside."""
        return sum(len(places) for places in self._seen.get(voter, {}).values())

    def choose(self, voter: str, rng: np.random.Generator) -> Match | None:
        """Returns what `voter` is shown next, None where there is nothing more."""
        if self._typed.get(voter):
            return _on_sides(self._typed[voter].popleft(), rng)
        seen = self._seen.get(voter, {})
        left = self._counts.copy()
        for k, places in seen.items():
            left[k] -= len(places)
        weights = np.where(left > 0, self.probabilities, 0.0)
        if not weights.sum() > 0:
            return None
        k = int(rng.choice(len(weights), p=weights / weights.sum()))
        free = np.setdiff1d(np.arange(self._counts[k]), list(seen.get(k, ())), assume_unique=True)
        one, other = self.scenes[k][int(rng.choice(free))]
        return _on_sides(Match(one, other, min(1.0, float(weights[k] / weights.sum()))), rng)

    def choose_entrants(
        self, among: Sequence[str], rng: np.random.Generator
    ) -> tuple[tuple[str, str], float]:
        """Returns two entrants of `among` that a typed prompt is made by, and their probability."""
        inside = [self.entrants[a] in among and self.entrants[b] in among for a, b in self.pairs]
        weights = np.where(inside, self.probabilities, 0.0)
        k = int(rng.choice(len(weights), p=weights / weights.sum()))
        a, b = self.pairs[k]
        return (self.entrants[a], self.entrants[b]), min(1.0, float(weights[k] / weights.sum()))


def _on_sides(match: Match, rng: np.random.Generator) -> Match:
    """The match with its sides drawn, each with probability one half."""
    return match if rng.random() < 0.5 else Match(match.right, match.left, match.propensity)
