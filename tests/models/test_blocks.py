"""Blocks: the noise embedding, identity at the start, resampling."""

import math

import pytest
import torch

from models.blocks import Downsample, ResidualBlock, SpatialTransformer, noise_embedding


def test_noise_embedding_is_its_formula() -> None:
    c_noise = torch.tensor([0.0, 1.0, 250.5, 999.0])
    embedding = noise_embedding(c_noise, 8)
    for b, value in enumerate(c_noise.tolist()):
        for i in range(4):
            angle = value * 10000 ** (-i / 4)
            assert embedding[b, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert embedding[b, 4 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_noise_embedding_is_float32_whatever_it_is_given() -> None:
    assert noise_embedding(torch.tensor([3]), 8).dtype == torch.float32


@pytest.mark.parametrize("scale_shift", [True, False])
def test_a_fresh_residual_block_is_the_identity(rng: torch.Generator, scale_shift: bool) -> None:
    block = ResidualBlock(8, 8, 4, 1e-5, time_width=6, scale_shift=scale_shift)
    x, time = torch.randn(2, 8, 4, 4, generator=rng), torch.randn(2, 6, generator=rng)
    assert torch.equal(block(x, time), x)


def test_scale_shift_modulates_after_the_norm(rng: torch.Generator) -> None:
    block = ResidualBlock(8, 8, 4, 1e-5, time_width=1, scale_shift=True)
    torch.nn.init.dirac_(block.conv_out.weight)
    torch.nn.init.zeros_(block.modulation.weight)
    with torch.no_grad():
        block.modulation.bias[:8] = -1.0  # scale 1 + (-1) = 0: nothing of the image is left
        block.modulation.bias[8:] = 2.0
    x = torch.randn(1, 8, 4, 4, generator=rng)
    expected = x + torch.nn.functional.silu(torch.tensor(2.0))
    torch.testing.assert_close(block(x, torch.zeros(1, 1)), expected)


def test_transformer_block_uses_positions_as_tokens(rng: torch.Generator) -> None:
    transformer = SpatialTransformer(8, 2, 6, depth=1, norm_groups=4)
    torch.nn.init.eye_(transformer.project_out.weight)
    x, context = torch.randn(1, 8, 2, 4, generator=rng), torch.randn(1, 3, 6, generator=rng)
    # Attention without positions commutes with any permutation of them.
    order = torch.randperm(8, generator=rng)
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (2, 4))
    expected = transformer(x, context, None).flatten(2)[:, :, order]
    torch.testing.assert_close(
        transformer(shuffled, context, None).flatten(2), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("asymmetric", [True, False])
def test_downsample_halves_and_pads_on_the_right_side(asymmetric: bool) -> None:
    layer = Downsample(1, asymmetric)
    torch.nn.init.zeros_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    with torch.no_grad():
        layer.conv.weight[0, 0, 1, 1] = 1.0
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    kept = x[:, :, 1::2, 1::2] if asymmetric else x[:, :, ::2, ::2]
    assert torch.equal(layer(x), kept)
