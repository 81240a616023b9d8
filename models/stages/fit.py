"""Trains one stage from where it stands to the end of its plan, with Lightning as the loop."""

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from data.datamodule import DataModule
from data.progress import Progress
from models.checkpoint import Checkpoint
from models.loading import PICTURING
from models.portions import on_threads
from models.stages.averages import PowerFunctionAverage
from models.stages.callbacks import (
    Checkpointing,
    CheckRanks,
    Clock,
    Metrics,
    Stopping,
    Trace,
    Validation,
)
from models.stages.division import Division, divide
from models.stages.effort import Effort
from models.stages.evaluating import Evaluating
from models.stages.guard import Guard, Rewind
from models.stages.memory import out_of_memory
from models.stages.pace import Pace
from models.stages.recorder import FlightRecorder
from models.stages.reduce import make_reduction
from models.stages.saving import Saver
from models.stages.session import Session
from models.stages.signals import SAVE, Stopped
from models.stages.snapshots import Snapshots
from models.stages.stage import Stage, restore_networks, restore_optimizer
from models.stages.strategies import make_trainer

#: How often one command goes back to a checkpoint before it gives up.
MAX_REWINDS = 5


@dataclass(frozen=True)
class Work:
    """What is particular to one stage.

    Args:
        stage: restored from `checkpoint` where there is one.
        data: of batches of the plan's size.
        fingerprints: of the dataset and of frozen networks, kept in its checkpoints.
        checkpoint: whose optimizer state is taken up.
        finish: called after the last step and before the last checkpoint.
        show: makes and keeps pictures, given the images seen.
        effort: of an image, and what the machine could do, as the preflight found.
    """

    stage: Stage
    data: DataModule
    fingerprints: Mapping[str, Any]
    checkpoint: Checkpoint | None
    finish: Callable[[], None]
    show: Callable[[int], Path]
    effort: Effort = field(default_factory=Effort)


def fit(work: Work, session: Session) -> None:
    """Trains the stage and leaves its last checkpoint under `folder/<stage>/checkpoints`.

    Raises:
        Stopped: a signal asked for it; a checkpoint was saved.
        FloatingPointError: a loss or gradient was not finite.
        DataError: too many samples were bad.
        OSError: a checkpoint could not be written, memory ran out, or a rank was lost; what was saved stays.
    """
    _quieten()
    stage, ranks = work.stage, session.ranks
    here = session.folder / stage.name
    here.mkdir(parents=True, exist_ok=True)
    with Progress(stage.name, stage.plan.images, stage.images_seen, shown=ranks.first) as progress:
        saver = Saver(stage, here / "checkpoints", session, work.fingerprints)
        pace = Pace(stage, here, ranks, work.effort)
        metrics = Metrics(stage, here / "metrics.jsonl", progress, ranks, pace)
        recorder = FlightRecorder(stage, here, ranks, session.options.hang_seconds)
        loader = work.data.val_loader(
            _validation_images(work, ranks.size), ranks.rank, ranks.size, _division(stage, session).parts
        )
        validation = Validation(stage, loader, metrics, work.show, ranks)
        checkpointing = Checkpointing(stage, saver, validation)
        callbacks = [recorder, pace, metrics, validation, checkpointing]
        evaluating = _evaluating(work, session, saver, metrics)
        callbacks += [] if evaluating is None else [evaluating]
        with (
            session.signals.flagged(),
            nullcontext() if evaluating is None else evaluating.evaluations,
            saver,
            out_of_memory(stage.name, stage.compute.device),
        ):
            # This rank may have fewer cores than the one that decided.
            with on_threads(min(stage.compute.threads, torch.get_num_threads())):
                trainer = _train(work, session, callbacks, saver)
                if stage.images_seen >= stage.plan.images:
                    work.finish()  # whose figures the next stage's weights depend on
            if stage.images_seen >= stage.plan.images:
                validation.run(trainer)
                saver.save(trainer.optimizers[0], validation.figures, wait=True)
                if evaluating is not None:
                    evaluating.finish(trainer)
            for each in trainer.loggers:
                each.save()
            asked = max(int(asked) for (asked,) in ranks.gather([float(session.signals.asked)]))
    if asked > SAVE:
        raise Stopped(asked)


def _evaluating(work: Work, session: Session, saver: Saver, metrics: Metrics) -> Evaluating | None:
    """What has checkpoints evaluated; None on other ranks and for stages that make no pictures of prompts."""
    if session.evaluations is None or work.stage.name not in PICTURING or not session.ranks.first:
        return None
    return Evaluating(work.stage, saver.parent, session.evaluations, metrics, session.signals)


def _validation_images(work: Work, size: int) -> int:
    """Held-out images to measure: ranks that share a model take as many each, for they compute together."""
    images = work.stage.plan.validation_images
    if work.stage.sharding is None:
        return images
    return min(images, len(work.data.val)) // size * size


def _train(work: Work, session: Session, callbacks: list[Callback], saver: Saver) -> Trainer:
    """Makes the steps that are left, going back to a checkpoint where the guard asks for it."""
    stage, checkpoint = work.stage, work.checkpoint
    assert isinstance(stage, LightningModule)
    here, options, ranks = session.folder / stage.name, session.options, session.ranks
    division = _division(stage, session)
    reason = ""
    for attempt in range(MAX_REWINDS + 1):
        guard = Guard(
            stage, here, ranks, session.signals, make_reduction(options.reduce, division, ranks),
            options.not_finite, options.spike_zscore, options.rewind_spikes,
        )  # fmt: skip
        stage.guard = guard
        averaging = stage.ema.averaging
        snapshots = (
            [Snapshots(stage, averaging, here / "averages", ranks)]
            if isinstance(averaging, PowerFunctionAverage) and averaging.snapshot_every_images
            else []
        )
        trace = [Trace(stage, here, ranks)] if options.trace else []
        logger = session.logger.build(session.folder, stage.name) if ranks.first else False
        trainer = make_trainer(ranks, stage, options.reduce, logger, [
            _RestoreOptimizer(stage, checkpoint), Clock(stage, ranks),
            CheckRanks(stage, options.check_ranks_every_images, ranks), *trace, *snapshots,
            *callbacks, Stopping(stage),
        ])  # fmt: skip
        if attempt == 0:
            for each in trainer.loggers:
                each.log_hyperparams(dict(session.config))
        start = stage.images_seen
        try:
            trainer.fit(stage, work.data.train_loader(start, stage.plan.images, ranks.rank, ranks.size))
            guard.settle()
            return trainer
        except Rewind as rewind:
            reason, checkpoint = rewind.reason, saver.newest()
            if checkpoint is None:
                reason += ", and there is no checkpoint to go back to"
                break
            restore_networks(stage, checkpoint)
            stage.images_seen, stage.unlogged_losses = rewind.images_seen, []
            if ranks.first:
                print(
                    f"{reason}: back to the weights of {checkpoint.images:,} images, and on with the data "
                    f"after {rewind.images_seen:,}; the samples between are left out",
                    flush=True,
                )
    else:
        reason += f", and rewinding {MAX_REWINDS} times did not help"
    raise FloatingPointError(
        f"{reason}; lower optimizer.{stage.name}.lr, look at the keys in {guard.path}, then continue with "
        "resume=true"
    )


def _division(stage: Stage, session: Session) -> Division:
    return divide(f"plan.{stage.name}", stage.plan.batch_size, session.ranks.size, session.options)


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
