"""Gradients of micro-batches become those of the batch: equal to tolerance, or in one order to the bit."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from data.batch import Batch
from models.stages import reduce as module
from models.stages.compute import Reduce
from models.stages.division import Division
from models.stages.ranks import Ranks
from models.stages.reduce import (
    FastReduction,
    Reduction,
    TreeReduction,
    add_across,
    make_reduction,
    pairwise_mean,
)
from tests.models.stages.together import Threads, together

MakeBatch = Callable[..., Batch]


class Regression:
    """A stage whose loss is that of a linear regression from the pictures' pixels."""

    def __init__(self) -> None:
        rng = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3, 768, generator=rng).requires_grad_()
        self.bias = torch.zeros(3, requires_grad=True)
        self.unused = torch.zeros(2, requires_grad=True)
        self.trainer = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))
        self.sizes: list[int] = []

    def mean_loss(self, batch: Batch) -> Tensor:
        self.sizes.append(len(batch))
        return (batch.images.flatten(1) @ self.weight.T + self.bias).square().mean()

    def manual_backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self, reduction: Reduction, batch: Batch) -> tuple[float, list[Tensor]]:
        """The loss, and the gradients of weight and bias."""
        stage: Any = self
        parameters = [self.weight, self.bias, self.unused]
        loss = reduction.gradients(stage, batch, parameters)
        return loss.item(), [p.grad.clone() for p in parameters[:2] if p.grad is not None]


def exact(batch: Batch) -> tuple[float, list[Tensor]]:
    """Of the whole batch, in float64, by hand."""
    stage = Regression()
    x, weight = batch.images.flatten(1).double(), stage.weight.detach().double()
    y = x @ weight.T
    return y.square().mean().item(), [2 / y.numel() * y.T @ x, 2 / y.numel() * y.sum(0)]


@pytest.mark.parametrize("reduction", [FastReduction(), FastReduction(4), TreeReduction(4, Ranks.alone())])
def test_the_gradients_are_those_of_the_batch(reduction: Reduction, make_batch: MakeBatch) -> None:
    batch, stage = make_batch(8), Regression()
    for _ in range(2):  # and those of the step before are dropped
        loss, gradients = stage.gradients(reduction, batch)
    wanted_loss, wanted = exact(batch)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


def test_only_the_last_micro_batch_exchanges(make_batch: MakeBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, held, backward = Regression(), [], Regression.manual_backward

    class Held:
        on = False

        def __init__(self, strategy: Any) -> None:
            assert strategy is stage.trainer.strategy

        def __enter__(self) -> None:
            Held.on = True

        def __exit__(self, *_: object) -> None:
            Held.on = False

    def noting(self: Regression, loss: Tensor) -> None:
        held.append(Held.on)
        backward(self, loss)

    monkeypatch.setattr(module, "without_exchange", Held)
    monkeypatch.setattr(Regression, "manual_backward", noting)
    stage.gradients(FastReduction(4), make_batch(8))
    assert held == [True, True, True, False]
    assert stage.sizes == [2, 2, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_tree_has_the_same_bits_on_any_ranks(size: int, make_batch: MakeBatch) -> None:
    def on(ranks: Ranks, batch: Batch) -> tuple[float, list[Tensor]]:
        return Regression().gradients(TreeReduction(8 // ranks.size, ranks), batch)

    def one_of_them(ranks: Threads) -> tuple[float, list[Tensor]]:
        return on(ranks, make_batch(16 // size, ranks.rank * 16 // size))

    loss, gradients = on(Ranks.alone(), make_batch(16))
    results = together(size, one_of_them)
    assert pairwise_mean([mine for mine, _ in results]) == loss
    for _, mine in results:
        assert all(torch.equal(a, b) for a, b in zip(mine, gradients, strict=True))
    _, other = Regression().gradients(FastReduction(8), make_batch(16))
    assert not torch.equal(other[0], gradients[0])  # another order is other bits: the test can fail


def test_unused_parameters_have_no_slope(make_batch: MakeBatch) -> None:
    stage = Regression()
    stage.gradients(TreeReduction(2, Ranks.alone()), make_batch(4))
    assert stage.unused.grad is not None
    assert not stage.unused.grad.any()


@pytest.mark.parametrize("bucket", [1, 7, 2**24])
def test_sums_across_ranks_are_those_of_the_tree(bucket: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the buckets, and for counts that the ranks do not divide."""
    monkeypatch.setattr(module, "_BUCKET", bucket)
    shapes, rng = [(3,), (2, 5), (1,), (4, 2, 3)], torch.Generator().manual_seed(1)
    every = [[torch.randn(shape, generator=rng) for shape in shapes] for _ in range(4)]
    wanted = [(a + b) + (c + d) for a, b, c, d in zip(*every, strict=True)]

    def add(ranks: Threads) -> tuple[list[Tensor], int]:
        mine = [tensor.clone() for tensor in every[ranks.rank]]
        add_across(mine, ranks)
        return mine, sum(ranks.table.sent)

    results = together(4, add)
    for mine, _ in results:
        assert all(torch.equal(a, b) for a, b in zip(mine, wanted, strict=True))
    if bucket == 2**24:  # 38 numbers, padded to 40: what a ring sends, 2 (R - 1) / R of them
        assert max(sent for _, sent in results) == 4 * (2 * 3 * 40 // 4) * 4


def test_channels_last_gradients_are_added_in_their_places() -> None:
    def add(ranks: Threads) -> Tensor:
        tensor = torch.arange(24.0).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        add_across([tensor], ranks)
        return tensor

    for tensor in together(2, add):
        assert torch.equal(tensor, 2 * torch.arange(24.0).view(2, 3, 2, 2))
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_the_mean_is_added_pair_by_pair() -> None:
    assert pairwise_mean([3.5]) == 3.5
    assert pairwise_mean([1.0, 2.0, 6.0]) == 3.0
    big = 2.0**53
    assert pairwise_mean([big, 1.0, 1.0, -big]) == ((big + 1.0) + (1.0 - big)) / 4


def test_which_reduction() -> None:
    division = Division(8, 2, 4)
    assert isinstance(make_reduction(Reduce.tree, division, Ranks.alone()), TreeReduction)
    assert isinstance(make_reduction(Reduce.fast, division, Ranks.alone()), FastReduction)
