"""Whether replicas hold the same weights, which a device that gets a number wrong or a missed exchange ends.

Of each tensor a checksum is computed where the tensor is. The ranks exchange one number of 64 bits a check,
and one a tensor only where that differs.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from models.stages.ranks import Ranks

#: Elements that are summed at once: what stays in a CPU's cache, and what keeps a GPU busy.
_PORTION, _PORTION_ON_GPU = 2**16, 2**22
#: An odd number with bits well spread (Steele and Vigna 2021, arXiv 2001.05304, table 4).
_SPREAD = 0xD1342543DE82EF95 - 2**64
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RanksDiffer(FloatingPointError):  # noqa: N818 - says what is wrong, as its base does
    """Weights that must be the same on all ranks are not."""


def differing(tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, list[int]]:
    """The names of tensors that replicas do not have alike, each with the ranks that are in the minority.

    Where two halves differ all of them are named. Of sharded tensors, ranks that hold the same shard are
    compared.

    Raises:
        RankError: a rank is gone or does not answer.
    """
    names = list(tensors)
    mine = torch.stack([checksum(_local(tensor)) for tensor in tensors.values()]).cpu()
    place = hashlib.sha256(str([_place(tensor) for tensor in tensors.values()]).encode()).digest()
    rows = _gather(torch.stack([_number(place), checksum(mine)]), ranks)
    if not any(_odd_ones(rows)):
        return {}
    everything = _gather(torch.cat([_number(place)[None], mine]), ranks)
    return {
        name: odd
        for column, name in enumerate(names, 1)
        if (odd := _odd_ones([[row[0], row[column]] for row in everything]))
    }


def checksum(tensor: Tensor) -> Tensor:
    """A number of 64 bits, int64 `[]` on the tensor's device, that changes with every element.

    Of each portion the sum of its elements' bits times odd numbers of their places, and of the portions a
    polynomial, all modulo 2**64: exact, so that the order of a sum does not matter, and one changed element
    always changes it.
    """
    bits = tensor.detach().flatten()
    bits = bits.to(torch.uint8) if bits.dtype is torch.bool else bits.view(_INTEGERS[bits.element_size()])
    size = _PORTION if tensor.device.type == "cpu" else _PORTION_ON_GPU
    place = torch.arange(min(size, len(bits)), device=tensor.device).mul_(_SPREAD)
    weights = (place >> 29).bitwise_xor_(place).bitwise_or_(1)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for portion in bits.split(size):
        total.mul_(_SPREAD).add_(portion.long().mul_(weights[: len(portion)]).sum())
    return total


def _gather(numbers: Tensor, ranks: Ranks) -> list[list[int]]:
    return ranks.collect(numbers).view(ranks.size, -1).tolist()


def _odd_ones(rows: Sequence[Sequence[int]]) -> list[int]:
    """Ranks whose (place, checksum) is not that of most ranks with the same place; all where none is most."""
    odd: list[int] = []
    for place in dict.fromkeys(row[0] for row in rows):
        those = [rank for rank, row in enumerate(rows) if row[0] == place]
        counts = Counter(rows[rank][1] for rank in those).most_common()
        tied = len(counts) > 1 and counts[0][1] == counts[1][1]
        odd += [rank for rank in those if tied or rows[rank][1] != counts[0][0]]
    return sorted(odd)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _place(tensor: Tensor) -> list[int]:
    """Which shard of a tensor this rank has; nothing of one that is whole."""
    if not isinstance(tensor, DTensor):
        return []
    coordinate = tuple(tensor.device_mesh.get_coordinate() or ())
    return [at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_shard()]


def _number(digest: bytes) -> Tensor:
    return torch.tensor(int.from_bytes(digest[:8], "little", signed=True))
