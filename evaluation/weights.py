"""Weights of other people's networks, from local files of safetensors; no other form is read.

Used by `evaluation.features` and `evaluation.clip`.
"""

import hashlib
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.checkpoint import CheckpointError


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file by name, and the file's SHA-256 in hexadecimal.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors.
    """
    try:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        return load_file(path), sha256
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except SafetensorError:
        raise CheckpointError(
            f"{path}: not safetensors; other files of weights could hold code and are not read, convert it"
        ) from None


def fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """None; puts `state` into `network`. What the network has no place for is left out.

    Raises:
        CheckpointError: a tensor is missing or of another shape: the file is of another network.
    """
    wanted = network.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    if missing:
        raise CheckpointError(
            f"{path}: no {missing[0]}, and {len(missing) - 1} more are missing; it is another network's"
        )
    wrong = [name for name, value in wanted.items() if state[name].shape != value.shape]
    if wrong:
        raise CheckpointError(
            f"{path}: {wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(wanted[wrong[0]].shape)}; "
            "the weights are of another network"
        )
    network.load_state_dict({name: state[name] for name in wanted})
    network.eval().requires_grad_(False)
