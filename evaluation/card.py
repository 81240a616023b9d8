"""The card of a checkpoint: its figures, all that they depend on, and the features they were computed from.

A card is a JSON file with a SHA-256 of itself, and names that of `features.safetensors` beside it, so that
neither is read after it was changed. It holds no path, host or time: two evaluations of one checkpoint give
the same bytes. `NEEDS` says what two cards must have in common for a figure of theirs to be compared.

    card = read_card(Path("runs/landscapes/evaluation/24000-1f2e3d4c/card.json"))
    card.metrics["fd"], card.metrics["fd_floor"], card.measured["pictures"], card.made["num_steps"]
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.arrays import write_atomic
from data.index import DataError

CARD_FORMAT = "firstlight-card-1"
#: Grows whenever the same pictures would give another figure: a formula, or which real pictures are read.
METRICS_VERSION = 1
CARD, FEATURES = "card.json", "features.safetensors"

#: Kind of figure -> the keys of `Card.measured` that must be the same for such figures to be compared.
NEEDS: dict[str, tuple[str, ...]] = {
    "distance": (
        *("metrics_version", "distance_pictures", "prompts_sha256", "features", "features_sha256", "resize"),
        "reference_sha256",
    ),
    "adherence": ("metrics_version", "pictures", "prompts_sha256", "scorer", "scorer_sha256", "names"),
    "variety": (
        *("metrics_version", "variety_prompts", "variety_prompts_sha256", "variety_seeds"),
        *("features", "features_sha256", "resize", "train_pictures", "train_sha256"),
    ),
    "memorization": (
        *("metrics_version", "memorization_pictures", "prompts_sha256", "features", "features_sha256"),
        *("resize", "known_new_sha256", "index"),
    ),
}
#: Settings of the sampler, which a strict comparison wants equal as well; else they are shown.
SETTINGS = ("sampler", "grid", "guidance", "num_steps", "guidance_scale", "size", "seed")


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint's pictures.

    Args:
        metrics: name -> figure; the kind of each is told by `kind_of`.
        measured: what the figures depend on besides the pictures: numbers of pictures, hashes, networks.
        made: how the pictures were made: checkpoint, sampler, seed, code.
        alarms: a line for each thing that a person should look at.
        features_sha256: of the file beside the card.
    """

    metrics: Mapping[str, float]
    measured: Mapping[str, Any]
    made: Mapping[str, Any]
    alarms: tuple[str, ...]
    features_sha256: str

    def document(self) -> dict[str, Any]:
        """The card as JSON values, without its own hash."""
        return {
            "format": CARD_FORMAT,
            "metrics": {
                name: value if math.isfinite(value) else None for name, value in self.metrics.items()
            },
            "alarms": list(self.alarms),
            "measured": dict(self.measured),
            "made": dict(self.made),
            "features_sha256": self.features_sha256,
        }


def kind_of(metric: str) -> str:
    """The kind of a figure, a key of `NEEDS`: the word that its name begins with, and else a distance."""
    return next((kind for kind in NEEDS if metric.split("_")[0] == kind), "distance")


def write_card(folder: Path, card: Card) -> Path:
    """Writes `card.json` into `folder` and returns its path."""
    document = card.document()
    text = json.dumps({**document, "sha256": _sha256(document)}, indent=2, ensure_ascii=False) + "\n"
    write_atomic(folder / CARD, text.encode())
    return folder / CARD


def read_card(path: Path) -> Card:
    """The card at `path`, a file or the folder it lies in.

    Raises:
        DataError: there is none, it is no card of this version, or it was changed after it was written.
    """
    path = path / CARD if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        sha256 = document.pop("sha256")
        if document["format"] != CARD_FORMAT:
            raise DataError(f"{path}: is of format {document['format']!r}, not {CARD_FORMAT}; evaluate again")
        card = Card(
            {name: math.nan if value is None else value for name, value in document["metrics"].items()},
            document["measured"],
            document["made"],
            tuple(document["alarms"]),
            document["features_sha256"],
        )
    except OSError as error:
        raise DataError(
            f"{path}: no card can be read ({error.strerror}); make one with evaluate.py"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is no card ({error}); make one with scripts/evaluate.py") from None
    if _sha256(document) != sha256:
        raise DataError(f"{path}: was changed after it was written (its SHA-256 is another); evaluate again")
    return card


def write_features(folder: Path, features: Mapping[str, Tensor]) -> str:
    """Writes `features.safetensors` into `folder`; returns its SHA-256."""
    data = save({name: value.contiguous() for name, value in features.items()})
    write_atomic(folder / FEATURES, data)
    return hashlib.sha256(data).hexdigest()


def read_features(path: Path, card: Card) -> dict[str, Tensor]:
    """What `card` at `path` was computed from: features and scores of each picture.

    Raises:
        DataError: the file is missing, or is another one than the card was written with.
    """
    beside = (path if path.is_dir() else path.parent) / FEATURES
    try:
        data = beside.read_bytes()
    except OSError as error:
        raise DataError(f"{beside}: cannot be read ({error.strerror}); it belongs to the card") from None
    if hashlib.sha256(data).hexdigest() != card.features_sha256:
        raise DataError(f"{beside}: is not the file that the card was written with (another SHA-256)")
    try:
        return dict(load(data))
    except SafetensorError as error:
        raise DataError(f"{beside}: is damaged ({error})") from None


def unlike(cards: Sequence[Card], kind: str, strict: bool = False) -> str | None:
    """The first thing in which cards differ that forbids comparing figures of `kind`; None where nothing.

    `strict` wants the sampler's settings equal as well.
    """
    first = cards[0]
    for number, card in enumerate(cards[1:], start=2):
        both = [(first.measured, card.measured, NEEDS[kind])]
        both += [(first.made, card.made, SETTINGS)] if strict else []
        for one, other, keys in both:
            for key in keys:
                if one.get(key) != other.get(key):
                    return f"{key} is {one.get(key)} in card 1 and {other.get(key)} in card {number}"
    return None


def _sha256(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
