"""Blocks: attention against its definition, the noise embedding, identity at the start, resampling."""

import math

import pytest
import torch

from models.blocks import Downsample, ResidualBlock, SpatialTransformer, attention, noise_embedding


def softmax_average(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Attention written out for one query at a time, in float64."""
    batch, heads, length, width = query.shape
    out = torch.zeros(batch, heads, length, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                keep = torch.ones(key.shape[2], dtype=torch.bool)
                if mask is not None:
                    keep = mask.expand(batch, heads, length, -1)[b, h, i]
                scores = key[b, h][keep].double() @ query[b, h, i].double() / math.sqrt(width)
                out[b, h, i] = torch.softmax(scores, 0) @ value[b, h][keep].double()
    return out


@pytest.mark.parametrize("kind", ["none", "padding", "causal"])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_is_its_definition(rng: torch.Generator, kind: str, grad: bool) -> None:
    query = torch.randn(2, 3, 6, 8, generator=rng)
    keys = 6 if kind == "causal" else 4
    key, value = (torch.randn(2, 3, keys, 8, generator=rng) for _ in range(2))
    mask = None
    if kind == "padding":
        mask = (torch.arange(4) < torch.tensor([[1], [3]]))[:, None, None, :]
    elif kind == "causal":
        mask = torch.ones(6, 6, dtype=torch.bool).tril()
    with torch.set_grad_enabled(grad):
        result = attention(query, key, value, mask)
    torch.testing.assert_close(
        result.double(), softmax_average(query, key, value, mask), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("masked", [True, False])
def test_attention_in_bfloat16_stays_near_float32(rng: torch.Generator, masked: bool) -> None:
    query, key, value = (torch.randn(2, 2, 16, 32, generator=rng) for _ in range(3))
    mask = (torch.arange(16) < torch.tensor([[5], [16]]))[:, None, None, :] if masked else None
    exact = attention(query, key, value, mask)
    for grad in (True, False):  # two ways of computing it on a CPU
        with torch.set_grad_enabled(grad):
            rough = attention(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask)
        assert rough.dtype == torch.bfloat16
        torch.testing.assert_close(rough.float(), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_gradients_under_a_mask_are_finite(rng: torch.Generator, dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 2, 4, 8, generator=rng).to(dtype).requires_grad_() for _ in range(3))
    mask = (torch.arange(4) < torch.tensor([[1], [2]]))[:, None, None, :]
    attention(query, key, value, mask).square().sum().backward()
    assert value.grad is not None
    assert torch.isfinite(value.grad).all()
    assert value.grad[0, :, 1:].abs().sum() == 0
    assert value.grad[0, :, 0].abs().sum() > 0
    assert query.grad is not None
    assert torch.isfinite(query.grad).all()


@pytest.mark.parametrize("masked", [True, False])
def test_written_out_attention_has_the_gradients_of_its_definition(
    rng: torch.Generator, masked: bool
) -> None:
    inputs = [
        torch.randn(2, 2, length, 4, generator=rng, dtype=torch.float64, requires_grad=True)
        for length in (5, 3, 3)
    ]
    mask = (torch.arange(3) < torch.tensor([[1], [3]]))[:, None, None, :] if masked else None
    assert torch.autograd.gradcheck(lambda *given: attention(*given, mask), inputs)
    with pytest.raises(RuntimeError, match="first derivatives"):
        torch.autograd.grad(attention(*inputs, mask).sum(), inputs, create_graph=True)


def test_written_out_attention_keeps_its_inputs_alone(rng: torch.Generator) -> None:
    query, key, value = (
        torch.randn(1, 2, 64, 8, generator=rng).bfloat16().requires_grad_() for _ in range(3)
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda t: t):
        attention(query, key, value, None)
    assert sorted(kept) == sorted(each.data_ptr() for each in (query, key, value))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own use of it
def test_forward_derivatives_of_attention_are_there(rng: torch.Generator) -> None:
    query, key, value = (torch.randn(1, 1, 3, 4, generator=rng, dtype=torch.float64) for _ in range(3))
    _, slope = torch.func.jvp(lambda q: attention(q, key, value, None), (query,), (torch.ones_like(query),))
    step = 1e-6
    moved = attention(query + step, key, value, None) - attention(query - step, key, value, None)
    torch.testing.assert_close(slope, moved / (2 * step), rtol=1e-5, atol=1e-7)


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
