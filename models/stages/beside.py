"""A command that runs beside a training and ends with it. Used by `train.py`, and for evaluations."""

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from models.stages.launch import PARENT

#: What a rank's environment says of its place among others, which a command beside them has no part in.
_PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: Seconds that a stopped command gets to end by itself.
_GRACE = 5.0


class Beside:
    """A process, started at once and stopped at the end of a `with`.

    Args:
        command: program and words; it gives way to other work, and stays with its parent, by itself.
        log: gets what it says.
        threads: it may compute with.

    Raises:
        OSError: it cannot be started, or the log cannot be written.
    """

    def __init__(self, command: Sequence[str], log: Path, threads: int = 1) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in _PLACE}
        environment |= {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(command), env=environment,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """What it ended with; None while it runs."""
        return self._process.poll()

    def wait(self, seconds: float) -> None:
        """Returns once it has ended, however it did, or after so many seconds."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)

    def stop(self) -> None:
        """Ends it where it still runs, by force if need be."""
        if self.code is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
