"""Progress in a terminal as a bar, elsewhere as one line an interval: images/s and time left in both."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

#: Seconds between two lines where the output is no terminal.
_PAUSE = 5.0


class Progress:
    """Shows how far a count of images has come; a context manager.

    Args:
        title: what is going on.
        total: images at the end.
        start: images already done.
        shown: False says nothing, as for all ranks but the first.
    """

    def __init__(self, title: str, total: int, start: int = 0, shown: bool = True) -> None:
        self.title = title
        self.total = total
        self.start = self._done = start
        self.console = Console(soft_wrap=True, quiet=not shown)
        self._began = time.perf_counter()
        self._said = -_PAUSE
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} images  {task.fields[note]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, more: int) -> None:
        """Counts `more` images as done."""
        self._done += more
        self.update(self._done)

    def update(self, done: int, loss: float | None = None) -> None:
        """Shows that `done` images are done, and the loss where there is one."""
        rate = (done - self.start) / max(time.perf_counter() - self._began, 1e-9)
        note = f"{rate:,.0f} images/s" + ("" if loss is None else f"  loss {loss:.4f}")
        self._bar.update(self._task, completed=done, note=note)
        now = time.perf_counter()
        if not self.console.is_terminal and (now - self._said >= _PAUSE or done >= self.total):
            self._said = now
            left = max(self.total - done, 0) / max(rate, 1e-9)
            self.console.print(
                f"{self.title}: {done:,}/{self.total:,} images  {note}  {duration(left)} left",
                highlight=False,
            )


def duration(seconds: float) -> str:
    """`seconds` as a person says it: `45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
