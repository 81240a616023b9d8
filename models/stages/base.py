"""Training that begins with the networks of another run: fine-tuning, or editing learnt on top of drawing.

The autoencoder is taken as it is: it becomes a checkpoint of the new run, marked with the base it came from,
so that the run is whole and the base may go. Text encoder and backbone begin with its averaged weights. One
layer may have grown: the first convolution of a backbone that takes a picture beside `x` keeps its weights
and has zeros for the picture, so that the first step sees exactly what the base computes. Anything else that
differs is refused. Used by `train.py`: `base = Base.open(Path("runs/landscapes"), values)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from models.checkpoint import Checkpoint, CheckpointError, fingerprint, save_checkpoint
from models.loading import load_weights, read_model
from models.stages.depends import flatten

if TYPE_CHECKING:
    from models.stages.distillation import DistillationStage
    from models.stages.stage import Stage

#: Parts of the configuration whose weights, or whose meaning of the weights, are taken over.
TAKEN = ("autoencoder", "text_encoder", "backbone", "objective.schedule", "objective.parameterization")
GROWS = "backbone.image_conditioning"
GROWN = "backbone.conv_in.weight"


@dataclass(frozen=True)
class Base:
    """The networks a run begins with: averaged `tensors` of all three, their configuration and a SHA-256."""

    path: Path
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    sha256: str

    @classmethod
    def open(cls, path: Path, values: Mapping[str, Any]) -> Self:
        """The base at `path`, a run's folder or an exported file, for a run of configuration `values`.

        Raises:
            CheckpointError: nothing there, damaged, or networks of another kind than `values` describes.
        """
        tensors, config, sha256 = read_model(path)
        base = cls(path, tensors, config, sha256)
        differ = apart(config, values, TAKEN)
        takes, wanted = (bool(each["backbone"].get("image_conditioning")) for each in (config, values))
        if takes and not wanted:
            differ.append(f"{GROWS} is True, here False")
        if differ:
            shown = "; ".join(differ[:3]) + (f"; and {len(differ) - 3} more" if len(differ) > 3 else "")
            raise CheckpointError(
                f"base={path}: its networks are others than this run's ({shown}); give the run the same "
                "parts, or begin without base"
            )
        return base

    @property
    def autoencoder(self) -> dict[str, Tensor]:
        """The autoencoder's weights, named as in its checkpoints."""
        return {key: tensor for key, tensor in self.tensors.items() if key.startswith("autoencoder.")}

    def hand_over_autoencoder(self, parent: Path, config: Mapping[str, Any]) -> None:
        """Writes the autoencoder as the finished checkpoint of a run whose checkpoints lie in `parent`.

        Raises:
            OSError: it cannot be written.
        """
        tensors = self.autoencoder
        state = {"stage": "autoencoder", "images_seen": 0, "base": self.sha256}
        save_checkpoint(parent, 0, {"ema": tensors, "weights": tensors}, {"config": config, "state": state})

    def start(self, stage: "Stage") -> None:
        """Puts the averaged weights into the networks of a fresh `stage`, and into its average.

        Raises:
            CheckpointError: names or shapes differ, but for the layer that may grow.
        """
        others = ("autoencoder.", "decoder.")
        mine = {key: tensor for key, tensor in self.tensors.items() if not key.startswith(others)}
        wanted = stage.networks.state_dict()
        if GROWN in mine and GROWN in wanted:
            mine[GROWN] = grown(mine[GROWN], wanted[GROWN].shape)
        # A student's small decoder is nobody's yet.
        mine |= {key: tensor for key, tensor in wanted.items() if key.startswith("decoder.")}
        for networks in (stage.networks, *stage.ema.networks):
            load_weights(networks, mine, f"base={self.path}")

    def teach(self, stage: "DistillationStage") -> None:
        """Makes the base the teacher of `stage`; CheckpointError for a backbone of another shape."""
        stage.load_teacher(dict(self.tensors), f"base={self.path}")


def grown(weight: Tensor, shape: torch.Size) -> Tensor:
    """`weight` [O I k k] with as many zeros for new inputs where `shape` is [O 2I k k]; else as it is."""
    O, I, *kernel = weight.shape  # noqa: E741
    return torch.cat([weight, torch.zeros_like(weight)], 1) if shape == (O, 2 * I, *kernel) else weight


def is_handed_over(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint of the autoencoder came from a base, and is finished whatever the plan says."""
    state = checkpoint.document("state")
    return state["stage"] == "autoencoder" and "base" in state


def same_autoencoder(checkpoint: Checkpoint, base: Base) -> bool:
    """Whether `checkpoint` holds the autoencoder of `base`."""
    return fingerprint(checkpoint.tensors("ema")) == fingerprint(base.autoencoder)


def apart(before: Mapping[str, Any], now: Mapping[str, Any], keys: tuple[str, ...]) -> list[str]:
    """The settings under `keys` that differ between two configurations, a line each.

    A key that either lacks is not compared, nor the one that lets a layer grow.
    """
    was, becomes = flatten(before, keys), flatten(now, keys)
    return [
        f"{key} is {was[key]}, here {becomes[key]}"
        for key in sorted(was.keys() & becomes.keys())
        if was[key] != becomes[key] and key != GROWS
    ]
