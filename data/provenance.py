"""What precomputed shards were made by, `OUT/precomputed.json`, and the check before training on them.

Moments are worth something only to the autoencoder that made them, text embeddings only to the text encoder
that made them. So a folder names both by fingerprint, with all the options its numbers depend on, and is
refused wherever one of them differs. `scripts/precompute.py` writes it, a note `NAME.tar.done.json` beside
each finished shard carries its digest, and training calls `check_provenance`.
"""

import hashlib
import json
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.npy import DTYPES
from data.shard_index import DataError

FORMAT = 1
FILE = "precomputed.json"
DONE = ".done.json"
AGAIN = "python scripts/precompute.py RUN OUT"
_SHOWN = 12  # hex digits of a fingerprint in a message
#: Options that training compares, and what they are called on the command line of training.
_OPTIONS = {"random_crop": "data.random_crop", "flip": "data.flip", "background": "data.background"}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture became pixels: `variants` crops and mirrorings of it, drawn from `seed`.

    `resolution` in pixels, `background` (R, G, B). One variant is the central crop, as it is.
    """

    resolution: int
    random_crop: bool = False
    flip: bool = False
    background: tuple[int, ...] = (255, 255, 255)
    variants: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Provenance:
    """All that the numbers in the shards depend on, but for the pictures.

    `autoencoder` is the fingerprint of its averaged weights, `autoencoder_config` its options; `dtype` of all
    arrays; `shape` (2C, h, w) of one picture's moments; `text` the identity of the text encoder (`weights`,
    `tokenizer`, `context_length`, `dim`, `mask_padding`), None where no captions were encoded.
    """

    autoencoder: str
    autoencoder_config: dict[str, Any]
    preprocessing: Preprocessing
    dtype: str
    shape: tuple[int, ...]
    text: dict[str, Any] | None = None

    def content(self) -> dict[str, Any]:
        """Returns all of it as JSON holds it."""
        content: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
        return content

    def digest(self) -> str:
        """Returns a hash of all of it, in hex."""
        return hashlib.sha256(json.dumps(self.content(), sort_keys=True).encode()).hexdigest()


def read_provenance(folder: Path) -> Provenance:
    """Returns what the shards of `folder` were made by.

    Raises DataError where there is none, or one that is damaged or of another format.
    """
    return _parse(folder / FILE, read_document(folder / FILE))


def read_document(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises DataError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{path}: missing; the folder holds no precomputed shards, make them: {AGAIN}"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); make the shards again: {AGAIN}") from None
    if not isinstance(document, dict):
        raise DataError(f"{path}: damaged; make the shards again: {AGAIN}")
    return document


def _parse(path: Path, document: Mapping[str, Any]) -> Provenance:
    if document.get("format") != FORMAT:
        raise DataError(
            f"{path}: of format {document.get('format')!r}, this program reads {FORMAT}; "
            f"make the shards again: {AGAIN}"
        )
    try:
        options = dict(document["preprocessing"])
        options["background"] = tuple(options["background"])
        found = Provenance(
            str(document["autoencoder"]),
            dict(document["autoencoder_config"]),
            Preprocessing(**options),
            str(document["dtype"]),
            tuple(int(side) for side in document["shape"]),
            None if document["text"] is None else dict(document["text"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged ({error!r}); make the shards again: {AGAIN}") from None
    if found.dtype not in DTYPES or len(found.shape) != 3 or found.preprocessing.variants < 1:
        raise DataError(f"{path}: damaged (dtype or shape); make the shards again: {AGAIN}")
    return found


def check_provenance(
    folder: Path,
    autoencoder: str,
    resolution: int,
    text: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Provenance:
    """Returns the provenance of `folder` after comparing it with the run that wants to train on it.

    Args:
        folder: that `scripts/precompute.py` filled.
        autoencoder: fingerprint of the run's averaged autoencoder.
        resolution: pixels a side.
        text: identity of the run's frozen text encoder, None where it is trained or encodes by itself.
        options: random_crop, flip, background of the run's data; those that are given have to be the same.

    Raises:
        DataError: something differs, with both values and the remedy; or shards are still missing.
    """
    made = read_provenance(folder)
    if made.autoencoder != autoencoder:
        raise DataError(
            f"{folder}: its moments are of autoencoder {short(made.autoencoder)}, this run's is "
            f"{short(autoencoder)}; precompute again with this run into another folder: {AGAIN}"
        )
    if made.preprocessing.resolution != resolution:
        raise DataError(
            f"{folder}: its moments are of {made.preprocessing.resolution} pixels, this run has "
            f"{resolution}; set data.resolution={made.preprocessing.resolution}, or precompute again: {AGAIN}"
        )
    for name, value in (options or {}).items():
        mine = asdict(made.preprocessing)[name]
        if mine != (tuple(value) if isinstance(value, list | tuple) else value):
            raise DataError(
                f"{folder}: made with {_OPTIONS[name]}={mine}, this run has {value}; "
                f"set {_OPTIONS[name]}={mine}, or precompute again: {AGAIN}"
            )
    if text is not None:
        _check_text(folder, made.text, text)
    _check_complete(folder)
    return made


def _check_text(folder: Path, made: Mapping[str, Any] | None, text: Mapping[str, Any]) -> None:
    if made is None:
        raise DataError(
            f"{folder}: holds no text embeddings; precompute again with --text, or train without them"
        )
    for name in sorted(text.keys() | made.keys()):
        if made.get(name) != text.get(name):
            raise DataError(
                f"{folder}: its text embeddings are of a text encoder with {name} {short(made.get(name))}, "
                f"this run's has {short(text.get(name))}; use that text encoder, or precompute again into "
                f"another folder: {AGAIN} --text"
            )


def code_version() -> str:
    """Returns the commit of the source, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def short(value: object) -> str:
    """Returns a value for a message: of a fingerprint the first digits."""
    return value[:_SHOWN] if isinstance(value, str) else str(value)


def _check_complete(folder: Path) -> None:
    wanted = read_document(folder / FILE).get("shards")
    done = sum(1 for _ in folder.rglob(f"*{DONE}"))
    if done != wanted:
        raise DataError(
            f"{folder}: {done} of {wanted} shards are done; run the same command again to go on: {AGAIN}"
        )
