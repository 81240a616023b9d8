"""A flight recorder: where every rank stands when training has not moved for a while.

A rank that waits in an exchange says so when it gives up (ranks.py); one that hangs in a lock, a driver or a
network file system says nothing at all. So every rank arms a timer of its own process, which needs neither
the interpreter's lock nor a healthy event loop, and re-arms it as long as steps are made. When it runs out
the stacks of all threads are in `stacks-rank<k>.txt` beside the stage's metrics. Nothing is stopped.
"""

import faulthandler
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from data.batch import Batch
from models.stages.ranks import Ranks
from models.stages.stage import Stage

#: Seconds between two armings: a timer is a thread, and a step may take a millisecond.
_REARM = 1.0


class FlightRecorder(Callback):
    """Writes down the stacks of this process if no step ends for a while.

    Args:
        stage: what is trained.
        folder: of the stage.
        ranks: of which this process is one.
        seconds: without the end of a step; 0 records never.
    """

    def __init__(self, stage: Stage, folder: Path, ranks: Ranks, seconds: float) -> None:
        self.stage = stage
        self.path = folder / f"stacks-rank{ranks.rank}.txt"
        self.seconds = seconds
        self._file: TextIOWrapper | None = None
        self._armed = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.seconds:
            self.path.unlink(missing_ok=True)  # of a hang before
            self._file = self.path.open("w", encoding="utf-8")
            self._arm()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        if self._file is not None and time.monotonic() - self._armed > _REARM:
            self._arm()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _arm(self) -> None:
        assert self._file is not None
        self._armed = time.monotonic()
        self._file.seek(0)
        self._file.truncate()
        self._file.write(
            f"no step has ended for {self.seconds:g} seconds after {self.stage.images_seen:,} images; "
            "where each thread stood:\n"
        )
        self._file.flush()
        faulthandler.dump_traceback_later(self.seconds, exit=False, file=self._file)

    def _close(self) -> None:
        """Leaves the file where stacks were written, and no empty one."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self._file = None
        if "File " not in self.path.read_text(encoding="utf-8", errors="replace"):
            self.path.unlink(missing_ok=True)
