"""Checkpoints: folders of safetensors and JSON that are either whole and verified, or not chosen.

    images-000096000/
      weights.safetensors  ema.safetensors  optimizer.safetensors  config.json  state.json
      manifest.json        size and SHA-256 of every other file; written last
                           (several ranks each write their rows: models/checkpoint_shards.py)
    last  best             links to such folders, for people
    best.json              {"folder", "metric", "value"}

A folder is staged beside its target, fsynced, read back and renamed into place, so that a kill or a full
disk at any moment leaves the folders before it untouched. No folder is ever written to or replaced: the same
step saved again, after a resume from before it, becomes images-000096000-1. The highest number that verifies
is the one that is loaded, whatever links, clocks and times of change say, and two that verify are always
kept. There is no pickle anywhere. `models/checkpoint_writer.py` saves while training goes on.
"""

import contextlib
import hashlib
import json
import logging
import shutil
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoint_folders import (
    LAST,
    Best,
    CheckpointError,
    Retention,
    folders,
    free_name,
    fsync,
    mark_best,
    point,
    rank,
    remove,
    remove_abandoned,
    superseded,
)
from models.checkpoint_folders import best_of as best_of
from models.checkpoint_shards import LAYOUT, StoredTensors, shard_file

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
#: So often the newest is looked for while others are removed.
_LOOKS = 1_000

#: Bytes of an element -> whole numbers to compare its bits as; several times as fast as byte by byte.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}

Tensors = Mapping[str, Tensor]
KEEP_TWO = Retention()


