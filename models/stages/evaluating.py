"""The callback that has checkpoints evaluated while a stage trains, and records their figures.

Training never waits for it and never fails with it. Figures are recorded at the images that the checkpoint
had seen, as `eval_<name>`; an alarm of variety or of copies is told once.
"""

import logging
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from data.batch import Batch
from data.json_lines import read_json_lines
from models.stages.callbacks import Metrics
from models.stages.evaluations import Evaluated, Evaluations
from models.stages.signals import SAVE, Signals
from models.stages.stage import Stage

#: Seconds between two looks while training, and within the last wait; how long that is at most.
_PAUSE, _LAST_PAUSE, PATIENCE = 1.0, 0.1, 600.0

log = logging.getLogger(__name__)


class Evaluating(Callback):
    """Starts the evaluation of new checkpoints, one at a time, and takes up what they gave.

    Args:
        stage: what is trained.
        checkpoints: folder of its checkpoints.
        evaluations: the processes.
        metrics: where the figures go.
        signals: what the run is asked for.
    """

    def __init__(
        self, stage: Stage, checkpoints: Path, evaluations: Evaluations, metrics: Metrics, signals: Signals
    ) -> None:
        self.stage = stage
        self.checkpoints = checkpoints
        self.evaluations = evaluations
        self.metrics = metrics
        self.signals = signals
        self._began = 0
        self._looked = 0.0
        self._told: set[str] = set()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        recorded = _recorded(self.metrics.path)
        done = [each for each in self.evaluations.done() if each.images <= self.stage.images_seen]
        for each in done:
            if each.images not in recorded:
                self._take(trainer, each)
        self._began = max((each.images for each in done), default=0)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        now = time.monotonic()
        if now - self._looked >= _PAUSE:
            self._looked = now
            self._look(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Waits for what is due, as the stage is trained; 10 minutes at most, and not where a signal came."""
        until = time.monotonic() + PATIENCE
        self._look(trainer)
        if self.evaluations.running:
            print("waiting for the evaluation of the last checkpoint", flush=True)
        while self.evaluations.running and self.signals.asked <= SAVE and time.monotonic() < until:
            time.sleep(_LAST_PAUSE)
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Takes up an evaluation that has ended, and starts the next one that is due."""
        ended = self.evaluations.poll()
        if ended is not None:
            self._take(trainer, ended)
        if not self.evaluations.running:
            newest = max(self.checkpoints.glob("images-*[0-9]"), default=None)
            images = 0 if newest is None else int(newest.name.rpartition("-")[2])
            every = self.evaluations.options.every_images
            if newest is not None and images // every > self._began // every:
                self._began = images
                failed = self.evaluations.start(newest, images)
                if failed is not None:
                    self._take(trainer, failed)

    def _take(self, trainer: Trainer, each: Evaluated) -> None:
        if each.failure:
            log.warning(
                "the evaluation at %s images failed, %s; training goes on", f"{each.images:,}", each.failure
            )
            return
        figures = {f"eval_{name}": value for name, value in each.figures.items()}
        self.metrics.record(trainer, figures, each.images)
        for alarm in each.alarms:
            kind = alarm.partition(":")[0]
            if kind not in self._told:
                self._told.add(kind)
                log.warning("evaluation at %s images: %s", f"{each.images:,}", alarm)


def _recorded(path: Path) -> set[int]:
    """The images at which the metrics hold figures of an evaluation."""
    return {
        int(line["images"]) for line in read_json_lines(path) if any(key.startswith("eval_") for key in line)
    }
