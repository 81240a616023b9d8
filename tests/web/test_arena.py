"""The arena on a real server: blind, once, in order, on the disk, whatever is thrown at it."""

import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaluation.arena.blind import chunks_of
from evaluation.arena.ledger import read_ledger
from evaluation.arena.making import choose_sampling
from evaluation.arena.store import SHOWING_SECONDS, ArenaStore
from models.pipeline import Pipeline
from tests.servers import wait_for
from tests.web.hostile import attack
from tests.web.serving import Answer, Browser, Site
from web.live import Live, Maker

Serve = Callable[..., AbstractContextManager[tuple[Site, ArenaStore]]]
NAMES = (b"zebra-finch", b"quokka-mole")


def next_pair(browser: Browser) -> dict[str, Any]:
    pair = browser.get("/api/arena/next").json()["pair"]
    assert isinstance(pair, dict)
    return pair


def cast(browser: Browser, pair: dict[str, Any], outcome: str = "left") -> Answer:
    return browser.post("/api/arena/vote", {"token": pair["token"], "outcome": outcome})


def test_a_vote_shows_the_names_and_is_kept(arena: Path, serve_arena: Serve) -> None:
    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        answer = cast(browser, pair, "right")
        shown = answer.json()["shown"]
        assert {shown["left"], shown["right"]} == {name.decode() for name in NAMES}
        assert answer.json()["progress"] == {"voted": 1, "of": 40, "votes": 1}
        (vote,) = store.votes()
        assert (vote.left, vote.right, vote.outcome.value) == (shown["left"], shown["right"], "right")
        assert vote.propensity == 1.0
        assert vote.showing == 0
        assert answer.json()["pair"]["token"] != pair["token"]


def test_all_pairs_are_shown_once_sides_vary_and_then_there_is_nothing(
    arena: Path, serve_arena: Serve
) -> None:
    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        while pair is not None:
            pair = cast(browser, pair, "tie").json()["pair"]
        votes = store.votes()
        assert sorted({vote.prompt for vote in votes}) == sorted(f"p{k}" for k in range(40))
        assert [vote.showing for vote in votes] == list(range(40))
        assert 5 < Counter(vote.left for vote in votes)["zebra-finch"] < 35
        assert browser.get("/api/arena/next").json()["pair"] is None
        assert next_pair(site.browser())


def test_nothing_tells_the_names_before_the_vote(arena: Path, serve_arena: Serve) -> None:
    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        for picture in (arena / "pictures").iterdir():
            picture.unlink()  # both are in memory by now: neither waits for the disk
        pictures = [browser.get(pair[side]) for side in ("left", "right")]
        browser.get("/arena")
        browser.get("/arena.js")
        ids = [picture.id for picture in store.pictures()]
        for answer in browser.seen:
            assert answer.status in (200, 303)
            assert not any(word in answer.everything for word in (*NAMES, *(i.encode() for i in ids)))
        assert pictures[0].headers == pictures[1].headers
        assert len(pictures[0].body) == len(pictures[1].body)
        for answer in pictures:
            assert chunks_of(answer.body) == [b"IHDR", b"IDAT", b"paDt", b"IEND"]
            with Image.open(io.BytesIO(answer.body)) as image:
                assert (image.size, image.info) == ((16, 16), {})
        assert len(pair["left"]) == len(pair["right"])
        assert set(pair) == {"token", "prompt", "left", "right", "width", "height"}


def test_the_pair_stays_until_it_is_voted_on_also_over_a_restart(arena: Path, serve_arena: Serve) -> None:
    with serve_arena(arena) as (site, _):
        browser = site.browser()
        pair = next_pair(browser)
        assert next_pair(browser) == pair
        cookie = browser.cookie.partition("=")[2]
    with serve_arena(arena) as (site, store):
        browser = Browser(site.port, f"firstlight-{site.port}={cookie}")
        assert next_pair(browser) == pair
        assert browser.get(pair["right"]).status == 200
        assert cast(browser, pair).status == 200
        assert cast(browser, pair).status == 409
        assert len(store.votes()) == 1


