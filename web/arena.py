"""The arena's page and leaderboard: `arena_part(voting, live)`, and what their scripts ask for.

GET  /api/arena/next     the pair before the voter, and how far they are; no name, nothing that tells one
GET  /picture/NAME       one of its two pictures, as PNG
POST /api/arena/vote     {"token", "outcome"} -> the names, and the next pair
POST /api/arena/prompt   {"text"}: two entrants make pictures of it, which come before this voter next
GET  /api/arena/board    the leaderboard as JSON
"""

import asyncio
import logging
import secrets
from collections import Counter
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data.fields import BadSample, decode_caption
from evaluation.arena.store import PromptRow
from evaluation.arena.votes import Outcome
from web.app import Part, read_json
from web.live import MAX_WAITING, Live
from web.security import RequestError, visitor_of
from web.voting import Voting

log = logging.getLogger(__name__)

FILES = {
    "/arena": "arena.html",
    "/arena.js": "arena.js",
    "/arena.css": "arena.css",
    "/leaderboard": "leaderboard.html",
    "/leaderboard.js": "leaderboard.js",
    "/leaderboard.css": "leaderboard.css",
}
#: Typed prompts of one voter that wait at most, and the length of one in characters.
MAX_TYPED, MAX_TEXT = 3, 500


def arena_part(voting: Voting, live: Live | None) -> list[Part]:
    """Returns the pages of the arena; `live` is None where no prompts can be typed."""
    handler = _Handler(voting, live)
    routes = [
        Route("/api/arena/next", handler.next),
        Route("/api/arena/vote", handler.vote, methods=["POST"]),
        Route("/api/arena/prompt", handler.prompt, methods=["POST"]),
        Route("/api/arena/board", handler.board),
        Route("/picture/{name:str}", handler.picture),
    ]
    arena = {address: name for address, name in FILES.items() if name.startswith("arena")}
    board = {address: name for address, name in FILES.items() if name.startswith("leaderboard")}
    return [Part("Arena", "/arena", routes, arena), Part("Leaderboard", "/leaderboard", [], board)]


class _Handler:
    """What answers the requests."""

    def __init__(self, voting: Voting, live: Live | None) -> None:
        self.voting = voting
        self.live = live
        self.waiting: Counter[str] = Counter()
        self.failed: dict[str, str] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.rng = np.random.default_rng(secrets.randbits(128))

    async def next(self, request: Request) -> Response:
        return JSONResponse(await self._state(visitor_of(request)))

    async def picture(self, request: Request) -> Response:
        png = await self.voting.image(visitor_of(request), request.path_params["name"])
        return Response(png, headers={"content-type": "image/png"})

    async def vote(self, request: Request) -> Response:
        values = await read_json(request)
        token, said = values.get("token"), values.get("outcome")
        if not isinstance(token, str) or said not in tuple(Outcome) or set(values) != {"token", "outcome"}:
            raise RequestError(400, "a vote is a token, and left, right, tie or both_bad")
        voter = visitor_of(request)
        opened = await self.voting.vote(voter, token, Outcome(said))
        shown = {"left": opened.left.entrant, "right": opened.right.entrant, "outcome": said}
        return JSONResponse({"shown": shown, **await self._state(voter)})

    async def prompt(self, request: Request) -> Response:
        values = await read_json(request)
        if self.live is None:
            raise RequestError(404, "prompts cannot be typed here: no entrant makes pictures live")
        text = _clean(values.get("text"))
        voter = visitor_of(request)
        if self.waiting[voter] >= MAX_TYPED or sum(self.waiting.values()) >= MAX_WAITING:
            raise RequestError(429, "prompts are waiting already; vote on until they are painted")
        self.failed.pop(voter, None)
        self.waiting[voter] += 1
        task = asyncio.create_task(
            self._make(self.live, PromptRow(secrets.token_hex(8), text, "typed", voter))
        )
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return JSONResponse({"painting": self.waiting[voter]}, 202)

    async def board(self, request: Request) -> Response:
        return JSONResponse(await self.voting.board())

    async def _state(self, voter: str) -> dict[str, Any]:
        return {
            "pair": await self.voting.next(voter),
            "progress": self.voting.progress(voter),
            "live": self.live is not None,
            "painting": self.waiting[voter],
            "failed": self.failed.pop(voter, None),
        }

    async def _make(self, live: Live, prompt: PromptRow) -> None:
        try:
            names, propensity = self.voting.matches.choose_entrants(tuple(live.makers), self.rng)
            made = await live.make(prompt.text, names, secrets.randbits(31))
            await self.voting.add_typed(prompt, made, propensity)
        except Exception as error:
            log.error("a typed prompt: %s: %s", type(error).__name__, error)
            self.failed[prompt.voter] = "your prompt could not be painted; try another one"
        finally:
            self.waiting[prompt.voter] -= 1
            self.waiting += Counter()  # forgets who waits for nothing


def _clean(text: object) -> str:
    """A prompt as training captions are: NFC, no control characters, white space folded."""
    if not isinstance(text, str) or not text.strip():
        raise RequestError(400, "type a prompt first")
    try:
        cleaned = decode_caption(text.encode())
    except (BadSample, UnicodeEncodeError):
        raise RequestError(400, "this prompt is not usable text") from None
    if len(cleaned) > MAX_TEXT:
        raise RequestError(400, f"a prompt has at most {MAX_TEXT} characters")
    return cleaned
