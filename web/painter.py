"""The one thread that makes pictures for a page, one order after another, and what is known of each.

An order is pictures of the same words by one checkpoint or several, side by side. After every step the page
can be told how the pictures look; what nobody watches any more, or is cancelled, stops at the next step.

    painter = Painter(shelf, album); painter.start()
    order = Order("visitor", [Panel(shelf.offers()[0].id, lambda source: make_work(...))])
    painter.submit(order)             # then order.told, after each call of what order.watch(...) was given
"""

import base64
import io
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum

from PIL import Image
from torch import Tensor

from data.index import DataError
from evaluation.gallery import Work
from evaluation.request import Source, too_long
from models.checkpoint import CheckpointError
from models.registry import ConfigError
from web.album import Album
from web.shelf import Shelf

log = logging.getLogger(__name__)

#: Orders that wait at most, of all visitors and of one, and finished ones that are remembered.
MAX_WAITING, MAX_EACH, MAX_REMEMBERED = 16, 4, 64
#: An order that nobody watches is dropped after so many seconds: a page that is loaded again is back by then.
UNWATCHED_SECONDS = 10.0
#: The longer side of a preview in pixels; it is a JPEG of that quality.
PREVIEW, PREVIEW_QUALITY = 320, 85


class State(StrEnum):
    """Where an order is."""

    WAITING = "waiting"
    LOADING = "loading"
    PAINTING = "painting"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (State.DONE, State.FAILED, State.CANCELLED)


@dataclass(frozen=True)
class Told:
    """What is known of an order at one moment.

    Args:
        state: where it is.
        panel: number of the checkpoint that paints, from 0.
        step: steps it has made, of `steps`.
        steps: see `step`.
        previews: its pictures as they look after that step, as data addresses.
        pictures: names in the album of the finished pictures, for each panel.
        note: what the person should know, such as words that are not read.
        error: one line, where it failed.
    """

    state: State = State.WAITING
    panel: int = 0
    step: int = 0
    steps: int = 0
    previews: tuple[str, ...] = ()
    pictures: tuple[tuple[str, ...], ...] = ()
    note: str = ""
    error: str = ""


@dataclass(frozen=True)
class Panel:
    """A checkpoint's part of an order: its id on the shelf, and how it becomes work once it is loaded."""

    checkpoint: str
    make: Callable[[Source], Work]


class _StoppedError(Exception):
    """Nobody wants the pictures any more."""


class Order:
    """Pictures that a visitor asked for; `told` is replaced as a whole, so any thread may read it."""

    def __init__(self, key: str, visitor: str, panels: Sequence[Panel]) -> None:
        self.key = key
        self.visitor = visitor
        self.panels = tuple(panels)
        self.told = Told()
        self._cancelled = False
        self._watchers: list[Callable[[], None]] = []
        self._unwatched_since = time.monotonic()

    @contextmanager
    def watch(self, changed: Callable[[], None]) -> Iterator[None]:
        """Calls `changed`, from the painter's thread, whenever `told` is another one."""
        self._watchers.append(changed)
        try:
            yield
        finally:
            self._watchers.remove(changed)
            self._unwatched_since = time.monotonic()

    def cancel(self) -> None:
        """Stops it at the next step."""
        self._cancelled = True

    @property
    def unwanted(self) -> bool:
        """Whether it was cancelled, or nobody has watched it for a while."""
        unwatched = not self._watchers and time.monotonic() - self._unwatched_since > UNWATCHED_SECONDS
        return self._cancelled or unwatched

    @property
    def watched(self) -> bool:
        """Whether anybody wants previews."""
        return bool(self._watchers)

    def tell(self, told: Told) -> None:
        """Replaces what is known of it."""
        self.told = told
        if told.state in ENDED:
            self.panels = ()  # the pictures that it started from need no memory any more
        for changed in tuple(self._watchers):
            changed()


