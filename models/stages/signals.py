"""Signals during training: a handler only sets a flag, which the ranks look at together after a step.

SIGTERM and SIGINT: save at the end of the step, then exit with 143 or 130. SIGUSR1: save and go on. A second
SIGTERM or SIGINT ends the process at once, with what was saved before.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SAVE = 1
#: signal -> what it asks for: to save, or the exit code; the larger wins where ranks got different ones.
_ASKED = {signal.SIGUSR1: SAVE, signal.SIGINT: 130, signal.SIGTERM: 143}
#: Seconds in which a second signal is the first one over again: a terminal and a launcher both pass it on.
_SAME = 0.5


class Stopped(BaseException):
    """The run was asked to stop, has saved, and ends with `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Signals:
    """What was asked for since the last look; a context in which signals are flags and not exceptions."""

    def __init__(self) -> None:
        self.asked = 0
        self._first = 0.0

    @contextmanager
    def flagged(self) -> Iterator["Signals"]:
        """Within it signals only set the flag."""
        before = {number: signal.signal(number, self._set) for number in _ASKED}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def saved(self) -> None:
        """Forgets a wish to save that was met."""
        if self.asked == SAVE:
            self.asked = 0

    def _set(self, number: int, frame: FrameType | None) -> None:
        asked, now = _ASKED[signal.Signals(number)], time.monotonic()
        if asked > SAVE and self.asked > SAVE and now - self._first > _SAME:
            os._exit(asked)
        if self.asked <= SAVE < asked:
            self._first = now
        self.asked = max(self.asked, asked)
