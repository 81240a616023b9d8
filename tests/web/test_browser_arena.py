"""The arena in a real browser: votes by mouse and keyboard, nothing that tells a name before the vote.

`pytest -m slow` casts 200 votes. With FIRSTLIGHT_SHOTS=docs and FIRSTLIGHT_ARENA=FOLDER, an arena of real
pictures, it also takes the pictures of the documentation.
"""

import io
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.arena.votes import Outcome
from tests.web.chromium import DESKTOP, PHONE, Seen, chromium, page_of, permutation_test, shoot
from tests.web.serving import Site

KEYS = {
    "left": ("ArrowLeft", "a"),
    "right": ("ArrowRight", "d"),
    "tie": ("ArrowDown", "s"),
    "both_bad": ("ArrowUp", "x"),
}
#: Entrants of the arena that the tests make; the second one's pictures are noise, which can be preferred.
NAMES = ("zebra-finch", "quokka-mole")


class Voter:
    """Votes at one page, and looks for names in all that it is told.

    Args:
        page: of the arena, open.
        seen: what it is told.
        names: of the entrants, which no page may tell before a vote.
        waits: entrant -> milliseconds that its pictures took.
    """

    def __init__(self, page: Any, seen: Seen, names: tuple[str, ...], waits: dict[str, list[float]]) -> None:
        self.page = page
        self.seen = seen
        self.names = names
        self.waits = waits
        self.told: list[tuple[str, bytes, float]] = []
        self.counts: Counter[str] = Counter()

    def leaks(self, told: list[tuple[str, bytes, float]]) -> list[str]:
        """Addresses of what holds a name, in any case."""
        names = [name.lower().encode() for name in self.names]
        return [address for address, data, _ in told if any(name in data.lower() for name in names)]

    def pictures(self) -> list[tuple[bytes, float]]:
        """The two pictures before the voter, left first, with the time each took."""
        self.told += self.seen.take()
        told = {address.split("/", 3)[3]: (data, waited) for address, data, waited in self.told}
        pair = self.page.evaluate("state.pair")
        found = [told[pair[side].removeprefix("/")] for side in ("left", "right")]
        return [(data.split(b"\n\n", 1)[1], waited) for data, waited in found]

    def vote(self, choose: Callable[[list[bytes]], str], by: str) -> None:
        """One vote, and on to the next pair."""
        page = self.page
        page.locator("#answers button:enabled").first.wait_for()
        pair = self.pictures()
        assert self.leaks(self.told) == []
        assert not any(name in page.content().lower() for name in self.names)
        assert len(pair[0][0]) == len(pair[1][0])  # not even the length of a file tells
        outcome = choose([data for data, _ in pair])
        self.told.clear()
        if by == "mouse":
            page.locator(f"#answers [data-outcome={outcome}]").click()
        else:
            page.keyboard.press(random.Random(len(self.counts)).choice(KEYS[outcome]))
        page.locator("#after").wait_for()
        shown = [page.locator(f"#{side}-name").inner_text() for side in ("left", "right")]
        assert sorted(shown) == sorted(set(shown))
        assert set(shown) <= set(self.names)
        for name, (_, waited) in zip(shown, pair, strict=True):
            self.waits.setdefault(name, []).append(waited)
        self.counts[outcome] += 1
        # The answer to the vote tells the names and brings the next pair, whose pictures are loaded now.
        page.evaluate("state.coming && state.coming.images.then(() => null)")
        after = self.seen.take()
        said = [each for each in after if "/api/arena/vote" in each[0]]
        assert len(said) == 1
        self.told = [each for each in after if each not in said]
        if by == "mouse":
            page.locator("#next").click()
        else:
            page.keyboard.press("Enter")
        page.locator("#after").wait_for(state="hidden")


def noisy(pair: list[bytes]) -> str:
    """Prefers the picture with more in it; now and then a tie or neither."""
    spread = [float(np.asarray(Image.open(io.BytesIO(data)).convert("L"), float).std()) for data in pair]
    number = hash_of(pair[0]) % 10
    return (
        "tie" if number == 0 else "both_bad" if number == 1 else "left" if spread[0] > spread[1] else "right"
    )


