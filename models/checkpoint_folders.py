"""The folder that holds a stage's checkpoints: names, links, and what is kept in it.

    images-000096000/  images-000128000/     the numbers are what counts
    last  best                               links to such folders, for people
    best.json                                {"folder", "metric", "value"}

Numbers decide, never times of change or links: where a file system has no links, none is made. Whatever is
being made or removed goes by a hidden name ending in .part, so that a crash leaves nothing that could be
taken for a checkpoint, and the run's next start or save removes it. What lies inside a folder is the matter
of `models/checkpoint.py`, whose users find here nothing that is not there as well.
"""

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

LAST, BEST, BEST_FILE = "last", "best", "best.json"
_NAME = re.compile(r"images-(\d+)(?:-(\d+))?")
#: What a process that was killed leaves behind.
_ABANDONED = (".images-*.part", *(f".{name}.part" for name in (LAST, BEST, BEST_FILE)))


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or made for something else."""


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a newer one has been saved; what `best.json` names stays in any case.

    Args:
        last: so many of the newest that verify, 2 or more.
        every_images: also the first at or past each multiple of this; 0 for none.

    Raises:
        ValueError: out of range.
    """

    last: int = 2
    every_images: int = 0

    def __post_init__(self) -> None:
        if self.last < 2:
            raise ValueError(
                f"last is {self.last}, but must be 2 or more: where the newest is damaged, "
                "training goes on from the one before"
            )
        if self.every_images < 0:
            raise ValueError(f"every_images is {self.every_images}, but must be 0 or more")


@dataclass(frozen=True)
class Best:
    """A held-out figure by which a checkpoint is the best so far, such as `Best("loss", 0.41)`.

    Raises:
        ValueError: `value` is no finite number.
    """

    metric: str
    value: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"{self.metric} is {self.value}, which is no finite number")


def mark_best(parent: Path, folder: Path | str, metric: str, value: float) -> None:
    """Writes that `folder`, one of `parent`, is the best so far; it is kept until another one is.

    Not while another thread saves to `parent`: give a save its `best` instead.

    Raises:
        CheckpointError: there is no such folder.
        ValueError: `value` is no finite number.
        OSError: the disk is full or not writable; the best before it is still the best.
    """
    name = Path(folder).name
    if not _NAME.fullmatch(name) or not (parent / name).is_dir():
        raise CheckpointError(f"{parent / name}: is no checkpoint and cannot be the best one")
    if not math.isfinite(value):
        raise ValueError(f"{parent / name}: {metric} is {value}, which is no finite number")
    part = parent / f".{BEST_FILE}.part"
    content = {"folder": name, "metric": metric, "value": float(value)}
    try:
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        fsync(part)
        part.replace(parent / BEST_FILE)
    finally:
        part.unlink(missing_ok=True)
    fsync(parent)
    point(parent / BEST, name)


def best_of(parent: Path) -> tuple[str, str, float] | None:
    """Folder name, metric and value of the best checkpoint; None where none was marked.

    Also None, with a warning, where `best.json` is damaged or names a folder that is not there.
    """
    path = parent / BEST_FILE
    try:
        content = json.loads(path.read_bytes())
        name, metric, value = content["folder"], str(content["metric"]), float(content["value"])
        if not _NAME.fullmatch(name) or not (parent / name).is_dir():
            raise ValueError(f"there is no checkpoint {name!r}")
        if not math.isfinite(value):
            raise ValueError(f"{value} is no finite number")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        logger.warning("%s: names no best checkpoint (%s: %s)", path, type(error).__name__, error)
        return None
    return name, metric, value


def rank(folder: Path) -> tuple[int, int]:
    """Images seen, and how often that step had been saved before; (-1, 0) if it is no checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def free_name(parent: Path, images: int) -> Path:
    """A name in `parent` that ranks above every folder of the same step."""
    again = max((rank(p)[1] + 1 for p in folders(parent) if rank(p)[0] == images), default=0)
    return parent / (f"images-{images:012d}" + (f"-{again}" if again else ""))


def folders(parent: Path) -> list[Path]:
    """Checkpoint folders, fewest images first; by number, never by time of change."""
    return sorted((p for p in parent.glob("images-*") if _NAME.fullmatch(p.name)), key=rank)


def remove_abandoned(parent: Path) -> None:
    """Removes what a process that was killed has left."""
    for pattern in _ABANDONED:
        for path in parent.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def point(link: Path, name: str) -> None:
    """Points `link` at its neighbour `name`; where the file system has no links, there is none."""
    part = link.with_name(f".{link.name}.part")
    with contextlib.suppress(OSError, NotImplementedError):
        part.unlink(missing_ok=True)
        part.symlink_to(name)
        try:
            part.replace(link)
        finally:
            part.unlink(missing_ok=True)


def best_names(parent: Path) -> set[str]:
    """Names that the best one goes by: a crash may lie between the file and the link."""
    found = best_of(parent)
    names = set() if found is None else {found[0]}
    with contextlib.suppress(OSError):
        names.add(os.readlink(parent / BEST))
    return names


def superseded(saved: Path, retention: Retention, verifies: Callable[[Path], bool]) -> list[Path]:
    """The folders below `saved` that are not to be kept.

    What lies above it stays: a run that was resumed from before found it damaged, and it is no reason to
    remove what that run writes.

    Args:
        saved: the newest one, which verifies.
        retention: the rule.
        verifies: whether a folder is whole; asked as rarely as possible, for it reads all of it.
    """
    there = folders(saved.parent)
    below = [folder for folder in there if rank(folder) < rank(saved)]
    kept = 1
    while below and kept < retention.last:
        kept += verifies(below.pop())
    keep = {saved.parent / name for name in best_names(saved.parent)}
    if below and retention.every_images:
        keep |= _milestones(there, retention.every_images, verifies)
    return [folder for folder in below if folder not in keep]


def _milestones(there: list[Path], every: int, verifies: Callable[[Path], bool]) -> set[Path]:
    """For each multiple of `every` images, the first folder at or past it that verifies.

    One that is alone at its multiple is not read again: there is none to take its place.
    """
    groups: dict[int, list[Path]] = {}
    for folder in there:
        groups.setdefault(rank(folder)[0] // every, []).append(folder)
    groups.pop(0, None)
    firsts = (next((f for f in group if len(group) == 1 or verifies(f)), None) for group in groups.values())
    return {folder for folder in firsts if folder is not None}


def remove(folder: Path) -> None:
    """Removes a folder, out of sight first so that a kill leaves no half one; if it cannot be, it stays."""
    hidden = folder.with_name(f".{folder.name}.old.part")
    with contextlib.suppress(OSError):
        folder.rename(hidden)
        shutil.rmtree(hidden)


def fsync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
