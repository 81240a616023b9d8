"""A model spread over ranks: which of them holds which rows of its weights.

Each rank keeps one part of every weight, gradient, average and optimizer state (FSDP2: Zhao et al. 2023,
arXiv:2304.11277; Rajbhandari et al. 2020, arXiv:1910.02054). The whole of a block is gathered for as long as
it computes. With fewer `shards` than ranks there are several replicas, which average their gradients (HSDP):
rank = replica * shards + shard, so that neighbours on a machine share a model. Names of weights stay as they
are. Used by the stages (`configure_model`), and by whatever saves, restores or averages their weights.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from models.blocks import Block, SpatialTransformer
from models.checkpoint_shards import StoredTensors, shard_rows
from models.loading import require_shapes
from models.registry import ConfigError
from models.stages.compute import Reduce, Strategy, TrainerOptions

#: What is gathered and given back as one, inside of what is gathered for the whole of a network.
_UNITS = (Block, SpatialTransformer)


class Sharding:
    """How models are spread over all ranks.

    Args:
        shards: ranks that one model is spread over.
        size: ranks in all.
        device: kind of device they compute on.
    """

    def __init__(self, shards: int, size: int, device: torch.device) -> None:
        shape, names = ((size // shards, shards), ("replicas", "shards"))
        self.mesh: DeviceMesh = (
            init_device_mesh(device.type, shape, mesh_dim_names=names)
            if shards < size
            else init_device_mesh(device.type, (size,), mesh_dim_names=names[1:])
        )
        self.shards = shards
        self.size = size
        #: Which part this rank has, and whether it is of the replica that writes checkpoints.
        self.shard = distributed.get_rank() % shards
        self.writes = distributed.get_rank() < shards

    def spread(self, networks: Iterable[nn.Module]) -> None:
        """Leaves of each network this rank's part, on its device; each is called as a module from then on."""
        for network in networks:
            for module in reversed(list(network.modules())):  # what lies inside comes first
                if isinstance(module, _UNITS):
                    self._spread(module)
            self._spread(network)

    def _spread(self, module: nn.Module) -> None:
        # Given back after the forward pass also at the root: outside of a step all weights are parts.
        fully_shard(module, mesh=self.mesh, reshard_after_forward=True)

    def rows(self, length: int) -> tuple[int, int]:
        """Which rows of `length` this rank holds."""
        edges = shard_rows(length, self.shards)
        return edges[self.shard], edges[self.shard + 1]


def shards_of(options: TrainerOptions, size: int) -> int:
    """Over how many of `size` ranks a model is spread; 1 where each has all of it.

    Raises:
        ConfigError: shards that the strategy cannot have, or that do not divide the ranks.
    """
    strategy, shards = options.strategy, options.shards
    if strategy is not Strategy.hsdp and shards:
        raise ConfigError(
            f"trainer.shards is {shards}, but trainer.strategy={strategy.name} does not look at it; set "
            "trainer.strategy=hsdp, or leave trainer.shards out"
        )
    if strategy in (Strategy.auto, Strategy.ddp):
        return 1
    if options.reduce is Reduce.tree:
        raise ConfigError(
            f"trainer.reduce=tree adds up whole gradients, but with trainer.strategy={strategy.name} no rank "
            "has them; use trainer.strategy=ddp, or trainer.reduce=fast"
        )
    if strategy is Strategy.hsdp and (shards < 2 or size % shards):
        raise ConfigError(
            f"trainer.shards is {shards}, the ranks that trainer.strategy=hsdp spreads a model over, "
            f"but must be 2 or more and divide the {size} ranks"
        )
    return size if strategy is Strategy.fsdp else shards


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, sharing memory with it; itself where it is not spread."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of `tensor`, put together from all ranks; itself where it is not spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_spread(network: nn.Module) -> bool:
    """Whether the weights of `network` are parts."""
    return isinstance(next(network.parameters()), DTensor)


@torch.no_grad()
def restore_parts(network: nn.Module, stored: StoredTensors, sharding: Sharding, label: str) -> None:
    """Reads this rank's part of `stored`, and no more, into a `network` that is spread.

    Raises:
        CheckpointError: names or shapes differ.
    """
    mine = network.state_dict()
    require_shapes({key: tuple(tensor.shape) for key, tensor in mine.items()}, stored.shapes, label)
    for key, tensor in mine.items():
        restore_part(tensor, stored, key, sharding)


@torch.no_grad()
def restore_part(tensor: Tensor, stored: StoredTensors, key: str, sharding: Sharding) -> None:
    """Reads this rank's part of the stored tensor `key` into `tensor`."""
    if isinstance(tensor, DTensor):
        tensor.to_local().copy_(stored.rows(key, *sharding.rows(tensor.shape[0])))
    else:
        tensor.copy_(stored.whole(key))


def parts(tensors: Mapping[str, Tensor], sharding: Sharding) -> dict[str, Tensor]:
    """What this rank writes of `tensors`: its parts, and the first shard also what is not spread."""
    return {
        key: local(tensor)
        for key, tensor in tensors.items()
        if isinstance(tensor, DTensor) or sharding.shard == 0
    }
