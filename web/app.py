"""The one application of arena and studio: what a page brings, and how pages become an application.

A `Part` is a page with its routes. The files in `web/pages` are read when the application is made and served
from memory by exact address, so no part of an address ever becomes a path. Use:
`app = create_app(Access.of("127.0.0.1", 8000, secret), [arena_part, studio_part])`, then `web.server.Server`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from web.security import Access, Buckets, Guard, RequestError, respond

PAGES = Path(__file__).parent / "pages"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
#: What all pages share.
SHARED = ("base.css", "nav.js", "icon.svg")


@dataclass(frozen=True)
class Part:
    """A page of the application, and what belongs to it.

    Args:
        title: as the navigation shows it.
        home: the address of the page.
        routes: of starlette; a POST reaches them only from our own pages, as JSON of at most 16 kB.
        files: address -> name in `web/pages`, such as `{"/arena": "arena.html", "/arena.js": "arena.js"}`.
        body_limits: address -> bytes, where a POST may be larger.
    """

    title: str
    home: str
    routes: Sequence[BaseRoute]
    files: Mapping[str, str]
    body_limits: Mapping[str, int] = field(default_factory=dict)


def create_app(
    access: Access, parts: Sequence[Part], visitors: Buckets | None = None, strangers: Buckets | None = None
) -> ASGIApp:
    """Returns the guarded application; its root leads to the first part.

    Args:
        access: who may come in.
        parts: at least one.
        visitors: how often one visitor may ask; None for the default.
        strangers: how often an address may ask that shows no cookie; None for the default.
    """
    shown = [{"title": part.title, "home": part.home} for part in parts]

    async def home(request: Request) -> Response:
        return RedirectResponse(parts[0].home, 303)

    async def listed(request: Request) -> Response:
        return JSONResponse(shown)

    routes: list[BaseRoute] = [Route("/", home), Route("/api/parts", listed)]
    routes += [page(f"/{name}", name) for name in SHARED]
    limits: dict[str, int] = {}
    for part in parts:
        routes += [page(address, name) for address, name in part.files.items()]
        routes += part.routes
        limits |= part.body_limits
    handlers: Mapping[Any, Any] = {HTTPException: _http_error, RequestError: _refused, Exception: _failed}
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Guard(app, access, limits, visitors, strangers)


def page(address: str, name: str) -> Route:
    """Returns the route that serves a file of `web/pages` from memory."""
    data, kind = (PAGES / name).read_bytes(), KINDS[Path(name).suffix]

    async def served(request: Request) -> Response:
        return Response(data, headers={"content-type": kind})

    return Route(address, served)


async def read_json(request: Request) -> dict[str, Any]:
    """Returns the JSON object that was posted; raises RequestError for anything else."""
    try:
        values = json.loads(await request.body())
    except (ValueError, RecursionError):
        raise RequestError(400, "this is no JSON") from None
    if not isinstance(values, dict):
        raise RequestError(400, "a JSON object is expected")
    return values


class _Said(Response):
    """An error as the guard says it."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(status_code=status)
        self.message = message

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await respond(scope, send, self.status_code, self.message)


def _refused(request: Request, error: RequestError) -> Response:
    return _Said(error.status, error.message)


def _http_error(request: Request, error: HTTPException) -> Response:
    said = {404: "there is nothing here", 405: "this address does not take that method"}
    return _Said(error.status_code, said.get(error.status_code, "this cannot be answered"))


def _failed(request: Request, error: Exception) -> Response:
    return _Said(500, "this did not work; the server's log says why")
