"""Several trials at a time: one zygote forks them all, and a thread drives each.

Use: `with Jobs(out, 2) as jobs: results = jobs.run([task, ...])`, each task a function of the zygote. Several
threads may run tasks; no more than `count` go on at a time in all.
"""

import contextlib
import queue
import random
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from scripts.faults.zygote import Zygote

T = TypeVar("T")
Task = Callable[[Zygote], T]


class Jobs:
    """A bounded number of trials at a time.

    Args:
        out: the folder the zygote's errors are written to.
        count: how many trials run at a time.
    """

    def __init__(self, out: Path, count: int) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.count = count
        self.zygote = Zygote(out / "zygote.log")
        self._slots = threading.BoundedSemaphore(count)

    def __enter__(self) -> "Jobs":
        return self

    def __exit__(self, *_: object) -> None:
        self.zygote.close()

    def run(self, tasks: Sequence[Task[T]]) -> list[T]:
        """The results in the order of the tasks; the first error of one is raised when all have ended."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(len(tasks)):
            waiting.put(number)
        results: dict[int, T] = {}
        errors: list[BaseException] = []

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not errors:
                    number = waiting.get_nowait()
                    try:
                        with self._slots:
                            results[number] = tasks[number](self.zygote)
                    except BaseException as error:
                        errors.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in tasks[: self.count]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(tasks))]


@dataclass
class Report:
    """What all kinds of trials report to: the failures of the command, and where its files are.

    Args:
        out: the folder of everything.
        seed: of every random number.
        short: whether a few of each are enough.
    """

    out: Path
    seed: int
    short: bool = False
    failures: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def random(self, *words: Any) -> random.Random:
        """Random numbers of their own for a trial, a function of the seed and `words`."""
        return random.Random(f"{self.seed} {words}")

    def fail(self, kind: str, what: str, place: Path | None = None) -> None:
        """Writes down a trial that did not go as wanted, and says how to repeat it."""
        where = f" ({place})" if place is not None else ""
        again = f"python scripts/torture.py --only {kind} --seed {self.seed}"
        line = f"FAILED {kind}: {what}{where}; repeat: {again}"
        with self._lock:
            self.failures.append(line)
        self.say(line)

    def say(self, text: str) -> None:
        """Prints a line at once."""
        with self._lock:
            print(text, flush=True)
            sys.stdout.flush()
