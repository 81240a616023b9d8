"""The voting between requests: which pair is before whom, what has been voted, and what it says by now.

One pair is before a voter until it is voted on: opening the page anew shows it again, so no pair can be
skipped. What is asked for at the same time is committed together, one `fsync` for all of it; a request is
answered when its own entry is on the disk. All but the disk and the statistics happens on the event loop,
one thing at a time.
"""

import asyncio
import hmac
import logging
import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.arena.blind import pad_alike
from evaluation.arena.board import leaderboard
from evaluation.arena.matches import Match, Matches
from evaluation.arena.pairing import pair_probabilities
from evaluation.arena.store import (
    SHOWING_SECONDS,
    ArenaStore,
    Ballot,
    Entry,
    PictureRow,
    PromptRow,
    Showing,
)
from evaluation.arena.votes import OUTCOMES, Outcome, Vote
from web.security import RequestError

log = logging.getLogger(__name__)

#: Bytes of pictures before voters that are kept in memory; others are read again when they are asked for.
MAX_PICTURE_BYTES = 512 << 20
#: Entries that are committed together at most, and pairs before voters that are kept in mind.
MAX_TOGETHER, MAX_OPEN = 256, 20_000
#: The board is not computed more often than once in so many seconds.
BOARD_SECONDS = 2.0


class Committer:
    """Commits what comes in while the disk is busy in one transaction, in the order it came."""

    def __init__(self, store: ArenaStore) -> None:
        self.store = store
        self._waiting: list[tuple[Entry, asyncio.Future[bool]]] = []
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, entry: Entry) -> bool:
        """Returns whether `entry` is kept, once that is on the disk; raises what the store raises."""
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((entry, future))
        if self._task is None:
            self._task = asyncio.create_task(self._drain())
        return await asyncio.shield(future)

    async def _drain(self) -> None:
        while self._waiting:
            some, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
            try:
                kept = await asyncio.to_thread(self.store.commit, [entry for entry, _ in some])
            except Exception as error:
                for _, future in some:
                    future.set_exception(error)
                    future.exception()  # who asked may have gone; the error is in the log by who stayed
                continue
            for (_, future), done in zip(some, kept, strict=True):
                future.set_result(done)
        self._task = None


@dataclass(frozen=True)
class Open:
    """A pair before a voter: what is kept of it, what the page gets to know, and what it must not yet."""

    showing: Showing
    prompt: PromptRow
    left: PictureRow
    right: PictureRow

    def to_dict(self, sign: Callable[[str, str], str], size: tuple[int, int]) -> dict[str, Any]:
        """Returns what the page is told: nothing that depends on the entrants."""
        return {
            "token": f"{self.showing.id}.{sign('vote', self.key)}",
            "prompt": self.prompt.text,
            "left": f"/picture/{sign('left', self.key)}",
            "right": f"/picture/{sign('right', self.key)}",
            "width": size[0],
            "height": size[1],
        }

    @property
    def key(self) -> str:
        """What the token and the addresses of the pictures are signed for."""
        return f"{self.showing.id}|{self.showing.voter}"


