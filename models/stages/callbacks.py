"""What happens around the training steps of every stage, each in a callback of its own.

`Clock` counts images and moves the learning rate and the average; `FiniteGuard` refuses a step that is not a
number; `Metrics`, `Validation` and `Checkpointing` act at intervals that are counted in images.
"""

import json
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from data.batch import Batch
from data.progress import Progress
from models.stages.optim import learning_rate_factor
from models.stages.stage import Stage, save_stage


class Clock(Callback):
    """Sets the learning rate before a step; counts its images and moves the average after it."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        plan = self.stage.plan
        factor = learning_rate_factor(
            self.stage.images_seen, plan.images, plan.warmup_images, plan.cooldown_fraction
        )
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] * factor

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self.stage.images_seen += self.stage.plan.batch_size
        self.stage.ema.update(self.stage.networks, self.stage.images_seen, self.stage.plan.batch_size)


class FiniteGuard(Callback):
    """Stops before a loss or gradient that is not finite is applied, and writes down the batch's keys."""

    def __init__(self, stage: Stage, folder: Path) -> None:
        self.stage = stage
        self.path = folder / "not_finite.json"
        self._batch: Batch | None = None
        self._loss: Tensor | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, module: LightningModule, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        gradients = [p.grad for p in self.stage.networks.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if torch.isfinite(norm) and self._loss is not None and torch.isfinite(self._loss):
            return
        keys = self._batch.keys if self._batch is not None else []
        self.path.write_text(json.dumps({"images_seen": self.stage.images_seen, "keys": keys}) + "\n")
        raise FloatingPointError(
            f"stage {self.stage.name} at {self.stage.images_seen} images: the loss or a gradient is not "
            f"finite; the step was not applied and the batch's keys are in {self.path}; lower "
            f"optimizer.{self.stage.name}.lr, or look at those samples, then continue with resume=true"
        )


class Metrics(Callback):
    """A line in `metrics.jsonl`, the logger and the progress display at every interval.

    Args:
        stage: what is trained.
        path: the file, appended to; lines past the images seen are dropped when a run is resumed.
        progress: told images seen and loss.
    """

    def __init__(self, stage: Stage, path: Path, progress: Progress) -> None:
        self.stage = stage
        self.path = path
        self.progress = progress
        self._losses: list[Tensor] = []
        self._began = self._waited_since = time.perf_counter()
        self._waited = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.path.exists():
            # The last line was not finished where the run was killed, and has no newline.
            lines = [line for line in self.path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            kept = [line for line in lines if json.loads(line)["images"] <= self.stage.images_seen]
            self.path.write_text("".join(kept))
        self._began = self._waited_since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Batch, i: int) -> None:
        self._waited += time.perf_counter() - self._waited_since

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        self._losses.append(outputs["loss"].detach())
        if crossed(self.stage, self.stage.plan.log_every_images):
            self._write(trainer)
        self._waited_since = time.perf_counter()

    def _write(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self._began
        images = len(self._losses) * self.stage.plan.batch_size
        loss = torch.stack(self._losses).mean().item()
        figures = {
            "train_loss": loss,
            "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
            "images_per_second": images / seconds,
            "data_wait_share": self._waited / seconds,
            "peak_memory_gib": peak_memory_gib(self.stage.compute.device),
        }
        self.record(trainer, figures)
        self.progress.update(self.stage.images_seen, loss)
        self._losses, self._waited, self._began = [], 0.0, time.perf_counter()

    def restart_clock(self) -> None:
        """Counts time and waiting from now on, so that a validation is no part of the images/s."""
        self._waited = 0.0
        self._began = self._waited_since = time.perf_counter()

    def record(self, trainer: Trainer, figures: Mapping[str, float]) -> None:
        """Writes figures at the images seen so far to the file and to the logger."""
        with self.path.open("a") as file:
            file.write(json.dumps({"images": self.stage.images_seen, **figures}) + "\n")
        for logger in trainer.loggers:
            logger.log_metrics(dict(figures), step=self.stage.images_seen)


class Validation(Callback):
    """Held-out figures and a sheet of pictures at every interval.

    Args:
        stage: what is trained.
        loader: held-out batches.
        metrics: where the figures go.
        show: makes and keeps the pictures, given the images seen; returns the picture's path.
    """

    def __init__(
        self,
        stage: Stage,
        loader: DataLoader[Batch],
        metrics: Metrics,
        show: Callable[[int], Path],
    ) -> None:
        self.stage = stage
        self.loader = loader
        self.metrics = metrics
        self.show = show

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        plan = self.stage.plan
        if crossed(self.stage, plan.validate_every_images) and self.stage.images_seen < plan.images:
            self.run(trainer)
            self.metrics.restart_clock()

    def run(self, trainer: Trainer) -> None:
        """Measures and shows now."""
        figures = {f"val_{key}": value for key, value in self.stage.validate(self.loader).items()}
        self.metrics.record(trainer, figures)
        picture = self.show(self.stage.images_seen)
        for logger in trainer.loggers:
            log_image = getattr(
                logger, "log_image", None
            )  # Lightning's loggers share no interface for pictures
            if log_image is not None:
                log_image(key="pictures", images=[str(picture)], step=self.stage.images_seen)


class Checkpointing(Callback):
    """A checkpoint at every interval; the last one is written by whoever finishes the stage.

    Args:
        stage: what is trained.
        parent: folder of the checkpoints.
        config: the run's configuration as plain values.
        fingerprints: of the dataset and of frozen networks.
    """

    def __init__(
        self, stage: Stage, parent: Path, config: Mapping[str, Any], fingerprints: Mapping[str, str]
    ) -> None:
        self.stage = stage
        self.parent = parent
        self.config = config
        self.fingerprints = fingerprints

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        plan = self.stage.plan
        if crossed(self.stage, plan.checkpoint_every_images) and self.stage.images_seen < plan.images:
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Writes a checkpoint now."""
        save_stage(self.stage, trainer.optimizers[0], self.parent, self.config, self.fingerprints)


def crossed(stage: Stage, interval: int) -> bool:
    """Whether the last step took the images seen to or past a multiple of `interval`."""
    now, before = stage.images_seen, stage.images_seen - stage.plan.batch_size
    return now // interval > before // interval


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