def test_a_pair_is_before_one_voter_alone(arena: Path, serve_arena: Serve) -> None:
    with serve_arena(arena) as (site, store):
        one, other = site.browser(), site.browser()
        pair = next_pair(one)
        assert other.get(pair["left"]).status == 404
        assert cast(other, pair).status == 403
        assert one.get(pair["left"]).status == 200
        assert cast(one, pair).status == 200
        assert one.get(pair["left"]).status == 404
        assert len(store.votes()) == 1


def test_a_showing_grows_old(arena: Path, serve_arena: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        monkeypatch.setattr("web.voting.SHOWING_SECONDS", -1.0)
        assert cast(browser, pair).status == 410
        monkeypatch.setattr("web.voting.SHOWING_SECONDS", SHOWING_SECONDS)
        assert store.votes() == []


def test_fifty_posts_of_one_vote_count_once(arena: Path, serve_arena: Serve) -> None:
    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        gate = threading.Barrier(50)
        statuses: list[int] = []

        def post() -> None:
            gate.wait()
            statuses.append(cast(Browser(site.port, browser.cookie), pair).status)

        threads = [threading.Thread(target=post) for _ in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Counter(statuses) == {200: 1, 409: 49}
        assert len(store.votes()) == 1
        assert len(read_ledger(arena / "votes.jsonl")) == 1


def test_a_disk_that_fails_is_said_and_the_vote_can_be_given_again(
    arena: Path, serve_arena: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: ArenaStore, entries: object) -> list[bool]:
        raise OSError(28, "No space left on device")

    with serve_arena(arena) as (site, store):
        browser = site.browser()
        pair = next_pair(browser)
        with monkeypatch.context() as patch:
            patch.setattr(ArenaStore, "commit", full)
            answer = cast(browser, pair)
            assert answer.status == 500
            assert b"space" not in answer.everything
        assert store.votes() == []
        assert cast(browser, pair).status == 200


def test_the_board_follows_the_votes(
    arena: Path, serve_arena: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.voting.BOARD_SECONDS", 0.0)
    with serve_arena(arena) as (site, _):
        browser = site.browser()
        assert browser.get("/api/arena/board").json()["votes"] == 0
        pair: Any = next_pair(browser)
        for _ in range(30):
            with Image.open(io.BytesIO(browser.get(pair["left"]).body)) as image:
                flat = len(image.getcolors(256) or []) == 1
            pair = cast(browser, pair, "left" if flat else "right").json()["pair"]
        board = browser.get("/api/arena/board").json()
        assert [row["entrant"] for row in board["rows"]] == ["zebra-finch", "quokka-mole"]
        assert board["rows"][0]["tally"]["wins"] == 30
        assert {"even", "odd"} == set(board["categories"])
        visitor = browser.cookie.partition("=")[2].partition(".")[0]
        assert visitor.encode() not in browser.seen[-1].body


def hostile(folder: Path, serve_arena: Serve, count: int) -> None:
    with serve_arena(folder) as (site, store):
        slow = [socket.create_connection(("127.0.0.1", site.port), timeout=10) for _ in range(10)]
        try:
            for raw in slow:
                raw.sendall(b"GET /arena HTTP/1.1\r\nHost: ")
            secrets = (*NAMES, *(picture.id.encode() for picture in store.pictures()), b"pictures/")
            began = time.monotonic()
            record = attack(site, count, seed=1, secrets=secrets)
            seconds = time.monotonic() - began
        finally:
            for raw in slow:
                raw.close()
        total = sum(record.statuses.values())
        print(f"{total:,} requests in {seconds:.1f} s, {len(record.accepted):,} honest votes")
        print(sorted(record.statuses.items()))
        assert total >= 0.95 * count
        assert len(record.statuses) >= 15
        assert record.leaks == []
        assert not [status for (_, status) in record.statuses if status >= 500]
        assert set(record.accepted.values()) == {1}
        kept = [row["token"] for row in store.rows()]
        assert sorted(kept) == sorted(token.partition(".")[0] for token in record.accepted)
        assert site.browser().get("/arena").status == 200


def test_hundreds_of_hostile_requests_change_nothing(arena: Path, serve_arena: Serve) -> None:
    hostile(arena, serve_arena, 600)


@pytest.mark.slow
def test_ten_thousand_hostile_requests_change_nothing(arena: Path, serve_arena: Serve) -> None:
    hostile(arena, serve_arena, 10_000)


def test_a_typed_prompt_is_made_by_two_and_shown_to_its_voter(
    arena: Path,
    serve_arena: Serve,
    make_run: Callable[..., Path],
    tiny_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    pipeline = Pipeline.from_checkpoint(make_run(tmp_path / "run", tiny_config), "cpu")
    assert pipeline.defaults is not None
    makers = {
        name.decode(): Maker(pipeline, choose_sampling(pipeline.defaults, {"num_steps": str(steps)}))
        for name, steps in zip(NAMES, (1, 2), strict=True)
    }
    text = '<img src=x onerror="alert(1)">'
    live = Live(makers, (16, 16))
    with serve_arena(arena, live) as (site, store):
        browser, other = site.browser(), site.browser()
        pair = next_pair(browser)
        for bad in ("", "  ", None, 7, "x" * 501, ["x"]):
            assert browser.post("/api/arena/prompt", {"text": bad}).status == 400
        assert browser.post("/api/arena/prompt", {"text": f" {text}\n"}).status == 202
        wait_for(lambda: not browser.get("/api/arena/next").json()["painting"])
        typed = cast(browser, pair).json()["pair"]
        assert typed["prompt"] == text
        assert browser.get(typed["left"]).status == browser.get(typed["right"]).status == 200
        assert cast(browser, typed).status == 200
        vote = store.votes()[-1]
        assert (vote.category, vote.propensity) == ("typed", 1.0)
        assert other.get("/api/arena/next").json()["progress"]["of"] == 40
    live.close()
    with ArenaStore.open(arena) as store:
        assert [prompt.text for prompt in store.prompts() if prompt.voter] == [text]


def test_typed_prompts_wait_in_a_short_line(
    arena: Path,
    serve_arena: Serve,
    make_run: Callable[..., Path],
    tiny_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    pipeline = Pipeline.from_checkpoint(make_run(tmp_path / "run", tiny_config), "cpu")
    assert pipeline.defaults is not None
    live = Live({name.decode(): Maker(pipeline, pipeline.defaults) for name in NAMES}, (16, 16))
    held = threading.Event()
    live._thread.submit(held.wait)
    with serve_arena(arena, live) as (site, _):
        browser = site.browser()
        assert [browser.post("/api/arena/prompt", {"text": "x"}).status for _ in range(5)] == [202] * 3 + [
            429
        ] * 2
        many = [site.browser() for _ in range(6)]
        statuses = Counter(b.post("/api/arena/prompt", {"text": "x"}).status for b in many for _ in range(3))
        assert statuses == {202: 13, 429: 5}
        held.set()
        wait_for(lambda: not browser.get("/api/arena/next").json()["painting"])
    live.close()


def test_what_cannot_be_painted_is_said(
    arena: Path,
    serve_arena: Serve,
    make_run: Callable[..., Path],
    tiny_config: dict[str, Any],
    tmp_path: Path,
) -> None:
    pipeline = Pipeline.from_checkpoint(make_run(tmp_path / "run", tiny_config), "cpu")
    assert pipeline.defaults is not None
    live = Live({name.decode(): Maker(pipeline, pipeline.defaults) for name in NAMES}, (17, 17))
    with serve_arena(arena, live) as (site, _):
        browser = site.browser()
        browser.post("/api/arena/prompt", {"text": "x"})
        said: list[str] = []

        def answered() -> bool:
            state = browser.get("/api/arena/next").json()
            said.append(str(state["failed"]))
            return not state["painting"]

        wait_for(answered)
        assert "could not be painted" in " ".join(said)
    live.close()