class Voting:
    """The state of an arena that is being served.

    Args:
        store: open to write.
        sign: signs a text for one kind of use, as `Access.sign`.
        clock: seconds since 1970, UTC.
    """

    def __init__(
        self, store: ArenaStore, sign: Callable[[str, str], str], clock: Callable[[], float] = time.time
    ) -> None:
        self.store = store
        self.sign = sign
        self.clock = clock
        self.commit = Committer(store)
        self.entrants = tuple(entrant.name for entrant in store.entrants())
        self.prompts = {prompt.id: prompt for prompt in store.prompts()}
        self.pictures = {picture.id: picture for picture in store.pictures()}
        self.matches = Matches(self.entrants, self.prompts.values(), self.pictures.values())
        self.votes = store.votes()
        for row in store.rows():
            self.matches.record(row["voter"], *row["pair"].split("|"))
        self.counts = np.zeros((len(self.entrants), len(self.entrants), len(OUTCOMES)), np.int64)
        for vote in self.votes:
            self._count(vote)
        self._shown = store.shown()
        self._open: OrderedDict[str, Open] = OrderedDict()
        for showing in store.pending(clock()):
            self._open[showing.voter] = self._opened(showing)
        self._images: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._image_bytes = 0
        self._rng = np.random.default_rng(secrets.randbits(128))
        self._weighing: asyncio.Task[None] | None = None
        self._board: tuple[int, float, dict[str, Any]] | None = None
        self._board_lock = asyncio.Lock()

    # --- a pair

    async def next(self, voter: str) -> dict[str, Any] | None:
        """Returns the pair before `voter`, a new one where there is none; None where all has been seen."""
        opened = self._open.get(voter)
        if opened is None or self._is_old(opened.showing):
            match = self.matches.choose(voter, self._rng)
            if match is None:
                self._open.pop(voter, None)
                return None
            opened = await self._show(voter, match)
        await self._load(opened)
        return opened.to_dict(self.sign, (self.store.width, self.store.height))

    async def _show(self, voter: str, match: Match) -> Open:
        number = self._shown.get(voter, 0)
        self._shown[voter] = number + 1
        propensity = None if np.isnan(match.propensity) else match.propensity
        ids = (match.left.id, match.right.id)
        showing = Showing(secrets.token_hex(16), voter, number, *ids, propensity, self.clock())
        opened = self._open[voter] = self._opened(showing)
        self._open.move_to_end(voter)
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        try:
            await self.commit(Entry(showing=showing))
        except BaseException:
            if self._open.get(voter) is opened:
                del self._open[voter]
            raise
        return opened

    def _opened(self, showing: Showing) -> Open:
        left, right = self.pictures[showing.left_picture], self.pictures[showing.right_picture]
        return Open(showing, self.prompts[left.prompt], left, right)

    def _is_old(self, showing: Showing) -> bool:
        return self.clock() - showing.made > SHOWING_SECONDS

    # --- its pictures

    async def image(self, voter: str, name: str) -> bytes:
        """Returns a PNG that is before `voter` now; raises RequestError for any other."""
        if name not in self._images:
            opened = self._open.get(voter)
            if opened is None or name not in (self.sign("left", opened.key), self.sign("right", opened.key)):
                raise RequestError(404, "there is no such picture before you")
            await self._load(opened)
        owner, png = self._images[name]
        if owner != voter:
            raise RequestError(404, "there is no such picture before you")
        return png

    async def _load(self, opened: Open) -> None:
        """Has both pictures of a pair in memory, so that neither comes faster than the other."""
        names = [self.sign(side, opened.key) for side in ("left", "right")]
        if all(name in self._images for name in names):
            return
        pair = await asyncio.to_thread(self._read, opened)
        for name, png in zip(names, pair, strict=True):
            if name not in self._images:
                self._images[name] = (opened.showing.voter, png)
                self._image_bytes += len(png)
        while self._image_bytes > MAX_PICTURE_BYTES and len(self._images) > 2:
            self._forget(next(iter(self._images)))

    def _read(self, opened: Open) -> tuple[bytes, bytes]:
        return pad_alike(*(self.store.read_picture(each.id) for each in (opened.left, opened.right)))

    def _forget(self, name: str) -> None:
        if name in self._images:
            self._image_bytes -= len(self._images.pop(name)[1])

    # --- a vote

    async def vote(self, voter: str, token: str, outcome: Outcome) -> Open:
        """Returns the pair that was voted on, once the vote is on the disk; raises RequestError."""
        name, _, proof = token.partition(".")
        wanted = self.sign("vote", f"{name}|{voter}").encode()
        if not hmac.compare_digest(proof.encode("utf-8", "replace"), wanted):
            raise RequestError(403, "this vote was not given to you")
        opened = self._open.get(voter)
        if opened is None or opened.showing.id != name:
            if await asyncio.to_thread(self.store.is_voted, name):
                raise RequestError(409, "this pair has been voted on")
            raise RequestError(410, "this pair is no longer before you")
        if self._is_old(opened.showing):
            raise RequestError(410, "this pair is no longer before you")
        shown = opened.showing
        vote = Vote(
            *(opened.left.entrant, opened.right.entrant, outcome, opened.prompt.id, opened.prompt.category),
            *(voter, shown.number, self.clock()),
            math.nan if shown.propensity is None else shown.propensity,
        )
        if not await self.commit(Entry(ballot=Ballot(shown, vote))):
            raise RequestError(409, "this pair has been voted on")
        if self._open.get(voter) is opened:
            del self._open[voter]
        for side in ("left", "right"):
            self._forget(self.sign(side, opened.key))
        self.votes.append(vote)
        self._count(vote)
        self.matches.record(voter, opened.left.id, opened.right.id)
        self._weigh()
        return opened

    def progress(self, voter: str) -> dict[str, int]:
        """Returns how many pairs the voter has voted on, and of how many."""
        return {"voted": self.matches.seen(voter), "of": self.matches.total, "votes": len(self.votes)}

    def _count(self, vote: Vote) -> None:
        places = [self.entrants.index(name) for name in (vote.left, vote.right) if name in self.entrants]
        if len(places) == 2:  # entrants of a rebuilt arena may not have come back yet
            self.counts[places[0], places[1], OUTCOMES.index(vote.outcome)] += 1

    def _weigh(self) -> None:
        """Spends the next votes where they tell most, as far as is known; computed beside the serving."""
        if self._weighing is None or self._weighing.done():
            self._weighing = asyncio.create_task(self._update_probabilities(self.counts.copy()))

    async def _update_probabilities(self, counts: np.ndarray) -> None:
        allowed = np.ones(len(self.entrants), bool)
        self.matches.set_probabilities(await asyncio.to_thread(pair_probabilities, counts, allowed))

    # --- a prompt that was typed, and the board

    async def add_typed(
        self, prompt: PromptRow, made: Sequence[tuple[str, bytes]], propensity: float
    ) -> None:
        """Puts the pictures of a typed prompt, (entrant, PNG) twice, before its voter."""

        def keep() -> list[PictureRow]:
            self.store.add(prompts=[prompt])
            return [self.store.add_picture(name, prompt.id, 0, png) for name, png in made]

        one, other = await asyncio.to_thread(keep)
        self.prompts[prompt.id] = prompt
        self.pictures |= {one.id: one, other.id: other}
        self.matches.add_typed(prompt.voter, Match(one, other, propensity))

    async def board(self) -> dict[str, Any]:
        """Returns the leaderboard as JSON values, at most a few seconds old."""
        async with self._board_lock:
            now, known = time.monotonic(), self._board
            if known is None or (known[0] != len(self.votes) and now - known[1] > BOARD_SECONDS):
                votes = list(self.votes)
                board = await asyncio.to_thread(leaderboard, votes, self.entrants)
                said = board.to_dict()
                for each in said["diagnostics"]["robustness"]["influences"]:
                    each["voter"] = self.sign("voter", each["voter"])[:6]  # a name, and no visitor's id
                self._board = known = (len(votes), time.monotonic(), said)
            return known[2]
