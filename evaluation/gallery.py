"""The pictures of one request in a folder: made once, each with its record, gone on with where it stopped.

A picture that is there and was made by the same settings from the same checkpoint is kept, and one that
differs is never written over unasked. Several processes may share a folder: picture k is that of process k
modulo their number. Used by `sample.py` and `scripts/evaluate.py`.
"""

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.arrays import write_atomic
from data.credentials import Signer
from data.pictures import Look, PictureFormat, encode_picture, read_record
from data.progress import Progress
from data.shard_index import DataError
from evaluation.report import contact_sheet
from models.pipeline import Pipeline
from models.registry import ConfigError
from models.sampling import Job, Sampling

SAMPLES = Path("samples")
#: So many pictures are shown on the sheet; with more, the first ones. Its width in pixels.
ON_SHEET = 400
SHEET_WIDTH = 1_600
#: The longer side of a picture on the sheet is at most so many pixels.
THUMBNAIL = 256


@dataclass(frozen=True)
class Work:
    """All that the pictures of one command have in common, and the jobs. `size` is (width, height)."""

    pipeline: Pipeline
    sampling: Sampling
    size: tuple[int, int]
    jobs: Sequence[Job]
    common: Mapping[str, Any]
    look: Look
    signer: Signer | None

    def record(self, job: Job) -> dict[str, Any]:
        """What made the picture of `job`, as JSON values."""
        mixed = {"other_prompt": job.other_prompt, "share": job.share} if job.other_prompt else {}
        said = {"prompt": job.prompt, **mixed, "negative_prompt": job.negative_prompt}
        look: dict[str, Any] = {"format": self.look.format.name, "watermark": self.look.watermark}
        if self.look.format is not PictureFormat.png:
            look["quality"] = self.look.quality
        signed = {} if self.signer is None else {"signed_by": self.signer.certificate.name}
        return {**said, "seed": self.sampling.seed, "index": job.index, **self.common, **look, **signed}

    def path(self, folder: Path, k: int) -> Path:
        """Where the picture of job `k` lies in `folder`."""
        return folder / f"{k:05d}{self.look.format.value}"

    def default_folder(self) -> Path:
        """A folder for this request alone: the same one again continues in it, another destroys nothing."""
        request = json.dumps([self.record(job) for job in self.jobs], sort_keys=True)
        words = "-".join(re.findall(r"[a-z0-9]+", self.jobs[0].prompt.lower()))[:40].strip("-")
        return SAMPLES / f"{words or 'pictures'}-{hashlib.sha256(request.encode()).hexdigest()[:8]}"


def make(work: Work, folder: Path, batch_size: int, overwrite: bool = False) -> Path | None:
    """The sheet of all pictures, once all are there: this process makes its share of what is missing.

    None where other processes are not finished.

    Raises:
        ConfigError: the folder holds other pictures.
        OSError: it cannot be written.
    """
    fill(work, folder, batch_size, overwrite)
    paths = [work.path(folder, k) for k in range(len(work.jobs))]
    if not all(path.exists() for path in paths):
        return None
    scale = min(1.0, THUMBNAIL / max(work.size))
    shown = [max(1, round(side * scale)) for side in work.size]
    thumbnails = torch.stack([_thumbnail(path, *shown) for path in paths[:ON_SHEET]])
    captions = [_caption(job) for job in work.jobs[:ON_SHEET]]
    enlarged = 2 if 2 * max(shown) <= THUMBNAIL else 1
    columns = max(1, min(8, SHEET_WIDTH // (enlarged * shown[0])))
    buffer = io.BytesIO()
    contact_sheet(thumbnails, captions, columns, enlarged).save(buffer, "PNG")
    write_atomic(folder / "contact_sheet.png", buffer.getvalue())
    return folder / "contact_sheet.png"


def fill(work: Work, folder: Path, batch_size: int, overwrite: bool = False) -> None:
    """Makes this process's share of the pictures that are missing in `folder`.

    Each picture is written as soon as it is made, so that nothing is lost by an interruption.

    Raises:
        ConfigError: the folder holds other pictures.
        OSError: it cannot be written.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(rank, len(work.jobs), ranks)
    todo = [k for k in mine if not is_made(work.path(folder, k), work.record(work.jobs[k]), overwrite)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo):,} of {len(mine):,} pictures are there already: {folder}")
    with Progress("sampling", len(todo), shown=rank == 0) as progress:
        for first in range(0, len(todo), batch_size):
            some = todo[first : first + batch_size]
            jobs = [work.jobs[k] for k in some]
            images = work.pipeline.generate(jobs, work.sampling, work.size, batch_size)
            for k, job, pixels in zip(some, jobs, images, strict=True):
                write(work.path(folder, k), pixels, work, work.record(job))
            progress.update(first + len(some))


def _caption(job: Job) -> str:
    return f"{job.share:.0%} {job.other_prompt}, else {job.prompt}" if job.other_prompt else job.prompt


def _thumbnail(path: Path, width: int, height: int) -> Tensor:
    """A picture of ours as uint8 `[3 height width]`."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        small = image.convert("RGB").resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def write(path: Path, pixels: Tensor, work: Work, record: Mapping[str, Any]) -> None:
    """Writes a picture with its record inside, and the record beside it; the picture last, whole or not."""
    data = encode_picture(pixels, work.look, record)
    if work.signer is not None:
        data = work.signer.sign(data, path.suffix, record)
    write_atomic(path.with_suffix(".json"), _as_text(record))
    write_atomic(path, data)


def is_made(path: Path, record: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the picture that `record` describes is at `path`; raises ConfigError where another one is."""
    wanted = json.loads(json.dumps(record))
    beside = path.with_suffix(".json")
    found, intact = _found(path)
    if intact and found == wanted:
        if not beside.exists():
            write_atomic(beside, _as_text(record))
        return True
    if overwrite or not (path.exists() or beside.exists()):
        return False
    if not path.exists():  # stopped between the two, or a picture of another format has this name
        found = _beside(beside)
        if found == wanted:
            return False
    keys = [key for key in (*wanted, *found) if found.get(key) != wanted.get(key)]
    was = f"{keys[0]} was {found.get(keys[0])!r}"[:200] if keys and found else "it holds no such record"
    raise ConfigError(
        f"{path} is another picture ({was}); give another output=..., or overwrite=true to replace it"
    )


def _found(path: Path) -> tuple[dict[str, Any], bool]:
    """The record in a picture's file, and whether its pixels are those it was written with."""
    try:
        found, intact = read_record(path)
    except DataError:
        return {}, False
    found.pop("pixels_sha256", None)
    return found, intact


def _beside(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _as_text(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
