"""The prompt studio's page: `studio_part(painter)`, and what its script asks for.

GET  /api/studio/checkpoints        the checkpoints with their defaults, or what is wrong with them; limits
POST /api/studio/paint              what to make, as `WORDS` lists it -> {"order"}
GET  /api/studio/events/ORDER       server-sent events: what is known of it, after every step
POST /api/studio/cancel             {"order"}
GET  /api/studio/history?before=    finished pictures with their records, newest first
GET  /studio/picture/NAME.png       one of them; with ?download it is offered as a file

What is asked for is checked by the objects that `sample.py` uses, so the same request is refused with the
same words and makes the same bytes.
"""

import asyncio
import base64
import binascii
import json
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from PIL import Image
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from data.decoder import Decoder
from data.fields import BadSample
from data.pictures import Look
from evaluation.gallery import Work
from evaluation.request import DEFAULTS, Given, Source, clean, make_work, part
from models.registry import REGISTRY, ConfigError
from web.app import Part, read_json
from web.painter import ENDED, Order, Painter, Panel
from web.security import RequestError, visitor_of

FILES = {"/studio": "studio.html", "/studio.css": "studio.css"} | {
    f"/{name}.js": f"{name}.js" for name in ("studio", "studio-canvas", "studio-history")
}
#: Characters of a text, pictures of an order, steps of one, checkpoints side by side.
MAX_TEXT, MAX_PICTURES, MAX_STEPS, MAX_PANELS = 1_000, 16, 250, 2
#: All pixels of an order together, in pictures of the training size.
MAX_AREA = 64
#: Characters of the name of a sampler or a grid.
MAX_NAME = 64
#: Largest whole number that a page can say exactly.
MAX_SEED = 2**53 - 1
#: Bytes of an order, pixels of its picture, pictures of one page of history.
MAX_BODY, MAX_PIXELS, PAGE = 12 << 20, 1 << 24, 24
#: Seconds after which a comment keeps a silent stream open.
SILENCE = 10.0


def studio_part(painter: Painter) -> Part:
    """Returns the studio's page."""
    handler = _Handler(painter)
    routes = [
        Route("/api/studio/checkpoints", handler.checkpoints),
        Route("/api/studio/paint", handler.paint, methods=["POST"]),
        Route("/api/studio/events/{order:str}", handler.events),
        Route("/api/studio/cancel", handler.cancel, methods=["POST"]),
        Route("/api/studio/history", handler.history),
        Route("/studio/picture/{name:str}.png", handler.picture),
    ]
    return Part("Studio", "/studio", routes, FILES, {"/api/studio/paint": MAX_BODY})


# --- what is asked for --------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise ValueError(f"a text of at most {MAX_TEXT:,} characters")
    return value


