"""Encoding a run's pictures once, between its two stages, instead of in every step of the second.

It is `scripts/precompute.py`, run as a command, by each rank: they share the work, and what was done before a
stop is kept. Used by `train.py`.
"""

import shutil
import sys
from pathlib import Path

import torch

from data.datamodule import ShardData
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


def encode_ahead(
    script: Path, run: Path, shards: str, data: ShardData, with_text: bool, on_cpu: bool, ranks: Ranks
) -> int:
    """0 once the moments of `run` are made by all ranks; else the exit code of a command that failed.

    Args:
        script: `scripts/precompute.py`.
        run: folder of a run whose autoencoder is trained.
        shards: where its pictures are.
        data: how they are read.
        with_text: whether the captions' embeddings are stored too; for a frozen text encoder.
        on_cpu: whether a GPU that is there is left alone.
        ranks: that train together.

    Raises:
        SystemExit: a command was asked to stop.
        RankError: a rank is gone, or waited longer than `trainer.timeout` for the others.
    """
    words = [str(run), str(run / FOLDER), "--shards", shards, "--resolution", str(data.resolution)]
    words += ["--cache", data.cache, "--cache-gb", str(data.cache_gb), "--workers", str(data.workers)]
    words += ["--max-bad-fraction", str(data.max_bad_fraction), "--variants", str(data.variants)]
    words += ["--flip" if data.flip else "--no-flip", "--no-random-crop", "--quiet"]
    words += ["--text"] if with_text else []
    environment = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if on_cpu else {}
    mine = run_command([sys.executable, str(script), *words], environment)
    codes = [int(code) for (code,) in ranks.gather([mine])]
    for code in codes:
        if code in _STOPPED:
            sys.exit(code)
    return max(codes)


def failure(folder: Path, code: int) -> Exception:
    """What to raise of a command that ended with `code`."""
    return _ERRORS.get(code, OSError)(
        f"{folder}: scripts/precompute.py ended with exit code {code}, see above; mend that and give "
        "resume=true, or train without: data.precompute=off"
    )
