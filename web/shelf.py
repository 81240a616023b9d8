"""The checkpoints that the studio offers: found in folders, loaded when wanted, the latest few kept.

    shelf = Shelf([Place.of("runs"), Place.of("small=runs/a")], device)
    shelf.look(); shelf.survey(); source = shelf.get(shelf.offers()[0].id)

A damaged checkpoint stays in the list, with what is wrong with it. A run that is still being trained is
loaded again once it has a newer checkpoint.
"""

import contextlib
import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evaluation.request import Source
from models.checkpoint import CheckpointError
from models.checkpoint_folders import folders
from models.loading import PICTURING, load_pipeline
from models.pipeline import Pipeline
from models.registry import ConfigError

log = logging.getLogger(__name__)

#: Checkpoints that are in memory at once.
KEPT = 3


@dataclass(frozen=True)
class Place:
    """Where checkpoints lie: a run, a file that `scripts/export.py` wrote, or a folder of such."""

    path: Path
    name: str | None = None

    @classmethod
    def of(cls, word: str) -> "Place":
        """Returns the place that `PATH` or `NAME=PATH` says."""
        name, equals, path = word.partition("=")
        return cls(Path(path), name) if equals and name else cls(Path(word))

    def checkpoints(self) -> list[tuple[str, Path]]:
        """Returns names and paths of what is there, runs that have no checkpoint yet left out."""
        if self.path.is_dir() and not _is_checkpoint(self.path):
            found = sorted(path for path in self.path.iterdir() if _is_checkpoint(path))
            return [(f"{self.name}/{path.name}" if self.name else str(path), path) for path in found]
        return [(self.name or str(self.path), self.path)]


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        pictures = any((path / stage / "checkpoints").is_dir() for stage in PICTURING)
        return pictures or path.parent.name == "checkpoints"
    return path.suffix == ".safetensors"


@dataclass(frozen=True)
class Offer:
    """A checkpoint in the list.

    Args:
        id: opaque.
        name: as the page and the command call it.
        path: of its run or file.
        stamp: changes when there is a newer checkpoint.
        about: what the page is told once it has been loaded: its defaults, sizes, whether it edits.
        problem: what is wrong with it, "" while nothing is known to be.
    """

    id: str
    name: str
    path: Path
    stamp: str = ""
    about: dict[str, Any] | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns what the page is told."""
        state = "damaged" if self.problem else "ready" if self.about else "unread"
        return {
            "id": self.id,
            "name": self.name,
            "state": state,
            "problem": self.problem,
            **(self.about or {}),
        }


class Shelf:
    """The checkpoints of `places`. `look` and `offers` may be called from any thread, the rest from one.

    Args:
        places: as given on the command line.
        device: where networks go.
        kept: so many checkpoints stay in memory.
    """

    def __init__(self, places: Sequence[Place], device: torch.device, kept: int = KEPT) -> None:
        self.places = list(places)
        self.device = device
        self.kept = kept
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}
        self._loaded: OrderedDict[str, tuple[str, Source]] = OrderedDict()

    def look(self) -> None:
        """Finds what lies in the places now; what has gone stays in the list until it is wanted."""
        found = [pair for place in self.places for pair in place.checkpoints()]
        with self._lock:
            for name, path in found:
                key = hashlib.sha256(f"{name}\0{path}".encode()).hexdigest()[:12]
                known, stamp = self._offers.get(key), _stamp(path)
                if known is None:
                    self._offers[key] = Offer(key, name, path, stamp)
                elif known.stamp != stamp:
                    self._offers[key] = replace(known, stamp=stamp, about=None, problem="")

    def offers(self) -> list[Offer]:
        """Returns the list, as it is known by now."""
        with self._lock:
            return list(self._offers.values())

    def survey(self) -> bool:
        """Returns whether a checkpoint was read of which nothing had been known."""
        for offer in self.offers():
            if offer.about is None and not offer.problem:
                with contextlib.suppress(CheckpointError):  # the list says it
                    self.get(offer.id)
                return True
        return False

    def get(self, key: str) -> Source:
        """Returns the checkpoint with that id, the newest of its run; raises CheckpointError."""
        self.look()
        with self._lock:
            offer = self._offers.get(key)
        if offer is None:
            raise CheckpointError("there is no such checkpoint; reload the page")
        loaded = self._loaded.get(key)
        if loaded is None or loaded[0] != offer.stamp:
            self._loaded.pop(key, None)
            while len(self._loaded) >= self.kept:
                self._loaded.popitem(last=False)
            self._loaded[key] = loaded = (offer.stamp, self._load(offer))
        self._loaded.move_to_end(key)
        return loaded[1]

    def _load(self, offer: Offer) -> Source:
        about, problem = None, ""
        try:
            pipeline, _, sha256 = load_pipeline(offer.path, self.device)
            about = describe(pipeline, sha256)
            return Source(pipeline, str(offer.path), sha256)
        except (CheckpointError, ConfigError, OSError) as error:
            problem = " ".join(str(error).split())
            raise CheckpointError(problem) from None
        except Exception as error:  # no memory for it, or a file that no check foresaw
            log.error("%s: %s: %s", offer.path, type(error).__name__, error)
            said = "it cannot be loaded; the server's log says why"
            about, problem = (
                offer.about,
                "" if offer.about else said,
            )  # one that was read may be the next time
            raise CheckpointError(said) from None
        finally:
            with self._lock:
                self._offers[offer.id] = replace(offer, about=about, problem=problem)


def _stamp(path: Path) -> str:
    """What changes when there is a newer checkpoint."""
    if path.is_dir():
        found = ([p for p in folders(path / stage / "checkpoints") if p.is_dir()] for stage in PICTURING)
        return next((f"{each[-1].parents[1].name}-{each[-1].name}" for each in found if each), "")
    try:
        return str(path.stat().st_mtime_ns)
    except OSError:
        return ""


def describe(pipeline: Pipeline, sha256: str) -> dict[str, Any]:
    """Returns what a page has to know of a checkpoint: how it is sampled by default, and what it can make."""
    defaults = pipeline.defaults
    assert defaults is not None
    return {
        "sha256": sha256,
        "resolution": pipeline.resolution,
        "multiple": pipeline.autoencoder.factor * pipeline.min_divisor,
        "edits": pipeline.edits,
        "num_steps": defaults.num_steps,
        "guidance_scale": defaults.guidance_scale,
        "image_guidance_scale": defaults.image_guidance_scale,
        "sampler": str(pipeline.described.get("sampler", {}).get("name", "")),
        "grid": str(pipeline.described.get("grid", {}).get("name", "")),
    }
