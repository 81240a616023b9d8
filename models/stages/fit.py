"""Trains one stage from where it stands to the end of its plan, with Lightning as the loop."""

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from data.datamodule import DataModule
from data.progress import Progress
from models.checkpoint import Checkpoint
from models.stages.callbacks import Checkpointing, Clock, FiniteGuard, Metrics, Validation
from models.stages.logs import LogSettings
from models.stages.stage import Stage, restore_optimizer


def fit(
    stage: Stage,
    data: DataModule,
    folder: Path,
    config: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    logger: LogSettings,
    checkpoint: Checkpoint | None,
    finish: Callable[[], None],
    show: Callable[[int], Path],
) -> None:
    """Trains `stage` and leaves its last checkpoint under `folder/<stage>/checkpoints`.

    Args:
        stage: restored from `checkpoint` where there is one.
        data: of batches of the plan's size.
        folder: of the run.
        config: the run's configuration as plain values.
        fingerprints: of the dataset and of frozen networks.
        logger: besides `metrics.jsonl`.
        checkpoint: whose optimizer state is taken up.
        finish: called after the last step and before the last checkpoint.
        show: makes and keeps pictures, given the images seen.

    Raises:
        FloatingPointError: a loss or gradient was not finite.
        DataError: too many samples were bad.
        OSError: a checkpoint could not be written; those before it are whole.
    """
    assert isinstance(stage, LightningModule)
    _quieten()
    here = folder / stage.name
    here.mkdir(parents=True, exist_ok=True)
    start, plan = stage.images_seen, stage.plan
    steps = -(-(plan.images - start) // plan.batch_size)
    with Progress(stage.name, plan.images, start) as progress:
        metrics = Metrics(stage, here / "metrics.jsonl", progress)
        validation = Validation(stage, data.val_loader(plan.validation_images), metrics, show)
        checkpointing = Checkpointing(stage, here / "checkpoints", config, fingerprints)
        trainer = Trainer(
            accelerator="gpu" if stage.compute.device.type == "cuda" else "cpu",
            devices=1,
            max_steps=steps,
            max_epochs=-1,
            precision="32-true",  # autocast is the stage's own, so that probes and pictures compute alike
            gradient_clip_val=plan.gradient_clip,
            logger=logger.build(folder, stage.name),
            callbacks=[
                _RestoreOptimizer(stage, checkpoint),
                Clock(stage),
                FiniteGuard(stage, here),
                metrics,
                validation,
                checkpointing,
            ],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        for each in trainer.loggers:
            each.log_hyperparams(dict(config))
        try:
            trainer.fit(stage, data.train_loader(start, plan.images))
        except SystemExit:  # what Lightning makes of an interrupt
            raise KeyboardInterrupt from None
        finish()
        validation.run(trainer)
        checkpointing.save(trainer)
        for each in trainer.loggers:
            each.save()


class _RestoreOptimizer(Callback):
    """Takes up the optimizer's state once Lightning has made the optimizer."""

    def __init__(self, stage: Stage, checkpoint: Checkpoint | None) -> None:
        self.stage = stage
        self.checkpoint = checkpoint

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        if self.checkpoint is not None:
            restore_optimizer(self.stage, optimizer, self.checkpoint)


def _quieten() -> None:
    """Silences what Lightning says about its own product and about loaders that are ours on purpose."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