def _whole(value: Any, low: int, high: int) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"a whole number from {low} to {high:,}")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float):
        raise ValueError("a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError("a number that is less long") from None


def _size(value: Any) -> list[int]:
    if not isinstance(value, list) or len(value) != 2 or not all(type(side) is int for side in value):
        raise ValueError("a width and a height in pixels")
    return value


def _named(value: Any, group: str) -> dict[str, Any]:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise ValueError("a name")
    return part(group, value)


#: key -> what turns its JSON value into that of `evaluation.request`; its ValueError says what it must be.
WORDS: Mapping[str, Callable[[Any], Any]] = {
    "negative_prompt": _text,
    "num_images": partial(_whole, low=1, high=MAX_PICTURES),
    "seed": partial(_whole, low=0, high=MAX_SEED),
    "num_steps": partial(_whole, low=1, high=MAX_STEPS),
    "guidance_scale": _number,
    "image_guidance_scale": _number,
    "strength": _number,
    "size": _size,
    "sampler": partial(_named, group="sampler"),
    "grid": partial(_named, group="grid"),
}


@dataclass(frozen=True)
class Ask:
    """What a page asks for: checkpoints, a clean prompt, the values beside it, and what to start from."""

    checkpoints: tuple[str, ...]
    prompt: str
    values: Mapping[str, Any]
    given: Given

    @classmethod
    def of(cls, posted: Mapping[str, Any]) -> "Ask":
        """Returns what was posted, checked as far as it can be without the checkpoint.

        Raises RequestError for unknown words, values of another kind, or pictures that cannot be used.
        """
        unknown = posted.keys() - WORDS.keys() - {"checkpoints", "prompt", "image", "mask"}
        if unknown:
            raise RequestError(400, f"there is no option '{sorted(unknown)[0][:40]}'")
        checkpoints = posted.get("checkpoints")
        if (
            not isinstance(checkpoints, list)
            or not 1 <= len(checkpoints) <= MAX_PANELS
            or not all(isinstance(key, str) for key in checkpoints)
        ):
            raise RequestError(400, f"checkpoints must be a list of 1 to {MAX_PANELS}")
        values = dict(DEFAULTS)
        for key, read in WORDS.items():
            if posted.get(key) is not None:
                try:
                    values[key] = read(posted[key])
                except ConfigError as error:
                    raise RequestError(400, str(error)) from None
                except ValueError as error:
                    raise RequestError(400, f"{key} must be {error}") from None
        try:
            prompt = clean(_text(posted.get("prompt", "")), "a prompt")
        except ConfigError as error:
            raise RequestError(400, str(error)) from None
        except ValueError as error:
            raise RequestError(400, f"prompt must be {error}") from None
        image, mask = (_picture(posted.get(key), key) for key in ("image", "mask"))
        if mask is not None and (image is None or mask.size != image.size):
            raise RequestError(400, "mask: there is no picture of its size to paint in")
        return cls(tuple(checkpoints), prompt, values, Given(image, mask))

    def work(self, source: Source) -> Work:
        """Returns the work that `source` has with it; raises ConfigError."""
        work = make_work(self.values, [self.prompt], source, self.given, Look())
        most = MAX_AREA * source.pipeline.resolution**2
        if len(work.jobs) * work.size[0] * work.size[1] > most:
            width, height = work.size
            raise ConfigError(
                f"{len(work.jobs)} pictures of {width}x{height} are more than this page makes at once; "
                f"at this size up to {max(most // (width * height), 1)}"
            )
        return work


def _picture(value: Any, label: str) -> Image.Image | None:
    """A picture that was posted in base64."""
    if value is None:
        return None
    try:
        if not isinstance(value, str):
            raise RequestError(400, f"{label} must be a file in base64")
        return Decoder(max_pixels=MAX_PIXELS)(base64.b64decode(value, validate=True), label)
    except (binascii.Error, ValueError):
        raise RequestError(400, f"{label} must be a file in base64") from None
    except BadSample as error:
        raise RequestError(400, f"{label} cannot be used, {error.reason}; give a PNG, JPEG or WebP") from None


# --- what is answered ---------------------------------------------------------------------------------------


class _Handler:
    """What answers the requests."""

    def __init__(self, painter: Painter) -> None:
        self.painter = painter

    async def checkpoints(self, request: Request) -> Response:
        await asyncio.to_thread(self.painter.look)
        return JSONResponse(
            {
                "checkpoints": [offer.to_dict() for offer in self.painter.shelf.offers()],
                "samplers": sorted(REGISTRY["sampler"]),
                "grids": sorted(REGISTRY["grid"]),
                "limits": {"pictures": MAX_PICTURES, "steps": MAX_STEPS, "text": MAX_TEXT, "area": MAX_AREA},
            }
        )

    async def paint(self, request: Request) -> Response:
        posted = await read_json(request)
        ask = await asyncio.to_thread(Ask.of, posted)
        known = {offer.id: offer for offer in self.painter.shelf.offers()}
        for key in ask.checkpoints:
            if key not in known:
                raise RequestError(404, "there is no such checkpoint; reload the page")
            if known[key].problem:
                raise RequestError(400, known[key].problem)
        panels = [Panel(key, ask.work) for key in ask.checkpoints]
        order = Order(secrets.token_hex(8), visitor_of(request), panels)
        try:
            self.painter.submit(order)
        except OverflowError as error:
            raise RequestError(429, str(error)) from None
        return JSONResponse({"order": order.key}, 202)

    async def events(self, request: Request) -> Response:
        order = self._order(request, request.path_params["order"])
        return StreamingResponse(self._told(order), media_type="text/event-stream")

    async def cancel(self, request: Request) -> Response:
        values = await read_json(request)
        order = self._order(request, values.get("order"))
        self.painter.cancel(order)
        return JSONResponse({"state": order.told.state})

    async def history(self, request: Request) -> Response:
        before = request.query_params.get("before")
        found = await asyncio.to_thread(self.painter.album.latest, PAGE, before)
        pictures = [{"name": name, "record": record} for name, record in found]
        return JSONResponse({"pictures": pictures, "more": len(found) == PAGE})

    async def picture(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            png = await asyncio.to_thread(self.painter.album.png, name)
        except KeyError:
            raise RequestError(404, "there is no such picture") from None
        headers = {"content-type": "image/png"}
        if "download" in request.query_params:
            headers["content-disposition"] = f'attachment; filename="{name}.png"'
        return Response(png, headers=headers)

    def _order(self, request: Request, key: Any) -> Order:
        try:
            return self.painter.order(str(key), visitor_of(request))
        except KeyError:
            raise RequestError(404, "there is no such order; it may have been forgotten") from None

    async def _told(self, order: Order) -> AsyncIterator[str]:
        """What is known of an order as events, until it has ended; what comes too fast is passed over."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        with order.watch(wake):
            while True:
                changed.clear()
                told = order.told
                shown = {**asdict(told), "ahead": self.painter.ahead(order)}
                yield f"data: {json.dumps(shown)}\n\n"
                if told.state in ENDED:
                    return
                while not changed.is_set():
                    try:
                        await asyncio.wait_for(changed.wait(), SILENCE)
                    except TimeoutError:
                        yield ": nothing new\n\n"
