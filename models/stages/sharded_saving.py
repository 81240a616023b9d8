"""Saves a model that is spread over ranks: each writes its own part into one checkpoint folder.

Of each part one rank writes the file, those of the first replica, at the same time and with training
waiting; the first rank then adds documents, layout and manifest and gives the folder its name, so that a
checkpoint is whole or not there, as with one rank. Nothing is gathered. The ranks see one file system.
"""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from models.checkpoint import (
    Best,
    Retention,
    publish,
    stage_folder,
    staging_of,
    succeed,
    why_unwritten,
    write_tensors,
)
from models.checkpoint_folders import free_name
from models.checkpoint_shards import LAYOUT, layout, shard_file
from models.checkpoint_writer import Retry, SaveError
from models.stages.ranks import Ranks
from models.stages.sharded import Sharding, parts

logger = logging.getLogger(__name__)


class ShardedWriter:
    """Saves to one folder, all ranks together: every method is called by all of them.

    Args:
        parent: folder of a stage's checkpoints.
        retention: which older ones stay; None for all.
        retry_images: images from the first failure to the next attempt; doubled with each failure in a row.
        ranks: that save together.
        sharding: which part each of them has.
    """

    def __init__(
        self, parent: Path, retention: Retention | None, retry_images: int, ranks: Ranks, sharding: Sharding
    ) -> None:
        self.parent = parent
        self.retention = retention
        self.retry = Retry(retry_images)
        self.ranks = ranks
        self.sharding = sharding
        self._reason = ""

    def save(
        self,
        images: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Mapping[str, Any]],
        wait: bool = False,
        best: Best | None = None,
    ) -> Path | None:
        """The new folder, written when it returns; None on the other ranks, and where it failed once.

        Args:
            images: training images seen.
            tensors: file name -> named tensors of which this rank holds its part.
            documents: file name without suffix -> JSON content.
            wait: raise where it fails, instead of trying again later.
            best: given where this checkpoint is the best so far.

        Raises:
            SaveError: it could not be written; or, without `wait`, too many before it could not.
        """
        target = free_name(self.parent, images)
        error = self._all_wrote(target, tensors, documents)
        if error is None:
            if self.ranks.first:
                succeed(target, self.retention, best)
            self.retry.succeeded()
            return target if self.ranks.first else None
        self.retry.failed(images)
        self._reason = f"{error} (failure {self.retry.failures} of {self.retry.limit} in a row)"
        if wait:
            raise SaveError(self._reason)
        if self.ranks.first:
            logger.warning("%s; training goes on", self._reason)
        return None

    def _all_wrote(
        self,
        target: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Mapping[str, Any]],
    ) -> str | None:
        """Writes the folder `target`; what went wrong, told alike on all ranks, or None."""
        staging, error = staging_of(target), None
        try:
            if self.ranks.first:
                stage_folder(staging)
        except OSError as failure:
            error = f"{target}: {why_unwritten(failure, self.parent, tensors)}"
        told = self.ranks.share([str(staging), error])
        staging, error = Path(told[0]), told[1]
        if error is None:
            error = self._parts_written(staging, tensors)
        if error is None:
            error = self._published(staging, target, tensors, documents)
        if error is not None and self.ranks.first:
            shutil.rmtree(staging, ignore_errors=True)
        return error

    def _parts_written(self, staging: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """Writes this rank's files; which rank failed, if any did."""
        failed = 0.0
        mine = {name: parts(named, self.sharding) for name, named in tensors.items()}
        try:
            for name, named in mine.items() if self.sharding.writes else ():
                file = shard_file(name, self.sharding.shard, self.sharding.shards)
                write_tensors(staging / file, named)
        except OSError as failure:
            failed = 1.0
            why = why_unwritten(failure, self.parent, mine)
            print(f"rank {self.ranks.rank}: {staging.name}: {why}", flush=True)
        who = [rank for rank, (bad,) in enumerate(self.ranks.gather([failed])) if bad]
        return f"{staging}: rank {who[0]} could not write its part, and says why" if who else None

    def _published(
        self,
        staging: Path,
        target: Path,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Mapping[str, Any]],
    ) -> str | None:
        error = None
        if self.ranks.first:
            shapes = {
                name: {key: tuple(t.shape) for key, t in named.items()} for name, named in tensors.items()
            }
            whole = {
                name: {key for key, tensor in named.items() if not isinstance(tensor, DTensor)}
                for name, named in tensors.items()
            }
            try:
                publish(staging, target, {**documents, LAYOUT: layout(shapes, whole, self.sharding.shards)})
            except OSError as failure:
                error = f"{target}: {why_unwritten(failure, self.parent, tensors)}"
        return self.ranks.share(error)

    def due(self, images: int) -> bool:
        """Whether the last save failed and should be tried again at `images` seen."""
        return self.retry.due(images)

    def check(self) -> None:
        """Raises SaveError where saves have failed too often in a row."""
        if self.retry.exhausted:
            raise SaveError(self._reason)

    def close(self) -> None:
        """Nothing: no save is ever in flight."""
