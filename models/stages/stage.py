"""What a stage is to the callbacks, and how its state becomes a checkpoint and comes back."""

import math
import platform
import subprocess
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from data.batch import Batch
from models.checkpoint import Checkpoint, CheckpointError
from models.checkpoint_shards import StoredTensors
from models.loading import load_weights
from models.stages.compute import Compute
from models.stages.ema import Ema
from models.stages.plan import Plan
from models.stages.sharded import Sharding, restore_part, restore_parts

if TYPE_CHECKING:
    from lightning import Trainer

    from models.stages.guard import Guard


class Stage(Protocol):
    """A LightningModule that trains networks; what the callbacks see of it."""

    name: str
    networks: nn.ModuleDict
    ema: Ema
    plan: Plan
    compute: Compute
    images_seen: int
    #: How it is spread over ranks, set by whoever trains; None where each rank has all of it.
    sharding: Sharding | None
    #: Applies the steps; set by whoever trains.
    guard: "Guard"
    #: Lightning's; while it trains.
    trainer: "Trainer"
    #: Losses since the last line of metrics, and the last ones of all; a resumed run goes on with them.
    unlogged_losses: list[float]
    recent_losses: list[float]

    def configure_model(self) -> None:
        """Spreads weights and average over the ranks, if that is how to train and not done yet."""

    def use(self, compute: Compute) -> None:
        """Computes in the given way from now on."""

    def mean_loss(self, batch: Batch) -> Tensor:
        """The mean loss of a batch."""

    def manual_backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss` to those of the parameters."""

    def validate(self, batches: Iterable[Batch]) -> dict[str, Tensor]:
        """Held-out figures of the averaged weights, one number a sample."""


def stage_tensors(stage: Stage, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Everything of `stage` and its optimizer that training changes: file name -> named tensors."""
    return {
        "weights": stage.networks.state_dict(),
        **{name: network.state_dict() for name, network in stage.ema.named().items()},
        "optimizer": _optimizer_tensors(stage.networks, optimizer),
    }


def stage_state(stage: Stage, fingerprints: Mapping[str, Any]) -> dict[str, Any]:
    """What else a stage needs to go on, and what its checkpoint depends on, as JSON values.

    Args:
        stage: what is trained.
        fingerprints: of the dataset and of frozen networks.
    """
    return {
        "stage": stage.name,
        "images_seen": stage.images_seen,
        "unlogged_losses": stage.unlogged_losses,
        "recent_losses": stage.recent_losses,
        **fingerprints,
        "compute": stage.compute.document(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "git_commit": _git_commit(),
    }


def restore_networks(stage: Stage, checkpoint: Checkpoint) -> None:
    """Puts weights, average and images seen of `checkpoint` into `stage`.

    Raises:
        CheckpointError: it was made by networks of another shape.
    """
    networks = {"weights": stage.networks, **stage.ema.named()}
    for name, network in networks.items():
        if stage.sharding is None:
            load_weights(network, checkpoint.tensors(name), str(checkpoint.folder))
        else:
            restore_parts(network, checkpoint.stored(name), stage.sharding, str(checkpoint.folder))
    state = checkpoint.document("state")
    stage.images_seen = int(state["images_seen"])
    stage.unlogged_losses = [float(loss) for loss in state.get("unlogged_losses", [])]
    stage.recent_losses = [float(loss) for loss in state.get("recent_losses", [])]


def restore_compute(checkpoint: Checkpoint | None) -> Compute | None:
    """The way `checkpoint` was computed; None where there is none, or it does not say."""
    way = None if checkpoint is None else checkpoint.document("state").get("compute")
    if way is None:
        return None
    return Compute.read(way, "as before")


def restore_optimizer(stage: Stage, optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> None:
    """Puts the optimizer's state of `checkpoint` into `optimizer`.

    Raises:
        CheckpointError: it was made by another optimizer.
    """
    stored = checkpoint.stored("optimizer")
    for name, parameter in stage.networks.named_parameters():
        mine = [key for key in stored if key.split(".", 1)[1] == name]
        shapes = [stored.shapes[key] for key in mine]
        if any(math.prod(shape) > 1 and shape != tuple(parameter.shape) for shape in shapes):
            raise CheckpointError(f"{checkpoint.folder}: optimizer state of {name} is of another shape")
        state = {key.split(".", 1)[0]: _beside(parameter, stored, key, stage.sharding) for key in mine}
        if state:
            optimizer.state[parameter] = state


def _beside(parameter: Tensor, stored: StoredTensors, key: str, sharding: Sharding | None) -> Tensor:
    """The state stored as `key`, where and laid out as an optimizer wants it for `parameter`."""
    if stored.shapes[key] != tuple(parameter.shape):
        # A step counter: on the CPU unless the optimizer is fused on a GPU.
        state = stored.whole(key)
        return state.to(parameter.device) if parameter.is_cuda else state
    # The fused kernel walks memory, so that state in another layout than the weights belongs to others.
    state = torch.empty_like(parameter, requires_grad=False)
    if sharding is None:
        return state.copy_(stored.whole(key))
    restore_part(state, stored, key, sharding)
    return state


def _optimizer_tensors(networks: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """`<what>.<parameter name>` -> tensor, for all state an optimizer keeps."""
    return {
        f"{key}.{name}": value
        for name, parameter in networks.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


@lru_cache(maxsize=1)
def _git_commit() -> str:
    """The commit of the source, or "unknown" outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
