"""The folder of one evaluation: what was asked for, the pictures, and nothing of another evaluation.

Several processes may share the sampling: the first one writes down the request, the others wait for it, and
the first one waits for their pictures. They meet in files alone.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.arrays import write_atomic
from data.index import DataError
from data.progress import Progress
from evaluation.card import CARD, FEATURES
from evaluation.card_page import PAGE
from evaluation.gallery import Work, is_made
from models.registry import ConfigError

REQUEST, PICTURES, RUN = "request.json", "pictures", "run.json"
#: Seconds without a new file after which the other processes are given up.
PATIENCE = 900.0
_PAUSE = 0.1


def begin(folder: Path, request: Mapping[str, Any], overwrite: bool) -> None:
    """Writes the request into `folder`; the same one again goes on where it stopped.

    Raises:
        ConfigError: the folder holds another evaluation that is not to be overwritten, or files of none.
        OSError: it cannot be written.
    """
    wanted = json.loads(json.dumps(request))
    found = read_json(folder / REQUEST)
    if found == wanted:
        return
    if folder.is_dir() and any(folder.iterdir()):
        if not any(folder.glob(f"{REQUEST}*")):  # a run, perhaps, whose report has the name of ours
            raise ConfigError(f"{folder} holds files that are no evaluation; give another out=...")
        if not overwrite:
            what = _difference(found, wanted)
            raise ConfigError(f"{folder} holds {what}; give another out=..., or overwrite=true to replace it")
    # The old request stays until the new one takes its place: a replacement that was cut off is begun anew.
    for name in (CARD, FEATURES, PAGE, RUN):
        (folder / name).unlink(missing_ok=True)
    if (folder / PICTURES).is_dir():
        shutil.rmtree(folder / PICTURES)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / REQUEST, wanted)


def _difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in dict.fromkeys([*wanted, *found]) if found.get(key) != wanted.get(key)]
    return f"another evaluation ({keys[0]} was {found.get(keys[0])!r}, now {wanted.get(keys[0])!r})"[:300]


def await_request(folder: Path, name: str) -> None:
    """Returns once the first process has begun the request `name` in `folder`.

    Raises:
        TimeoutError: it did not in 15 minutes.
    """
    _await(lambda: int(read_json(folder / REQUEST).get("request") == name), 1, "the first process", None)


def await_pictures(work: Work, folder: Path) -> Tensor:
    """All pictures of `work`, uint8 `[N 3 H W]`, once every process has made its share.

    Raises:
        TimeoutError: none came for 15 minutes.
        DataError: a picture is not the one that was asked for.
    """
    paths = [work.path(folder, k) for k in range(len(work.jobs))]
    with Progress("waiting for the other processes", len(paths), shown=not paths[-1].exists()) as progress:
        _await(lambda: sum(path.exists() for path in paths), len(paths), "the other processes", progress)
    width, height = work.size
    pictures = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    for k, path in enumerate(paths):
        if not is_made(path, work.record(work.jobs[k]), overwrite=False):
            raise DataError(f"{path}: was changed while the evaluation ran; start the same command again")
        with Image.open(path, formats=("PNG",)) as image:
            pictures[k] = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    return pictures


def _await(count: Callable[[], int], wanted: int, whom: str, progress: Progress | None) -> None:
    before, since = count(), time.monotonic()
    while before < wanted:
        time.sleep(_PAUSE)
        now = count()
        if now > before:
            before, since = now, time.monotonic()
            if progress is not None:
                progress.update(now)
        if time.monotonic() - since > PATIENCE:
            raise TimeoutError(f"nothing came from {whom} for {PATIENCE:.0f} s; start the same command again")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object as a JSON file, whole or not at all."""
    write_atomic(path, (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def rank() -> int:
    """This process's number among those that share the work, as torchrun sets it."""
    return int(os.environ.get("RANK", "0"))