class Checkpoint:
    """A verified checkpoint folder.

    Args:
        folder: the folder, or a link to it; every file is read and compared with the manifest at once.

    Raises:
        CheckpointError: a file is missing, of another size, or of another SHA-256 than the manifest says.
    """

    def __init__(self, folder: Path) -> None:
        try:
            if folder.is_symlink():
                folder = folder.resolve()  # a moment later it may point elsewhere
            manifest = (folder / MANIFEST).read_bytes()
            self._files = _listing(manifest)
            for name, (size, sha256) in self._files.items():
                _compare(folder / name, size, sha256)
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            raise CheckpointError(
                f"{folder}: cannot be read ({error}); it was not finished, or the disk fails"
            ) from None
        except ValueError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        self.folder = folder
        #: SHA-256 of the manifest: one hash that stands for every byte of the checkpoint.
        self.sha256 = hashlib.sha256(manifest).hexdigest()

    @property
    def images(self) -> int:
        """Training images seen when it was written, from the folder's name.

        Raises:
            CheckpointError: the folder was given another name.
        """
        images = rank(self.folder)[0]
        if images < 0:
            raise CheckpointError(f"{self.folder}: does not tell its images; name it images-<number> again")
        return images

    def digest(self, names: Sequence[str] = ("weights", "ema", "optimizer")) -> str:
        """SHA-256 over the files of tensors called `names`: one line to compare two runs by.

        Two checkpoints of as many shards compare; so do two of none.

        Raises:
            CheckpointError: there is none of such a name.
        """
        hashes = [f"{name} {self._files[file][1]}\n" for name in names for file in self._files_of(name)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors called `name`, whole and on the CPU, however many shards they were written in.

        Raises:
            CheckpointError: there is none, it is of another format, or the folder was removed meanwhile.
        """
        if self.shards == 1:
            path = self._path(f"{name}.safetensors")
            try:
                return load_file(path)
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path}: is no safetensors file ({error}); nothing else is read, take another checkpoint"
                ) from None
            except (OSError, RuntimeError) as error:  # RuntimeError: torch could not open it
                raise CheckpointError(f"{path}: can no longer be read ({error})") from None
        stored = self.stored(name)
        return {key: stored.whole(key) for key in stored}

    def stored(self, name: str) -> StoredTensors:
        """The tensors called `name`, of which any rows can be read without the others.

        Raises:
            CheckpointError: as `tensors`.
        """
        self._files_of(name)
        try:
            return StoredTensors(self.folder, name, self.document(LAYOUT) if self.shards > 1 else None)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read ({error})") from None

    @property
    def shards(self) -> int:
        """In how many files the tensors of a name lie: as many as ranks wrote them."""
        return int(self.document(LAYOUT)["shards"]) if f"{LAYOUT}.json" in self._files else 1

    def _files_of(self, name: str) -> list[str]:
        shards = self.shards
        names = (
            [shard_file(name, s, shards) for s in range(shards)] if shards > 1 else [f"{name}.safetensors"]
        )
        return [self._path(each).name for each in names]

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
    parent: Path,
    images: int,
    tensors: Mapping[str, Tensors],
    documents: Mapping[str, Mapping[str, Any]],
    retention: Retention | None = KEEP_TWO,
    best: Best | None = None,
) -> Path:
    """The new folder `parent/images-<images>`, complete, read back and renamed into place.

    Afterwards `last` points to it, and the older ones go that `retention` does not keep. Only one process may
    save to `parent` at a time.

    Args:
        parent: folder of a stage's checkpoints.
        images: training images seen.
        tensors: file name without suffix -> named tensors.
        documents: file name without suffix -> JSON content.
        retention: which older ones stay; None for all of them.
        best: given where this one is the best so far.

    Raises:
        OSError: the disk is full, not writable, or gives back other bytes than it was given; nothing that was
            there before is touched.
    """
    target = free_name(parent, images)
    staging = staging_of(target)
    try:
        stage_folder(staging)
        for name, named in tensors.items():
            write_tensors(staging / f"{name}.safetensors", named)
        publish(staging, target, documents)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"{target}: {why_unwritten(error, parent, tensors)}") from None
        raise
    succeed(target, retention, best)
    return target


def staging_of(target: Path) -> Path:
    """A hidden name beside `target`, under which it is written."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"


def stage_folder(staging: Path) -> None:
    """Makes the folder in which a checkpoint is written, once what a killed process left is removed.

    Raises:
        OSError: it cannot be made.
    """
    staging.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(staging.parent)
    staging.mkdir()


def publish(staging: Path, target: Path, documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds documents and the manifest of all files to `staging`, and renames it to `target`.

    Raises:
        OSError: a file cannot be written, or does not read back as it was written.
    """
    _finish(staging, documents)
    staging.rename(target)
    fsync(target.parent)


def succeed(target: Path, retention: Retention | None, best: Best | None) -> None:
    """Lets `last`, and `best` where given, point to the new folder `target`; removes what is superseded."""
    parent = target.parent
    point(parent / LAST, target.name)
    try:
        if best is not None:
            mark_best(parent, target, best.metric, best.value)
    except OSError as error:
        logger.warning("%s is saved, but could not be marked as the best: %s", target, error)
    try:
        for older in superseded(target, retention, _verifies) if retention is not None else ():
            remove(older)
    except OSError as error:
        logger.warning("%s is saved, but older ones could not be removed: %s", target, error)


def newest(parent: Path) -> Checkpoint | None:
    """The checkpoint of the most images under `parent` that verifies; None where there is none.

    A damaged one is passed over with a warning, never deleted. One that another process removes meanwhile has
    made way for a newer one, which is looked for.
    """
    for _ in range(_LOOKS):
        vanished = False
        for folder in reversed(folders(parent)):
            try:
                return Checkpoint(folder)
            except CheckpointError as error:
                vanished = not folder.exists()
                if vanished:
                    break
                logger.warning("passing over a damaged checkpoint: %s", error)
        if not vanished:
            return None
    raise CheckpointError(f"{parent}: checkpoints vanish while they are read; is another run writing there?")


def save_single_file(path: Path, tensors: Tensors, metadata: Mapping[str, str]) -> None:
    """Writes one safetensors file with string metadata, through a temporary name in the same folder."""
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(_separate(tensors), part, dict(metadata))
        fsync(part)
        part.replace(path)
        fsync(path.parent)
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
    except (SafetensorError, OSError, RuntimeError) as error:
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


def write_tensors(path: Path, tensors: Tensors) -> None:
    """Writes `tensors` to the new file `path` and to the disk, and reads them back.

    Raises:
        OSError: it cannot be written, or does not read back as it was written.
    """
    separate = _separate(tensors)
    try:
        save_file(separate, path)
    except SafetensorError as error:
        raise OSError(f"{path.name} could not be written: {error}") from None
    fsync(path)
    _require_same(path, separate)


def _finish(staging: Path, documents: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the documents of a checkpoint into `staging` and to the disk, and the manifest last.

    Raises:
        OSError: a file cannot be written, or does not read back as it was written.
    """
    for name, content in documents.items():
        path = staging / f"{name}.json"
        text = json.dumps(content, indent=2) + "\n"
        path.write_text(text, encoding="utf-8")
        fsync(path)
        if path.read_text(encoding="utf-8") != text:
            raise OSError(f"{path.name} does not read back as it was written; the disk fails")
    files = {
        path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(staging.iterdir())
    }
    manifest = {"format": FORMAT_VERSION, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    fsync(staging / MANIFEST)
    fsync(staging)


def _require_same(path: Path, tensors: Tensors) -> None:
    """Raises OSError where the file at `path` does not hold `tensors` to the bit."""
    try:
        with safe_open(path, framework="pt") as file:
            same = set(file.keys()) == set(tensors) and all(
                _same(file.get_tensor(name), tensor) for name, tensor in tensors.items()
            )
    except (SafetensorError, RuntimeError):
        same = False
    if not same:
        raise OSError(f"{path.name} does not read back as it was written; the disk fails")


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether shape, type and bytes are the same, also of what is no number."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    whole = _WHOLE[one.element_size()]
    return one.flatten().view(whole).equal(other.flatten().view(whole))


def why_unwritten(error: OSError, parent: Path, tensors: Mapping[str, Tensors]) -> str:
    """What a failed save says: the reason, the space there is and the space it takes."""
    reason = str(error) if error.errno is None else f"could not be written: {error}"  # None: raised by us
    needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(parent).free / 2**20:,.1f} MiB"
    return (
        f"{reason}; it takes {needed / 2**20:,.1f} MiB and {free} are free; make room or mend the disk, "
        "the checkpoints before it are whole"
    )


def _verifies(folder: Path) -> bool:
    try:
        Checkpoint(folder)
    except CheckpointError as error:
        logger.warning("a damaged checkpoint does not count as one to keep: %s", error)
        return False
    return True


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
