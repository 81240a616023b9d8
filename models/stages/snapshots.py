"""Snapshots of power-function averages, and an average of another width made of them after the training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch
from models.checkpoint import Checkpoint, CheckpointError
from models.checkpoint_folders import folders, rank
from models.checkpoint_writer import CheckpointWriter
from models.stages.averages import PowerFunctionAverage, Profile, combination, gamma_of
from models.stages.ranks import Ranks
from models.stages.sharded_saving import ShardedWriter
from models.stages.stage import Stage


class Snapshots(Callback):
    """Writes the averages into checkpoint folders of their own, at every interval and at the end.

    Args:
        stage: whose averages they are.
        averaging: which they are.
        parent: folder of the snapshots.
        ranks: of which the first writes, or all where they share the model.
    """

    def __init__(self, stage: Stage, averaging: PowerFunctionAverage, parent: Path, ranks: Ranks) -> None:
        self.stage = stage
        self.averaging = averaging
        self.ranks = ranks
        every = averaging.snapshot_every_images
        self.writer = (
            CheckpointWriter(parent, None, every)
            if stage.sharding is None
            else ShardedWriter(parent, None, every, ranks, stage.sharding)
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Batch, i: int
    ) -> None:
        stage, every = self.stage, self.averaging.snapshot_every_images
        seen, before = stage.images_seen, stage.images_seen - stage.plan.batch_size
        self.writer.check()
        if seen // every > before // every or seen >= stage.plan.images:
            stage.guard.settle()
        elif not (stage.guard.settled and self.writer.due(seen)):
            return
        if stage.sharding is None and not self.ranks.first:
            return
        dtype = torch.float16 if self.averaging.half else torch.float32
        tensors = {
            snapshot_name(sigma_rel): {
                key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for key, tensor in network.state_dict().items()
            }
            for sigma_rel, network in zip(self.averaging.sigma_rel, stage.ema.networks, strict=True)
        }
        self.writer.save(seen, tensors, {"averages": {"sigma_rel": list(self.averaging.sigma_rel)}})

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.writer.close()


def snapshot_name(sigma_rel: float) -> str:
    """The name of the tensors of one width in a snapshot."""
    return f"sigma_rel-{sigma_rel:g}"


def reconstruct(parent: Path, sigma_rel: float, images: int | None = None) -> dict[str, Tensor]:
    """The averaged weights of width `sigma_rel` after `images` seen, float32, from the snapshots in `parent`.

    Args:
        parent: the folder `averages` of a stage.
        sigma_rel: any width in (0, 0.288].
        images: the last snapshot's where None; those after it are left out.

    Raises:
        ValueError: a width that no average has.
        CheckpointError: there are no snapshots, or damaged ones.
    """
    gamma = gamma_of(sigma_rel)
    found = {rank(folder)[0]: folder for folder in folders(parent)}  # of one saved twice the later
    kept = {seen: folder for seen, folder in found.items() if images is None or seen <= images}
    if not kept:
        raise CheckpointError(f"{parent}: holds no snapshot of averages; train with ema=power to have some")
    snapshots = [
        (Profile(seen, gamma_of(width)), snapshot.stored(snapshot_name(width)))
        for seen, snapshot in ((seen, Checkpoint(folder)) for seen, folder in kept.items())
        for width in widths(snapshot.document("averages"))
    ]
    last = Profile(max(kept) if images is None else images, gamma)
    factors = combination([profile for profile, _ in snapshots], last)
    average: dict[str, Tensor] = {}
    for key in snapshots[-1][1]:
        newest = snapshots[-1][1].whole(key)
        if newest.is_floating_point():
            terms = (
                f * stored.whole(key).double() for f, (_, stored) in zip(factors, snapshots, strict=True)
            )
            average[key] = sum(terms, torch.zeros(newest.shape, dtype=torch.float64)).float()
        else:
            average[key] = newest
    return average


def widths(document: Mapping[str, Any]) -> list[float]:
    """The widths a snapshot holds, as its document says."""
    return [float(width) for width in document["sigma_rel"]]
