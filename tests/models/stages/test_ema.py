"""The running average: its halflife is one of images, and it is a network of its own."""

import pytest
import torch
from torch import nn

from models.stages.ema import Ema


def network(value: float) -> nn.ModuleDict:
    linear = nn.Linear(1, 1)
    nn.init.constant_(linear.weight, value)
    linear.register_buffer("statistic", torch.tensor(value))
    return nn.ModuleDict({"linear": linear})


def share_of_the_old(batch_size: int, images: int, seen: int = 10**6, halflife: int = 400) -> float:
    """What is left of 1 after `images` images at 0."""
    ema, trained = Ema(network(1.0), halflife), network(0.0)
    for step in range(images // batch_size):
        ema.update(trained, seen + (step + 1) * batch_size, batch_size)
    return ema.network["linear"].weight.item()


@pytest.mark.parametrize("batch_size", [1, 4, 100, 400])
def test_the_halflife_counts_images_not_steps(batch_size: int) -> None:
    assert share_of_the_old(batch_size, 400) == pytest.approx(0.5, rel=1e-4)
    assert share_of_the_old(batch_size, 1200) == pytest.approx(0.125, rel=1e-4)


def test_first_weights_fade_early() -> None:
    assert share_of_the_old(10, 1000, seen=0, halflife=10**6) < 0.01
    assert share_of_the_old(10, 1000, seen=10**6, halflife=10**6) > 0.99


def test_it_is_a_copy_in_evaluation_mode() -> None:
    trained = network(1.0)
    ema = Ema(trained, 100)
    assert not ema.network.training
    assert not any(p.requires_grad for p in ema.network.parameters())
    assert all(p.requires_grad for p in trained.parameters())
    nn.init.constant_(trained["linear"].weight, 5.0)
    assert ema.network["linear"].weight.item() == 1.0
    assert not isinstance(ema.network["linear"], torch._dynamo.OptimizedModule)


def test_buffers_are_copied() -> None:
    ema = Ema(network(1.0), 100)
    ema.update(network(3.0), 10, 10)
    assert ema.network["linear"].statistic.item() == 3.0