def hash_of(data: bytes) -> int:
    """A number that two runs agree on."""
    return sum(data[-200:])


def cast(
    folder: Path, serve_arena: Callable[..., Any], names: tuple[str, ...], each: int
) -> dict[str, list[float]]:
    """`each` votes by mouse and by keyboard at both widths; returns how long pictures took by entrant."""
    waits: dict[str, list[float]] = {}
    counts: Counter[str] = Counter()
    with chromium() as browser, serve_arena(folder) as (site, store):
        before = board(browser, site)
        for size, by in ((DESKTOP, "mouse"), (DESKTOP, "keyboard"), (PHONE, "mouse"), (PHONE, "keyboard")):
            address = f"http://127.0.0.1:{site.port}/arena?token={site.access.token}"
            with page_of(browser, size, address) as (page, seen):
                voter = Voter(page, seen, names, waits)
                for number in range(each):
                    voter.vote(noisy, by)
                    if (size, by, number) == (DESKTOP, "mouse", 2):
                        page.locator("#answers button:enabled").first.wait_for()
                        shoot(page, "arena.png")
                counts += voter.counts
        after = board(browser, site, "leaderboard.png")
        votes = store.votes()
    assert len(votes) == 4 * each == sum(counts.values())
    assert Counter(str(vote.outcome.value) for vote in votes) == counts
    assert before != after
    assert f"{4 * each} blind votes by 4 voters" in after
    if names == NAMES:
        assert after.index(NAMES[1]) < after.index(NAMES[0])  # it moved: the preferred one leads
        won = [vote for vote in votes if vote.outcome in (Outcome.LEFT, Outcome.RIGHT)]
        assert all((vote.left if vote.outcome is Outcome.LEFT else vote.right) == NAMES[1] for vote in won)
    return waits


def board(browser: Any, site: Site, shot: str | None = None) -> str:
    """What the leaderboard says, as text."""
    address = f"http://127.0.0.1:{site.port}/leaderboard?token={site.access.token}"
    with page_of(browser, DESKTOP, address) as (page, _):
        page.locator("#ratings tbody tr").first.wait_for()
        if shot:
            shoot(page, shot)
        return str(page.locator("main").inner_text())


def test_a_few_votes_in_a_browser(arena: Path, serve_arena: Callable[..., Any]) -> None:
    cast(arena, serve_arena, NAMES, 5)


@pytest.mark.slow
def test_two_hundred_votes_in_a_browser_and_no_name_before_the_vote(
    fill: Callable[..., Path], serve_arena: Callable[..., Any], tmp_path: Path
) -> None:
    waits = cast(fill(tmp_path / "arena", 60), serve_arena, NAMES, 50)
    p = permutation_test(waits[NAMES[0]], waits[NAMES[1]])
    means = {name: round(float(np.mean(waits[name])), 2) for name in NAMES}
    print(f"200 votes; milliseconds to a picture's first byte: {means}, p = {p:.3f}")
    assert p > 0.001


@pytest.mark.slow
def test_an_arena_of_real_pictures(serve_arena: Callable[..., Any], tmp_path: Path) -> None:
    given = os.environ.get("FIRSTLIGHT_ARENA")
    if given is None:
        pytest.skip("FIRSTLIGHT_ARENA names no arena of real pictures")
    folder = Path(shutil.copytree(given, tmp_path / "arena"))
    from evaluation.arena.store import ArenaStore

    with ArenaStore.open(folder) as store:
        names = tuple(entrant.name for entrant in store.entrants())
    cast(folder, serve_arena, names, 12)


def test_the_search_finds_a_planted_name_and_a_planted_delay() -> None:
    voter = Voter(None, Seen(), NAMES, {})
    assert voter.leaks([("/a", b"x-maker: Zebra-Finch\n\n", 0.0), ("/b", b"nothing", 0.0)]) == ["/a"]
    rng = np.random.default_rng(0)
    ours, theirs = rng.gamma(4, 1, (2, 200))
    assert permutation_test(ours, theirs) > 0.001
    assert permutation_test(ours, theirs + 1.0) < 0.001  # a millisecond more, where four are usual
