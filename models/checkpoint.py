"""Checkpoints: folders of safetensors and JSON that are either whole and verified, or not chosen.

    images-000096000/
      weights.safetensors  ema.safetensors  optimizer.safetensors  config.json  state.json
      manifest.json        size and SHA-256 of every other file; written last

A folder is staged beside its target, fsynced and renamed into place, so that a kill or a full disk at any
moment leaves the folders before it untouched. No folder is ever written to or replaced: the same step saved
again, after a resume from before it, becomes images-000096000-1. The highest number that verifies is the one
that is loaded, and two that verify are always kept. There is no pickle anywhere.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_KEEP = 2
_NAME = re.compile(r"images-(\d+)(?:-(\d+))?")
_HIDDEN = ".images-*.part"

Tensors = Mapping[str, Tensor]


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or made for something else."""


class Checkpoint:
    """A verified checkpoint folder.

    Args:
        folder: the folder; every file is read and compared with the manifest at once.

    Raises:
        CheckpointError: a file is missing, of another size, or of another SHA-256 than the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = (folder / MANIFEST).read_bytes()
            self._files = _listing(manifest)
            for name, (size, sha256) in self._files.items():
                _compare(folder / name, size, sha256)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be read ({error}); it was not finished, or the disk fails"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        #: SHA-256 of the manifest: one hash that stands for every byte of the checkpoint.
        self.sha256 = hashlib.sha256(manifest).hexdigest()

    @property
    def images(self) -> int:
        """Training images seen when it was written."""
        return _rank(self.folder)[0]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `<name>.safetensors`, on the CPU.

        Raises:
            CheckpointError: there is none, or the folder was removed in the meantime.
        """
        path = self._path(f"{name}.safetensors")
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: can no longer be read ({error})") from None

    def document(self, name: str) -> dict[str, Any]:
        """The content of `<name>.json`.

        Raises:
            CheckpointError: there is none, or the folder was removed in the meantime.
        """
        path = self._path(f"{name}.json")
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: can no longer be read ({error})") from None

    def _path(self, name: str) -> Path:
        if name not in self._files:
            raise CheckpointError(f"{self.folder}: holds no {name}; is it a checkpoint of another stage?")
        return self.folder / name


def save_checkpoint(
    parent: Path, images: int, tensors: Mapping[str, Tensors], documents: Mapping[str, Mapping[str, Any]]
) -> Path:
    """The new folder `parent/images-<images>`, complete and renamed into place.

    Afterwards the older ones are removed, all but the newest that verifies. Only one process may save to
    `parent` at a time.

    Args:
        parent: folder of a stage's checkpoints.
        images: training images seen.
        tensors: file name without suffix -> named tensors.
        documents: file name without suffix -> JSON content.

    Raises:
        OSError: the disk is full or not writable; nothing that was there before is touched.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for abandoned in parent.glob(_HIDDEN):  # by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    target = _free_name(parent, images)
    staging = parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    staging.mkdir()
    try:
        for name, named in tensors.items():
            try:
                save_file(_separate(named), staging / f"{name}.safetensors")
            except SafetensorError as error:
                raise OSError(f"{target}: {name}.safetensors could not be written: {error}") from None
        for name, content in documents.items():
            (staging / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        files = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(staging.iterdir())
        }
        for path in staging.iterdir():
            _fsync(path)
        manifest = {"format": FORMAT_VERSION, "files": files}
        (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _fsync(staging / MANIFEST)
        _fsync(staging)
        staging.rename(target)
        _fsync(parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    _remove_older(target)
    return target


def newest(parent: Path) -> Checkpoint | None:
    """The checkpoint of the most images under `parent` that verifies; None where there is none.

    A damaged one is passed over with a warning, never deleted.
    """
    for folder in reversed(_folders(parent)):
        try:
            return Checkpoint(folder)
        except CheckpointError as error:
            logger.warning("passing over a damaged checkpoint: %s", error)
    return None


def save_single_file(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file with string metadata, through a temporary name in the same folder."""
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(_separate(tensors), part, dict(metadata))
        _fsync(part)
        part.replace(path)
        _fsync(path.parent)
    except SafetensorError as error:
        raise OSError(f"{path}: could not be written: {error}") from None
    finally:
        part.unlink(missing_ok=True)


def load_single_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors, metadata and SHA-256 of a file that `save_single_file` wrote.

    Raises:
        CheckpointError: not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), metadata, _sha256(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from None


def fingerprint(tensors: Tensors) -> str:
    """SHA-256 over names, shapes, types and bytes of `tensors`: the identity of a network's weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            digest.update(tensor.flatten().view(dtype=torch.uint8).numpy().data)
    return digest.hexdigest()


def _listing(manifest: bytes) -> dict[str, tuple[int, str]]:
    """File name -> size and SHA-256.

    Raises:
        ValueError: not a manifest of this format, or one that names something outside its folder.
    """
    try:
        content = json.loads(manifest)
        written_as, entries = content["format"], content["files"]
        files = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from None
    if written_as != FORMAT_VERSION:
        raise ValueError(
            f"is of format {written_as!r}, but this version reads {FORMAT_VERSION}; use the newer one"
        )
    if not files:
        raise ValueError(f"{MANIFEST} lists no files")
    for name in files:
        if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
            raise ValueError(f"the manifest names {name!r}, which is not a file of this folder")
    return files


def _compare(path: Path, size: int, sha256: str) -> None:
    """Raises ValueError where the file at `path` is not the one the manifest lists."""
    if not path.is_file():
        raise ValueError(f"{path.name} is missing, but the manifest lists it")
    if path.stat().st_size != size:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, but the manifest says {size}")
    if _sha256(path) != sha256:
        raise ValueError(f"{path.name} is damaged, its SHA-256 is not the manifest's")


def _separate(tensors: Tensors) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU of which no two share memory, as safetensors wants them."""
    separate: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        start = plain.untyped_storage().data_ptr()
        separate[name] = plain.clone() if start in taken else plain
        taken.add(start)
    return separate


def _rank(folder: Path) -> tuple[int, int]:
    """Images seen, and how often that step had been saved before; (-1, 0) if it is no checkpoint's name."""
    match = _NAME.fullmatch(folder.name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _free_name(parent: Path, images: int) -> Path:
    """A name in `parent` that ranks above every folder of the same step."""
    again = max((_rank(p)[1] + 1 for p in _folders(parent) if _rank(p)[0] == images), default=0)
    return parent / (f"images-{images:012d}" + (f"-{again}" if again else ""))


def _folders(parent: Path) -> list[Path]:
    """Checkpoint folders, fewest images first; by number, never by time of change."""
    return sorted((p for p in parent.glob("images-*") if _NAME.fullmatch(p.name)), key=_rank)


def _remove_older(saved: Path) -> None:
    """Removes what lies below `saved` but the newest `_KEEP - 1` that verify.

    Those above it stay: a run that was resumed from before them found them damaged, and they are no reason to
    remove what it writes.
    """
    kept = 0
    for folder in reversed([p for p in _folders(saved.parent) if _rank(p) < _rank(saved)]):
        if kept == _KEEP - 1:
            _remove(folder)
            continue
        try:
            Checkpoint(folder)
            kept += 1
        except CheckpointError as error:
            logger.warning("a damaged checkpoint does not count as one to keep: %s", error)


def _remove(folder: Path) -> None:
    """Removes a folder, out of sight first so that a kill leaves no half one; if it cannot be, it stays."""
    hidden = folder.with_name(f".{folder.name}.old.part")
    with contextlib.suppress(OSError):
        folder.rename(hidden)
        shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
