"""How fast each rank is, how long steps take, and what share of the machine's ceiling is used.

All ranks make the same number of steps a second, since they wait for each other: who is slow shows in what a
rank does before it meets the others, which is waiting for data and the first forward pass. `Pace` times that
on every rank and, at every line of metrics, the ranks exchange it. On a GPU the marks are events, which are
read at that moment only, so that no step waits for the device.
"""

import json
import logging
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch
from data.shard_index import write_atomic
from models.stages.effort import Effort
from models.stages.ranks import Ranks
from models.stages.stage import Stage

#: A rank so many times as slow as the median one, in so many lines of metrics in a row, is a straggler.
STRAGGLER, _IN_A_ROW = 1.25, 3
#: Edges of the histogram of step times: four bins an octave from a millisecond to about 70 minutes.
_FINE, _BINS = 4, 88

log = logging.getLogger(__name__)


class Pace(Callback):
    """Times every step of this rank.

    Args:
        stage: what is trained.
        folder: of the stage: `step_times.json` is the histogram of its steps, `ranks.jsonl` the ranks' paces.
        ranks: that train together.
        effort: for the share of the ceiling.
    """

    def __init__(self, stage: Stage, folder: Path, ranks: Ranks, effort: Effort) -> None:
        self.stage = stage
        self.folder = folder
        self.ranks = ranks
        self.effort = effort
        self._counts = np.zeros(_BINS + 1, np.int64)
        self._steps: list[float] = []
        self._fronts: list[tuple[Any, Any, float]] = []
        self._ended = self._started = 0.0
        self._mark: Any = None
        self._told: set[int] = set()
        self._slow: list[int | None] = []

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._ended = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        self._started = time.perf_counter()
        self._mark = self._now()

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        if self._mark is not None:  # the first micro-batch's; what follows may wait for others
            self._fronts.append((self._mark, self._now(), self._started - self._ended))
            self._mark = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        now = time.perf_counter()
        self._steps.append(now - self._ended)
        self._ended = now

    def restart(self) -> None:
        """What took time until now (a validation, a checkpoint) is no part of a step."""
        self._ended = time.perf_counter()

    def figures(self, images_per_second: float) -> dict[str, float]:
        """What has been timed since the last call, for a line of metrics; every rank has to ask for it.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        steps, fronts = self._steps, self._fronts
        self._steps, self._fronts = [], []
        if not steps:
            return {}
        edges = np.floor(_FINE * np.log2(np.maximum(np.array(steps) * 1000, 1e-9))).clip(-1, _BINS - 1)
        self._counts += np.bincount(edges.astype(np.int64) + 1, minlength=_BINS + 1)
        mine = [self._seconds(mark, then) + waited for mark, then, waited in fronts]
        waited = sum(wait for _, _, wait in fronts)
        every = self.ranks.gather([sum(mine) / max(len(mine), 1), waited / sum(steps)])
        paces = [pace for pace, _ in every]
        slowest = max(range(len(paces)), key=paces.__getitem__)
        middle = max(median(paces), 1e-9)
        found = {
            "step_ms_p50": 1000 * float(np.quantile(steps, 0.5)),
            "step_ms_p99": 1000 * float(np.quantile(steps, 0.99)),
            "step_ms_max": 1000 * max(steps),
        }
        used = self.effort.utilisation(images_per_second, self.ranks.size)
        if used is not None:
            found["mfu"] = used
        if self.ranks.size > 1:
            found |= {"slowest_rank": float(slowest), "slowest_rank_factor": paces[slowest] / middle}
            self._tell(slowest, paces[slowest] / middle)
        if self.ranks.first:
            self._write(every)
        return found

    def _tell(self, slowest: int, factor: float) -> None:
        self._slow = [*self._slow, slowest if factor > STRAGGLER else None][-_IN_A_ROW:]
        always = self._slow == [slowest] * _IN_A_ROW
        if always and slowest not in self._told and self.ranks.first:
            self._told.add(slowest)
            log.warning(
                "stage %s: rank %d needs %.1f times as long as the others for its data and its forward pass, "
                "and all wait for it; look at that machine and its disk (paces of all are in %s)",
                self.stage.name, slowest, factor, self.folder / "ranks.jsonl",
            )  # fmt: skip

    def _write(self, every: list[list[float]]) -> None:
        share = self.stage.plan.batch_size / self.ranks.size
        line = {
            "images": self.stage.images_seen,
            "images_per_second_alone": [share / max(pace, 1e-9) for pace, _ in every],
            "data_wait_share": [wait for _, wait in every],
        }
        with (self.folder / "ranks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        used = np.flatnonzero(self._counts)
        bins = {f"{2 ** ((int(b) - 1) / _FINE):.4g}": int(self._counts[b]) for b in used}
        document = {"from_ms": bins, "bins_an_octave": _FINE}
        write_atomic(self.folder / "step_times.json", (json.dumps(document, indent=1) + "\n").encode())

    def _now(self) -> Any:
        if self.stage.compute.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, mark: Any, then: Any) -> float:
        if isinstance(mark, float):
            return float(then - mark)
        then.synchronize()
        return float(mark.elapsed_time(then)) / 1000
