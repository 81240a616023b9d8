"""Encoding a run's pictures once, between its two stages, instead of in every step of the second.

It is `scripts/precompute.py`, run as a command, by each rank: they share the work, and what was done before a
stop is kept. Used by `train.py`.
"""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from data.datamodule import ShardData
from models.autoencoder import Autoencoder
from models.checkpoint import Checkpoint
from models.stages.launch import run_command

#: Beside the stages, in a run's folder.
FOLDER = "moments"
_FLOAT = 4


def reads_moments(checkpoint: Checkpoint) -> bool:
    """Whether the training that `checkpoint` is of read stored moments instead of pictures."""
    return "moments" in checkpoint.document("state").get("data", {}).get("plan", {})


def stored_bytes(data: ShardData, autoencoder: Autoencoder, samples: int) -> int:
    """About how large the moments of `samples` pictures are."""
    side = data.resolution // autoencoder.factor
    return data.variants * samples * 2 * autoencoder.latent_channels * side**2 * _FLOAT


def has_room(folder: Path, needed: int) -> bool:
    """Whether the disk of `folder` would still be half empty of what it has free now."""
    return shutil.disk_usage(folder).free >= 2 * needed


def encode_ahead(
    script: Path, run: Path, shards: str, data: ShardData, with_text: bool, say: Callable[[str], None]
) -> Path:
    """The folder of the moments of `run`, all of them made.

    Args:
        script: `scripts/precompute.py`.
        run: folder of a run whose autoencoder is trained.
        shards: where its pictures are.
        data: how they are read.
        with_text: whether the captions' embeddings are stored too; for a frozen text encoder.
        say: prints a line.

    Raises:
        OSError: the command ended in error; what it said stands above.
        SystemExit: it was asked to stop.
    """
    folder = run / FOLDER
    say(f"pictures are encoded once, ahead of the steps (data.precompute={data.precompute.name}): {folder}")
    words = [str(run), str(folder), "--shards", shards, "--resolution", str(data.resolution)]
    words += ["--cache", data.cache, "--workers", str(data.workers), "--variants", str(data.variants)]
    words += [
        "--flip" if data.flip else "--no-flip",
        "--no-random-crop",
        "--quiet",
        *(["--text"] if with_text else []),
    ]
    code = run_command([sys.executable, str(script), *words])
    if code in (130, 143):
        sys.exit(code)
    if code:
        raise OSError(
            f"{folder}: scripts/precompute.py ended with exit code {code}, see above; go on with "
            "resume=true, or without: data.precompute=off"
        )
    return folder
