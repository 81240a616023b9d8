"""What happens around the training steps of every stage, each in a callback of its own.

`Clock` counts images and moves the learning rate; `CheckRanks`, `Metrics`, `Validation` and
`Checkpointing` act at intervals that are counted in images; `Trace` writes down what each step saw;
`Stopping` ends the run where all ranks agreed to. The step itself, in however many micro-batches, is the
guard's (guard.py), which knows what became of it a step later: whoever needs to know at once, or the average,
has it settled first, at moments that are the same on all ranks. Of several ranks the first one writes.
"""

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from data.batch import Batch
from data.json_lines import read_json_lines
from data.loader import Loader
from data.progress import Progress
from data.shard_index import write_atomic
from models.stages.effort import Meter, hours_in
from models.stages.optim import learning_rate_factor
from models.stages.pace import Pace
from models.stages.ranks import Ranks, listed
from models.stages.replicas import RanksDiffer, differing
from models.stages.saving import Saver
from models.stages.signals import SAVE
from models.stages.stage import Stage

#: Share of captions that do not fit into the text encoder from which on it is told.
MANY_TRUNCATED = 0.05

log = logging.getLogger(__name__)


class Clock(Callback):
    """Sets the learning rate before a step; counts its images after it."""

    def __init__(self, stage: Stage, ranks: Ranks) -> None:
        self.stage = stage
        self.ranks = ranks

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        plan = self.stage.plan
        self.ranks.beat(self.stage.images_seen // plan.batch_size)
        factor = learning_rate_factor(
            self.stage.images_seen, plan.images, plan.warmup_images, plan.cooldown_fraction
        )
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * factor

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.stage.images_seen += self.stage.plan.batch_size


class CheckRanks(Callback):
    """Compares the weights of all ranks at every interval, before a checkpoint is made of the first rank's.

    Args:
        stage: what is trained.
        every_images: the interval.
        ranks: that train together.
    """

    def __init__(self, stage: Stage, every_images: int, ranks: Ranks) -> None:
        self.stage = stage
        self.every_images = every_images
        self.ranks = ranks
        self._agreed = stage.images_seen

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ranks.size > 1 and self.every_images:
            self.check()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        if self.ranks.size > 1 and self.every_images and crossed(self.stage, self.every_images):
            self.check()

    def check(self) -> None:
        """Compares now.

        Raises:
            RanksDiffer: naming ranks and tensors.
            RankError: a rank is gone or does not answer.
        """
        tensors = self.stage.networks.state_dict()
        found = differing(tensors, self.ranks)
        if found:
            named = [f"{name} of {listed(odd)}" for name, odd in found.items()]
            more = f" and {len(named) - 3} more" if len(named) > 3 else ""
            raise RanksDiffer(
                f"stage {self.stage.name} at {self.stage.images_seen} images: the ranks no longer have the "
                f"same weights: {', '.join(named[:3])}{more}; all agreed at {self._agreed} images; a device "
                "or its memory erred: test it, remove the checkpoints since then if rank 0 is named, "
                "and continue with resume=true"
            )
        self._agreed = self.stage.images_seen


class Trace(Callback):
    """A line for each step in `trace-<rank>.jsonl`: the samples of this rank and the exact losses.

    Steps that are made again after a resume appear again: the file is evidence, not a log.
    """

    def __init__(self, stage: Stage, folder: Path, ranks: Ranks) -> None:
        self.stage = stage
        self.path = folder / f"trace-{ranks.rank}.jsonl"

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        guard = self.stage.guard
        guard.settle()
        entry = {
            "images": self.stage.images_seen - self.stage.plan.batch_size,
            "indices": batch.indices.tolist(), "keys": batch.keys,
            "loss": guard.own_loss.hex(), "global_loss": guard.loss.hex(),
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


class Metrics(Callback):
    """A line in `metrics.jsonl`, the logger and the progress display at every interval.

    Args:
        stage: what is trained.
        path: the file, appended to; lines past the images seen are dropped when a run is resumed.
        progress: told images seen and loss.
        ranks: of which the first one writes.
        pace: how long the steps of all ranks take; a callback that comes before this one.
    """

    def __init__(self, stage: Stage, path: Path, progress: Progress, ranks: Ranks, pace: Pace) -> None:
        self.stage = stage
        self.path = path
        self.progress = progress
        self.ranks = ranks
        self.pace = pace
        self._meter = Meter(ranks.size)
        self._began = self._waited_since = time.perf_counter()
        self._waited, self._steps, self._truncated, self._substituted = 0.0, 0, 0, 0
        self._warned = False

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.ranks.first and self.path.exists():
            lines = read_json_lines(self.path)
            kept = [line for line in lines if line["images"] <= self.stage.images_seen]
            if len(kept) < len(lines) or not self.path.read_bytes().endswith(b"\n"):
                write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            # Those of steps that are made again were spent as well.
            spent = max(map(hours_in, lines), default=0.0)
            self._meter = Meter(self.ranks.size, spent)
        self._began = self._waited_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        self._waited += time.perf_counter() - self._waited_since

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self._steps += 1
        self._truncated += batch.truncated
        self._substituted += batch.substituted
        if crossed(self.stage, self.stage.plan.log_every_images):
            self.stage.guard.settle()
            self._write(trainer)
        self._waited_since = time.perf_counter()

    def _write(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self._began
        losses, images = self.stage.unlogged_losses, self._steps * self.stage.plan.batch_size
        figures = {"train_loss": fmean(losses)} if losses else {}  # none where every step was refused
        figures |= {
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / seconds,
            **self.pace.figures(images / seconds),
            **self._meter.figures(self.stage.plan.images - self.stage.images_seen, images / seconds),
            "data_wait_share": self._waited / seconds,
            "caption_truncated_share": self._truncated * self.ranks.size / images,
            "substituted_share": self._substituted * self.ranks.size / images,
            "peak_memory_gib": peak_memory_gib(self.stage.compute.device),
        }
        self.record(trainer, figures)
        self.progress.update(self.stage.images_seen, figures.get("train_loss"))
        self._warn(figures["caption_truncated_share"])
        self.stage.unlogged_losses = []
        self._truncated = self._substituted = 0
        self._waited, self._began, self._steps = 0.0, time.perf_counter(), 0

    def _warn(self, truncated: float) -> None:
        if truncated > MANY_TRUNCATED and not self._warned and self.ranks.first:
            self._warned = True
            log.warning(
                "stage %s: %.0f %% of the captions are longer than text_encoder.context_length, and what is "
                "beyond it is not learnt; raise it, or shorten the captions",
                self.stage.name, 100 * truncated,
            )  # fmt: skip

    def restart_clock(self) -> None:
        """Counts time and waiting from now on, so that a validation is no part of the images/s."""
        self._waited, self._steps, self._truncated, self._substituted = 0.0, 0, 0, 0
        self._began = self._waited_since = time.perf_counter()
        self.pace.restart()

    def record(self, trainer: Trainer, figures: Mapping[str, float], images: int | None = None) -> None:
        """Writes figures at `images`, by default those seen so far, to the file and to the logger."""
        if not self.ranks.first:
            return
        images = self.stage.images_seen if images is None else images
        with self.path.open("a") as file:
            file.write(json.dumps({"images": images, **figures}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=images)


class Validation(Callback):
    """Held-out figures and a sheet of pictures at every interval.

    Args:
        stage: what is trained.
        loader: this rank's share of the held-out batches.
        metrics: where the figures go.
        show: makes and keeps the pictures, given the images seen; returns the picture's path.
        ranks: that measure together.
    """

    def __init__(
        self, stage: Stage, loader: Loader, metrics: Metrics, show: Callable[[int], Path], ranks: Ranks
    ) -> None:
        self.stage = stage
        self.loader = loader
        self.metrics = metrics
        self.show = show
        self.ranks = ranks
        #: The last figures, and the images seen when they were measured.
        self.figures: dict[str, float] = {}
        self.measured_at = -1

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        plan = self.stage.plan
        if crossed(self.stage, plan.validate_every_images) and self.stage.images_seen < plan.images:
            self.stage.guard.settle()
            self.run(trainer)
            self.metrics.restart_clock()

    def run(self, trainer: Trainer) -> None:
        """Measures and shows now."""
        values = self.stage.validate(self.loader)
        self.figures = {
            f"val_{key}": self.ranks.gather_tensor(value.cpu()).mean().item() for key, value in values.items()
        }
        self.measured_at = self.stage.images_seen
        self.metrics.record(trainer, self.figures)
        if not self.ranks.first and self.stage.sharding is None:
            return
        picture = self.show(self.stage.images_seen)  # by all ranks where they share the networks
        for logger in trainer.loggers:
            log_image = getattr(
                logger, "log_image", None
            )  # Lightning's loggers share no interface for pictures
            if log_image is not None:
                log_image(key="pictures", images=[str(picture)], step=self.stage.images_seen)


class Checkpointing(Callback):
    """A checkpoint at every interval, where a signal asked for one, and where the figures are the best.

    The last one is written by whoever finishes the stage.
    """

    def __init__(self, stage: Stage, saver: Saver, validation: Validation) -> None:
        self.stage = stage
        self.saver = saver
        self.validation = validation

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        plan, seen, guard = self.stage.plan, self.stage.images_seen, self.stage.guard
        self.saver.check()
        if seen >= plan.images:
            return
        figures = self.validation.figures if self.validation.measured_at == seen else {}
        due = bool(guard.asked) or crossed(self.stage, plan.checkpoint_every_images)
        if due:
            guard.settle()
        # Only the rank that writes knows of a retry, so that it may not settle for it: all have to at once.
        if due or self.saver.better(figures) or (guard.settled and self.saver.retry_due(seen)):
            self.saver.save(trainer.optimizers[0], figures, wait=guard.asked > SAVE)
            if guard.asked:
                guard.saved()


class Stopping(Callback):
    """Ends the training after a step at which the ranks agreed that one of them was asked to stop."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        if self.stage.guard.asked > SAVE:
            trainer.should_stop = True


def crossed(stage: Stage, interval: int) -> bool:
    """Whether the last step took the images seen to or past a multiple of `interval`."""
    now, before = stage.images_seen, stage.images_seen - stage.plan.batch_size
    return now // interval > before // interval


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
