"""Networks of our own that judge pictures, kept for the next time: weights, and what is known of them.

Used by `evaluation.tower` and `evaluation.classifier`.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from data.arrays import write_atomic
from models.checkpoint import CheckpointError

C = TypeVar("C")


def packed(network: nn.Module) -> bytes:
    """The weights as a safetensors file; a network's SHA-256 is that of these bytes."""
    return save({name: value.detach().contiguous() for name, value in network.state_dict().items()})


def keep(folder: Path, name: str, network: nn.Module, card: Mapping[str, Any]) -> None:
    """Writes `<name>.safetensors`, then `<name>.json` with `card` and the weights' SHA-256, into `folder`.

    Each appears whole or not at all, and a crash between the two is found by the SHA-256 when they are read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = packed(network)
    write_atomic(folder / f"{name}.safetensors", weights)
    told = {**card, "sha256": hashlib.sha256(weights).hexdigest()}
    write_atomic(folder / f"{name}.json", (json.dumps(told, indent=1) + "\n").encode())


def read_kept(
    folder: Path, name: str, card: Callable[..., C], version: int, build: Callable[[C], nn.Module]
) -> tuple[C, nn.Module]:
    """The card and the network `name` that `keep` wrote into `folder`.

    Args:
        folder: of both files.
        name: of them, and in messages.
        card: makes the card of its record.
        version: that the record must have.
        build: makes the network of the card, to be filled.

    Raises:
        CheckpointError: a file is missing or damaged, or of another version.
    """
    try:
        weights = (folder / f"{name}.safetensors").read_bytes()
        record = json.loads((folder / f"{name}.json").read_text())
        sha256, found = record.pop("sha256"), record["version"]
        if found != version or sha256 != hashlib.sha256(weights).hexdigest():
            raise ValueError(f"version {found}, or the weights are not those of the card")
        told = card(**record)
        network, state = build(told), load(weights)
        network.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{folder}: no {name} can be read ({reason}); train the {name} again") from None
    return told, network


def data_sha256(pictures: Tensor, texts: list[str]) -> str:
    """The SHA-256 of pictures uint8 `[N 3 H W]` and the text of each, in hexadecimal."""
    digest = hashlib.sha256(pictures.numpy().tobytes())
    digest.update(json.dumps(texts).encode())
    return digest.hexdigest()
