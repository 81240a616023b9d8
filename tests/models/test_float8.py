"""Products of 8 bits against the same ones written out: what is rounded, and that nothing else is lost."""

import pytest
import torch
from torch import Tensor, nn

from models.float8 import BACKWARD, FORWARD, Linear, multiply, quantize


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What 8 bits leave of `tensor`, float64."""
    scale = tensor.abs().max().double() / torch.finfo(dtype).max
    return (tensor.double() / scale).float().to(dtype).double() * scale


def made(rows: int, width: int = 32, out: int = 48) -> tuple[Linear, Tensor]:
    rng = torch.Generator().manual_seed(0)
    layer = Linear(width, out)
    layer.weight.data = torch.randn(out, width, generator=rng) / width**0.5
    layer.bias.data = torch.randn(out, generator=rng)
    return layer, torch.randn(2, rows, width, generator=rng)


@pytest.mark.parametrize("rows", [16, 7])
def test_the_product_and_its_gradients_are_those_written_out(rows: int) -> None:
    layer, x = made(rows)
    layer.float8 = True
    x.requires_grad_()
    y = layer(x)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    y.backward(gradient)
    assert y.dtype == torch.bfloat16
    small, weight = rounded(x.detach(), FORWARD).flatten(0, 1), rounded(layer.weight.detach(), FORWARD)
    up = rounded(gradient.float(), BACKWARD).flatten(0, 1)
    wanted = (small @ weight.t()).unflatten(0, (2, rows)) + layer.bias.detach()
    torch.testing.assert_close(y.double(), wanted, rtol=0.01, atol=0.02)
    assert x.grad is not None
    assert layer.weight.grad is not None
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), up @ weight, rtol=0.01, atol=0.02)
    torch.testing.assert_close(layer.weight.grad.double(), up.t() @ small, rtol=0.01, atol=0.05)
    assert layer.weight.grad.dtype == torch.float32


def test_eight_bits_differ_from_all_bits_as_they_should() -> None:
    layer, x = made(16)
    exactly = layer(x)
    layer.float8 = True
    error = ((layer(x).float() - exactly).norm() / exactly.norm()).item()
    assert 0.005 < error < 0.06  # 3 bits of mantissa: not the exact product by another way


def test_off_and_for_widths_that_do_not_divide_it_is_a_linear_layer() -> None:
    layer, x = made(5)
    plain = nn.Linear(32, 48)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), plain(x))
    odd, x = made(5, width=20)
    odd.float8 = True
    plain = nn.Linear(20, 48)
    plain.load_state_dict(odd.state_dict())
    assert torch.equal(odd(x), plain(x))


def test_a_scale_brings_the_largest_number_to_the_largest_of_its_type() -> None:
    small, scale = quantize(torch.tensor([0.0, 3.0, -7.0]), FORWARD)
    assert small.float().abs().max() == torch.finfo(FORWARD).max
    assert (small.float() * scale)[2] == pytest.approx(-7.0, rel=1e-6)
    zeros, scale = quantize(torch.zeros(16, 16), FORWARD)
    assert torch.equal(multiply(zeros, zeros, scale, scale).float(), torch.zeros(16, 16))
