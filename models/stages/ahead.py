"""Encoding a run's pictures once, between its two stages, instead of in every step of the second.

It is `scripts/precompute.py`, run as a command, by each rank: they share the work, and what was done before a
stop is kept. Used by `train.py`.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from data.datamodule import Precompute, ShardData, holds_moments
from data.shard_index import DataError
from models.autoencoder import Autoencoder
from models.checkpoint import Checkpoint, CheckpointError
from models.stages.launch import run_command
from models.stages.ranks import Ranks

#: Beside the stages, in a run's folder.
FOLDER = "moments"
_FLOAT = 4
#: So much of the free disk moments may take; checkpoints, pictures and other runs have the rest.
_SHARE_OF_FREE = 1 / 4
_STOPPED = (130, 143)
_ERRORS: dict[int, type[Exception]] = {3: DataError, 4: CheckpointError}


def reads_moments(checkpoint: Checkpoint) -> bool:
    """Whether the training that `checkpoint` is of read stored moments instead of pictures."""
    return "moments" in checkpoint.document("state").get("data", {}).get("plan", {})


def stored_bytes(data: ShardData, autoencoder: Autoencoder, samples: int) -> int:
    """About how large the moments of `samples` pictures are."""
    side = data.resolution // autoencoder.factor
    return data.variants * samples * 2 * autoencoder.latent_channels * side**2 * _FLOAT


def has_room(folder: Path, needed: int) -> bool:
    """Whether what `folder` lacks of `needed` bytes is at most a quarter of what its disk has free."""
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return needed - there <= _SHARE_OF_FREE * shutil.disk_usage(folder.parent).free


@dataclass(frozen=True)
class Ahead:
    """Moments in a run's own folder, made by its trained autoencoder.

    Args:
        script: `scripts/precompute.py`.
        run: folder of the run.
        shards: where its pictures are.
        data: how they are read.
        ranks: that train together.
        on_cpu: whether a GPU that is there is left alone.
        say: prints a line, once for all ranks.
    """

    script: Path
    run: Path
    shards: str
    data: ShardData
    ranks: Ranks
    on_cpu: bool
    say: Callable[[str], None]

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.run / FOLDER

    def go_on(self, begun: Checkpoint, done: bool) -> bool:
        """Whether the stage that `begun` is of reads them; `done` where nothing is left to train of it.

        Raises:
            CheckpointError: it read them until now, and they are gone.
        """
        if not reads_moments(begun):
            return False
        there = bool(self.ranks.share(holds_moments(self.folder) if self.ranks.first else None))
        if not there and not done:
            raise CheckpointError(
                f"{begun.folder} was trained on stored moments, and {self.folder} has none; give "
                "data.precomputed=... if they are elsewhere, or make them again: python "
                f"scripts/precompute.py {self.run} {self.folder}"
            )
        return there

    def make(self, autoencoder: Autoencoder, samples: int, with_text: bool) -> bool:
        """Encodes `samples` pictures, all ranks together, and returns whether the moments are there.

        Where they are wanted only if that pays, it says why they are not, and the run goes on without.

        Args:
            autoencoder: of the run, for its shape.
            samples: training pictures.
            with_text: whether the captions' embeddings are stored too; for a frozen text encoder.

        Raises:
            Exception: they are wanted in any case and cannot be made.
            SystemExit: a command was asked to stop.
            RankError: a rank is gone, or waited longer than `trainer.timeout` for the others.
        """
        wanted, needed = self.data.precompute is Precompute.on, stored_bytes(self.data, autoencoder, samples)
        if not self.ranks.share(has_room(self.folder, needed) if self.ranks.first else None):
            told = (
                f"{self.folder}: {needed / 1e9:.3g} GB of moments would take over a quarter of the free disk"
            )
            if wanted:
                raise OSError(f"{told}; free some, or train without: data.precompute=off")
            self.say(f"{told}: pictures are encoded in every step")
            return False
        self.say(f"pictures are encoded once, ahead of the steps (data.precompute): {self.folder}")
        code = self._run_script(with_text)
        if code and wanted:
            raise _ERRORS.get(code, OSError)(
                f"{self.folder}: scripts/precompute.py ended with exit code {code}, see above; mend that and "
                "give resume=true, or train without: data.precompute=off"
            )
        if code:
            self.say(f"scripts/precompute.py ended with exit code {code}: pictures are encoded in every step")
        return not code

    def _run_script(self, with_text: bool) -> int:
        """0 once the script has ended on all ranks; else the exit code of one that failed."""
        data = self.data
        words = [str(self.run), str(self.folder), "--shards", self.shards]
        words += ["--resolution", str(data.resolution), "--cache", data.cache]
        words += ["--cache-gb", str(data.cache_gb), "--workers", str(data.workers)]
        words += ["--max-bad-fraction", str(data.max_bad_fraction), "--variants", str(data.variants)]
        words += ["--flip" if data.flip else "--no-flip", "--no-random-crop", "--quiet"]
        words += ["--text"] if with_text else []
        environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        environment |= {"CUDA_VISIBLE_DEVICES": ""} if self.on_cpu else {}
        mine = run_command([sys.executable, str(self.script), *words], environment)
        codes = [int(code) for (code,) in self.ranks.gather([mine])]
        for code in codes:
            if code in _STOPPED:
                sys.exit(code)
        return max(codes)