class Painter:
    """Paints what is submitted, and reads the checkpoints of the shelf while there is nothing to paint."""

    def __init__(self, shelf: Shelf, album: Album) -> None:
        self.shelf = shelf
        self.album = album
        self._wake = threading.Condition()
        self._waiting: deque[Order] = deque()
        self._orders: OrderedDict[str, Order] = OrderedDict()
        self._stopping = False
        self._surveyed = False
        self._thread = threading.Thread(target=self._run, name="painter")

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread at the next step of what it paints, or after what it loads."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Has checkpoints read that have come since."""
        self.shelf.look()
        with self._wake:
            self._surveyed = False
            self._wake.notify()

    def submit(self, order: Order) -> None:
        """Puts an order at the end of the queue; raises OverflowError where too many wait."""
        with self._wake:
            for gone in [each for each in self._waiting if each.unwanted]:
                self._waiting.remove(gone)
                gone.tell(replace(gone.told, state=State.CANCELLED))
            mine = sum(each.visitor == order.visitor for each in self._waiting)
            if len(self._waiting) >= MAX_WAITING or mine >= MAX_EACH:
                raise OverflowError("too many pictures are waiting to be made; cancel some, or wait")
            self._waiting.append(order)
            self._orders[order.key] = order
            while len(self._orders) > MAX_REMEMBERED:
                oldest = next(key for key, each in self._orders.items() if each.told.state in ENDED)
                del self._orders[oldest]
            self._wake.notify()

    def order(self, key: str, visitor: str) -> Order:
        """Returns an order of a visitor; raises KeyError where there is none."""
        with self._wake:
            order = self._orders[key]
        if order.visitor != visitor:
            raise KeyError(key)
        return order

    def ahead(self, order: Order) -> int:
        """Returns how many orders are painted before this one."""
        with self._wake:
            return self._waiting.index(order) + 1 if order in self._waiting else 0

    def cancel(self, order: Order) -> None:
        """Takes an order off the queue, or stops it at the next step."""
        order.cancel()
        with self._wake:
            if order in self._waiting:
                self._waiting.remove(order)
                order.tell(replace(order.told, state=State.CANCELLED))

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._stopping or self._waiting) and self._surveyed:
                    self._wake.wait()
                if self._stopping:
                    return
                order = self._waiting.popleft() if self._waiting else None
                if order is None:
                    self._surveyed = True
            if order is not None:
                self._paint(order)
            elif self._survey():
                self._surveyed = False

    def _survey(self) -> bool:
        """Whether a checkpoint was read that had not been; what cannot be looked at is for another time."""
        try:
            return self.shelf.survey()
        except OSError as error:
            log.error("the checkpoints cannot be looked at: %s", error)
            return False

    def _paint(self, order: Order) -> None:
        """Paints an order; whatever goes wrong is told, and the next one is painted all the same."""
        try:
            for number, panel in enumerate(order.panels):
                self._paint_panel(order, number, panel)
            order.tell(replace(order.told, state=State.DONE, previews=()))
        except _StoppedError:
            order.tell(replace(order.told, state=State.CANCELLED, previews=()))
        except (ConfigError, CheckpointError, DataError, FloatingPointError, ValueError) as error:
            order.tell(replace(order.told, state=State.FAILED, error=" ".join(str(error).split())))
        except Exception as error:
            log.error("an order could not be painted: %s: %s", type(error).__name__, error)
            text = "this did not work; the server's log says why"
            if isinstance(error, OSError) and error.strerror:
                text = f"{error.strerror}; check that the folder of the pictures can be written and has space"
            order.tell(replace(order.told, state=State.FAILED, error=text))

    def _paint_panel(self, order: Order, number: int, panel: Panel) -> None:
        self._go_on(order)
        order.tell(replace(order.told, state=State.LOADING, panel=number, step=0, steps=0, previews=()))
        work = panel.make(self.shelf.get(panel.checkpoint))
        note = order.told.note or too_long(work)
        steps = len(work.sampling.times(work.pipeline.denoiser.schedule)) - 1
        order.tell(replace(order.told, state=State.PAINTING, steps=steps, note=note))

        def preview(step: int, pixels: Tensor) -> None:
            self._go_on(order)
            previews = tuple(map(as_address, pixels)) if order.watched else ()
            order.tell(replace(order.told, step=step, previews=previews))

        self._go_on(order)
        images = work.pipeline.generate(work.jobs, work.sampling, work.size, len(work.jobs), preview=preview)
        names = tuple(
            self.album.add(pixels, work.record(job)) for job, pixels in zip(work.jobs, images, strict=True)
        )
        order.tell(replace(order.told, previews=(), pictures=(*order.told.pictures, names)))

    def _go_on(self, order: Order) -> None:
        if order.unwanted or self._stopping:
            raise _StoppedError


def as_address(pixels: Tensor) -> str:
    """Returns a picture uint8 `[3 H W]`, made small, as a data address."""
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((PREVIEW, PREVIEW))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=PREVIEW_QUALITY, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
