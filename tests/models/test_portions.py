"""Rows come out the same, to the bit, whatever comes with them; every call has the one shape."""

import pytest
import torch
from torch import nn

from models.conditioning import Conditioning
from models.portions import POSITIONS, PortionedBackbone, Portions, rows_for


def test_every_call_has_one_shape_and_every_row_its_own_result(rng: torch.Generator) -> None:
    layer = nn.Linear(33, 17)
    seen: list[torch.Size] = []

    def call(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape)
        return layer(x) * scale

    x, scale = torch.randn(11, 33, generator=rng), torch.rand(11, 1, generator=rng)
    whole = Portions()(4, call, x, scale)
    assert seen == [torch.Size([4, 33])] * 3
    assert not whole.requires_grad
    for count in range(1, 11):
        assert torch.equal(Portions()(4, call, x[:count], scale[:count]), whole[:count])
    order = torch.randperm(11, generator=rng)
    assert torch.equal(Portions()(4, call, x[order], scale[order]), whole[order])


def test_the_number_of_threads_changes_nothing_and_stays(rng: torch.Generator) -> None:
    layer = nn.Conv2d(8, 64, 3, padding=1)
    x = torch.randn(12, 8, 32, 32, generator=rng)
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made.append(Portions()(2, layer, x))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])


def test_an_error_in_a_portion_comes_out() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        Portions()(2, fail, torch.zeros(5, 1))


def test_the_portion_depends_on_the_size_alone() -> None:
    assert [rows_for(POSITIONS, side, side) for side in (4, 16, 32, 64, 128)] == [128, 8, 2, 1, 1]


def test_a_backbone_gets_all_that_it_is_told(rng: torch.Generator) -> None:
    def told(x: torch.Tensor, c_noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        extra = torch.zeros_like(x) if conditioning.image is None else conditioning.image
        text = conditioning.tokens.sum((1, 2)) + conditioning.mask.sum(1) + conditioning.pooled.sum(1)
        return x + extra + (c_noise + text)[:, None, None, None]

    B = 5
    x, image = torch.randn(2, B, 4, 32, 32, generator=rng)
    conditioning = Conditioning(
        torch.randn(B, 3, 2, generator=rng), torch.rand(B, 3, generator=rng) > 0.5, torch.randn(B, 2)
    )
    t = torch.rand(B, generator=rng)
    for each in (conditioning, conditioning.with_image(image)):
        assert torch.equal(PortionedBackbone(told, Portions())(x, t, each), told(x, t, each))
