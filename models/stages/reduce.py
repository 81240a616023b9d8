"""From the gradients of micro-batches to that of the global batch.

`FastReduction` adds up as it comes: micro-batches into the same gradient one after another, and ranks in the
order of the strategy's exchange. The sum is right to float tolerance; its last bits depend on how the batch
was divided. `TreeReduction` always adds the same numbers in the same order: a fixed micro-batch is a leaf of
one binary tree, of which every rank computes a branch. Where ranks meet, each gathers its part of all their
sums, adds these in the tree's order, and gives its part to all: each of R ranks sends 2 (R - 1) / R times the
size of the gradient, as in a ring. A run then has the same weights to the last bit on 1, 2, 4, ... ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from data.batch import Batch
from models.stages.compute import Reduce
from models.stages.division import Division
from models.stages.ranks import Ranks
from models.stages.stage import Stage
from models.stages.strategies import without_exchange

#: Of which a mean is taken.
N = TypeVar("N", float, Tensor)

#: Numbers that the ranks exchange at once: 64 MiB of them are held twice meanwhile.
_BUCKET = 2**24


class Reduction(ABC):
    """Interface: computes the gradients of a rank's share and makes them those of the global batch."""

    @abstractmethod
    def gradients(self, stage: Stage, batch: Batch, parameters: Sequence[Tensor]) -> Tensor:
        """The mean loss of this rank's share, float64 `[]` on its device, which nobody has waited for.

        The `parameters` have the global batch's mean gradient then.

        Args:
            stage: whose loss it is.
            batch: this rank's share of the global batch.
            parameters: that are trained; gradients they have are dropped.

        Raises:
            RankError: a rank is gone or does not answer.
        """


class FastReduction(Reduction):
    """Adds up as it comes; the strategy exchanges gradients in the backward pass of the last micro-batch."""

    def __init__(self, parts: int = 1) -> None:
        self.parts = parts

    def gradients(self, stage: Stage, batch: Batch, parameters: Sequence[Tensor]) -> Tensor:
        _drop(parameters)
        parts = batch.parts(self.parts)
        losses = []
        with without_exchange(stage.trainer.strategy):
            for part in parts[:-1]:
                losses.append(_backward(stage, part, self.parts))
        losses.append(_backward(stage, parts[-1], self.parts))
        return pairwise_mean([loss.double() for loss in losses])


class TreeReduction(Reduction):
    """Adds up in the order of one binary tree, whatever the ranks.

    Args:
        parts: micro-batches of each rank, a power of two.
        ranks: that train together, a power of two.
    """

    def __init__(self, parts: int, ranks: Ranks) -> None:
        self.parts = parts
        self.ranks = ranks

    def gradients(self, stage: Stage, batch: Batch, parameters: Sequence[Tensor]) -> Tensor:
        branches: list[tuple[int, list[Tensor]]] = []  # leaves and sum of each, at most one of a size
        losses = []
        for part in batch.parts(self.parts):
            _drop(parameters)
            losses.append(_backward(stage, part, 1))
            branches.append((1, [_gradient(parameter) for parameter in parameters]))
            while len(branches) > 1 and branches[-1][0] == branches[-2][0]:
                (leaves, right), (_, left) = branches.pop(), branches.pop()
                torch._foreach_add_(left, right)
                branches.append((2 * leaves, left))
        ((leaves, total),) = branches
        if self.ranks.size > 1:
            add_across(total, self.ranks)
        torch._foreach_mul_(total, 1 / (leaves * self.ranks.size))  # a power of two: no bit is lost
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        return pairwise_mean([loss.double() for loss in losses])


def make_reduction(reduce: Reduce, division: Division, ranks: Ranks) -> Reduction:
    """The reduction that was asked for, of a global batch so divided."""
    if reduce is Reduce.tree:
        return TreeReduction(division.parts, ranks)
    return FastReduction(division.parts)


def pairwise_mean(values: Sequence[N]) -> N:
    """The mean, added up as a tree adds: neighbours first, then their sums."""
    sums = list(values)
    while len(sums) > 1:
        odd = [sums[-1]] if len(sums) % 2 else []
        sums = [left + right for left, right in zip(sums[::2], sums[1::2], strict=False)] + odd
    return sums[0] / len(values)


def add_across(tensors: Sequence[Tensor], ranks: Ranks) -> None:
    """Makes each of `tensors`, which every rank has alike, the sum over all ranks, added pair by pair.

    Raises:
        RankError: a rank is gone or does not answer.
    """
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        width = -(-len(flat) // ranks.size)
        padded = torch.nn.functional.pad(flat, (0, ranks.size * width - len(flat)))
        rows = list(ranks.swap(padded.view(ranks.size, width)))
        while len(rows) > 1:
            rows = [left.add_(right) for left, right in zip(rows[::2], rows[1::2], strict=True)]
        total = ranks.collect(rows[0])
        pieces = total[: len(flat)].split([tensor.numel() for tensor in bucket])
        for tensor, piece in zip(bucket, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in their order, as many at a time as make a bucket, or one that is larger."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _backward(stage: Stage, part: Batch, parts: int) -> Tensor:
    """The loss of a micro-batch, of which its share was added to the gradients."""
    loss = stage.mean_loss(part)
    stage.manual_backward(loss if parts == 1 else loss / parts)
    return loss.detach()


def _drop(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _gradient(parameter: Tensor) -> Tensor:
    """The gradient, zero where nothing used the parameter."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
