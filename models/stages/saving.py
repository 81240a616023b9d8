"""When a stage's checkpoints are written: by the first rank in the background, or by all that share a model.

After a full disk they are tried again.
"""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from models.checkpoint import Best, Checkpoint, best_of, newest
from models.checkpoint_writer import CheckpointWriter
from models.stages.session import Session
from models.stages.sharded_saving import ShardedWriter
from models.stages.stage import Stage, stage_state, stage_tensors

#: After a failed save the next attempt comes after this share of the interval, then twice as late each time.
_RETRY_SHARE = 8


class Saver:
    """Saves a stage; a context manager that waits for the save in flight.

    Args:
        stage: what is trained.
        parent: folder of its checkpoints.
        session: the configuration to keep with them, and who saves.
        fingerprints: of the dataset and of frozen networks.
    """

    def __init__(self, stage: Stage, parent: Path, session: Session, fingerprints: Mapping[str, Any]) -> None:
        self.stage = stage
        self.parent = parent
        self.session = session
        self.fingerprints = fingerprints
        self._best = self._best_on_disk()
        self._writer = self._new_writer()

    def _best_on_disk(self) -> float | None:
        known = best_of(self.parent) if self.session.ranks.first and self.parent.is_dir() else None
        best = known[2] if known is not None and known[1] == self.session.keep.best else None
        return best if self.stage.sharding is None else self.session.ranks.share(best)

    def _new_writer(self) -> CheckpointWriter | ShardedWriter:
        retention = self.session.keep.retention
        retry = max(1, self.stage.plan.checkpoint_every_images // _RETRY_SHARE)
        sharding = self.stage.sharding
        if sharding is None:
            return CheckpointWriter(self.parent, retention, retry)
        return ShardedWriter(self.parent, retention, retry, self.session.ranks, sharding)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def check(self) -> None:
        """Takes note of a save that has ended.

        Raises:
            SaveError: saves have failed too often in a row.
        """
        self._writer.check()

    def retry_due(self, images: int) -> bool:
        """Whether a failed save should be tried again at `images` seen."""
        return self._writer.due(images)

    def better(self, figures: Mapping[str, float]) -> bool:
        """Whether held-out `figures` are the best so far."""
        keep = self.session.keep
        if self._writer.retry.failures:  # the best that was to be saved may not have been
            self._best = self._best_on_disk()
        return keep.best in figures and keep.better(figures[keep.best], self._best)

    def save(self, optimizer: torch.optim.Optimizer, figures: Mapping[str, float], wait: bool) -> None:
        """Writes a checkpoint of the stage as it is now.

        Args:
            optimizer: of the networks.
            figures: held-out ones of these very weights; empty where they were not measured.
            wait: return when it is on disk.

        Raises:
            SaveError: it could not be written, or too many before it could not.
        """
        best = None
        if self.better(figures):
            self._best = figures[self.session.keep.best]
            best = Best(self.session.keep.best, self._best)
        if self.stage.sharding is None and not self.session.ranks.first:
            return
        tensors = stage_tensors(self.stage, optimizer)
        documents = {"config": self.session.config, "state": stage_state(self.stage, self.fingerprints)}
        self._writer.save(self.stage.images_seen, tensors, documents, wait, best)

    def newest(self) -> Checkpoint | None:
        """The last verified checkpoint, the same one on every rank; a save in flight is waited for."""
        self._writer.close()
        self._writer = self._new_writer()
        mine = newest(self.parent) if self.session.ranks.first else None
        folder = self.session.ranks.share(None if mine is None else str(mine.folder))
        return mine if mine is not None or folder is None else Checkpoint(Path(folder))
