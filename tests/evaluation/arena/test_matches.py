"""What is shown to whom: every scene once, sides even, probabilities kept to what is left."""

from collections import Counter

import numpy as np
import pytest

from evaluation.arena.matches import Match, Matches
from evaluation.arena.store import PictureRow, PromptRow

ENTRANTS = ("a", "b", "c")


def pictures(prompts: int, entrants: str = "abc", start: int = 0) -> list[PictureRow]:
    return [PictureRow(f"{name}{p}", name, f"p{p}", 0) for p in range(start, prompts) for name in entrants]


@pytest.fixture
def matches() -> Matches:
    return Matches(ENTRANTS, [PromptRow(f"p{k}", "x") for k in range(4)], pictures(4))


def test_a_voter_sees_every_scene_of_every_pair_once(matches: Matches) -> None:
    rng = np.random.default_rng(0)
    shown = []
    while (match := matches.choose("v", rng)) is not None:
        shown.append(frozenset((match.left.id, match.right.id)))
        assert match.left.prompt == match.right.prompt
        matches.record("v", match.right.id, match.left.id)
    assert len(shown) == len(set(shown)) == matches.total == matches.seen("v") == 12
    assert matches.choose("w", rng) is not None


def test_entrants_follow_the_probabilities_and_sides_are_even(matches: Matches) -> None:
    rng = np.random.default_rng(1)
    wanted = np.array([[0, 0.7, 0.2], [0, 0, 0.1], [0, 0, 0]])
    matches.set_probabilities(wanted)
    drawn = [matches.choose("v", rng) for _ in range(4_000)]
    counts = Counter((m.left.entrant, m.right.entrant) for m in drawn if m is not None)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        one, other = counts[ENTRANTS[a], ENTRANTS[b]], counts[ENTRANTS[b], ENTRANTS[a]]
        assert (one + other) / 4_000 == pytest.approx(wanted[a, b], abs=0.03)
        assert one / (one + other) == pytest.approx(0.5, abs=0.1)
    stored = {m.propensity for m in drawn if m and {m.left.entrant, m.right.entrant} == {"a", "b"}}
    assert list(stored) == [pytest.approx(0.7)]


def test_a_pair_that_is_used_up_leaves_its_probability_to_the_others() -> None:
    matches = Matches(
        ENTRANTS, [PromptRow(f"p{k}", "x") for k in range(2)], pictures(1) + pictures(2, "bc", 1)
    )
    matches.set_probabilities(np.array([[0, 0.5, 0.3], [0, 0, 0.2], [0, 0, 0]]))
    matches.record("v", "a0", "b0")
    rng = np.random.default_rng(2)
    drawn = [matches.choose("v", rng) for _ in range(300)]
    found = {(frozenset((m.left.entrant, m.right.entrant)), round(m.propensity, 9)) for m in drawn if m}
    assert found == {(frozenset("ac"), 0.6), (frozenset("bc"), 0.4)}


def test_a_typed_prompt_comes_first_and_to_its_voter_alone(matches: Matches) -> None:
    rng = np.random.default_rng(3)
    one, other = PictureRow("x", "a", "t", 0), PictureRow("y", "b", "t", 0)
    matches.add_typed("v", Match(one, other, 0.25))
    assert matches.choose("w", rng) is not None
    first = matches.choose("v", rng)
    assert first is not None
    assert {first.left, first.right} == {one, other}
    assert first.propensity == 0.25
    second = matches.choose("v", rng)
    assert second is not None
    assert second.left.prompt != "t"


def test_typed_prompts_are_no_scenes_for_others() -> None:
    prompts = [PromptRow("p0", "x", voter="v"), PromptRow("p1", "x")]
    assert Matches(ENTRANTS, prompts, pictures(2)).total == 3
    assert Matches(ENTRANTS, prompts[:1], pictures(1)).choose("v", np.random.default_rng(0)) is None


def test_typed_prompts_are_made_by_two_of_those_that_can(matches: Matches) -> None:
    matches.set_probabilities(np.array([[0, 0.5, 0.3], [0, 0, 0.2], [0, 0, 0]]))
    rng = np.random.default_rng(4)
    assert matches.choose_entrants(("c", "a"), rng) == (("a", "c"), 1.0)
    found = {matches.choose_entrants(ENTRANTS, rng) for _ in range(100)}
    assert found == {(("a", "b"), 0.5), (("a", "c"), 0.3), (("b", "c"), 0.2)}
